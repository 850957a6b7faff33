"""Frames on their way from the store, who waits for them, and the requests that bring them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
)
from envstore.fuse.metrics import Metrics
from envstore.fuse.pace import Pace
from envstore.store.locations import FrameRef

_SILENCE = 2.0
"""Seconds after which a request that nothing comes of lets others go before it."""

_CORRUPT_TRIES, _REFUSED_TRIES = 2, 5


class Flight:
    """One frame on its way, and everybody who waits for it.

    ``urgent`` once somebody waits; then it is worth trying until ``deadline``, in trio's time.
    ``guessed`` if it was asked for before anybody waited. ``failure`` is what became of the last
    of ``tries``.
    """

    __slots__ = (
        *("_done", "_result", "deadline", "failure", "frame", "group", "guessed"),
        *("tries", "urgent"),
    )

    def __init__(self, frame: FrameRef, *, guessed: bool) -> None:
        self.frame = frame
        self.guessed = guessed
        self.group: Group
        self.urgent = False
        self.deadline = 0.0
        self.tries = 0
        self.failure: EnvstoreError | None = None
        self._done = trio.Event()
        self._result: bytes | EnvstoreError = b""

    def land(self, result: bytes | EnvstoreError) -> None:
        """Give everybody who waits the frame's raw bytes, or the error that befell it."""
        self._result = result
        self._done.set()

    async def wait(self, deadline: float) -> bytes | EnvstoreError:
        """Return what landed; after ``deadline`` the last failure, if there was one.

        A request that is merely slow is waited for as long as it makes progress.
        """
        with trio.move_on_at(deadline):
            await self._done.wait()
        if not self._done.is_set():
            if self.failure is not None:
                return self.failure
            await self._done.wait()
        return self._result

    def may_land(self, now: float, *, renewed: bool) -> bool:
        """Return whether another try can bring a frame, and somebody waits that long.

        ``renewed`` says that others bring new credentials when the store takes these no longer.
        """
        if not self.urgent or now >= self.deadline:
            return False
        if isinstance(self.failure, UnavailableError):
            return True
        if isinstance(self.failure, CorruptError):  # by something on the way, perhaps
            return self.tries < _CORRUPT_TRIES
        if isinstance(self.failure, AccessDeniedError):  # credentials renew themselves, perhaps
            return renewed or self.tries < _REFUSED_TRIES
        return False


@dataclass(slots=True, eq=False)
class Group:
    """The flights that one request brings, in the order of the pack, and where it stands.

    Of what has landed ``None`` is left. ``heard`` is when the last bytes came, in seconds of
    ``time.monotonic``; ``pace`` limits the bandwidth while nobody waits. ``lost`` are the frames
    that nobody waited for when the store could not be reached, ``misplaced`` those that were not
    where they should be. ``account`` is whose they are.
    """

    frames: Sequence[FrameRef]
    flights: list[Flight | None]
    demanded: bool = False
    started: bool = False
    pace: Pace | None = None
    account: Metrics | None = None
    heard: float = 0.0
    lost: list[FrameRef] = field(default_factory=list)
    misplaced: list[FrameRef] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        for flight in self.flights:
            if flight is not None:
                flight.group = self

    def urgent(self, position: int) -> bool:
        """Return whether somebody waits for the frame at ``position``. From any thread."""
        flight = self.flights[position]
        return flight is not None and flight.urgent

    def arrived(self, size: int) -> None:
        """Note that ``size`` bytes came, and keep to the pace. From a worker thread."""
        self.heard = time.monotonic()
        if self.pace is not None and not any(map(self.urgent, range(len(self.flights)))):
            self.pace.wait(size)
            self.heard = time.monotonic()


class Turn:
    """A turn to ask the store, held by one group; lost when the store does not answer."""

    def __init__(self, limiter: trio.CapacityLimiter, group: Group) -> None:
        self.limiter = limiter
        self._group = group
        self._held = False

    async def __aenter__(self) -> Turn:
        await self.limiter.acquire_on_behalf_of(self._group)
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    async def give_back_after_silence(self) -> None:
        """Let others have the turn once nothing has come for a while."""
        while (silence := time.monotonic() - self._group.heard) < _SILENCE:
            await trio.sleep(_SILENCE - silence)
        self._give_back()

    def _give_back(self) -> None:
        if self._held:
            self._held = False
            self.limiter.release_on_behalf_of(self._group)


def is_misplaced(result: bytes | EnvstoreError) -> bool:
    """Whether something is not where it should be, so that it may be worth looking elsewhere."""
    return isinstance(result, (CorruptError, NotFoundError))
