"""Packs that are live in part: what is live moves, every byte stays, whoever dies in between."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError, NoSpaceError, UnavailableError
from envstore.store.chunking import Chunk
from envstore.store.describing import store_manifest
from envstore.store.digest import digest
from envstore.store.entries import Entry
from envstore.store.frames import Codec
from envstore.store.gc import moving
from envstore.store.gc.columns import open_columns
from envstore.store.gc.moves import KEY, Move, encode_moves, open_moves
from envstore.store.gc.relinking import by_place, move_columns
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.locations import FrameRef, Locations, locations_key, open_locations
from envstore.store.packing import PackWriter
from envstore.store.packs import pack_key
from envstore.store.refs import RefName, move_ref
from envstore.store.session_records import TTL
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind
from tests import trees
from tests.damage import assert_noticed
from tests.store.gc.collecting import DAY, gc, keys, remove, size
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

MIB = 1 << 20
UNIT = 300_000


@pytest.fixture
def thinned(store: Store, tmp_path: Path) -> Path:
    """A tree of which an earlier version, pushed as ``old``, had three times as much."""
    root = tmp_path / "tree"
    trees.plain(root, "tree", files=30)
    (root / "noise").write_bytes(trees.noise("noise", 3 * UNIT))
    (root / "prose").write_bytes(trees.prose("prose", 3 * UNIT))
    trees.settle(root)
    store.push(root, "old")
    for number, path in enumerate(sorted(root.rglob("file *"))):
        if number % 3:
            path.unlink()
    (root / "noise").write_bytes(trees.noise("noise", 3 * UNIT)[: UNIT + 7])
    (root / "prose").write_bytes(trees.prose("prose", 3 * UNIT)[2 * UNIT :])
    trees.settle(root)
    store.push(root, "new")
    return root


def _same(store: Store, root: Path, where: Path, ref: str = "new") -> None:
    store.assert_sound()
    shutil.rmtree(where, ignore_errors=True)
    store.pull(where, ref)
    assert trees.describe(where) == trees.describe(root)


def test_the_store_takes_what_is_live_and_little_more(
    store: Store, thinned: Path, tmp_path: Path
) -> None:
    before = store.snapshot("new"), store.repository.resolve("new")
    remove(store, "old")
    done = gc(store)
    assert done.repacked_packs == 1
    assert done.kept == {}
    assert (store.snapshot("new"), store.repository.resolve("new")) == before
    with Store(tmp_path / "fresh") as fresh:
        fresh.push(thinned)
        assert size(store) <= 1.05 * size(fresh)
    _same(store, thinned, tmp_path / "out")
    again = keys(store)
    assert gc(store).repacked_packs == 0
    assert keys(store) == again


def test_an_old_pack_stays_for_the_grace_period(
    store: Store, thinned: Path, tmp_path: Path
) -> None:
    (old,) = keys(store, "packs/") - _packs_of_new_only(store)
    remove(store, "old")
    done = gc(store, DAY)
    assert done.repacked_packs == 1
    assert old in keys(store)
    assert done.kept["grace"] >= store.repository.objects.size(old)  # type: ignore[operator]
    _same(store, thinned, tmp_path / "out")
    assert gc(store, DAY).repacked_packs == 0
    store.faults.skew = 2 * DAY
    gc(store, DAY)
    assert old not in keys(store)
    _same(store, thinned, tmp_path / "out")


def _packs_of_new_only(store: Store) -> set[str]:
    found = []
    for ref in ("old", "new"):
        _, locations = store.repository.located(store.snapshot(ref).manifest)
        found.append({pack_key(frame.pack) for frame in locations.frames})
    return found[1] - found[0]


def test_little_that_is_dead_is_left_where_it_is(
    store: Store, thinned: Path, tmp_path: Path
) -> None:
    remove(store, "old")
    done = gc(store, max_unused=10.0)
    assert done.repacked_packs == 0
    assert done.kept["parts"] > UNIT
    assert done.live_bytes + done.kept_bytes == done.store_bytes
    _same(store, thinned, tmp_path / "out")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("put", "packs/"),
        ("put", "index/"),
        ("put", KEY),
        ("put_if", "locations/"),
        ("delete", KEY),
        ("put_if", "sessions/"),
    ],
)
def test_interrupted_anywhere_it_goes_on(
    store: Store, thinned: Path, tmp_path: Path, operation: str, key: str, after: bool
) -> None:
    # A third tree, so that there are locations to be changed before and after.
    (thinned / "more").write_text("more")
    trees.settle(thinned)
    store.push(thinned, "third")
    remove(store, "old")
    fault = store.faults.fail(operation, KeyboardInterrupt(), key=key, after=after, times=1)
    with pytest.raises(KeyboardInterrupt):
        gc(store)
    fault.remove()
    # This process lives on, and so would what it had no time to end.
    store.faults.skew = TTL + 120
    store.assert_sound()
    done = gc(store)
    assert not keys(store, KEY)
    with Store(tmp_path / "fresh") as fresh:
        fresh.push(thinned)
        assert size(store) - 20_000 <= 1.05 * size(fresh)
    _same(store, thinned, tmp_path / "out", "third")
    assert done.kept == {}


def test_a_push_in_between_keeps_what_it_needs(store: Store, thinned: Path, tmp_path: Path) -> None:
    """Locations that are stored after the mark name chunks that were dead then."""
    back = tmp_path / "back"
    back.mkdir()
    (back / "noise").write_bytes(trees.noise("noise", 3 * UNIT))
    trees.settle(back)
    remove(store, "old")
    gate = store.faults.gate("put", key="packs/", times=1)
    join = _in_thread(lambda: gc(store, DAY))
    try:
        gate.wait_entered()
        store.push(back, "back")
    finally:
        gate.open()
        join()
    _same(store, thinned, tmp_path / "out")
    _same(store, back, tmp_path / "out", "back")
    gc(store)
    gc(store)
    _same(store, thinned, tmp_path / "out")
    _same(store, back, tmp_path / "out", "back")


def _in_thread(work: Callable[[], object]) -> Callable[[], None]:
    pool = ThreadPoolExecutor(1)
    task = pool.submit(work)

    def join() -> None:
        pool.shutdown()
        task.result()

    return join


def test_a_damaged_pack_is_left_alone_and_told(store: Store, thinned: Path, tmp_path: Path) -> None:
    (old,) = keys(store, "packs/") - _packs_of_new_only(store)
    remove(store, "old")
    fault = store.faults.corrupt("get_range", key=old, at=100)
    done = gc(store)
    assert done.damaged
    assert old in done.damaged[0]
    assert done.repacked_packs == 0
    assert done.kept["parts"] > UNIT
    fault.remove()
    _same(store, thinned, tmp_path / "out")
    assert gc(store).repacked_packs == 1
    _same(store, thinned, tmp_path / "out")


def test_the_order_stays(store: Store, thinned: Path) -> None:
    manifest = store.snapshot("new").manifest
    before = _order(store, manifest)
    remove(store, "old")
    gc(store)
    after = _order(store, manifest)
    assert len(after) > 10
    assert after == [ref for ref in before if ref in set(after)]


def _order(store: Store, manifest: bytes) -> list[int]:
    """Return the references that lie in the pack that has most of them, in its order."""
    _, locations = store.repository.located(manifest)
    refs = [
        (locations.frames[frame].pack, locations.frames[frame].offset, offset, ref)
        for ref, (frame, offset) in enumerate(
            zip(locations.ref_frames, locations.ref_offsets, strict=True)
        )
    ]
    packs = [pack for pack, *_ in refs]
    most = max(set(packs), key=packs.count)
    return [ref for pack, _, _, ref in sorted(refs) if pack == most]


class Checkpoints:
    """Snapshots of one file of several tensors, written straight into packs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.content: dict[str, list[bytes]] = {}

    def save(
        self,
        name: str,
        tensors: list[bytes],
        codec: Codec,
        like: list[bytes] | None = None,
    ) -> None:
        """Store ``tensors`` as one file each; with ``Codec.XOR`` as differences to ``like``."""
        repository = self.store.repository
        index = DedupIndex()
        known = KnownChunks(repository, index)
        known.learn_snapshots(
            [repository.resolve(other) for other in self.content if other != name]
        )
        writer = PackWriter(repository.objects, index, codec=codec)
        entries = []
        try:
            for number, data in enumerate(tensors):
                chunk = Chunk(digest(data), data)
                if index.find(chunk.digest) is None:
                    base = digest(like[number]) if like is not None else None
                    writer.add(chunk.digest, data, like=base)
                refs = ((chunk.digest, len(data)),)
                entries.append(
                    Entry(b"%03d" % number, Kind.FILE, False, len(data), chunk.digest, refs)
                )
            root = store_manifest(repository, entries, known, writer)
        finally:
            writer.close()
        made = Snapshot("checkpoint", root.digest, root.files, root.logical, "2026-01-01T00:00:00Z")
        objects = repository.objects
        move_ref(objects, RefName.parse(name), save_snapshot(objects, made), None)
        self.content[name] = tensors

    def check(self, name: str, where: Path) -> None:
        """See that every byte is there still."""
        shutil.rmtree(where, ignore_errors=True)
        self.store.pull(where, name)
        found = [path.read_bytes() for path in sorted(where.iterdir())]
        assert found == self.content[name]


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.SPLIT, Codec.ZSTD])
def test_a_frame_that_is_cut_keeps_its_kind(store: Store, tmp_path: Path, codec: Codec) -> None:
    rng = random.Random(1)
    small = [rng.randbytes(300) + bytes(rng.randrange(9000)) for _ in range(400)]
    saved = Checkpoints(store)
    saved.save("old", small, codec)
    saved.save("new", small[::3], codec)
    before = _codecs(store, "new")
    remove(store, "old")
    done = gc(store)
    assert done.repacked_packs == 1
    assert _codecs(store, "new") <= before
    assert codec in _codecs(store, "new")
    store.assert_sound()
    saved.check("new", tmp_path / "out")


def _codecs(store: Store, ref: str) -> set[int]:
    _, locations = store.repository.located(store.snapshot(ref).manifest)
    return {frame.codec for frame in locations.frames}


def test_differences_and_their_anchors_stay_readable(store: Store, tmp_path: Path) -> None:
    tensors = [trees.noise(f"tensor {n}", MIB + 4096) for n in range(6)]
    later = []
    for number, tensor in enumerate(tensors):
        changed = bytearray(tensor)
        changed[:2000] = trees.noise(f"later {number}", 2000)
        later.append(bytes(changed))
    fresh = [trees.noise(f"fresh {n}", MIB) for n in range(4)]
    saved = Checkpoints(store)
    saved.save("first", [*tensors, *fresh], Codec.SPLIT)
    saved.save("second", later, Codec.XOR, tensors)
    assert Codec.XOR in _codecs(store, "second")
    saved.save("third", later[:1], Codec.XOR)
    anchors = {
        pack_key(frame.anchor.pack)
        for frame in store.repository.located(store.snapshot("second").manifest)[1].frames
        if frame.anchor is not None
    }
    remove(store, "first")
    done = gc(store)
    assert anchors <= keys(store, "packs/")
    assert done.kept["anchors"] > 3 * MIB
    store.assert_sound()
    saved.check("second", tmp_path / "out")
    # Now most of the differences go; the one that stays moves, and still finds its anchor.
    remove(store, "second")
    done = gc(store)
    assert done.repacked_packs == 1
    assert anchors <= keys(store, "packs/")
    store.assert_sound()
    saved.check("third", tmp_path / "out")
    remove(store, "third")
    gc(store)
    assert keys(store) == set()


def test_in_small_batches(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "BATCH", 300_000)
    saved = Checkpoints(store)
    for number in range(6):
        small = [trees.noise(f"{number} {n}", 30_000) for n in range(20)]
        saved.save(f"old{number}", small, Codec.RAW)
        saved.save(f"new{number}", small[::2], Codec.RAW)
    remove(store, *(f"old{number}" for number in range(6)))
    done = gc(store)
    assert done.repacked_packs == 6
    assert done.kept == {}
    store.assert_sound()
    for number in range(6):
        saved.check(f"new{number}", tmp_path / "out")


# The pieces.


def _frame(pack: int, offset: int, name: str = "", raw: int = 1000, codec: int = 1) -> FrameRef:
    return FrameRef(digest(b"%d" % pack), offset, 500, raw, codec, digest(name.encode()))


def _locations() -> Locations:
    found = Locations()
    found.frames = [
        _frame(1, 8, "a"),
        _frame(1, 508, "b"),
        _frame(2, 8, "x", codec=3),
        _frame(3, 8, "anchor"),
    ]
    found.part_frames.append(0)
    found.part_offsets.append(0)
    found.ref_frames.extend([1, 0xFFFFFFFF, 1, 2, 0])
    found.ref_offsets.extend([100, 0, 300, 0, 7])
    return found


def test_columns_are_the_locations(store: Store) -> None:
    manifest = digest(b"m")
    sealed = _locations().seal()
    columns = open_columns(sealed, manifest)
    assert columns.seal() == sealed
    pairs = [pair for block in columns.blocks() for pair in zip(*block, strict=True)]
    assert pairs == [(0, 0), (1, 100), (1, 300), (2, 0), (0, 7)]
    assert columns.anchors() == [3]


def test_damaged_columns_are_noticed() -> None:
    sealed = _locations().seal()
    assert_noticed(lambda data: open_columns(data, bytes(32)).seal(), sealed)


@pytest.mark.parametrize("wrong", ["pack", "part", "ref", "anchor", "raw"])
def test_columns_are_as_strict_as_locations(wrong: str) -> None:
    found = _locations()
    if wrong == "pack":
        found.frames[0] = _frame(1, 8, raw=(8 << 20) + 1)
    elif wrong == "part":
        found.part_frames[0] = 4
    elif wrong == "ref":
        found.ref_frames[0] = 4
    elif wrong == "anchor":
        del found.frames[3]
    else:
        found.frames[3] = _frame(3, 8, "anchor", raw=999)
    sealed = found.seal()
    for read in (
        lambda: open_columns(sealed, bytes(32)),
        lambda: open_locations(sealed, bytes(32), parts=1, refs=5),
    ):
        with pytest.raises(CorruptError):
            read()


def test_moves_are_applied_once_and_only_where_all_is_taken_over() -> None:
    whole = Move(_frame(1, 8, "a"), _frame(9, 77, "a"))
    cut = Move(_frame(1, 508, "b"), _frame(9, 577, "c", raw=400), {100: 0, 300: 200})
    for places, moved in (({100: 0, 300: 200}, True), ({100: 0}, False)):
        move = Move(cut.old, cut.new, places)
        moves = by_place(open_moves(encode_moves([whole, move])))
        columns = open_columns(_locations().seal(), bytes(32))
        assert move_columns(columns, moves)
        after = open_locations(columns.seal(), bytes(32), parts=1, refs=5)
        assert after.frames[0] == whole.new
        assert after.frames[1] == (cut.new if moved else cut.old)
        offsets = [0, 0, 200, 0, 7] if moved else [100, 0, 300, 0, 7]
        assert list(after.ref_offsets) == offsets
        assert after.frames[2].anchor == after.frames[3]
        assert not move_columns(columns, moves)


def test_a_frame_that_is_not_as_it_was_is_not_moved() -> None:
    move = Move(_frame(1, 8, "other"), _frame(9, 77, "other"))
    columns = open_columns(_locations().seal(), bytes(32))
    assert not move_columns(columns, by_place([move]))


def test_damaged_moves_are_noticed() -> None:
    moves = [
        Move(_frame(1, 8, "a"), _frame(9, 77, "a")),
        Move(_frame(1, 508, "b"), _frame(9, 577, "c", raw=400), {100: 0, 300: 200}),
    ]
    assert open_moves(encode_moves(moves)) == moves
    assert_noticed(open_moves, encode_moves(moves))


def test_moves_to_what_is_gone_are_forgotten(store: Store, thinned: Path) -> None:
    manifest = store.snapshot("new").manifest
    _, locations = store.repository.located(manifest)
    frame = locations.frames[0]
    new = FrameRef(digest(b"gone"), 8, frame.stored, frame.raw, frame.codec, frame.digest)
    objects = store.repository.objects
    before = objects.get(locations_key(manifest))
    for data in (encode_moves([Move(frame, new)]), b"rubbish"):
        objects.put(KEY, data)
        gc(store)
        assert not keys(store, KEY)
        assert objects.get(locations_key(manifest)) == before


def test_the_store_may_fail_while_it_moves(store: Store, thinned: Path, tmp_path: Path) -> None:
    remove(store, "old")
    fault = store.faults.fail("put_if", UnavailableError("away"), key="locations/", times=9)
    with pytest.raises(EnvstoreError):
        gc(store)
    fault.remove()
    gc(store)
    _same(store, thinned, tmp_path / "out")


@pytest.mark.parametrize("where", [("put", "packs/"), ("put", KEY), ("put_if", "locations/")])
def test_a_full_store_frees_what_is_dead_as_a_whole(
    store: Store, thinned: Path, tmp_path: Path, where: tuple[str, str]
) -> None:
    whole = tmp_path / "whole"
    trees.plain(whole, "whole", files=5)
    store.push(whole, "whole")
    remove(store, "old", "whole")
    operation, key = where
    for grace in (DAY, 0):
        fault = store.faults.fail(operation, NoSpaceError("the disk is full"), key=key)
        done = gc(store, grace=grace)
        assert done.no_space == "the disk is full"
        assert done.repacked_packs == 0
        assert done.condemned_objects if grace else done.freed_packs
        fault.remove()
        _same(store, thinned, tmp_path / "out")
    done = gc(store)
    # Moved now, or led by now to where the full store had moved it.
    assert (done.no_space, done.kept) == ("", {})
    assert done.freed_packs
    _same(store, thinned, tmp_path / "out")
