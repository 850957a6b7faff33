from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.store.chunking import Chunk
from envstore.store.dedup import MAX_RANGES, MIN_WINDOW, places_to_reuse
from envstore.store.fetch import MAX_GAP, MAX_REQUEST, FrameFetcher
from envstore.store.frames import Frame
from envstore.store.index import DedupIndex
from envstore.store.objects import open_objects
from envstore.store.packs import Pack

_CHUNK = 64 << 10
_CHUNKS_IN_FRAME = 4
_FRAMES_IN_PACK = 40
_STORED = 100 << 10
_DATA = bytes(_CHUNK)


def _name(pack: int, number: int) -> bytes:
    return b"%16d%16d" % (pack, number)


def _pack(pack: int) -> Pack:
    frames = []
    for i in range(_FRAMES_IN_PACK):
        names = b"".join(_name(pack, i * _CHUNKS_IN_FRAME + j) for j in range(_CHUNKS_IN_FRAME))
        sizes = array("I", [_CHUNK] * _CHUNKS_IN_FRAME)
        frames.append(Frame(1, _STORED, sum(sizes), b"f%31d" % (pack * 1000 + i), sizes, names))
    return Pack(b"p%31d" % pack, 1 << 25, tuple(frames))


def _index(packs: int) -> DedupIndex:
    index = DedupIndex()
    index.add_packs(_pack(number) for number in range(packs))
    return index


def _window(names: list[bytes]) -> list[Chunk]:
    return [Chunk(name, _DATA) for name in names]


def _requests(index: DedupIndex, places: list[tuple[int, int] | None]) -> int:
    """Return what a reader of the window would send: the fetcher's own plan, and what is new."""
    fetcher = FrameFetcher(open_objects("/"), None)
    old = {place[0] for place in places if place and place[0] not in index.own}
    groups = fetcher.plan(index.frames[number] for number in old)
    return len(groups) + any(place is None or place[0] in index.own for place in places)


_picks = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 11), st.integers(0, _FRAMES_IN_PACK * _CHUNKS_IN_FRAME - 1)),
        st.none(),
    ),
    min_size=1,
    max_size=64,
)


@given(_picks)
def test_no_window_takes_more_requests_than_allowed(picks: list[tuple[int, int] | None]) -> None:
    index = _index(12)
    window = _window([_name(*pick) if pick else b"new%29d" % i for i, pick in enumerate(picks)])
    places = places_to_reuse(index, window)
    assert len(places) == len(window)
    for chunk, place in zip(window, places, strict=True):
        assert place is None or place == index.find(chunk.digest)
    if len(window) * _CHUNK < MIN_WINDOW:
        assert places == [index.find(chunk.digest) for chunk in window]
    else:
        assert _requests(index, places) <= MAX_RANGES


@given(_picks)
def test_what_fits_is_reused(picks: list[tuple[int, int] | None]) -> None:
    index = _index(12)
    window = _window([_name(*pick) if pick else b"new%29d" % i for i, pick in enumerate(picks)])
    every = [index.find(chunk.digest) for chunk in window]
    if _requests(index, every) <= MAX_RANGES:
        assert places_to_reuse(index, window) == every


def test_scattered_changes_in_one_old_run_are_no_reason_to_refuse() -> None:
    # A new release of a large library: every seventh chunk is new, the others lie as they lay.
    index = _index(1)
    names = [_name(0, i) if i % 7 else b"new%29d" % i for i in range(64)]
    places = places_to_reuse(index, _window(names))
    assert [place is None for place in places] == [not i % 7 for i in range(64)]


def test_the_ranges_that_serve_least_are_refused() -> None:
    index = _index(12)
    # Pack k serves k + 1 chunks: 78 in all, of twelve packs.
    names = [_name(pack, i) for pack in range(12) for i in range(pack + 1)]
    random.Random(1).shuffle(names)
    places = places_to_reuse(index, _window(names))
    refused = {int(chunk[:16]) for chunk, place in zip(names, places, strict=True) if place is None}
    # Seven old ranges stay: the eighth is that of what is stored again.
    assert refused == set(range(12 - MAX_RANGES + 1))


def test_a_gap_that_would_be_read_over_does_not_count() -> None:
    index = _index(1)
    step = MAX_GAP // _STORED * _CHUNKS_IN_FRAME
    names = [_name(0, i * step) for i in range(16)]
    assert None not in places_to_reuse(index, _window(names))
    # One frame more between them and each is a request of its own.
    names = [_name(0, i * (step + 2 * _CHUNKS_IN_FRAME)) for i in range(10)] * 2
    assert None in places_to_reuse(index, _window(names))


def test_small_files_are_left_alone() -> None:
    index = _index(12)
    names = [_name(pack, 0) for pack in range(12)]
    assert len(names) * _CHUNK < MIN_WINDOW
    assert None not in places_to_reuse(index, _window(names))


def test_segments_loaded_on_the_way_count_as_old() -> None:
    # A push loads further segments while frames of its own are being made.
    index = DedupIndex()
    index.learn(b"own%29d" % 0, index.reserve(), 0)
    index.add_packs(_pack(number) for number in range(12))
    names = [_name(pack, i) for pack in range(12) for i in range(2)]
    places = places_to_reuse(index, _window(names))
    assert _requests(index, places) <= MAX_RANGES


def test_frames_being_made_count_as_one_range() -> None:
    index = _index(MAX_RANGES)
    own = []
    for i in range(30):
        own.append(b"own%29d" % i)
        index.learn(own[-1], index.reserve(), 0)
    assert None not in places_to_reuse(index, _window(own))
    old = [_name(pack, 0) for pack in range(MAX_RANGES)]
    places = places_to_reuse(index, _window(own + old))
    assert places.count(None) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_the_smallest_windows(count: int) -> None:
    index = _index(1)
    assert places_to_reuse(index, _window([_name(0, 0)] * count)) == [(0, 0)] * count


def test_a_request_may_be_longer_than_a_window_of_frames() -> None:
    # Otherwise the plan would split what the ranges counted as one.
    assert MAX_REQUEST >= 4 * (4 << 20)
