"""A store that fails, or is damaged, and a machine that forgets."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NoSpaceError,
    UnavailableError,
)
from envstore.store import known, packing, packs
from envstore.store.frames import encode_frame
from envstore.store.index import DedupIndex
from envstore.store.packing import PackWriter
from tests import trees
from tests.sources import ListedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("put", "packs/"), ("put", "index/"), ("put_if", "locations/"), ("put", "manifests/"),
        ("put", "snapshots/"), ("put_if", "refs/"), ("get_versioned", "refs/"), ("list", "index/"),
        ("get", "snapshots/"), ("get", "index/"), ("put_if", "sessions/"),
        ("get_versioned", "gc/state"), ("delete", "sessions/"),
    ],
)  # fmt: skip
def test_a_failure_anywhere_leaves_the_ref_and_the_next_push_goes_on(
    store: Store,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    key: str,
    skip: int,
    after: bool,
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 2 << 20)
    monkeypatch.setattr(packing, "SEGMENT_PACKS", 2)
    old = store.push(ListedSource({b"old": b"content"}))
    error = UnavailableError("the wire was cut")
    fault = store.faults.fail(operation, error, key=key, times=1, skip=skip, after=after)
    try:
        store.push(tree)
    except UnavailableError:
        assert store.repository.resolve("tree") == old.snapshot
    else:
        # Not met so often, a ref that was written although the answer was lost, or tried again.
        tried_again = key in ("locations/", "sessions/", "gc/state")
        assert not fault.hits or (operation == "put_if" and after) or tried_again
    assert threading.active_count() == 1
    fault.remove()
    assert store.verify().ok
    # Listed by a segment, or at least in a note of this machine.
    found = len(store.object_keys("index/")) - 1 + len(list(store.state.glob("*")))
    result = store.push(tree)
    assert (result.new_chunk_bytes < result.logical_bytes) == bool(found)
    store.assert_sound()
    assert store.snapshot().manifest == result.manifest


@pytest.mark.parametrize("error", [NoSpaceError("disk full"), AccessDeniedError("no")])
def test_errors_of_uploads_reach_the_caller(store: Store, tree: Path, error: EnvstoreError) -> None:
    store.faults.fail("put", error, key="packs/")
    with pytest.raises(type(error), match=error.message):
        store.push(tree)
    assert threading.active_count() == 1


def test_what_leads_to_something_is_written_after_it(
    store: Store, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 2 << 20)
    monkeypatch.setattr(packing, "SEGMENT_PACKS", 2)
    # However many uploads end at once, no segment lists more than three packs.
    monkeypatch.setattr(packing, "UPLOADS", 2)
    store.faults.clear()
    store.push(tree)
    written = [
        (call.key.partition("/")[0], call.key)
        for call in store.faults.calls
        if call.operation in ("put", "put_if")
    ]
    kinds = [kind for kind, _ in written]
    assert kinds[0] == "sessions"
    assert kinds[-5:] == ["locations", "manifests", "snapshots", "sessions", "refs"]
    assert set(kinds[1:-5]) == {"packs", "index"}
    assert kinds.count("packs") > 3
    assert kinds.count("index") >= 2
    assert kinds[-6] == "index"
    seen: set[str] = set()
    for kind, key in written:
        if kind == "index":
            listed = store.repository.segment(bytes.fromhex(key.partition("/")[2]))
            assert {packs.pack_key(pack.digest) for pack in listed} <= seen
        seen.add(key)


def test_the_ref_that_moved_meanwhile_is_a_conflict(store: Store, tree: Path) -> None:
    gate = store.faults.gate("put_if", key="refs/", times=1)
    caught: list[BaseException] = []

    def lose() -> None:
        try:
            store.push(ListedSource({b"loser": trees.noise(1, 100_000)}))
        except ConflictError as error:
            caught.append(error)

    # SQLite objects stay in the thread that made them.
    with Store(store.root) as winner:
        thread = threading.Thread(target=store.in_this_thread, args=(lose,))
        thread.start()
        gate.wait_entered()
        result = winner.push(ListedSource({b"winner": b"1"}))
        gate.open()
        thread.join()
    assert len(caught) == 1
    assert store.repository.resolve("tree") == result.snapshot
    # What the loser had stored is reused when he tries again.
    again = store.push(ListedSource({b"loser": trees.noise(1, 100_000)}))
    assert again.new_chunk_bytes == 0
    assert store.snapshot().parents == (result.snapshot,)


@pytest.mark.parametrize("damage", ["missing", "altered"])
@pytest.mark.parametrize("kind", ["snapshots", "manifests", "locations", "index", "packs"])
def test_a_damaged_ancestor_is_replaced_by_a_sound_snapshot(
    store: Store, tmp_path: Path, kind: str, damage: str
) -> None:
    files = {b"lib/" + trees.noise(i, 5).hex().encode(): b"%d" % i for i in range(1500)}
    files[b"noise"] = trees.noise("noise", 1 << 20)
    store.push(ListedSource(files))
    root, locations = store.repository.located(store.snapshot().manifest)
    assert len(root.parts) > 1
    part = locations.frames[locations.part_frames[0]]
    for key in store.object_keys(f"{kind}/"):
        path = store.path(key)
        if damage == "missing":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[part.offset + 50 if kind == "packs" else len(data) // 2] ^= 0xFF
            path.write_bytes(data)
    store.forget()
    files[b"zzz"] = b"new"
    result = store.push(ListedSource(files))
    if (kind, damage) != ("index", "missing"):
        assert any("damaged" in warning for warning in result.warnings)
    # Only packs need to be stored again: all else is found some other way.
    assert (result.new_chunk_bytes > 1 << 20) == (kind == "packs")
    assert store.verify(whole=False).problems == []
    store.pull(tmp_path / "copy")
    for path, data in files.items():
        assert (tmp_path / "copy" / path.decode()).read_bytes() == data


def test_packs_that_vanished_are_stored_again(store: Store, tree: Path, tmp_path: Path) -> None:
    store.push(tree, "one")
    for key in store.object_keys("packs/"):
        store.path(key).unlink()
    # The index promises every chunk of it, and so does the stat cache.
    result = store.push(tree, "two")
    assert any("missing or cut short" in warning for warning in result.warnings)
    assert result.new_chunk_bytes == result.logical_bytes
    store.pull(tmp_path / "copy", "two")
    assert trees.describe(tmp_path / "copy") == trees.describe(tree)
    assert store.verify(whole=False).problems == []


def test_what_cannot_be_remembered_is_a_warning(
    store: Store, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise NoSpaceError("the stat cache is full")

    monkeypatch.setattr(store.stat_cache, "save", full)
    result = store.push(tree)
    assert result.warnings == ("the stat cache is full",)
    assert store.repository.resolve("tree") == result.snapshot
    monkeypatch.undo()
    assert store.push(tree).unchanged


def test_packs_of_an_interrupted_push_are_adopted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 1 << 20)
    data = trees.noise(1, 6 << 20)
    store.faults.fail("put", UnavailableError("cut"), key="packs/", skip=3)
    with pytest.raises(UnavailableError):
        store.push(ListedSource({b"file": data}))
    arrived = len(store.object_keys("packs/"))
    assert arrived == 3
    assert store.object_keys("index/") == []
    store.faults.clear()
    result = store.push(ListedSource({b"file": data}))
    assert result.new_chunk_bytes <= len(data) - arrived * (900 << 10)
    assert os.listdir(store.state) == []
    store.assert_sound()
    # Listed now, so that other machines find them too.
    store.forget()
    assert store.push(ListedSource({b"file": data}), "other").new_chunk_bytes == 0


def test_two_pushes_may_note_the_same_pack(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PackWriter(store.repository.objects, DedupIndex(), pending=store.state)
    builder = packs.PackBuilder()
    builder.add(*encode_frame([(b"n" * 32, b"data")]))
    finished = builder.finish()
    assert finished is not None
    replace = Path.replace

    def overtaken(self: Path, target: Path) -> Path:
        # Between the two steps of one push the other does both of its own.
        monkeypatch.setattr(Path, "replace", replace)
        writer._remember(store.state, finished[0])
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    writer._remember(store.state, finished[0])
    assert os.listdir(store.state) == [finished[0].digest.hex()]
    writer.close()


def test_notes_of_packs_that_are_gone_are_forgotten(store: Store) -> None:
    writer = PackWriter(store.repository.objects, DedupIndex(), pending=store.state)
    writer.add(b"n" * 32, trees.noise(1, 100_000))
    writer.end_frame()
    while writer._encoding:
        writer._collect()
    writer._end_pack()
    while writer._uploading:
        writer._reap(block=True)
    writer.close()
    (note,) = os.listdir(store.state)
    (store.state / ("0" * 64)).write_bytes(b"half a note")
    assert len(known.find_orphans(store.repository, store.state)) == 1
    assert os.listdir(store.state) == [note]
    (key,) = store.object_keys("packs/")
    os.truncate(store.path(key), 1000)
    assert known.find_orphans(store.repository, store.state) == []
    assert os.listdir(store.state) == []
