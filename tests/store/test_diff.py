from __future__ import annotations

from dataclasses import replace
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from envstore.store.diff import diff
from envstore.store.digest import digest
from envstore.store.entries import Entry, composed_entry, sort_key
from envstore.store.source import Kind

_A, _B = digest(b"a"), digest(b"b")


def _file(path: bytes, content: bytes = b"", **more: object) -> Entry:
    name = digest(content)
    refs = ((name, len(content)),) if content else ()
    return Entry(path, Kind.FILE, False, len(content), name, refs, **more)  # type: ignore[arg-type]


_paths = st.sampled_from([b"a", b"a/b", b"a/c", b"a.b", b"a-", b"b", b"c/d", b"c", b"\xff", b"z"])
_entries = st.one_of(
    st.builds(_file, _paths, st.sampled_from([b"", b"x", b"yy"])),
    st.builds(lambda path: Entry(path, Kind.DIRECTORY), _paths),
    st.builds(lambda path, to: Entry(path, Kind.SYMLINK, target=to), _paths, st.binary(min_size=1)),
)
_trees = st.lists(_entries, unique_by=lambda entry: entry.path).map(
    lambda entries: sorted(entries, key=lambda entry: sort_key(entry.path))
)


@given(_trees, _trees)
def test_changes_lead_from_the_old_to_the_new(old: list[Entry], new: list[Entry]) -> None:
    tree = {entry.path: entry for entry in old}
    changes = list(diff(old, new))
    for change in changes:
        assert change.old == tree.get(change.path)
        assert change.old != change.new
        if change.new is None:
            del tree[change.path]
        else:
            tree[change.path] = change.new
        kinds = {(True, False): "added", (False, True): "removed", (False, False): "changed"}
        assert change.status == kinds[change.old is None, change.new is None]
    assert tree == {entry.path: entry for entry in new}
    keys = [sort_key(change.path) for change in changes]
    assert keys == sorted(set(keys))
    assert sum(change.bytes for change in changes) == sum(e.size for e in new) - sum(
        e.size for e in old
    )


@given(_trees, _trees)
def test_backwards_is_the_opposite(old: list[Entry], new: list[Entry]) -> None:
    forth, back = list(diff(old, new)), list(diff(new, old))
    assert [(c.path, c.old, c.new, c.bytes) for c in forth] == [
        (c.path, c.new, c.old, -c.bytes) for c in back
    ]


@given(_trees)
def test_a_tree_does_not_differ_from_itself(tree: list[Entry]) -> None:
    assert list(diff(tree, tree)) == []


def test_what_counts_as_a_change() -> None:
    base = _file(b"f", b"x", mode=0o644, mtime_ns=1)
    for other in (
        replace(base, executable=True),
        replace(base, mode=0o600),
        _file(b"f", b"y", mode=0o644, mtime_ns=1),
        Entry(b"f", Kind.DIRECTORY, mode=0o644, mtime_ns=1),
        Entry(b"f", Kind.SYMLINK, target=b"x", mode=0o644, mtime_ns=1),
    ):
        (change,) = diff([base], [other])
        assert (change.status, change.old, change.new) == ("changed", base, other)
    (change,) = diff(
        [Entry(b"l", Kind.SYMLINK, target=b"x")], [Entry(b"l", Kind.SYMLINK, target=b"y")]
    )
    assert change.bytes == 0
    assert list(diff([base], [replace(base, mtime_ns=2)])) == []


def test_a_composed_file_is_compared_by_what_it_is_made_of() -> None:
    refs = [(_A, 5), (_B, 6)]
    composed = composed_entry(b"f", refs)
    plain = Entry(b"f", Kind.FILE, False, 11, digest(b"all of it"), tuple(refs))
    assert list(diff([composed], [plain])) == []
    assert list(diff([plain], [composed])) == []
    for other in (composed_entry(b"f", refs[::-1]), replace(plain, refs=tuple(refs[::-1]))):
        (change,) = diff([composed], [other])
        assert change.status == "changed"


def test_nothing_is_read_ahead_of_need() -> None:
    def endless() -> object:
        number = 0
        while True:
            yield _file(b"%09d" % number)
            number += 1

    changes = diff(endless(), [])  # type: ignore[arg-type]
    assert len(list(islice(changes, 10))) == 10
