from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import (
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
)
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.fetch import MAX_GAP, MAX_REQUEST, FrameFetcher
from envstore.store.frames import encode_frame
from envstore.store.locations import FrameRef
from envstore.store.objects import ObjectStore, open_objects
from envstore.store.packs import PackBuilder, pack_key
from tests.faulty import FaultyStore
from tests.trees import noise, prose

pytestmark = pytest.mark.usefixtures("_no_fsync")


# Plans.


def _frames(pack: int, layout: list[tuple[int, int]]) -> list[FrameRef]:
    """Return frames of the given (gap before, stored bytes), one after the other."""
    found, at = [], 8
    for gap, stored in layout:
        at += gap
        found.append(FrameRef(b"p%31d" % pack, at, stored, stored, 0, b"f%15d%16d" % (pack, at)))
        at += stored
    return found


_layouts = st.lists(
    st.lists(
        st.tuples(
            st.one_of(st.just(0), st.integers(0, 3 * MAX_GAP), st.sampled_from([MAX_GAP])),
            st.one_of(st.integers(0, 2 << 20), st.just(5 << 20), st.just(MAX_REQUEST + 1)),
        ),
        max_size=14,
    ),
    max_size=3,
)
_limits = st.sampled_from(
    [(MAX_GAP, MAX_REQUEST), (0, 1 << 20), (1 << 20, 8 << 20), (0, 0), (MAX_GAP, 1)]
)


def _fetcher() -> FrameFetcher:
    return FrameFetcher(open_objects("/"), None)


@given(_layouts, st.randoms(use_true_random=False), _limits)
def test_every_frame_is_in_one_group_and_every_group_is_one_range(
    layouts: list[list[tuple[int, int]]], rng: random.Random, limits: tuple[int, int]
) -> None:
    frames = [frame for pack, layout in enumerate(layouts) for frame in _frames(pack, layout)]
    asked = [frame for frame in frames if rng.random() < 0.8]
    asked += [frame for frame in asked if rng.random() < 0.2]
    rng.shuffle(asked)
    max_gap, max_request = limits
    groups = _fetcher().plan(asked, max_gap=max_gap, max_request=max_request)

    def key(frame: FrameRef) -> tuple[bytes, int]:
        return frame.pack, frame.offset

    planned = [key(frame) for group in groups for frame in group]
    assert len(planned) == len(set(planned))
    assert set(planned) == {key(frame) for frame in asked}
    for group in groups:
        assert len({frame.pack for frame in group}) == 1
        for one, two in pairwise(group):
            assert 0 <= two.offset - (one.offset + one.stored) <= max_gap
        span = group[-1].offset + group[-1].stored - group[0].offset
        assert len(group) == 1 or span <= max_request
    first = {key(frame): i for i, frame in reversed(list(enumerate(asked)))}
    order = [min(first[key(frame)] for frame in group) for group in groups]
    assert order == sorted(order)


@given(_layouts)
def test_no_two_groups_could_have_been_one(layouts: list[list[tuple[int, int]]]) -> None:
    frames = [frame for pack, layout in enumerate(layouts) for frame in _frames(pack, layout)]
    groups = sorted(_fetcher().plan(frames), key=lambda group: (group[0].pack, group[0].offset))
    for one, two in pairwise(groups):
        if one[0].pack != two[0].pack:
            continue
        gap = two[0].offset - (one[-1].offset + one[-1].stored)
        span = two[0].offset + two[0].stored - one[0].offset
        assert gap > MAX_GAP or span > MAX_REQUEST


def test_frames_that_overlap_are_fetched_apart() -> None:
    # No writer makes them, but locations are not trusted.
    frames = [
        FrameRef(b"p" * 32, at, stored, stored, 0, b"%32d" % at)
        for at, stored in ((8, 1000), (100, 10), (500, 2000), (2500, 5))
    ]
    groups = _fetcher().plan(frames)
    assert [len(group) for group in groups] == [1, 3]
    for group in groups:
        assert all(
            frame.offset + frame.stored <= group[-1].offset + group[-1].stored for frame in group
        )


def test_nothing_asked_is_nothing_planned() -> None:
    assert _fetcher().plan([]) == []


def test_a_pack_read_from_end_to_end_takes_two_requests() -> None:
    groups = _fetcher().plan(_frames(0, [(0, 1 << 20)] * 32))
    assert [len(group) for group in groups] == [16, 16]


# Fetching from a real store.


class _Stored:
    """One pack of ``count`` frames in a store that can be made to fail."""

    def __init__(self, root: Path, count: int = 6) -> None:
        self.objects = FaultyStore(open_objects(f"file://{root}/store", create=True))
        self.cache = BlobCache(root / "cache", 1 << 30)
        self.fetcher = FrameFetcher(self.objects, self.cache)
        builder = PackBuilder()
        self.raw = [(prose if i % 2 else noise)(i, 20_000 + i) for i in range(count)]
        for data in self.raw:
            builder.add(*encode_frame([(digest(data), data)]))
        finished = builder.finish()
        assert finished is not None
        self.pack, data = finished
        self.key = pack_key(self.pack.digest)
        self.objects.put(self.key, data)
        self.objects.clear()
        self.frames = [
            FrameRef(self.pack.digest, at, row.stored, row.raw, row.codec, row.digest)
            for row, at in zip(self.pack.frames, self.pack.offsets(), strict=True)
        ]


@pytest.fixture
def stored(tmp_path: Path) -> _Stored:
    return _Stored(tmp_path)


def test_a_group_is_one_request_and_lands_in_the_cache(stored: _Stored) -> None:
    (group,) = stored.fetcher.plan(stored.frames)
    assert stored.fetcher.fetch(group) == stored.raw
    assert stored.objects.count() == 1
    for frame, raw in zip(stored.frames, stored.raw, strict=True):
        assert stored.cache.read(frame.digest) == raw
    fetched = stored.fetcher.fetched
    assert (fetched.requests, fetched.frames) == (1, 6)
    assert fetched.bytes == sum(frame.stored for frame in stored.frames)


def test_gaps_are_read_and_thrown_away(stored: _Stored) -> None:
    some = [stored.frames[0], stored.frames[3], stored.frames[5]]
    (group,) = stored.fetcher.plan(some)
    assert stored.fetcher.fetch(group) == [stored.raw[0], stored.raw[3], stored.raw[5]]
    assert not stored.cache.contains(stored.frames[1].digest)
    assert stored.objects.count() == 1


class _Slow:
    """A store whose answers come byte by byte, and may break off."""

    def __init__(self, inner: ObjectStore, step: int, end: int | None = None) -> None:
        self.inner, self.step, self.end = inner, step, end
        self.given = 0

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        data = self.inner.get_range(key, start, length)
        for at in range(0, length, self.step):
            if self.end is not None and at >= self.end:
                raise UnavailableError("broke off")
            self.given += self.step
            yield data[at : at + self.step]


def _streamed(
    stored: _Stored, objects: object, urgent: set[int]
) -> list[tuple[int, bytes | EnvstoreError]]:
    seen: list[tuple[int, bytes | EnvstoreError]] = []
    FrameFetcher(objects, stored.cache).stream(  # type: ignore[arg-type]
        stored.frames,
        lambda position, result: seen.append((position, result)),
        urgent=lambda position: position in urgent and position not in dict(seen),
        arrived=lambda size: None,
    )
    return seen


@pytest.mark.parametrize("step", [1, 100, 100_000])
def test_each_frame_is_delivered_once_it_has_come(stored: _Stored, step: int) -> None:
    slow = _Slow(stored.objects, step)
    ends = [frame.offset + frame.stored - stored.frames[0].offset for frame in stored.frames]
    given: list[int] = []
    seen: list[bytes | EnvstoreError] = []

    def deliver(position: int, result: bytes | EnvstoreError) -> None:
        given.append(slow.given)
        seen.append(result)

    FrameFetcher(slow, stored.cache).stream(  # type: ignore[arg-type]
        stored.frames, deliver, urgent=lambda position: False, arrived=lambda size: None
    )
    assert seen == stored.raw
    assert all(end <= had < end + step for end, had in zip(ends, given, strict=True))


def test_urgent_frames_are_unpacked_before_others(stored: _Stored) -> None:
    seen = _streamed(stored, _Slow(stored.objects, 50), {3, 1})
    assert [position for position, _ in seen] == [1, 3, 0, 2, 4, 5]
    assert [dict(seen)[position] for position in range(6)] == stored.raw


def test_what_came_before_an_answer_broke_off_is_delivered(stored: _Stored) -> None:
    end = stored.frames[3].offset - stored.frames[0].offset + 1
    seen = dict(_streamed(stored, _Slow(stored.objects, 50, end), {5}))
    assert [seen[position] for position in range(3)] == stored.raw[:3]
    for position in (4, 5):
        assert isinstance(seen[position], UnavailableError)


def test_a_cache_that_takes_nothing_does_not_keep_frames_from_a_mount(
    stored: _Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: bytes, data: bytes) -> None:
        raise NoSpaceError("No space left on device")

    monkeypatch.setattr(stored.cache, "put", refuse)
    seen: list[bytes | EnvstoreError] = []
    stored.fetcher.stream(
        stored.frames,
        lambda position, result: seen.append(result),
        urgent=lambda position: False,
        arrived=lambda size: None,
    )
    assert seen == stored.raw
    assert isinstance(stored.fetcher.refused, NoSpaceError)


def test_an_error_of_the_receiver_is_not_taken_for_one_of_the_store(stored: _Stored) -> None:
    seen = []

    def deliver(position: int, result: bytes | EnvstoreError) -> None:
        seen.append(position)
        raise NoSpaceError("the receiver's own disk")

    with pytest.raises(NoSpaceError, match=r"the receiver's own disk$"):
        stored.fetcher.stream(
            stored.frames, deliver, urgent=lambda position: False, arrived=lambda size: None
        )
    assert seen == [0]


def test_cached_frames_are_loaded_without_a_request(stored: _Stored) -> None:
    for _ in range(2):
        assert stored.fetcher.load(stored.frames[1]) == stored.raw[1]
    assert stored.objects.count() == 1


def test_without_a_cache_every_load_is_a_request(stored: _Stored) -> None:
    fetcher = FrameFetcher(stored.objects, None)
    for _ in range(2):
        assert fetcher.load(stored.frames[1]) == stored.raw[1]
    assert stored.objects.count() == 2


def test_one_bad_frame_does_not_spoil_its_neighbours(stored: _Stored) -> None:
    bad = stored.frames[2]
    stored.objects.corrupt("get_range", at=bad.offset - stored.frames[0].offset + 100)
    results = stored.fetcher.fetch(stored.frames)
    for i, (result, raw) in enumerate(zip(results, stored.raw, strict=True)):
        if i == 2:
            assert isinstance(result, CorruptError)
            # The line that an operator gets: which pack, where in it, and which frame.
            assert bad.digest.hex() in result.message
            assert f"pack {bad.pack.hex()}, byte {bad.offset}" in result.message
            assert not stored.cache.contains(stored.frames[i].digest)
        else:
            assert result == raw
            assert stored.cache.contains(stored.frames[i].digest)
    with pytest.raises(CorruptError):
        stored.fetcher.load(bad)


def test_wrong_bytes_are_never_returned_nor_cached(stored: _Stored) -> None:
    rng = random.Random(1)
    size = sum(frame.stored for frame in stored.frames)
    wrong = [rng.randbytes(size), bytes(size), b"\x28\xb5\x2f\xfd" + bytes(size - 4)]
    whole = stored.objects.inner.get_range(stored.key, stored.frames[0].offset, size)
    wrong += [whole[1:] + b"\0", b"\0" + whole[:-1], whole[::-1]]
    # Frames of the right pack in another order, as a broken proxy might serve them.
    cut = stored.frames[1].offset - stored.frames[0].offset
    wrong.append(whole[cut:] + whole[:cut])
    for data in wrong:
        fault = stored.objects.replace("get_range", data)
        for result, raw in zip(stored.fetcher.fetch(stored.frames), stored.raw, strict=True):
            assert isinstance(result, CorruptError) or result == raw
        fault.remove()
    refused = 0
    for _ in range(200):
        fault = stored.objects.corrupt("get_range", at=rng.randrange(size))
        for result, raw in zip(stored.fetcher.fetch(stored.frames), stored.raw, strict=True):
            refused += isinstance(result, CorruptError)
            assert isinstance(result, CorruptError) or result == raw
        fault.remove()
    assert refused >= 195
    for path in Path(stored.cache.root / "blobs").rglob("*"):
        if path.is_file():
            assert digest(path.read_bytes()).hex() == path.name


@pytest.mark.parametrize("by", [1, 1000, 1 << 30])
def test_an_answer_cut_short_is_an_error_for_all(stored: _Stored, by: int) -> None:
    stored.objects.truncate("get_range", by=by)
    results = stored.fetcher.fetch(stored.frames)
    assert all(isinstance(result, CorruptError) for result in results)
    assert stored.cache.usage().blobs == 0


@pytest.mark.parametrize("error", [UnavailableError("gone"), NotFoundError("no such pack")])
def test_a_failed_request_is_an_error_for_all(stored: _Stored, error: EnvstoreError) -> None:
    fault = stored.objects.fail("get_range", error)
    assert stored.fetcher.fetch(stored.frames) == [error] * 6
    fault.remove()
    assert stored.fetcher.fetch(stored.frames) == stored.raw


def test_errors_that_are_not_the_stores_are_not_hidden(stored: _Stored) -> None:
    stored.objects.fail("get_range", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        stored.fetcher.fetch(stored.frames)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codec": 7}, UnsupportedFormatError),
        ({"raw": 5}, CorruptError),
        ({"raw": 1 << 31}, CorruptError),
        ({"digest": digest(b"other")}, CorruptError),
        ({"stored": 100}, CorruptError),
        ({"offset": 9}, CorruptError),
        ({"offset": 1 << 31}, CorruptError),
        ({"stored": 8 << 20}, CorruptError),
    ],
)
def test_locations_that_lie(
    stored: _Stored, change: dict[str, int], error: type[EnvstoreError]
) -> None:
    facts = {name: getattr(stored.frames[1], name) for name in FrameRef.__slots__}
    (result,) = stored.fetcher.fetch([FrameRef(**(facts | change))])
    assert isinstance(result, error)
    assert stored.cache.usage().blobs == 0


@pytest.mark.parametrize("capacity", [0, 4096, 24_576])
def test_a_cap_too_small_makes_reading_slow_and_not_impossible(
    stored: _Stored, tmp_path: Path, capacity: int
) -> None:
    small = BlobCache(tmp_path / "small", capacity)
    fetcher = FrameFetcher(stored.objects, small)
    assert fetcher.fetch(stored.frames) == stored.raw
    assert fetcher.load(stored.frames[0]) == stored.raw[0]
    assert small.usage().bytes <= capacity


def test_a_full_disk_is_told_of_the_frames_it_concerns(
    stored: _Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = stored.cache.put

    def refuse(name: bytes, data: bytes) -> None:
        if name == stored.frames[3].digest:
            raise NoSpaceError("No space left on device")
        put(name, data)

    monkeypatch.setattr(stored.cache, "put", refuse)
    results = stored.fetcher.fetch(stored.frames)
    error = results.pop(3)
    assert isinstance(error, NoSpaceError)
    assert f"pack {stored.pack.digest.hex()}" in error.message
    assert results == stored.raw[:3] + stored.raw[4:]


def test_many_threads_share_one_fetcher(stored: _Stored) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(40):
                picks = sorted(rng.sample(range(6), rng.randrange(1, 7)))
                for group in stored.fetcher.plan(stored.frames[i] for i in picks):
                    for frame, result in zip(group, stored.fetcher.fetch(group), strict=True):
                        assert result == stored.raw[stored.frames.index(frame)]
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stored.fetcher.fetched.requests == stored.objects.count("get_range")
