"""What a collection did, what stays, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = {
    "grace": "found dead less than the grace period ago",
    "writers": "found dead after a writer began that is still at work",
    "undeletable": "the store refuses to delete it",
    "parts": "dead within packs that are live",
    "anchors": "dead within packs that differences elsewhere need",
    "next": "dead, for the next collection",
    "drafts": "live for drafts alone: files of trees that are not whole yet",
    "leases": "live for leases alone: mounted or read somewhere",
    "sessions": "live for writers alone: declared and not referred to yet",
}
"""Why bytes stay that no ref and no checkpoint needs."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A writer at work: what it does, where, and seconds since it was last heard of."""

    key: str
    what: str
    host: str
    epoch: int
    silent: float


@dataclass(frozen=True, slots=True)
class Busy:
    """Another collector that is at work: its process, and until when its lease lasts."""

    host: str
    until: int


@dataclass(slots=True)
class Collected:
    """The outcome of a collection; all sizes are bytes.

    ``freed`` counts what was deleted, or would be; ``written`` what was stored instead of parts of
    it; ``condemned`` what is on the list now and will be deleted. ``live`` is what refs and
    checkpoints need, with what is neither live nor garbage, such as the index; ``kept`` is the
    rest of the store by reason, see ``KINDS``. ``no_space`` says what kept packs that are live in
    part from being repacked, if anything has: the store was too full.
    """

    dry_run: bool = False
    busy: Busy | None = None
    epoch: int = 0
    seconds: float = 0.0
    snapshots: int = 0
    packs: int = 0
    store_bytes: int = 0
    live_bytes: int = 0
    condemned_bytes: int = 0
    condemned_objects: int = 0
    freed_bytes: int = 0
    freed_objects: int = 0
    freed_packs: int = 0
    written_bytes: int = 0
    repacked_packs: int = 0
    undeletable_objects: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    no_space: str = ""

    @property
    def kept_bytes(self) -> int:
        """What stays although no ref and no checkpoint needs it."""
        return sum(self.kept.values())
