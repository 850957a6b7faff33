"""Parts and commits as they are stored: immutable canonical JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from envstore.checkpoint.bodies import (
    FORMAT,
    MAX_WORLD,
    parse_time,
    read_body,
    read_digest,
    read_id,
    read_metrics,
    read_number,
    read_text,
    read_texts,
    read_time,
    write_metrics,
)
from envstore.checkpoint.layout import CheckpointId
from envstore.errors import CorruptError, UsageError
from envstore.store import canonical

_SIZES = 1 << 63


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has stored of a checkpoint.

    ``snapshot`` is the digest of its tree, which is stored before the part is. ``plan`` stands for
    what all ranks must agree on, as text; parts with different plans do not fit. ``saved`` is
    RFC 3339 UTC. ``size`` counts the bytes of its files, ``sent`` what it took to store them.
    """

    checkpoint: CheckpointId
    rank: int
    world_size: int
    snapshot: bytes
    saved: str
    plan: str = ""
    size: int = 0
    sent: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the object that is stored. Raises ``UsageError`` for what no reader would take."""
        if not 0 <= self.rank < self.world_size <= MAX_WORLD:
            raise UsageError(
                f"rank {self.rank} of {self.world_size} cannot be kept",
                hint=f"a checkpoint has at most {MAX_WORLD} ranks",
            )
        if parse_time(self.saved) is None:
            raise UsageError(f"{self.saved!r} is no time in UTC after RFC 3339")
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "checkpoint": str(self.checkpoint),
                "rank": self.rank,
                "world_size": self.world_size,
                "snapshot": self.snapshot.hex(),
                "plan": self.plan,
                "saved": self.saved,
                "size": self.size,
                "sent": self.sent,
                "metrics": write_metrics(self.metrics),
                "lineage": dict(self.lineage),
            }
        )


def parse_part(data: bytes, checkpoint: CheckpointId, rank: int, world_size: int) -> Part:
    """Return the stored part that its key says is this one. Raises ``CorruptError``."""
    what = f"part {rank} of {world_size} of checkpoint {checkpoint}"
    value = read_body(data, what)
    found = Part(
        read_id(value, "checkpoint", what),
        read_number(value, "rank", what, 0, MAX_WORLD),
        read_number(value, "world_size", what, 1, MAX_WORLD + 1),
        read_digest(value.get("snapshot"), what),
        read_time(value, "saved", what),
        read_text(value, "plan", what),
        read_number(value, "size", what, 0, _SIZES),
        read_number(value, "sent", what, 0, _SIZES),
        read_metrics(value, what),
        read_texts(value, "lineage", what),
    )
    if (found.checkpoint, found.rank, found.world_size) != (checkpoint, rank, world_size):
        raise CorruptError(f"{what} says that it is another one")
    return found


@dataclass(frozen=True, slots=True)
class Commit:
    """A whole checkpoint: ``snapshot`` is its tree, ``parts`` the trees of its ranks, in order.

    ``created`` is when the last rank saved, RFC 3339 UTC. ``size`` counts the bytes of all ranks'
    files. ``metrics`` and ``lineage`` are those of the first rank that told each.
    """

    checkpoint: CheckpointId
    snapshot: bytes
    parts: tuple[bytes, ...]
    created: str
    size: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self.checkpoint.step

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""
        return len(self.parts)

    def encode(self) -> bytes:
        """Return the object that is stored: the same from whoever commits the same parts."""
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "checkpoint": str(self.checkpoint),
                "snapshot": self.snapshot.hex(),
                "parts": [part.hex() for part in self.parts],
                "created": self.created,
                "size": self.size,
                "metrics": write_metrics(self.metrics),
                "lineage": dict(self.lineage),
            }
        )


def commit_of(checkpoint: CheckpointId, snapshot: bytes, parts: Sequence[Part]) -> Commit:
    """Return the commit of ``parts``, one of each rank in order, merged into ``snapshot``."""
    metrics: dict[str, float] = {}
    lineage: dict[str, str] = {}
    for part in reversed(parts):
        metrics.update(part.metrics)
        lineage.update(part.lineage)
    return Commit(
        checkpoint,
        snapshot,
        tuple(part.snapshot for part in parts),
        latest_time(part.saved for part in parts),
        sum(part.size for part in parts),
        metrics,
        lineage,
    )


def latest_time(times: Iterable[str]) -> str:
    """Return the latest of some RFC 3339 times; of equal ones the same for everyone."""
    return max(times, key=lambda text: (parse_time(text) or 0.0, text))


def parse_commit(data: bytes, checkpoint: CheckpointId) -> Commit:
    """Return the stored commit that its key says is this one. Raises ``CorruptError``."""
    what = f"commit of checkpoint {checkpoint}"
    value = read_body(data, what)
    parts = canonical.field(value, "parts", list, what)
    if not 1 <= len(parts) <= MAX_WORLD or read_id(value, "checkpoint", what) != checkpoint:
        raise CorruptError(f"{what} has no parts, too many, or says that it is another one")
    return Commit(
        checkpoint,
        read_digest(value.get("snapshot"), what),
        tuple(read_digest(part, what) for part in parts),
        read_time(value, "created", what),
        read_number(value, "size", what, 0, _SIZES),
        read_metrics(value, what),
        read_texts(value, "lineage", what),
    )
