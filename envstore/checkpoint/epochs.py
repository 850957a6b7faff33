"""Epochs: the incarnations of a run, one after the other, and which checkpoints still count.

An epoch begins in two steps. A *claim* takes the next number. Only then are the commits listed and
is it chosen which of them to resume from; the *start* writes that down, once for all ranks. Whoever
has written a COMMIT looks for claims that are newer and not started yet, and makes them *void*: who
made them must claim and list again. So a COMMIT that was reported is in the list that every later
epoch chooses from, whatever either side is interrupted by, and nobody waits for anybody.

What counts is what lies on the *line* of the newest epoch that has started: its own checkpoints,
those of the epoch it resumed from up to the one it resumed from, and so on, never beyond what a
later one of these resumed from. A claim without a
start changes nothing, and what an older incarnation goes on saving lies beside the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from envstore.checkpoint.bodies import (
    FORMAT,
    MAX_WORLD,
    create,
    read_body,
    read_id,
    read_number,
    read_text,
    read_time,
    run_prefix,
    try_get,
)
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.errors import CorruptError, UsageError
from envstore.store import canonical
from envstore.store.objects.base import ObjectStore

LAST = 10**8


@dataclass(frozen=True, slots=True)
class Epoch:
    """One incarnation of a run. ``resumed_from`` is ``None`` if it began with nothing."""

    number: int
    incarnation: str
    world_size: int
    resumed_from: CheckpointId | None
    created: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The number of an epoch, taken for an incarnation; ``created`` is RFC 3339 UTC."""

    number: int
    incarnation: str
    world_size: int
    created: str


@dataclass(frozen=True, slots=True)
class Line:
    """Which checkpoints count. ``limits`` has the last one that does, of each older epoch."""

    newest: int
    limits: Mapping[int, CheckpointId]

    def holds(self, checkpoint: CheckpointId) -> bool:
        """Return whether ``checkpoint`` counts."""
        if checkpoint.epoch >= self.newest:
            return True
        limit = self.limits.get(checkpoint.epoch)
        return limit is not None and checkpoint <= limit


@dataclass(frozen=True, slots=True)
class Standing:
    """How the epochs of a run stand.

    ``claimed`` is the greatest number taken, 0 if none is; ``pending`` are those neither started
    nor void, ascending; ``numbers`` all that are there.
    """

    claimed: int
    pending: tuple[int, ...]
    numbers: frozenset[int]
    newest: Epoch | None
    line: Line


class Epochs:
    """The epochs of one run in its store. Safe to share between threads.

    Claims and starts never change, so that each is read once.
    """

    def __init__(self, objects: ObjectStore, run: RunName) -> None:
        self._objects = objects
        self._run = run
        self._prefix = f"{run_prefix(run)}epochs/"
        self._starts: dict[int, Epoch | None] = {}

    def look(self) -> Standing:
        """Return how things stand. A listing, and a request for each epoch on the line not known.

        Raises ``CorruptError`` if one of them is damaged.
        """
        found: dict[str, set[int]] = {"claim": set(), "start": set()}
        for info in self._objects.list(self._prefix):
            number, _, kind = info.key.removeprefix(self._prefix).partition("/")
            if len(number) == 8 and number.isascii() and number.isdigit() and kind in found:
                found[kind].add(int(number))
        numbers = frozenset(found["claim"] | found["start"])
        pending = tuple(sorted(numbers - found["start"]))
        starts = (self.start(number) for number in sorted(found["start"], reverse=True))
        newest = next((epoch for epoch in starts if epoch is not None), None)
        return Standing(max(numbers, default=0), pending, numbers, newest, self._line(newest))

    def start(self, number: int) -> Epoch | None:
        """Return an epoch, ``None`` if it has not started or is void.

        One request, none when known.
        """
        if number not in self._starts:
            data = try_get(self._objects, self._key(number, "start"))
            if data is None:
                return None
            self._starts[number] = self._parse_start(data, number)
        return self._starts[number]

    def claim(self, number: int) -> Claim | None:
        """Return who took ``number``, ``None`` if nobody did. One request."""
        data = try_get(self._objects, self._key(number, "claim"))
        return None if data is None else self._parse_claim(data, number)

    def _line(self, newest: Epoch | None) -> Line:
        limits: dict[int, CheckpointId] = {}
        epoch, limit = newest, None
        while epoch is not None and epoch.resumed_from is not None:
            # An epoch may have saved smaller steps than the one it had resumed from.
            limit = min(limit or epoch.resumed_from, epoch.resumed_from)
            # Of a smaller number each time, which parsing has checked: this ends.
            limits[epoch.resumed_from.epoch] = limit
            epoch = self.start(epoch.resumed_from.epoch)
        return Line(newest.number if newest else 0, limits)

    def take(self, number: int, incarnation: str, world_size: int) -> Claim:
        """Claim ``number``; returns the claim that is there, ours or another's.

        Raises ``UnavailableError`` if the outcome is unknown.
        """
        body = {
            "format": FORMAT,
            "incarnation": incarnation,
            "world_size": world_size,
            "created": _now(),
        }
        data, _ = create(self._objects, self._key(number, "claim"), canonical.encode_checked(body))
        return self._parse_claim(data, number)

    def begin(self, claim: Claim, resumed_from: CheckpointId | None) -> Epoch | None:
        """Start a claimed epoch; returns it as whoever was first started it, ``None`` if void.

        Raises ``UsageError`` for what is not older, ``UnavailableError`` if the outcome is unknown.
        """
        if resumed_from is not None and resumed_from.epoch >= claim.number:
            raise UsageError(f"epoch {claim.number} cannot resume from {resumed_from}")
        return self._settle(
            claim.number,
            {
                "format": FORMAT,
                "incarnation": claim.incarnation,
                "world_size": claim.world_size,
                "resumed_from": "" if resumed_from is None else str(resumed_from),
                "created": _now(),
            },
        )

    def make_void(self, number: int) -> Epoch | None:
        """Keep a claim from being started; returns the epoch if it was started before.

        Raises ``UnavailableError`` if the outcome is unknown.
        """
        return self._settle(number, {"format": FORMAT, "void": 1})

    def _settle(self, number: int, body: dict[str, Any]) -> Epoch | None:
        data, _ = create(self._objects, self._key(number, "start"), canonical.encode_checked(body))
        self._starts[number] = self._parse_start(data, number)
        return self._starts[number]

    def forget(self, number: int) -> None:
        """Remove an epoch: the start, then the claim. Two requests."""
        self._objects.delete(self._key(number, "start"))
        self._objects.delete(self._key(number, "claim"))

    def _key(self, number: int, kind: str) -> str:
        return f"{self._prefix}{number:08d}/{kind}"

    def _parse_claim(self, data: bytes, number: int) -> Claim:
        what = f"claim of epoch {number} of {self._run}"
        value = read_body(data, what)
        return Claim(
            number,
            read_text(value, "incarnation", what),
            read_number(value, "world_size", what, 1, MAX_WORLD + 1),
            read_time(value, "created", what),
        )

    def _parse_start(self, data: bytes, number: int) -> Epoch | None:
        what = f"epoch {number} of {self._run}"
        value = read_body(data, what)
        if "void" in value:
            return None
        fresh = canonical.field(value, "resumed_from", str, what) == ""
        resumed_from = None if fresh else read_id(value, "resumed_from", what)
        if resumed_from is not None and resumed_from.epoch >= number:
            raise CorruptError(f"{what} says that it resumed from epoch {resumed_from.epoch}")
        return Epoch(
            number,
            read_text(value, "incarnation", what),
            read_number(value, "world_size", what, 1, MAX_WORLD + 1),
            resumed_from,
            read_time(value, "created", what),
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
