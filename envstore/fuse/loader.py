"""Brings frames from the store into the cache: each once, whoever and however many wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
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


class _Flight:
    """One frame on its way, and everybody who waits for it."""

    __slots__ = ("_done", "_result", "frame", "group", "urgent")

    def __init__(self, frame: FrameRef) -> None:
        self.frame = frame
        self.group: _Group
        self.urgent = False
        self._done = trio.Event()
        self._result: bytes | EnvstoreError = b""

    def land(self, result: bytes | EnvstoreError) -> None:
        self._result = result
        self._done.set()

    async def wait(self) -> bytes | EnvstoreError:
        await self._done.wait()
        return self._result


@dataclass(slots=True, eq=False)
class _Group:
    """The flights that one request brings, in the order of the pack, and where it stands.

    Of what has landed ``None`` is left.
    """

    frames: tuple[FrameRef, ...]
    flights: list[_Flight | None] = field(default_factory=list)
    demanded: bool = False
    started: bool = False


class FrameLoader:
    """Fetches the frames of one store, for the readers of any number of its snapshots.

    Belongs to one trio run.
    """

    def __init__(
        self,
        fetcher: FrameFetcher,
        cache: BlobCache,
        metrics: Metrics,
        complaints: Complaints,
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._metrics = metrics
        self._complaints = complaints
        self._flights: dict[bytes, _Flight] = {}
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
        self, needed: Iterable[FrameRef], ahead: Iterable[FrameRef] = ()
    ) -> dict[bytes, bytes | EnvstoreError]:
        """Return by digest the ``needed`` frames' raw bytes, or for each the error that befell it.

        ``ahead`` are frames worth having soon; those next to needed ones come with them, the
        others on their own, and nobody waits for them. Frames on their way already, for whatever
        snapshot, are not asked for again; a failure is not remembered.
        """
        wanted = {frame.digest: frame for frame in needed}
        found: dict[bytes, bytes | EnvstoreError] = {}
        self._take_off(wanted.values(), ahead)
        elsewhere = []
        for flight in self._join(wanted):
            result = found[flight.frame.digest] = await flight.wait()
            if isinstance(result, EnvstoreError):
                own = wanted[flight.frame.digest]
                if own != flight.frame:
                    elsewhere.append(own)
        if elsewhere:
            # Another snapshot's locations led there; ours may know a better place.
            found |= await self.load(elsewhere)
        return found

    def _join(self, wanted: Iterable[bytes]) -> list[_Flight]:
        """Return the flights of frames, whose requests now are urgent."""
        flights = [self._flights[name] for name in wanted]
        for flight in flights:
            flight.urgent = True
            if not flight.group.demanded:
                # Perhaps it is queued to be fetched ahead: that turn may come late.
                flight.group.demanded = True
                self._nursery.start_soon(self._fetch, flight.group, self._demanded)
        return flights

    def prefetch(self, ahead: Iterable[FrameRef]) -> None:
        """Begin to fetch frames that nobody waits for."""
        self._take_off((), ahead)

    def _take_off(self, needed: Iterable[FrameRef], ahead: Iterable[FrameRef]) -> None:
        """Make flights for frames that have none, and queue those that nobody waits for."""
        missing = {frame.digest: frame for frame in needed if frame.digest not in self._flights}
        extra = {
            frame.digest: frame
            for frame in ahead
            if not (
                frame.digest in missing
                or frame.digest in self._flights
                or self._cache.contains(frame.digest)
            )
        }
        self._metrics.ahead += len(extra)
        frames = (*missing.values(), *extra.values())
        for found in self._fetcher.plan(frames, max_request=MAX_REQUEST):
            group = _Group(found)
            for frame in found:
                flight = self._flights[frame.digest] = _Flight(frame)
                flight.group = group
                group.flights.append(flight)
            if missing.keys().isdisjoint(frame.digest for frame in found):
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
        urgent = [flight is not None and flight.urgent for flight in group.flights]
        return sorted(range(len(urgent)), key=lambda position: not urgent[position])

    def _land(self, group: _Group, position: int, result: bytes | EnvstoreError) -> None:
        """Give a result to the flight of one frame, unless it has landed already."""
        flight = group.flights[position]
        if flight is None:
            return
        # Of what nobody waits for nothing may stay in memory, not even until the group is done.
        group.flights[position] = None
        del self._flights[flight.frame.digest], flight.group
        flight.land(result)
        if not flight.urgent and isinstance(result, EnvstoreError):
            self._complaints.say(f"readahead: {result}")

    async def recheck(self, frame: FrameRef) -> bytes | None:
        """Return a frame's bytes if the cached blob is sound; else see that there is none."""

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
