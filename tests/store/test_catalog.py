"""What a store holds, as people ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import ConflictError, NotFoundError, UnavailableError
from envstore.store import catalog
from envstore.store.entries import Entry, sort_key
from envstore.store.objects.base import ObjectStore
from envstore.store.refs import RefName, read_ref
from envstore.store.source import Kind
from tests.faulty import FaultyStore
from tests.stores import Store


def _push(store: Store, tree: Path, name: str) -> bytes:
    tree.mkdir(exist_ok=True)
    (tree / "file").write_text(name)
    return store.push(tree, name).snapshot


@contextmanager
def _faulty_store(tmp_path: Path) -> Iterator[tuple[Store, FaultyStore]]:
    made: list[FaultyStore] = []

    def wrap(objects: ObjectStore) -> FaultyStore:
        made.append(FaultyStore(objects))
        return made[0]

    with Store(tmp_path / "store", wrap=wrap) as store:
        yield store, made[0]


def test_refs_come_in_order_and_with_what_they_lead_to(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        names = ["b", "a:2", "a", "team/c"]
        pushed = {str(RefName.parse(name)): _push(store, tmp_path / "t", name) for name in names}
        found = catalog.describe_refs(store.repository)
        assert [str(item.name) for item in found] == [
            "a:2",
            "a:latest",
            "b:latest",
            "team/c:latest",
        ]
        for item in found:
            assert item.ref is not None
            assert item.snapshot is not None
            assert item.error is None
            assert item.ref.snapshot == pushed[str(item.name)]
            assert item.snapshot.files == 1
        (only,) = catalog.describe_refs(store.repository, "team/")
        assert only.name == RefName("team", "c", "latest")


def test_a_ref_removed_meanwhile_is_not_listed(tmp_path: Path) -> None:
    with _faulty_store(tmp_path) as (store, faulty):
        for name in ("a", "b"):
            _push(store, tmp_path / "t", name)
        faulty.drop("get_versioned", key="refs/default/a/latest")
        assert [item.name.name for item in catalog.describe_refs(store.repository)] == ["b"]
        refs, _ = catalog.read_refs(store.repository)
        targets = catalog.all_targets(store.repository, refs)
        # What no ref names is looked at all the same, under its digest.
        assert targets[0][0] == "b:latest"
        assert [name[0] for name, _ in targets[1:]] == ["@"]


def test_damage_is_told_of_in_its_own_row(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        lost = _push(store, tmp_path / "t", "lost")
        for name in ("bad", "good"):
            _push(store, tmp_path / "t", name)
        store.path("refs/default/bad/latest").write_text("[]")
        store.path(f"snapshots/{lost.hex()}").unlink()
        rows = {item.name.name: item for item in catalog.describe_refs(store.repository)}
        assert rows["good"].error is None
        assert (rows["bad"].ref, rows["bad"].snapshot) == (None, None)
        assert rows["bad"].error is not None
        assert rows["lost"].ref is not None
        assert rows["lost"].snapshot is None
        assert lost.hex() in str(rows["lost"].error)
        refs, broken = catalog.read_refs(store.repository)
        targets = catalog.all_targets(store.repository, refs)
        assert [name for name, _ in targets][:2] == ["good:latest", "lost:latest"]
        assert [problem.object for problem in broken] == ["refs/default/bad/latest"]


def test_an_unreachable_store_is_not_a_damaged_ref(tmp_path: Path) -> None:
    with _faulty_store(tmp_path) as (store, faulty):
        _push(store, tmp_path / "t", "a")
        faulty.fail("get_versioned", UnavailableError("away"))
        with pytest.raises(UnavailableError):
            catalog.describe_refs(store.repository)


def test_tagging_loses_no_race(tmp_path: Path) -> None:
    with _faulty_store(tmp_path) as (store, faulty):
        one, two, three = (_push(store, tmp_path / "t", name) for name in ("one", "two", "three"))
        target = RefName.parse("target")
        catalog.tag(store.repository, "one", target)
        done = catalog.tag(store.repository, "two", target, force=True)
        assert (done.before, done.snapshot) == (one, two)
        gate = faulty.gate("put_if", key=target.key, times=1)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(catalog.tag, store.repository, "one", target, force=True)
            gate.wait_entered()
            catalog.tag(store.repository, "three", target, force=True)
            gate.open()
            with pytest.raises(ConflictError):
                slow.result()
        assert read_ref(store.repository.objects, target).snapshot == three


def test_only_a_snapshot_that_is_there_can_be_tagged(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        _push(store, tmp_path / "t", "a")
        with pytest.raises(NotFoundError):
            catalog.tag(store.repository, f"@{'0' * 64}", RefName.parse("b"))
        assert [item.name.name for item in catalog.describe_refs(store.repository)] == ["a"]


_NAMES = st.sampled_from([b"a", b"a-", b"ab", b"b", b"\xff", b"a\x01"])


@given(st.sets(st.lists(_NAMES, min_size=1, max_size=4).map(tuple), max_size=30), st.data())
def test_entries_at(paths: set[tuple[bytes, ...]], data: st.DataObject) -> None:
    """Compared with the definition, for every path of a tree and some that are not in it."""
    whole = {path[:depth] for path in paths for depth in range(1, len(path) + 1)}
    directories = {path[:-1] for path in whole}
    entries = sorted(
        (
            Entry(b"/".join(path), Kind.DIRECTORY if path in directories else Kind.FILE)
            for path in whole
        ),
        key=lambda entry: sort_key(entry.path),
    )
    path = data.draw(st.sampled_from([(), *sorted(whole)]) | st.lists(_NAMES).map(tuple))
    for recursive in (False, True):
        text = b"/".join(path)
        if path and path not in whole:
            with pytest.raises(NotFoundError):
                list(catalog.entries_at(entries, text, recursive=recursive))
            continue
        found = [e.path for e in catalog.entries_at(entries, text, recursive=recursive)]
        if path and path not in directories:
            assert found == [text]
            continue
        below = [p for p in whole if p[: len(path)] == path and len(p) > len(path)]
        wanted = [p for p in below if recursive or len(p) == len(path) + 1]
        assert found == sorted((b"/".join(p) for p in wanted), key=sort_key)
