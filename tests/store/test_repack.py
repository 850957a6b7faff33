"""Repack: the same bytes in another place, whoever does what else at the same time."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, NotFoundError, UnavailableError
from envstore.store import repack as repacking
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry
from envstore.store.locations import locations_key
from envstore.store.packs import pack_key
from envstore.store.profiles import Range, new_profile, save_profile
from envstore.store.refs import RefName
from envstore.store.repack import Repacked, repack, touched_chunks
from envstore.store.source import Kind
from tests import trees
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

MIB = 1 << 20
FILES = 12


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tree of which a start reads little here and there."""
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(FILES):
        (root / f"{number:02}").write_bytes(trees.noise(number, 3 * MIB))
    (root / "twin").write_bytes(trees.noise(3, 3 * MIB))
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(3 * MIB)
        sparse.write(trees.noise("sparse", 1000))
    trees.settle(root)
    return root


def _ranges(seed: int = 0) -> list[Range]:
    rng = random.Random(seed)
    found = [Range(b"%02d" % number, rng.randrange(2 * MIB), 70_000) for number in range(FILES)]
    rng.shuffle(found)
    return [*found, Range(b"sparse", 0, 3 * MIB), Range(b"gone", 0, 5)]


def _record(store: Store, name: str = "start", seed: int = 0) -> None:
    manifest = store.snapshot().manifest
    save_profile(
        store.repository.objects, manifest, name, new_profile(_ranges(seed), []), replace=True
    )


def _repack(store: Store, name: str | None = None) -> Repacked:
    return repack(store.repository, store.repository.resolve("tree"), name)


def test_fewer_requests_for_the_same_bytes(store: Store, wide: Path, tmp_path: Path) -> None:
    store.push(wide)
    _record(store)
    before, packs = store.snapshot(), set(store.object_keys("packs/"))
    told: list[tuple[int, int]] = []
    snapshot = store.repository.resolve("tree")
    done = repack(store.repository, snapshot, progress=lambda at, total: told.append((at, total)))
    assert (done.snapshot, done.manifest) == (snapshot, before.manifest)
    assert not done.unchanged
    assert done.before.requests >= FILES // 2
    assert done.after.requests == 1
    assert done.after.bytes <= done.raw_bytes < 4 * MIB < done.before.bytes
    assert told[-1] == (done.raw_bytes, done.raw_bytes)
    assert store.snapshot() == before
    assert packs < set(store.object_keys("packs/"))
    store.assert_sound()
    store.pull(tmp_path / "out")
    assert trees.describe(tmp_path / "out") == trees.describe(wide)


def test_twice_is_once(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    _repack(store)
    keys = store.object_keys()
    again = _repack(store)
    assert again.unchanged
    assert again.stored_bytes == 0
    assert again.before == again.after
    assert store.object_keys() == keys


def test_what_lies_well_is_left_alone(store: Store, tree: Path) -> None:
    store.push(tree)
    manifest = store.snapshot().manifest
    whole = new_profile([Range(b"large", 0, 9 * MIB)], [])
    save_profile(store.repository.objects, manifest, "start", whole)
    assert _repack(store).unchanged


def test_without_a_profile_there_is_nothing_to_go_by(store: Store, tree: Path) -> None:
    store.push(tree)
    with pytest.raises(NotFoundError, match="no profile"):
        _repack(store)
    with pytest.raises(NotFoundError, match="'train'"):
        _repack(store, "train")


def test_the_order_is_that_of_the_profile(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    _repack(store)
    repository = store.repository
    manifest = store.snapshot().manifest
    root, locations = repository.located(manifest)
    chunks = touched_chunks(repository.entries(manifest), _ranges())
    places = [
        (locations.frames[locations.ref_frames[chunk.ref]].offset, locations.ref_offsets[chunk.ref])
        for chunk in chunks
    ]
    assert places == sorted(places)
    assert len({locations.frames[locations.ref_frames[chunk.ref]].pack for chunk in chunks}) == 1
    # Equal content has one place, or it would be fetched twice.
    number = 0
    moved: dict[bytes, set[tuple[int, int]]] = {}
    for entry in repository.entries(manifest):
        for name, _ in entry.refs:
            if name != HOLE:
                place = locations.ref_frames[number], locations.ref_offsets[number]
                moved.setdefault(name, set()).add(place)
            number += 1
    assert {len(moved[chunk.name]) for chunk in chunks} == {1}
    assert sum(part.refs for part in root.parts) == number


def test_other_snapshots_stay_as_they_are(store: Store, wide: Path, tmp_path: Path) -> None:
    store.push(wide, "first")
    (wide / "more").write_bytes(trees.noise("more", 50_000))
    trees.settle(wide)
    store.push(wide)
    _record(store)
    before = store.repository.objects.get(locations_key(store.snapshot("first").manifest))
    _repack(store)
    assert store.repository.objects.get(locations_key(store.snapshot("first").manifest)) == before
    (wide / "still more").write_bytes(trees.noise("still", 50_000))
    pushed = store.push(wide)
    assert pushed.new_chunk_bytes == 50_000
    store.assert_sound()
    assert _repack(store).unchanged


def test_a_damaged_chunk_is_not_moved(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    before = store.repository.objects.get(locations_key(store.snapshot().manifest))
    fault = store.faults.corrupt("get_range", key="packs/", skip=1)
    with pytest.raises(CorruptError):
        _repack(store)
    fault.remove()
    assert store.repository.objects.get(locations_key(store.snapshot().manifest)) == before
    store.assert_sound()


@pytest.mark.parametrize(
    ("operation", "key"), [("put", "packs/"), ("put", "index/"), ("put_if", "locations/")]
)
@pytest.mark.parametrize("after", [False, True])
def test_a_repack_that_dies_changes_nothing_that_matters(
    store: Store, wide: Path, operation: str, key: str, after: bool
) -> None:
    store.push(wide)
    _record(store)
    fault = store.faults.fail(operation, UnavailableError("gone"), key=key, times=1, after=after)
    if key == "locations/" and after:
        assert _repack(store).after.requests == 1  # it had landed
    else:
        with pytest.raises(UnavailableError):
            _repack(store)
    fault.remove()
    store.assert_sound()
    assert _repack(store).after.requests == 1
    store.assert_sound()


def test_order_of_writes(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    store.faults.clear()
    done = len(store.faults.calls)
    _repack(store)
    writes = [
        call.key.partition("/")[0]
        for call in store.faults.calls[done:]
        if call.operation in ("put", "put_if")
    ]
    # The new packs are declared before the locations lead to them.
    assert writes == ["sessions", "packs", "index", "sessions", "locations"]


def test_two_repacks_and_a_push_at_once_lose_nothing(store: Store, wide: Path) -> None:
    store.push(wide)
    for seed, name in enumerate(("train", "serve")):
        _record(store, name, seed)
    gate = store.faults.gate("put_if", key="locations/", times=2)
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            _repack(store, name)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("train", "serve")]
    for thread in threads:
        thread.start()
    gate.wait_entered(2)
    # The same tree once more under another name, which writes the same manifest's locations.
    store.forget()
    store.push(wide, "other")
    gate.open()
    for thread in threads:
        thread.join()
    assert failed == []
    for name in ("train", "serve"):
        assert _repack(store, name).after.requests <= 3
    assert store.snapshot("other").manifest == store.snapshot().manifest
    store.assert_sound()


def test_memory_is_bounded_by_batches(
    store: Store, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.push(wide)
    _record(store)
    monkeypatch.setattr(repacking, "BATCH", 3 * MIB)
    asked: list[int] = []
    load = store.repository.load_frames

    def watched(frames: list[repacking.FrameRef]) -> dict[bytes, bytes]:
        asked.append(sum(frame.raw for frame in frames))
        return load(frames)

    monkeypatch.setattr(store.repository, "load_frames", watched)
    assert _repack(store).after.requests == 1
    assert len(asked) > 3
    monkeypatch.undo()
    store.assert_sound()


def test_locations_that_lie(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    manifest = store.snapshot().manifest
    _, locations = store.repository.located(manifest)
    locations.ref_offsets[:] = type(locations.ref_offsets)("I", [1] * len(locations.ref_offsets))
    store.repository.objects.put(locations_key(manifest), locations.seal())
    with pytest.raises(CorruptError, match="not where"):
        _repack(store)


def test_a_pack_that_is_gone(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    _, locations = store.repository.located(store.snapshot().manifest)
    chunks = touched_chunks(store.repository.entries(store.snapshot().manifest), _ranges())
    frame = locations.frames[locations.ref_frames[chunks[0].ref]]
    store.path(pack_key(frame.pack)).rename(store.root / "aside")
    with pytest.raises(NotFoundError):
        _repack(store)
    (store.root / "aside").rename(store.path(pack_key(frame.pack)))
    store.assert_sound()


def test_an_inherited_profile_will_do(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    (wide / "more").write_bytes(trees.noise("more", 50_000))
    store.push(wide)
    done = _repack(store)
    assert done.profile == "start"
    assert done.after.requests == 1
    store.assert_sound()


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=4),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 30)), max_size=8),
)
def test_touched_chunks(files: list[list[int]], reads: list[tuple[int, int, int]]) -> None:
    entries, number = [], 0
    where: dict[bytes, tuple[int, int, int]] = {}
    for which, sizes in enumerate(files):
        refs, at = [], 0
        for size in sizes:
            name = digest(b"%d" % (number % 9))
            refs.append((name, size))
            for turn, (file, offset, length) in enumerate(reads):
                if file == which and offset < at + size and at < offset + length:
                    where[name] = min((turn, number, size), where.get(name, (turn, number, size)))
            at += size
            number += 1
        entries.append(Entry(b"%d" % which, Kind.FILE, size=at, refs=tuple(refs)))
    ranges = [Range(b"%d" % file, offset, length) for file, offset, length in reads]
    kept: list[Range] = []
    for item in ranges:  # as in a profile, none of a file overlap
        if all(
            item.path != other.path
            or item.offset >= other.offset + other.length
            or other.offset >= item.offset + item.length
            for other in kept
        ):
            kept.append(item)
    if kept != ranges:
        return
    found = touched_chunks(entries, ranges)
    assert [(chunk.name, chunk.ref) for chunk in found] == [
        (name, ref) for (_, ref, _), name in sorted((place, name) for name, place in where.items())
    ]


def test_the_ref_names_what_it_named(store: Store, wide: Path) -> None:
    store.push(wide)
    _record(store)
    before = store.repository.objects.get(RefName.parse("tree").key)
    _repack(store)
    assert store.repository.objects.get(RefName.parse("tree").key) == before
