"""When a run saves, and which checkpoints it keeps: values that are composed by ``|``.

    save = every(steps=500) | every(minutes=30)
    keep = last(2) | every(10_000) | best("loss", "min", 3)

All of this is pure: no store, no clock. ``every`` may stand in either place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from envstore.checkpoint.layout import CheckpointId
from envstore.errors import UsageError

FIRST_SECONDS = 30.0
"""After so long ``auto`` saves for the first time, to learn what a save costs."""
_MAX_POLICIES = 64
_MAX_NUMBER = 10**12
_MAX_TEXT = 100_000


class Kept(Protocol):
    """What a keep policy looks at; ``created`` is RFC 3339 UTC. A ``Commit`` is one."""

    @property
    def checkpoint(self) -> CheckpointId:
        """Which checkpoint it is."""
        ...

    @property
    def created(self) -> str:
        """When it was saved."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured at that step."""
        ...


@dataclass(frozen=True, slots=True)
class SaveStats:
    """What a run knows of its saves. Times are seconds of the clock that ``now`` is of.

    ``step`` and ``time`` are those of the last save; before the first one, those at which the run
    began or was restored. ``stall`` is for how long a save holds up the training, ``persist`` how
    long it then takes to be durable; ``None`` until measured. ``busy``: the last save is not
    durable yet.
    """

    step: int
    time: float
    stall: float | None = None
    persist: float | None = None
    busy: bool = False


class Policy:
    """When to save, or what to keep, or both. Immutable; ``|`` means that either suffices."""

    __slots__ = ()

    @property
    def by_step(self) -> bool:
        """Whether steps alone decide when to save: then all ranks come to the same answer."""
        return True

    def due(self, step: int, now: float, stats: SaveStats) -> bool:
        """Return whether to save after ``step``. Raises ``UsageError`` if it cannot say."""
        raise UsageError(f"{self!r} says what to keep, not when to save")

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """Return what to keep of ``commits``, ascending, at the Unix time ``now``.

        Raises ``UsageError`` if it cannot say.
        """
        raise UsageError(f"{self!r} says when to save, not what to keep")

    def encode(self) -> list[Any]:
        """Return a keep policy as JSON. Raises ``UsageError`` if it is none."""
        raise UsageError(f"{self!r} says when to save, not what to keep")

    def __or__(self, other: Policy) -> AnyOf:
        return AnyOf((*_members(self), *_members(other)))


@dataclass(frozen=True, slots=True)
class AnyOf(Policy):
    """Several policies, each of which suffices."""

    members: tuple[Policy, ...]

    @property
    def by_step(self) -> bool:
        """See ``Policy.by_step``."""
        return all(member.by_step for member in self.members)

    def due(self, step: int, now: float, stats: SaveStats) -> bool:
        """See ``Policy.due``."""
        return any(member.due(step, now, stats) for member in self.members)

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        return set().union(*(member.kept(commits, pins, now) for member in self.members))

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["any", *(member.encode() for member in self.members)]


@dataclass(frozen=True, slots=True)
class EverySteps(Policy):
    """Save when a multiple of ``steps`` is reached or passed; keep those that are multiples."""

    steps: int

    def due(self, step: int, now: float, stats: SaveStats) -> bool:
        """See ``Policy.due``."""
        return step // self.steps > stats.step // self.steps

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        return {one.checkpoint for one in commits if one.checkpoint.step % self.steps == 0}

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["every_steps", self.steps]


@dataclass(frozen=True, slots=True)
class EverySeconds(Policy):
    """Save when so long has passed since the last save; keep the first of each such time."""

    seconds: int

    @property
    def by_step(self) -> bool:
        """See ``Policy.by_step``."""
        return False

    def due(self, step: int, now: float, stats: SaveStats) -> bool:
        """See ``Policy.due``."""
        return now - stats.time >= self.seconds

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        first: dict[float, CheckpointId] = {}
        for one in commits:
            first.setdefault(_time(one) // self.seconds, one.checkpoint)
        return set(first.values())

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["every_seconds", self.seconds]


@dataclass(frozen=True, slots=True)
class Auto(Policy):
    """Save as often as the time that training stands still stays below a share of all time.

    And never while the last save is not durable, nor more often than that takes (after Mohan et
    al., "CheckFreq: Frequent, Fine-Grained DNN Checkpointing", FAST 2021).
    """

    max_overhead: float

    @property
    def by_step(self) -> bool:
        """See ``Policy.by_step``."""
        return False

    def due(self, step: int, now: float, stats: SaveStats) -> bool:
        """See ``Policy.due``."""
        if stats.busy:
            return False
        if stats.stall is None:
            return now - stats.time >= FIRST_SECONDS
        return now - stats.time >= max(stats.stall / self.max_overhead, stats.persist or 0.0)


@dataclass(frozen=True, slots=True)
class Last(Policy):
    """Keep the newest ``n``."""

    n: int

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        return {one.checkpoint for one in commits[-self.n :]}

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["last", self.n]


@dataclass(frozen=True, slots=True)
class Best(Policy):
    """Keep the ``n`` with the smallest (``min``) or largest (``max``) finite ``metric``.

    Of equal ones the later.
    """

    metric: str
    mode: str
    n: int

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        sign = 1.0 if self.mode == "max" else -1.0
        measured = [
            (sign * one.metrics[self.metric], one.checkpoint)
            for one in commits
            if math.isfinite(one.metrics.get(self.metric, math.nan))
        ]
        return {checkpoint for _, checkpoint in sorted(measured)[-self.n :]}

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["best", self.metric, self.mode, self.n]


@dataclass(frozen=True, slots=True)
class Pinned(Policy):
    """Keep what is pinned, which is never deleted anyway: alone, it means nothing else."""

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        return set(pins)

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["pinned"]


@dataclass(frozen=True, slots=True)
class YoungerThan(Policy):
    """Keep what was saved less than ``seconds`` ago."""

    seconds: int

    def kept(
        self, commits: Sequence[Kept], pins: Collection[CheckpointId], now: float
    ) -> set[CheckpointId]:
        """See ``Policy.kept``."""
        return {one.checkpoint for one in commits if now - _time(one) < self.seconds}

    def encode(self) -> list[Any]:
        """See ``Policy.encode``."""
        return ["younger_than", self.seconds]


def every(
    steps: int | None = None, *, minutes: float | None = None, seconds: float | None = None
) -> Policy:
    """Save, or keep, one every so many ``steps``, or so much time. Raises ``UsageError``."""
    given = [value for value in (steps, minutes, seconds) if value is not None]
    if len(given) != 1:
        raise UsageError("every() takes one of steps=, minutes= and seconds=")
    if steps is not None:
        return EverySteps(_number(steps, "every: steps"))
    return EverySeconds(_seconds(given[0] * (1 if minutes is None else 60), "every"))


def auto(max_overhead: float = 0.02) -> Policy:
    """Save as often as ``max_overhead`` (a share of the time) allows. Raises ``UsageError``."""
    given: object = max_overhead
    if not isinstance(given, int | float) or not 0 < given < 1:
        raise UsageError("auto: max_overhead is a share, above 0 and below 1", hint="0.02 is 2 %")
    return Auto(float(max_overhead))


def last(n: int) -> Policy:
    """Keep the newest ``n``, at least one. Raises ``UsageError``."""
    return Last(_number(n, "last"))


def best(metric: str, mode: str = "min", n: int = 1) -> Policy:
    """Keep the ``n`` best by ``metric``; ``mode`` is ``min`` or ``max``. Raises ``UsageError``."""
    if mode not in ("min", "max"):
        raise UsageError(f"best: mode is 'min' or 'max', not {mode!r}")
    return Best(_metric(metric), mode, _number(n, "best"))


def younger_than(*, hours: float | None = None, days: float | None = None) -> Policy:
    """Keep what was saved less than so long ago. Raises ``UsageError``."""
    if (hours is None) == (days is None):
        raise UsageError("younger_than() takes one of hours= and days=")
    if days is not None:
        return YoungerThan(_seconds(days * 86400, "younger_than"))
    return YoungerThan(_seconds((hours or 0) * 3600, "younger_than"))


pinned: Policy = Pinned()


def encode_keep(policy: Policy | None) -> str:
    """Return a keep policy as text, ``""`` for ``None``: keep all. Raises ``UsageError``."""
    return "" if policy is None else json.dumps(policy.encode(), separators=(",", ":"))


def decode_keep(text: str) -> Policy | None:
    """Return what ``encode_keep`` was given. Raises ``UsageError`` for anything else."""
    if not text:
        return None
    try:
        value = json.loads(text) if len(text) <= _MAX_TEXT else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not value:
        raise UsageError(f"{text[:80]!r} is no retention policy")
    members = value[1:] if value[0] == "any" else [value]
    if not 1 <= len(members) <= _MAX_POLICIES:
        raise UsageError(f"a retention policy has 1 to {_MAX_POLICIES} members")
    found = [_decode(member) for member in members]
    return AnyOf(tuple(found)) if value[0] == "any" else found[0]


def _members(policy: Policy) -> tuple[Policy, ...]:
    if not isinstance(policy, Policy):
        raise UsageError(f"{policy!r} is no policy", hint="see envstore.checkpoint.policies")
    return policy.members if isinstance(policy, AnyOf) else (policy,)


def _time(one: Kept) -> float:
    return datetime.fromisoformat(one.created).timestamp()


def _metric(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError("best: metric is the name of a metric")
    return value


def _number(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_NUMBER:
        raise UsageError(f"{what} is a whole number of at least 1, not {value!r:.40}")
    return value


def _seconds(value: float, what: str) -> int:
    if not 0 < value <= _MAX_NUMBER:
        raise UsageError(f"{what}: that is no time: {value!r:.40}")
    return max(1, round(value))


_MAKERS: Mapping[str, Callable[..., Policy]] = {
    "every_steps": every,
    "every_seconds": lambda seconds: EverySeconds(_number(seconds, "every_seconds")),
    "last": last,
    "best": best,
    "pinned": Pinned,
    "younger_than": lambda seconds: YoungerThan(_number(seconds, "younger_than")),
}


def _decode(value: object) -> Policy:
    if isinstance(value, list) and value and isinstance(value[0], str) and value[0] in _MAKERS:
        try:
            return _MAKERS[value[0]](*value[1:])
        except TypeError:
            pass
    raise UsageError(f"{str(value)[:80]!r} is no retention policy")
