"""Frames fetched in a given order ahead of their readers, and what reads get of them."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
)
from envstore.fuse.complaints import Complaints
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.pace import Pace
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.frames import encode_frame
from envstore.store.locations import FrameRef
from envstore.store.objects import open_objects
from envstore.store.packs import PackBuilder, pack_key
from tests.faulty import FaultyStore
from tests.trees import noise

SIZE = 10_000


class Trickle(FaultyStore):
    """A store whose answers come frame by frame, each when it is let through."""

    free = True

    def __init__(self, root: Path) -> None:
        super().__init__(open_objects(f"file://{root}", create=True))
        self.ranges: list[tuple[str, int, int]] = []
        self.let = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        self.ranges.append((key, start, length))
        self.begun.release()
        for piece in super().iter_range(key, start, length):
            for at in range(0, len(piece), SIZE):
                if not self.free:
                    assert self.let.acquire(timeout=60)
                yield piece[at : at + SIZE]


class Packs:
    """Packs of incompressible frames of one size in a store, and a loader of them."""

    def __init__(self, base: Path, packs: int = 3, count: int = 30) -> None:
        self.objects = Trickle(base / "store")
        self.frames: list[FrameRef] = []
        for number in range(packs):
            builder = PackBuilder()
            for position in range(count):
                data = noise(f"{number} {position}", SIZE)
                builder.add(*encode_frame([(digest(data), data)]))
            finished = builder.finish()
            assert finished is not None
            pack, data = finished
            self.objects.put(pack_key(pack.digest), data)
            self.frames += [
                FrameRef(pack.digest, at, row.stored, row.raw, row.codec, row.digest)
                for row, at in zip(pack.frames, pack.offsets(), strict=True)
            ]
        self.cache = BlobCache(base / "cache")
        self.fetcher = FrameFetcher(self.objects, self.cache)
        self.metrics = Metrics()
        self.patience = 60.0

    def run(self, main: object) -> None:
        async def loop() -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            loader = FrameLoader(
                *(self.fetcher, self.cache, self.metrics, complaints), patience=self.patience
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(loader.run)
                await main(loader)  # type: ignore[operator]
                nursery.cancel_scope.cancel()

        trio.run(loop)

    def cached(self) -> list[FrameRef]:
        return [frame for frame in self.frames if self.cache.contains(frame.digest)]


@pytest.fixture
def packs(tmp_path: Path) -> Packs:
    return Packs(tmp_path)


def test_a_recorded_order_is_fetched_in_few_requests(packs: Packs) -> None:
    order = list(packs.frames)
    # As programs do: not quite as the packs have it.
    for at in range(0, len(order), 10):
        some = order[at : at + 10]
        random.Random(at).shuffle(some)
        order[at : at + 10] = some

    async def main(loader: FrameLoader) -> None:
        await loader.stream(iter(order), request=10 * SIZE, window=20 * SIZE, concurrency=2)

    packs.run(main)
    assert packs.cached() == packs.frames
    assert packs.fetcher.fetched.frames == len(order)
    assert len(packs.objects.ranges) <= len(order) // 10 * 2
    assert all(length <= 10 * SIZE for _, _, length in packs.objects.ranges)
    # No request lies further from the recorded order than the window.
    ranks = {frame.digest: rank for rank, frame in enumerate(order)}
    latest = -1
    for key, start, _ in packs.objects.ranges:
        (first,) = (f for f in packs.frames if pack_key(f.pack) == key and f.offset == start)
        assert ranks[first.digest] > latest - 30
        latest = max(latest, ranks[first.digest])
    assert packs.metrics.prefetched == len(order)
    assert packs.metrics.prefetched_used == 0


def test_what_is_cached_is_not_asked_for(packs: Packs) -> None:
    async def main(loader: FrameLoader) -> None:
        await loader.load(packs.frames[10:20])
        before = packs.fetcher.fetched.frames
        await loader.stream(packs.frames, window=1)
        assert packs.fetcher.fetched.frames - before == len(packs.frames) - 10
        await loader.stream(packs.frames)
        assert packs.fetcher.fetched.frames - before == len(packs.frames) - 10

    packs.run(main)


def test_a_reader_gets_a_frame_before_the_request_has_ended(packs: Packs) -> None:
    packs.objects.free = False
    frames = packs.frames[:10]

    async def main(loader: FrameLoader) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loader.stream, frames)
            await trio.to_thread.run_sync(packs.objects.begun.acquire)
            packs.objects.let.release(5)
            found = await loader.load([frames[4]])
            assert digest(found[frames[4].digest]) == frames[4].digest  # type: ignore[arg-type]
            assert not packs.cache.contains(frames[5].digest)
            packs.objects.let.release(5)
        assert len(packs.objects.ranges) == 1
        assert packs.cached() == frames
        assert packs.metrics.prefetched_used == 1

    packs.run(main)


def test_a_fault_does_not_wait_for_streams(packs: Packs) -> None:
    packs.objects.free = False

    async def main(loader: FrameLoader) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(
                    partial(loader.stream, packs.frames, concurrency=4, request=5 * SIZE)
                )
            # Bounded, however many streams there are.
            for _ in range(4):
                await trio.to_thread.run_sync(packs.objects.begun.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert len(packs.objects.ranges) == 4
            packs.objects.free = True
            await loader.load([packs.frames[-1]])
            assert len(packs.objects.ranges) == 5
            packs.objects.let.release(1000)
        assert packs.cached() == packs.frames
        assert packs.fetcher.fetched.frames == len(packs.frames)

    packs.run(main)


def test_a_stream_waits_for_a_store_that_is_away(packs: Packs) -> None:
    packs.objects.fail("get_range", UnavailableError("away"), times=3)

    async def main(loader: FrameLoader) -> None:
        await loader.stream(packs.frames, concurrency=2)

    packs.run(main)
    assert packs.cached() == packs.frames


def test_a_stream_gives_up_in_the_end(packs: Packs, caplog: pytest.LogCaptureFixture) -> None:
    packs.patience = 0.0
    packs.objects.fail("get_range", UnavailableError("away"))

    async def main(loader: FrameLoader) -> None:
        await loader.stream(packs.frames)

    packs.run(main)
    assert packs.cached() == []
    assert "gave up" in caplog.text


def test_a_stream_goes_on_past_a_pack_that_is_gone(packs: Packs) -> None:
    gone = packs.frames[0].pack
    packs.objects.fail("get_range", NotFoundError("gone"), key=pack_key(gone))

    async def main(loader: FrameLoader) -> None:
        await loader.stream(packs.frames)

    packs.run(main)
    assert packs.cached() == [frame for frame in packs.frames if frame.pack != gone]


def test_who_cancels_a_stream_takes_nothing_from_readers(packs: Packs) -> None:
    packs.objects.free = False
    wanted = packs.frames[3]

    async def main(loader: FrameLoader) -> None:
        async with trio.open_nursery() as readers:

            async def read() -> None:
                found = await loader.load([wanted])
                assert isinstance(found[wanted.digest], bytes)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(loader.stream, packs.frames, concurrency=1))
                await trio.to_thread.run_sync(packs.objects.begun.acquire)
                readers.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            packs.objects.let.release(1000)

    packs.run(main)
    assert len(packs.objects.ranges) == 1


def test_a_stream_keeps_to_its_rate(packs: Packs) -> None:
    async def main(loader: FrameLoader) -> None:
        begun = trio.current_time()
        await loader.stream(packs.frames[:30], rate=30 * SIZE)
        # At least: a slow machine takes longer.
        assert trio.current_time() - begun >= 0.7

    packs.run(main)


def test_a_pace_is_kept_over_time() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(1000, lambda: now, sleep)
    for _ in range(50):
        pace.wait(100)
    assert now == pytest.approx(5, rel=0.1)
    now += 100
    before = now
    for _ in range(50):
        pace.wait(100)
    assert now - before == pytest.approx(5, rel=0.1)
    with pytest.raises(ValueError, match="rate"):
        Pace(0)


def test_requests_that_hang_let_others_go_before_them(packs: Packs) -> None:
    hung = packs.frames[0].pack
    gate = packs.objects.gate("get_range", key=pack_key(hung))

    async def main(loader: FrameLoader) -> None:
        async with trio.open_nursery() as nursery:

            async def read(frame: FrameRef) -> None:
                found = await loader.load([frame])
                assert isinstance(found[frame.digest], bytes)

            for frame in packs.frames[:8]:
                nursery.start_soon(read, frame)
            await trio.to_thread.run_sync(gate.wait_entered, 4)
            await read(packs.frames[-1])
            await trio.to_thread.run_sync(gate.wait_entered, 4)
            gate.open()

    packs.run(main)


def test_a_reader_of_a_stream_that_fails_is_not_given_up(packs: Packs) -> None:
    gate = packs.objects.gate("get_range", times=1)
    packs.objects.fail("get_range", UnavailableError("away"), times=3)
    wanted = packs.frames[3]

    async def main(loader: FrameLoader) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(loader.stream, packs.frames, concurrency=1))

            async def read() -> None:
                found = await loader.load([wanted])
                assert isinstance(found[wanted.digest], bytes)

            await trio.to_thread.run_sync(gate.wait_entered)
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()

    packs.run(main)
    assert packs.metrics.retries > 0
    assert packs.cached() == packs.frames


@pytest.mark.parametrize(
    ("error", "tries"),
    [(CorruptError("altered"), 2), (AccessDeniedError("expired"), 5), (NotFoundError("gone"), 1)],
)
def test_what_is_tried_again_how_often(packs: Packs, error: EnvstoreError, tries: int) -> None:
    packs.objects.fail("get_range", error, times=tries)
    wanted = packs.frames[0]

    async def main(loader: FrameLoader) -> None:
        assert (await loader.load([wanted]))[wanted.digest] is error
        assert packs.objects.count("get_range") == tries
        assert isinstance((await loader.load([wanted]))[wanted.digest], bytes)

    packs.run(main)
