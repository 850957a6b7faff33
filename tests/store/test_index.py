from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError
from envstore.store.digest import digest
from envstore.store.frames import Frame
from envstore.store.index import (
    DedupIndex,
    LocationsBuilder,
    encode_segment,
    open_segment,
    segment_key,
)
from envstore.store.locations import NOWHERE, FrameRef
from envstore.store.packs import HEADER, Pack
from envstore.store.samples import (
    RATE,
    build_sample,
    is_hook,
    merge_samples,
    open_sample,
    sample_key,
)
from tests.damage import assert_noticed


def _pack(seed: int, frames: int = 3, chunks: int = 4) -> Pack:
    rng = random.Random(seed)
    found = []
    for _ in range(frames):
        sizes = array("I", (rng.randrange(1, 9999) for _ in range(chunks)))
        raw = sum(sizes)
        names = rng.randbytes(32 * chunks)
        found.append(Frame(1, rng.randrange(1, raw), raw, rng.randbytes(32), sizes, names))
    size = len(HEADER) + sum(frame.stored for frame in found) + 99
    return Pack(rng.randbytes(32), size, tuple(found))


def _chunks(pack: Pack) -> list[tuple[bytes, FrameRef, int]]:
    return [
        (
            name,
            FrameRef(pack.digest, offset, frame.stored, frame.raw, frame.codec, frame.digest),
            start,
        )
        for frame, offset in zip(pack.frames, pack.offsets(), strict=True)
        for name, start, _ in frame.chunks()
    ]


def _place(index: DedupIndex, name: bytes) -> tuple[FrameRef, int] | None:
    place = index.find(name)
    return None if place is None else (index.frames[place[0]], place[1])


@given(st.lists(st.integers(0, 2**32), max_size=5, unique=True), st.integers(0, 5))
def test_segments_round_trip(seeds: list[int], frames: int) -> None:
    packs = [_pack(seed, frames) for seed in seeds]
    name, data = encode_segment(packs)
    assert open_segment(data, name) == packs
    assert segment_key(name) == f"index/{name.hex()}"


def test_damaged_segments_are_refused() -> None:
    name, data = encode_segment([_pack(1), _pack(2)])
    assert_noticed(lambda damaged: open_segment(damaged, name), data)


def test_a_segment_under_another_name_is_refused() -> None:
    with pytest.raises(CorruptError, match="does not match its name"):
        open_segment(encode_segment([_pack(1)])[1], digest(b"other"))


def test_chunks_are_found_where_the_packs_say() -> None:
    packs = [_pack(seed) for seed in range(3)]
    index = DedupIndex()
    index.add_packs(packs)
    for pack in packs:
        for name, frame, start in _chunks(pack):
            assert _place(index, name) == (frame, start)
    assert index.find(digest(b"unknown")) is None
    assert len(index) == 36
    # Fed again it learns nothing, not even the frames.
    index.add_packs(packs)
    assert (len(index), len(index.frames)) == (36, 9)


def test_the_first_place_fed_wins() -> None:
    pack = _pack(1)
    copy = Pack(digest(b"copy"), pack.size, pack.frames)
    index = DedupIndex()
    index.add_packs([pack, copy])
    for name, frame, start in _chunks(pack):
        assert _place(index, name) == (frame, start)


def test_what_is_learnt_overrides_what_was_fed() -> None:
    pack = _pack(1)
    index = DedupIndex()
    index.add_packs([pack])
    number = index.reserve()
    name = _chunks(pack)[0][0]
    index.learn(name, number, 77)
    assert index.find(name) == (number, 77)
    frame = FrameRef(digest(b"new"), 8, 1, 2, 0, digest(b"frame"))
    index.settle(number, frame)
    assert _place(index, name) == (frame, 77)


def test_located_chunks_out_of_bounds_are_left_out() -> None:
    frame = FrameRef(digest(b"p"), 8, 1, 2, 0, digest(b"f"))
    index = DedupIndex()
    index.add_located([frame], [(digest(b"a"), 0, 5), (digest(b"b"), 1, 5), (digest(b"c"), 9, 9)])
    assert _place(index, digest(b"a")) == (frame, 5)
    assert index.find(digest(b"b")) is None
    assert index.find(digest(b"c")) is None


def test_a_frame_known_from_packs_and_locations_is_one() -> None:
    pack = _pack(1)
    index = DedupIndex()
    index.add_packs([pack])
    _, frame, _ = _chunks(pack)[0]
    index.add_located([frame], [(digest(b"more"), 0, 5)])
    assert len(index.frames) == len(pack.frames)


def test_locations_list_frames_once_and_in_order_of_use() -> None:
    pack = _pack(1)
    index = DedupIndex()
    index.add_packs([pack])
    chunks = _chunks(pack)
    builder = LocationsBuilder(index.frames)
    order = [9, 0, 1, 9, 5]
    place = index.find(chunks[4][0])
    assert place is not None
    builder.part(place)
    builder.hole()
    for i in order:
        place = index.find(chunks[i][0])
        assert place is not None
        builder.ref(place)
    found = builder.result
    assert [frame.digest for frame in found.frames] == [
        chunks[4][1].digest,
        chunks[9][1].digest,
        chunks[0][1].digest,
    ]
    assert found.ref_frames[0] == NOWHERE
    for i, number, offset in zip(order, found.ref_frames[1:], found.ref_offsets[1:], strict=True):
        assert (found.frames[number], offset) == chunks[i][1:]


# Samples.


def _segments(count: int, chunks: int = 400) -> list[tuple[bytes, list[Pack]]]:
    found = []
    for seed in range(count):
        packs = [_pack(1000 + seed, frames=2, chunks=chunks)]
        found.append((encode_segment(packs)[0], packs))
    return found


def test_one_chunk_in_so_many_is_a_hook() -> None:
    rng = random.Random(1)
    hooks = sum(is_hook(rng.randbytes(32)) for _ in range(100_000))
    assert 0.8 < hooks * RATE / 100_000 < 1.2


def test_samples_find_the_segment_of_every_hook() -> None:
    segments = _segments(8)
    sample = build_sample(segments)
    found = 0
    for name, packs in segments:
        for pack in packs:
            for chunk, _, _ in _chunks(pack):
                if is_hook(chunk):
                    assert sample.find(chunk) == name
                    found += 1
                else:
                    assert sample.find(chunk) is None
                # The hooks around it are others.
                unknown = chunk[:7] + bytes((chunk[7] ^ 1,)) + chunk[8:]
                assert sample.find(unknown) is None
    assert found > 10
    assert sample.segments == tuple(name for name, _ in segments)


def test_samples_round_trip_and_merge() -> None:
    segments = _segments(8)
    parts = [build_sample(segments[:3]), build_sample(segments[2:6]), build_sample(segments[6:])]
    for sample in (*parts, build_sample([])):
        name, data = sample.encode()
        assert open_sample(data, name) == sample
        assert sample_key(name) == f"samples/{name.hex()}"
    merged, whole = merge_samples(parts), build_sample(segments)
    assert set(merged.segments) == set(whole.segments)
    assert merged.heads == whole.heads
    for _, packs in segments:
        for chunk, _, _ in _chunks(packs[0]):
            assert merged.find(chunk) == whole.find(chunk)


def test_damaged_samples_are_refused() -> None:
    name, data = build_sample(_segments(4)).encode()
    assert_noticed(lambda damaged: open_sample(damaged, name), data)
    with pytest.raises(CorruptError, match="does not match its name"):
        open_sample(data, digest(b"other"))
