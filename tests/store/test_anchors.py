"""Frames stored as differences: written, found again, read, verified, not relied on blindly."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError, NotFoundError
from envstore.fuse.content import load_content
from envstore.store.anchors import (
    anchor_of,
    decode,
    encode_difference,
    may_be_anchor,
)
from envstore.store.codecs import xor
from envstore.store.describing import store_manifest
from envstore.store.digest import digest
from envstore.store.entries import Entry
from envstore.store.frames import MAX_SIZE, Codec, decode_frame, encode_frame
from envstore.store.index import DedupIndex, LocationsBuilder
from envstore.store.known import KnownChunks
from envstore.store.locations import FrameRef, Locations, open_locations
from envstore.store.packing import PackWriter
from envstore.store.packs import pack_key
from envstore.store.refs import RefName, move_ref
from envstore.store.repack import _moved
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind
from envstore.store.usage import measure
from tests.damage import assert_noticed
from tests.store.independent_reader import Tree
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.usefixtures("_no_fsync")

MIB = 1 << 20


def later(data: bytes, step: int) -> bytes:
    """Return numbers a training step later: the low bytes of each four have changed."""
    changed = bytearray(data)
    low = noise(f"step {step}", len(data) // 4)
    changed[0 : len(low) * 4 : 4] = low
    return bytes(changed)


def _ref(data: bytes, codec: Codec = Codec.RAW, pack: bytes = b"p" * 32) -> FrameRef:
    return FrameRef(pack, 8, len(data), len(data), codec, digest(data))


def _made(data: bytes, base: bytes) -> tuple[FrameRef, bytes]:
    found = encode_difference(digest(data), memoryview(data), _ref(base), base)
    assert found is not None
    frame, stored = found
    assert (frame.codec, frame.stored, frame.raw) == (Codec.XOR, len(stored), len(data))
    return FrameRef(b"q" * 32, 8, frame.stored, frame.raw, frame.codec, frame.digest), stored


@given(st.integers(0, 99), st.integers(1, 200_000), st.integers(0, 400))
@settings(max_examples=30)
def test_a_difference_comes_back(seed: int, size: int, changed: int) -> None:
    base = noise(seed, size)
    data = bytearray(base)
    data[: min(changed, size)] = noise("other", min(changed, size))
    found = encode_difference(digest(data), memoryview(data), _ref(base), base)
    if found is None:
        assert changed * 4 > size or size < 1000
        return
    frame, stored = found
    ref = FrameRef(b"q" * 32, 8, frame.stored, frame.raw, frame.codec, frame.digest)
    assert anchor_of(ref, stored) == _ref(base)
    assert decode(ref, stored, lambda _: base) == data


@given(st.binary(max_size=40_000), st.integers(0, 9))
def test_xor_is_its_own_inverse(one: bytes, seed: int) -> None:
    other = noise(seed, len(one))
    both = xor(one, other)
    assert both == bytes(a ^ b for a, b in zip(one, other, strict=True))
    assert xor(both, other) == one
    with pytest.raises(ValueError, match="no difference"):
        xor(one, other + b"x")


def test_what_is_not_alike_is_not_stored_as_a_difference() -> None:
    base, data = noise(1, 100_000), noise(2, 100_000)
    assert encode_difference(digest(data), data, _ref(base), base) is None


def test_a_difference_shrinks_what_changed_little() -> None:
    base = noise(1, 400_000)
    ref, _ = _made(later(base, 1), base)
    assert ref.stored < 0.27 * ref.raw


def test_damaged_differences_are_refused() -> None:
    base = noise(1, 4000)
    ref, stored = _made(later(base, 1), base)

    def load(anchor: FrameRef) -> bytes:
        if anchor != _ref(base):
            raise CorruptError("there is no such frame")
        return base

    assert_noticed(lambda damaged: decode(ref, damaged, load), stored, most=500)
    with pytest.raises(CorruptError, match="does not match its digest"):
        decode(ref, stored, lambda _: noise(2, 4000))


@pytest.mark.parametrize(
    "change",
    [{"codec": Codec.XOR}, {"codec": 4}, {"raw": 3999}, {"raw": 4001}, {"stored": MAX_SIZE + 1}],
)
def test_anchors_that_cannot_be_ones_are_refused_before_they_are_fetched(
    change: dict[str, int],
) -> None:
    base = noise(1, 4000)
    ref, stored = _made(later(base, 1), base)
    wrong = replace(_ref(base), **change)
    place = struct.pack(
        "<32sIIIB32s", wrong.pack, wrong.offset, wrong.stored, wrong.raw, wrong.codec, wrong.digest
    )

    def load(_: FrameRef) -> bytes:
        raise AssertionError("it was fetched")

    with pytest.raises(CorruptError, match="cannot be one"):
        decode(ref, place + stored[77:], load)
    with pytest.raises(CorruptError, match="too short"):
        decode(ref, stored[:76], load)
    with pytest.raises(CorruptError, match="more than"):
        decode(replace(ref, raw=MAX_SIZE + 1), stored, load)


# In a store.


class Steps:
    """Snapshots of one file of 1 MiB pieces at several steps of a training, in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.snapshots: list[bytes] = []

    def save(
        self, pieces: Sequence[bytes], codec: Codec = Codec.XOR, like: Sequence[bytes] = ()
    ) -> bytes:
        repository = self.store.repository
        known = KnownChunks(repository, DedupIndex())
        known.learn_snapshots(self.snapshots)
        known.learn_segments()
        writer = PackWriter(
            repository.objects, known.index, codec=codec, fetcher=repository.fetcher
        )
        refs = tuple((digest(piece), len(piece)) for piece in pieces)
        self.written = 0
        try:
            for number, piece in enumerate(pieces):
                if known.index.find(refs[number][0]) is None:
                    other = digest(like[number]) if like else None
                    writer.add(refs[number][0], memoryview(piece), like=other)
            assert known.forget_lost(name for name, _ in refs)
            content = b"".join(pieces)
            entry = Entry(b"f", Kind.FILE, size=len(content), digest=digest(content), refs=refs)
            root = store_manifest(repository, [entry], known, writer)
            self.written = writer.stored_bytes
        finally:
            writer.close()
        self.index = known.index
        when = "2026-01-02T03:04:05+00:00"
        made = Snapshot("checkpoint", root.digest, root.files, root.logical, when, ())
        self.snapshots.append(save_snapshot(repository.objects, made))
        name = RefName.parse(f"step:{len(self.snapshots)}")
        move_ref(repository.objects, name, self.snapshots[-1], None)
        return root.digest

    def locations(self, manifest: bytes) -> Locations:
        return self.store.repository.located(manifest)[1]


@pytest.fixture
def steps(store: Store) -> Steps:
    return Steps(store)


FIRST = [noise(f"piece {number}", MIB) for number in range(3)]
SECOND = [later(piece, 1) for piece in FIRST]
THIRD = [SECOND[0], later(FIRST[1], 2), later(FIRST[2], 2)]


def test_later_steps_are_differences_to_the_first(steps: Steps, tmp_path: Path) -> None:
    steps.save(FIRST)
    assert Codec.XOR not in {frame.codec for frame in steps.index.frames}
    second = steps.save(SECOND, like=FIRST)
    assert steps.written < 0.3 * 3 * MIB
    third = steps.save(THIRD, like=SECOND)
    # One piece was there; of the others, the anchors of what they are like became theirs.
    assert steps.written < 0.3 * 2 * MIB
    for manifest in (second, third):
        frames = steps.locations(manifest).frames
        differences = [n for n, frame in enumerate(frames) if frame.codec == Codec.XOR]
        assert len(differences) == 3
        anchors = [frames[number].anchor for number in differences]
        assert anchors == [frames[number + 1] for number in differences]
        assert [anchor.digest for anchor in anchors if anchor] == list(map(digest, FIRST))
    steps.store.assert_sound()
    for number, pieces in enumerate((FIRST, SECOND, THIRD), 1):
        steps.store.pull(tmp_path / str(number), f"step:{number}")
        assert (tmp_path / str(number) / "f").read_bytes() == b"".join(pieces)
        tree = Tree(steps.store.root / "objects", f"refs/default/step/{number}")
        assert bytes(tree.items[b"f"].content) == b"".join(pieces)


def test_a_mount_reads_differences(steps: Steps) -> None:
    steps.save(FIRST)
    steps.save(SECOND, like=FIRST)
    repository = steps.store.repository
    content = load_content(repository, steps.snapshots[-1])
    found = b"".join(
        repository.fetcher.load(content.locations.frames[number])
        for number in content.locations.ref_frames
    )
    assert found == b"".join(SECOND)


def test_an_anchor_is_not_taken_for_another_length_or_nothing(steps: Steps) -> None:
    steps.save(FIRST)
    steps.save([later(FIRST[0], 1)[:-4], noise("new", MIB)], like=[FIRST[0], b"unknown"])
    assert Codec.XOR not in {frame.codec for frame in steps.index.frames}
    steps.store.assert_sound()


def test_segments_do_not_lead_to_differences(steps: Steps) -> None:
    # They do not name the anchors, and so nothing else would keep these.
    steps.save(FIRST)
    steps.save(SECOND, like=FIRST)
    known = KnownChunks(steps.store.repository, DedupIndex())
    known.learn_segments()
    assert known.index.find(digest(FIRST[0])) is not None
    assert known.index.find(digest(SECOND[0])) is None
    known.learn_snapshots(steps.snapshots)
    assert known.index.find(digest(SECOND[0])) is not None


def test_what_lost_its_anchor_is_stored_again(steps: Steps) -> None:
    steps.save(FIRST)
    steps.save(SECOND, like=FIRST)
    (anchor,) = {frame.anchor.pack for frame in steps.index.frames if frame.anchor}
    steps.store.repository.objects.delete(pack_key(anchor))
    report = steps.store.verify(read_data=False, whole=False)
    harmed = {name for problem in report.problems for name in problem.harms}
    assert harmed == {"step:1", "step:2"}
    known = KnownChunks(steps.store.repository, DedupIndex())
    known.learn_snapshots(steps.snapshots[1:])
    names = [digest(piece) for piece in SECOND]
    assert not known.forget_lost(names)
    assert [known.index.find(name) for name in names] == [None] * 3


def test_a_lost_anchor_is_not_built_on(steps: Steps) -> None:
    steps.save(FIRST)
    index = steps.index
    repository = steps.store.repository
    packs_of_first = {frame.pack for frame in index.frames if frame.pack}
    for name in packs_of_first:
        repository.objects.delete(pack_key(name))
    writer = PackWriter(repository.objects, index, codec=Codec.XOR)
    try:
        writer.add(digest(SECOND[0]), SECOND[0], like=digest(FIRST[0]))
        writer.flush()
    finally:
        writer.close()
    place = index.find(digest(SECOND[0]))
    assert place is not None
    assert index.frames[place[0]].codec != Codec.XOR
    with pytest.raises(NotFoundError):
        repository.fetcher.load(index.frames[0])


def test_locations_without_the_anchor_are_refused(steps: Steps) -> None:
    steps.save(FIRST)
    manifest = steps.save(SECOND, like=FIRST)
    root, locations = steps.store.repository.located(manifest)
    refs = sum(part.refs for part in root.parts)
    at = next(n for n, frame in enumerate(locations.frames) if frame.codec == Codec.XOR)
    for broken in (
        [
            replace(frame, raw=5) if n == at + 1 else frame
            for n, frame in enumerate(locations.frames)
        ],
        [*locations.frames, locations.frames[at]],
    ):
        data = replace(locations, frames=broken).seal()
        with pytest.raises(CorruptError, match="without its anchor"):
            open_locations(data, manifest, parts=len(root.parts), refs=refs)


def test_another_anchor_than_the_locations_say_is_damage(steps: Steps) -> None:
    steps.save(FIRST)
    manifest = steps.save(SECOND, like=FIRST)
    locations = steps.locations(manifest)
    at = [n for n, frame in enumerate(locations.frames) if frame.codec == Codec.XOR]
    locations.frames[at[0] + 1] = locations.frames[at[1] + 1]
    steps.store.repository.objects.put(f"locations/{manifest.hex()}", locations.seal())
    assert any("another anchor" in p.reason for p in steps.store.verify(whole=False).problems)


def test_anchors_count_as_used(steps: Steps) -> None:
    steps.save(FIRST)
    steps.save(SECOND, like=FIRST)
    first, second = (RefName.parse(f"step:{number}") for number in (1, 2))
    used = measure(steps.store.repository, [first, second])
    assert used.refs[first].unique == 3 * MIB
    assert used.refs[second].unique == 6 * MIB
    assert used.refs[second].stored > used.refs[first].stored >= 3 * MIB
    assert used.refs[first].exclusive == 0
    assert 0 < used.refs[second].exclusive < MIB
    assert used.total.unique == 6 * MIB


def test_a_repack_keeps_anchors(steps: Steps) -> None:
    first = steps.save(FIRST)
    second = steps.save(SECOND, like=FIRST)
    for manifest, refs in ((first, FIRST), (second, SECOND)):
        locations = steps.locations(manifest)
        names = b"".join(map(digest, refs))
        moved = _moved(locations, names, DedupIndex())
        assert set(moved.frames) == set(locations.frames)
        for old, new in zip(locations.ref_frames, moved.ref_frames, strict=True):
            assert moved.frames[new] == locations.frames[old]
            anchor = locations.frames[old].anchor
            assert anchor is None or moved.frames[new + 1] == anchor


def test_a_place_brings_its_anchor_along(steps: Steps) -> None:
    steps.save(FIRST)
    locations = steps.locations(steps.save(SECOND, like=FIRST))
    frame = locations.frames[locations.ref_frames[0]]
    assert frame.codec == Codec.XOR
    index = DedupIndex()
    index.add_located([frame], [(digest(SECOND[0]), 0, 0)])
    place = index.find(digest(SECOND[0]))
    assert place is not None
    builder = LocationsBuilder(index.frames)
    builder.ref(place)
    assert builder.result.frames == [frame, frame.anchor]
    other = DedupIndex()
    other.add_located([replace(frame, anchor=None)], [(digest(SECOND[0]), 0, 0)])
    assert other.find(digest(SECOND[0])) is None


def test_chains_are_never_longer_than_one() -> None:
    base = noise(1, 4000)
    assert may_be_anchor(_ref(base), 4000)
    assert not may_be_anchor(_ref(base, Codec.XOR), 4000)
    index = DedupIndex()
    number = index.reserve()
    index.settle(number, replace(_ref(later(base, 1), Codec.XOR), anchor=_ref(base)))
    builder = LocationsBuilder(index.frames)
    builder.ref((number, 0))
    builder.ref((number, 0))
    assert [frame.codec for frame in builder.result.frames] == [Codec.XOR, Codec.RAW]
    assert list(builder.result.ref_frames) == [0, 0]


def test_a_difference_cannot_be_decoded_without_its_anchor() -> None:
    base = noise(1, 4000)
    ref, stored = _made(later(base, 1), base)
    with pytest.raises(CorruptError, match="anchor"):
        decode_frame(stored, ref.codec, ref.raw, ref.digest)


def test_split_frames_may_be_anchors(steps: Steps) -> None:
    numbers = struct.pack(f"<{MIB // 4}f", *(n * 1e-3 for n in range(MIB // 4)))
    frame, _ = encode_frame([(digest(numbers), numbers)], codec=Codec.SPLIT)
    assert frame.codec == Codec.SPLIT
    steps.save([numbers])
    steps.save([later(numbers, 1)], like=[numbers])
    anchors = [frame.anchor for frame in steps.index.frames if frame.anchor]
    assert [anchor.codec for anchor in anchors] == [Codec.SPLIT]
    steps.store.assert_sound()
