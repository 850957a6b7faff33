"""Brings frames from the store into the cache: each once, whoever and however many wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import trio

from envstore.errors import EnvstoreError
from envstore.fuse.complaints import Complaints
from envstore.fuse.metrics import Metrics
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.locations import FrameRef

MAX_REQUEST = 16 << 20
"""Stored bytes asked for at once: whoever waits for one frame of a request waits for all of it."""

_DEMANDED, _AHEAD = 4, 1

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Group:
    """Frames that one request brings, the flights that end with each, and where it stands.

    ``urgent`` are the numbers of the frames that somebody waits for.
    """

    frames: tuple[FrameRef, ...]
    flights: list[list[_Flight]]
    urgent: set[int] = field(default_factory=set)
    demanded: bool = False
    started: bool = False


class _Flight:
    """One frame on its way, and everybody who waits for it."""

    __slots__ = ("_done", "_result", "group", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.group: _Group
        self._done = trio.Event()
        self._result: bytes | EnvstoreError = b""

    def land(self, result: bytes | EnvstoreError) -> None:
        self._result = result
        self._done.set()

    async def wait(self) -> bytes | EnvstoreError:
        await self._done.wait()
        return self._result


class FrameLoader:
    """Fetches frames by their number in a snapshot's locations. Belongs to one trio run."""

    def __init__(
        self,
        frames: Sequence[FrameRef],
        fetcher: FrameFetcher,
        cache: BlobCache,
        metrics: Metrics,
        complaints: Complaints,
    ) -> None:
        self._frames = frames
        self._fetcher = fetcher
        self._cache = cache
        self._metrics = metrics
        self._complaints = complaints
        self._flights: dict[int, _Flight] = {}
        self._nursery: trio.Nursery
        # What somebody waits for never queues behind what somebody may want later.
        self._demanded = trio.CapacityLimiter(_DEMANDED)
        self._ahead = trio.CapacityLimiter(_AHEAD)
        self._threads = trio.CapacityLimiter(_DEMANDED + _AHEAD)
        self._checks = trio.CapacityLimiter(1)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the fetches until cancelled: they outlive the readers that asked for them."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep(inf)

    async def load(
        self, needed: Iterable[int], ahead: Iterable[int] = ()
    ) -> dict[int, bytes | EnvstoreError]:
        """Return the ``needed`` frames' raw bytes, or for each the error that befell it.

        ``ahead`` are frames worth having soon; those next to needed ones come with them, the
        others on their own, and nobody waits for them. Frames on their way already are not asked
        for again; a failure is not remembered.
        """
        needed = dict.fromkeys(needed)
        self._take_off(needed, ahead)
        waiting = [self._flights[number] for number in needed]
        for flight in waiting:
            flight.group.urgent.add(flight.number)
            if not flight.group.demanded:
                # Perhaps it is queued to be fetched ahead: that turn may come late.
                flight.group.demanded = True
                self._nursery.start_soon(self._fetch, flight.group, self._demanded)
        return {flight.number: await flight.wait() for flight in waiting}

    def prefetch(self, ahead: Iterable[int]) -> None:
        """Begin to fetch frames that nobody waits for."""
        self._take_off((), ahead)

    def _take_off(self, needed: Iterable[int], ahead: Iterable[int]) -> None:
        """Make flights for frames that have none, and queue those that nobody waits for."""
        numbers = [number for number in needed if number not in self._flights]
        missing = set(numbers)
        for number in ahead:
            name = self._frames[number].digest
            if not (number in missing or number in self._flights or self._cache.contains(name)):
                numbers.append(number)
                self._metrics.ahead += 1
        # Nothing forbids that two numbers stand for the same place.
        places: dict[tuple[bytes, int], list[_Flight]] = {}
        for number in dict.fromkeys(numbers):
            flight = self._flights[number] = _Flight(number)
            frame = self._frames[number]
            places.setdefault((frame.pack, frame.offset), []).append(flight)
        frames = [self._frames[number] for number in numbers]
        for found in self._fetcher.plan(frames, max_request=MAX_REQUEST):
            group = _Group(found, [places[frame.pack, frame.offset] for frame in found])
            numbers = [flight.number for flights in group.flights for flight in flights]
            for flights in group.flights:
                for flight in flights:
                    flight.group = group
            if missing.isdisjoint(numbers):
                self._nursery.start_soon(self._fetch, group, self._ahead)

    async def _fetch(self, group: _Group, turn: trio.CapacityLimiter) -> None:
        """Fetch a group unless it is being fetched already."""
        async with turn:
            if group.started:
                return
            group.started = True
            token = trio.lowlevel.current_trio_token()

            def deliver(position: int, result: bytes | EnvstoreError) -> None:
                token.run_sync_soon(self._land, group, position, result)

            try:
                await trio.to_thread.run_sync(
                    self._fetcher.fetch_each,
                    group.frames,
                    self._order(group),
                    deliver,
                    abandon_on_cancel=True,
                    limiter=self._threads,
                )
            except Exception:  # noqa: BLE001 - a bug must cost these reads, not the whole mount
                _log.exception("fetching from pack %s failed", group.frames[0].pack.hex())
            finally:
                # Also when cancelled: nobody may be left waiting.
                failure = EnvstoreError(f"fetching from pack {group.frames[0].pack.hex()} failed")
                for position in range(len(group.flights)):
                    self._land(group, position, failure)

    def _order(self, group: _Group) -> list[int]:
        """Return the positions of a group's frames, those that somebody waits for first."""
        waited = [
            any(flight.number in group.urgent for flight in flights) for flights in group.flights
        ]
        return sorted(range(len(waited)), key=lambda position: not waited[position])

    def _land(self, group: _Group, position: int, result: bytes | EnvstoreError) -> None:
        """Give a result to the flights of one frame, unless they have landed already."""
        flights = group.flights[position]
        # Of what nobody waits for nothing may stay in memory, not even until the group is done.
        group.flights[position] = []
        for flight in flights:
            del self._flights[flight.number], flight.group
            flight.land(result)
            if flight.number not in group.urgent and isinstance(result, EnvstoreError):
                self._complaints.say(f"readahead: {result}")

    async def recheck(self, number: int) -> bytes | None:
        """Return a frame's bytes if the cached blob is sound; else see that there is none."""
        frame = self._frames[number]

        def check() -> bytes | None:
            if not self._cache.contains(frame.digest):
                return None
            data = self._cache.read(frame.digest, 0, frame.raw)
            if data is not None and digest(data) == frame.digest:
                return data
            self._cache.drop(frame.digest)
            self._metrics.damaged += 1
            _log.warning("dropped damaged blob %s from the cache", frame.digest.hex())
            return None

        return await trio.to_thread.run_sync(check, limiter=self._checks)
