"""Composing: the later package wins a path, and no bytecode outlives its source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import UsageError
from envstore.resolver.compose import Clobber, Composition, compose
from envstore.store.digest import digest
from envstore.store.manifest import Entry, build_parts, sort_key
from envstore.store.source import Kind


def _file(path: str, content: str, *, executable: bool = False) -> Entry:
    data = content.encode()
    name = digest(data)
    return Entry(path.encode(), Kind.FILE, executable, len(data), name, ((name, len(data)),))


def _directory(path: str) -> Entry:
    return Entry(path.encode(), Kind.DIRECTORY)


def _compose(*packages: list[Entry]) -> Composition:
    return compose(packages, [f"package-{number}" for number in range(len(packages))])


def _contents(composed: Composition) -> dict[str, bytes]:
    return {entry.path.decode(): entry.digest for entry in composed.sorted() if entry.size}


def test_the_later_package_wins_and_both_are_named() -> None:
    composed = _compose(
        [_file("a", "1"), _file("b", "same")], [_file("a", "2"), _file("b", "same")]
    )
    assert _contents(composed) == {"a": digest(b"2"), "b": digest(b"same")}
    assert composed.clobbers == [Clobber(b"a", 1, 0)]


def test_another_mode_or_relocation_is_another_file() -> None:
    composed = _compose([_file("a", "1")], [_file("a", "1", executable=True)])
    assert composed.entries[b"a"].executable
    assert len(composed.clobbers) == 1


def test_directories_are_shared_and_missing_ones_made() -> None:
    composed = _compose([_directory("lib"), _file("lib/a", "1")], [_file("lib/deep/er/b", "2")])
    paths = [entry.path for entry in composed.sorted()]
    assert paths == [b"lib", b"lib/a", b"lib/deep", b"lib/deep/er", b"lib/deep/er/b"]
    assert composed.clobbers == []


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.SYMLINK])
@pytest.mark.parametrize("turned", [False, True])
def test_a_file_where_another_has_a_directory_is_refused(kind: Kind, turned: bool) -> None:
    other = Entry(b"lib", kind, target=b"elsewhere" if kind is Kind.SYMLINK else b"")
    packages = [[_directory("lib"), _file("lib/a", "1")], [other]]
    with pytest.raises(UsageError, match="lib is a directory in only one of package-0 and"):
        _compose(*(reversed(packages) if turned else packages))


def test_bytecode_of_a_source_that_was_replaced_is_left_out() -> None:
    cached = "lib/__pycache__/a.cpython-311.pyc"
    first = [_file("lib/a.py", "old"), _file(cached, "old code")]
    assert cached not in _contents(_compose(first, [_file("lib/a.py", "new")]))
    both = _compose(first, [_file("lib/a.py", "new"), _file(cached, "new code")])
    assert _contents(both)[cached] == digest(b"new code")
    optimised = "lib/__pycache__/a.cpython-311.opt-1.pyc"
    assert optimised not in _contents(
        _compose([_file("lib/a.py", "old"), _file(optimised, "x")], [_file("lib/a.py", "new")])
    )


names = st.sampled_from(
    ["a", "b", "c/d", "c/e", "c/f/g", "h/__pycache__/i.cpython-311.pyc", "h/i.py"]
)


@given(st.lists(st.dictionaries(names, st.sampled_from("xyz"), max_size=5), max_size=5))
def test_a_composition_is_a_tree_that_a_manifest_can_hold(packages: list[dict[str, str]]) -> None:
    composed = _compose(*([_file(path, text) for path, text in one.items()] for one in packages))
    entries = composed.sorted()
    assert entries == sorted(entries, key=lambda entry: sort_key(entry.path))
    list(build_parts(entries))
    directories = {b""} | {entry.path for entry in entries if entry.kind is Kind.DIRECTORY}
    assert all(entry.path.rpartition(b"/")[0] in directories for entry in entries)
    for path, owner in composed.owners.items():
        if owner >= 0:
            assert composed.entries[path].digest == digest(packages[owner][path.decode()].encode())
            assert all(path.decode() not in later for later in packages[owner + 1 :])
