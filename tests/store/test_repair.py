from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.store import frames, packs
from envstore.store.checking import Reading, check_store
from envstore.store.damage import damaged_packs
from envstore.store.locations import locations_key
from envstore.store.repair import Repaired, advice, repair
from envstore.store.sessions import Session
from tests.stores import Store
from tests.trees import describe, noise, plain

pytestmark = pytest.mark.usefixtures("_no_fsync")

_DATA = Reading(read_data=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A tree in several packs, and a node cache that is empty."""
    monkeypatch.setattr(frames, "TARGET_SIZE", 50_000)
    monkeypatch.setattr(packs, "TARGET_SIZE", 150_000)
    plain(tmp_path / "tree", 1, files=5)
    for number in range(4):
        (tmp_path / "tree" / f"large {number}").write_bytes(noise(str(number), 120_000))
    with Store(tmp_path / "store", cache=True) as opened:
        opened.push(tmp_path / "tree")
        yield opened


def _all_of(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _pack_of(store: Store, path: bytes) -> Path:
    """Return the pack in which a file begins."""
    manifest = store.snapshot().manifest
    _, locations = store.repository.located(manifest)
    number = 0
    for entry in store.repository.entries(manifest):
        if entry.path == path:
            return store.path(packs.pack_key(locations.frames[locations.ref_frames[number]].pack))
        number += len(entry.refs)
    raise AssertionError(path)


def _scramble(path: Path) -> bytes:
    """Damage every frame of a pack, and nothing else; returns its name."""
    data = path.read_bytes()
    pack = packs.parse_pack(data, bytes.fromhex(path.name))
    changed = bytearray(data)
    for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
        changed[offset + frame.stored // 2] ^= 1
    path.write_bytes(changed)
    return pack.digest


def _repair(store: Store, **options: bool) -> Repaired:
    return repair(store.repository, reading=_DATA, **options)


def _pulled(store: Store, tmp_path: Path) -> bool:
    store.pull(tmp_path / "copy")
    return describe(tmp_path / "copy", times=False) == describe(tmp_path / "tree", times=False)


def test_of_a_sound_store_nothing_is_changed(store: Store) -> None:
    before = _all_of(store.root / "objects")
    done = _repair(store)
    assert (done.done, done.ok) == ([], True)
    assert _all_of(store.root / "objects") == before


def test_trying_it_changes_nothing_and_says_the_same(store: Store, tmp_path: Path) -> None:
    _scramble(_pack_of(store, b"large 1"))
    for key in store.object_keys("index/"):
        store.path(key).unlink()
    store.path(locations_key(store.snapshot().manifest)).write_bytes(b"")
    before = _all_of(store.root / "objects")
    would = _repair(store, dry_run=True)
    assert _all_of(store.root / "objects") == before
    done = _repair(store)
    assert done.done == would.done
    assert done.after.problems == would.after.problems
    assert [problem.lost for problem in done.before.problems]


def test_what_cannot_be_healed_is_named_with_its_files(store: Store) -> None:
    pack = _scramble(_pack_of(store, b"large 1"))
    done = _repair(store)
    assert not done.ok
    assert damaged_packs(store.repository.objects) == {pack}
    lost = {file.path for problem in done.after.problems for file in problem.files}
    assert b"large 1" in lost
    assert lost < {entry.path for entry in store.repository.entries(store.snapshot().manifest)}
    for problem in done.after.problems:
        assert problem.object == f"pack {pack.hex()}"
        assert problem.harms == ("tree:latest",)
        assert "push" in advice(problem)
    # Once more, nothing is stored again and again.
    before = store.object_keys()
    assert _repair(store).done == []
    assert store.object_keys() == before


def test_other_copies_in_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _pack_of(store, b"large 1")
    # Somebody has stored the same, in other packs, without having looked at what was there.
    monkeypatch.setattr(frames, "TARGET_SIZE", 400_000)
    with Store(tmp_path / "other") as other:
        other.push(tmp_path / "tree", "tree")
        for prefix in ("packs/", "index/"):
            for key in other.object_keys(prefix):
                store.repository.objects.put(key, other.path(key).read_bytes())
    pack = _scramble(path)
    done = _repair(store)
    assert done.after.problems == []
    assert done.after.quarantined == {pack}
    assert _pulled(store, tmp_path)


def test_frames_that_this_machine_has_cached(store: Store, tmp_path: Path) -> None:
    store.pull(tmp_path / "first")
    for key in store.object_keys("packs/"):
        _scramble(store.path(key))
    done = _repair(store)
    assert done.after.problems == []
    assert store.cache is not None
    store.cache.clear()
    assert _pulled(store, tmp_path)


def test_a_cache_that_lies_heals_nothing(store: Store, tmp_path: Path) -> None:
    store.pull(tmp_path / "first")
    assert store.cache is not None
    for blob in (store.root / "cache").rglob("*"):
        if blob.is_file() and len(blob.name) == 64:
            blob.write_bytes(bytes(len(blob.read_bytes())))
    _scramble(_pack_of(store, b"large 1"))
    assert not _repair(store).ok


def test_the_good_frames_of_a_damaged_pack_are_kept(store: Store, tmp_path: Path) -> None:
    for key in store.object_keys("packs/"):
        path = store.path(key)
        # Without its table it is no pack, but every frame in it can be read.
        path.write_bytes(path.read_bytes()[:-20])
    assert not check_store(store.repository).ok
    for key in store.object_keys("index/"):
        store.path(key).unlink()
    assert _pulled(store, tmp_path)
    done = _repair(store)
    assert done.after.problems == []
    for pack in done.after.quarantined:
        store.path(packs.pack_key(pack)).unlink()
    assert store.cache is not None
    store.cache.clear()
    store.pull(tmp_path / "again")
    assert check_store(store.repository, reading=_DATA).ok


def test_a_snapshot_that_is_cached(store: Store, tmp_path: Path) -> None:
    name = store.repository.resolve("tree")
    store.repository.snapshot(name)
    store.path(f"snapshots/{name.hex()}").unlink()
    done = _repair(store)
    assert done.done == [f"stored snapshot {name.hex()} again, from the cache"]
    assert done.ok
    assert _pulled(store, tmp_path)


def test_other_writers_are_at_work_meanwhile(store: Store, tmp_path: Path) -> None:
    _scramble(_pack_of(store, b"large 1"))
    with Session.begin(store.repository, "another") as session:
        _repair(store)
        session.check()
    assert store.object_keys("sessions/") == []
