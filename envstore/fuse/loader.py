"""Brings frames from the store into the cache: each once, whoever and however many wait for it.

What is waited for is tried again, with growing pauses, for as long as the loader is patient: a
store that is away for a minute makes reads slow and nothing else. Requests that are waited for,
those that are guesses, and those of ``stream`` each have turns of their own, so that nothing
queues behind what is less urgent; who pauses, or is not answered, holds no turn.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator
from math import inf

import trio

from envstore.errors import CorruptError, EnvstoreError, UnavailableError
from envstore.fuse.complaints import Complaints
from envstore.fuse.flights import Flight, Group, Turn, is_misplaced
from envstore.fuse.lookahead import Lookahead
from envstore.fuse.metrics import Metrics
from envstore.fuse.pace import Pace
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.locations import FrameRef

PATIENCE = 300.0
"""Seconds that a read waits for a store that cannot be reached."""

MAX_REQUEST = 16 << 20
STREAM_REQUEST, STREAM_WINDOW = 8 << 20, 64 << 20
"""Stored bytes of one request of a stream, and among how many it looks for neighbours."""

_DEMANDED, _AHEAD, _STREAMS = 4, 1, 4
_UNANSWERED = 16
"""Threads beside those for requests that are not answered and have lost their turn."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 4.0

_log = logging.getLogger(__name__)


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
        *,
        patience: float = PATIENCE,
        renewed: bool = False,
    ) -> None:
        """Keep trying for ``patience`` seconds what somebody waits for.

        ``renewed`` says that the credentials are replaced from outside: a store that refuses them
        then is one that is away.
        ``metrics`` are the totals of the server, among which ``fetcher`` is counted from now on.
        """
        metrics.include(fetcher)
        self._fetcher = fetcher
        self._cache = cache
        self._metrics = metrics
        self._complaints = complaints
        self._patience = patience
        self._renewed = renewed
        self._flights: dict[bytes, Flight] = {}
        self._unused: dict[bytes, int] = {}
        self._nursery: trio.Nursery
        self.certain = 0
        """Streams under way of what will be read for sure, which make guesses needless."""
        # What somebody waits for never queues behind what somebody may want later.
        self._demanded = trio.CapacityLimiter(_DEMANDED)
        self._ahead = trio.CapacityLimiter(_AHEAD)
        self._streams = trio.CapacityLimiter(_STREAMS)
        self._threads = {
            self._demanded: trio.CapacityLimiter(_DEMANDED + _UNANSWERED),
            self._ahead: trio.CapacityLimiter(_AHEAD),
            self._streams: trio.CapacityLimiter(_STREAMS),
        }
        self._checks = trio.CapacityLimiter(1)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the fetches until cancelled: they outlive the readers that asked for them."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep(inf)

    async def load(
        self,
        needed: Iterable[FrameRef],
        ahead: Iterable[FrameRef] = (),
        account: Metrics | None = None,
    ) -> dict[bytes, bytes | EnvstoreError]:
        """Return by digest the ``needed`` frames' raw bytes, or for each the error that befell it.

        ``ahead`` are frames worth having soon; those next to needed ones come with them, the
        others on their own, and nobody waits for them. Frames on their way already, for whatever
        snapshot, are not asked for again; a failure is not remembered. What is asked for now is
        put on ``account``.
        """
        wanted = {frame.digest: frame for frame in needed}
        deadline = trio.current_time() + self._patience
        found: dict[bytes, bytes | EnvstoreError] = {}
        elsewhere = []
        self._take_off(wanted.values(), ahead, account)
        for flight in self._join(wanted, deadline):
            own = wanted[flight.frame.digest]
            found[own.digest] = result = await flight.wait(deadline)
            if own != flight.frame and is_misplaced(result):
                elsewhere.append(own)
        if elsewhere:
            # Another snapshot's locations led there; ours may know a better place.
            found |= await self.load(elsewhere, account=account)
        return found

    def prefetch(self, ahead: Iterable[FrameRef], account: Metrics | None = None) -> None:
        """Begin to fetch frames that nobody waits for."""
        self._take_off((), ahead, account)

    async def stream(
        self,
        frames: Iterable[FrameRef],
        *,
        concurrency: int = 3,
        request: int = STREAM_REQUEST,
        window: int = STREAM_WINDOW,
        rate: float | None = None,
        certain: bool = False,
        account: Metrics | None = None,
    ) -> list[FrameRef]:
        """Fetch what is not cached of ``frames``, in the order given, and return when it is done.

        ``concurrency`` requests at a time, of up to ``request`` stored bytes: each brings the
        first frame that is missing, and with it those of the next ``window`` bytes of ``frames``
        that lie beside it. ``rate`` limits the bytes received in a second. Who needs a frame of
        a request on its way gets it as soon as that frame has come, and what is needed and not
        on its way does not wait for any of this. ``certain`` says that these frames will be read,
        so that readers need not guess meanwhile which other files are. Ends early, with a
        complaint, when the store has not been reached for as long as the loader is patient.

        Returns the frames that are not where they should be. When it is cancelled, what is on its
        way still comes. Raises nothing.
        """
        pace = None if rate is None else Pace(rate)
        queue = Lookahead(self._missing(frames), window)
        misplaced: list[FrameRef] = []
        reached = trio.current_time()

        async def work() -> None:
            nonlocal reached
            tries = 0
            while group := self._next_group(queue, request):
                group.pace, group.account = pace, account
                self._nursery.start_soon(self._fetch, group, self._streams)
                await group.done.wait()
                misplaced.extend(group.misplaced)
                if not group.lost:
                    reached, tries = trio.current_time(), 0
                    continue
                if trio.current_time() - reached > self._patience:
                    self._complaints.say("gave up fetching ahead: the store cannot be reached")
                    queue.clear()
                    return
                queue.put_back(group.lost)
                tries += 1
                await trio.sleep(self._pause(tries))

        self.certain += certain
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(concurrency):
                    nursery.start_soon(work)
        finally:
            self.certain -= certain
        return misplaced

    def used(self, name: bytes) -> None:
        """Note that a reader was given bytes of the cached frame called ``name``."""
        if self._unused:
            stored = self._unused.pop(name, None)
            if stored is not None:
                self._metrics.prefetched_used += 1
                self._metrics.prefetched_used_bytes += stored

    def _missing(self, frames: Iterable[FrameRef]) -> Iterator[FrameRef]:
        """Pass on the frames that are neither cached nor on their way, when it comes to them."""
        for frame in frames:
            if not (frame.digest in self._flights or self._cache.contains(frame.digest)):
                yield frame

    def _next_group(self, queue: Lookahead, request: int) -> Group | None:
        """Let the frames that come next take off, up to one request."""
        ahead: dict[bytes, FrameRef] = {}
        while not ahead and (shown := queue.ahead()):
            ahead = {frame.digest: frame for frame in self._missing(shown)}
            queue.keep(ahead.values())
        if not ahead:
            return None
        first = self._fetcher.plan(ahead.values(), max_request=request)[0]
        taken = {frame.digest for frame in first}
        queue.keep([frame for frame in ahead.values() if frame.digest not in taken])
        return self._grouped(first, frozenset())

    def _join(self, wanted: Iterable[bytes], deadline: float) -> list[Flight]:
        """Return the flights of frames, whose requests now are urgent."""
        flights = [self._flights[name] for name in wanted]
        for flight in flights:
            flight.urgent = True
            flight.deadline = max(flight.deadline, deadline)
            if not flight.group.demanded:
                # Perhaps it is queued to be fetched ahead: that turn may come late.
                flight.group.demanded = True
                self._nursery.start_soon(self._fetch, flight.group, self._demanded)
        return flights

    def _take_off(
        self, needed: Iterable[FrameRef], ahead: Iterable[FrameRef], account: Metrics | None
    ) -> None:
        """Make flights for frames that have none, and queue those that nobody waits for."""
        missing = {frame.digest: frame for frame in needed if frame.digest not in self._flights}
        extra = {
            frame.digest: frame
            for frame in ahead
            # What is cached may still lie on a disk that takes its time.
            if not (
                frame.digest in self._flights
                or frame.digest in missing
                or self._cache.expect(frame.digest)
            )
        }
        self._metrics.ahead += len(extra)
        for found in self._fetcher.plan(
            (*missing.values(), *extra.values()), max_request=MAX_REQUEST
        ):
            group = self._grouped(found, missing.keys())
            group.account = account
            if missing.keys().isdisjoint(frame.digest for frame in found):
                self._nursery.start_soon(self._fetch, group, self._ahead)

    def _grouped(self, frames: tuple[FrameRef, ...], needed: Iterable[bytes]) -> Group:
        group = Group(
            frames, [Flight(frame, guessed=frame.digest not in needed) for frame in frames]
        )
        for flight in group.flights:
            if flight is not None:
                self._flights[flight.frame.digest] = flight
        return group

    async def _fetch(self, group: Group, turn: trio.CapacityLimiter, pause: float = 0) -> None:
        """Fetch a group after a pause, unless it is being fetched already."""
        try:
            await trio.sleep(pause)
            async with Turn(turn, group) as held:
                if group.started:
                    return
                group.started = True
                await self._request(group, held)
            self._settle(group)
        except BaseException:
            # Also when cancelled: nobody may be left waiting.
            for position in range(len(group.flights)):
                self._land(group, position, _failed(group))
            raise

    async def _request(self, group: Group, turn: Turn) -> None:
        """Ask the store for a group once, and land what comes."""
        token = trio.lowlevel.current_trio_token()

        def deliver(position: int, result: bytes | EnvstoreError) -> None:
            token.run_sync_soon(self._deliver, group, position, result)

        def fetch() -> None:
            self._fetcher.stream(group.frames, deliver, urgent=group.urgent, arrived=group.arrived)

        group.heard = time.monotonic()
        if group.account is not None:
            group.account.brought_requests += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn.give_back_after_silence)
            try:
                await trio.to_thread.run_sync(
                    fetch, abandon_on_cancel=True, limiter=self._threads[turn.limiter]
                )
            except Exception:  # noqa: BLE001 - a bug must cost these reads, not the whole mount
                _log.exception("fetching from pack %s failed", group.frames[0].pack.hex())
            nursery.cancel_scope.cancel()
        if self._fetcher.refused is not None:
            self._complaints.say(f"not kept: {self._fetcher.refused}")
            self._fetcher.refused = None

    def _deliver(self, group: Group, position: int, result: bytes | EnvstoreError) -> None:
        """Land a frame that came; of one that did not, remember why."""
        flight = group.flights[position]
        if isinstance(result, bytes):
            if group.account is not None:
                group.account.brought_bytes += group.frames[position].stored
            self._land(group, position, result)
        elif flight is not None:
            flight.failure = result
            flight.tries += 1
            self._metrics.corrupt += isinstance(result, CorruptError)

    def _settle(self, group: Group) -> None:
        """Try again what did not come, where that makes sense; land the rest as it is."""
        now = trio.current_time()
        again: list[Flight] = []
        for position, flight in enumerate(group.flights):
            if flight is None:
                continue
            if flight.may_land(now, renewed=self._renewed):
                again.append(flight)
                continue
            failure = flight.failure or _failed(group)
            if not flight.urgent:
                self._complaints.say(f"readahead: {failure}")
                if isinstance(failure, UnavailableError):
                    group.lost.append(flight.frame)
            if is_misplaced(failure):
                group.misplaced.append(flight.frame)
            self._land(group, position, failure)
        if again:
            self._complaints.say(f"trying again: {again[0].failure}")
        for found in self._fetcher.plan(
            (flight.frame for flight in again), max_request=MAX_REQUEST
        ):
            flights = [self._flights[frame.digest] for frame in found]
            pause = self._pause(min(flight.tries for flight in flights))
            retry = Group(found, list(flights), demanded=True, account=group.account)
            self._metrics.retries += 1
            self._nursery.start_soon(self._fetch, retry, self._demanded, pause)
        group.done.set()

    def _pause(self, tries: int) -> float:
        """Return how long to wait before another try: longer each time, and never the same.

        Who comes later and waits for the same must not run out of patience in a pause.
        """
        longest = min(_LONGEST_PAUSE, self._patience / 8, _FIRST_PAUSE * float(2**tries))
        return longest * random.uniform(0.5, 1)  # noqa: S311

    def _land(self, group: Group, position: int, result: bytes | EnvstoreError) -> None:
        """Give a result to the flight of one frame, unless it has landed already."""
        flight = group.flights[position]
        if flight is None:
            return
        # Of what nobody waits for nothing may stay in memory, not even until the group is done.
        group.flights[position] = None
        name, stored = flight.frame.digest, flight.frame.stored
        del self._flights[name], flight.group
        flight.land(result)
        if flight.guessed and isinstance(result, bytes):
            self._metrics.prefetched += 1
            self._metrics.prefetched_bytes += stored
            self._unused[name] = stored
            if flight.urgent:
                self.used(name)

    async def recheck(self, frame: FrameRef) -> bytes | None:
        """Return a frame's bytes if the cached blob is sound; else see that there is none."""

        def check() -> bytes | None:
            try:
                if not self._cache.contains(frame.digest):
                    return None
                data = self._cache.read(frame.digest, 0, frame.raw)
                if data is not None and digest(data) == frame.digest:
                    return data
                self._cache.drop(frame.digest)
            except EnvstoreError as error:
                _log.warning("cannot check blob %s: %s", frame.digest.hex(), error)
                return None
            self._metrics.damaged += 1
            _log.warning("dropped damaged blob %s from the cache", frame.digest.hex())
            return None

        return await trio.to_thread.run_sync(check, limiter=self._checks)


def _failed(group: Group) -> EnvstoreError:
    return EnvstoreError(f"fetching from pack {group.frames[0].pack.hex()} failed")
