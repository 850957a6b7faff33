"""What a check of a store says: the objects that are not as they should be, and whom that harms."""

from __future__ import annotations

from dataclasses import dataclass, field

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError

DAMAGE = (CorruptError, NotFoundError, UnsupportedFormatError)
"""What is wrong with one object, and does not keep the others from being looked at."""

MAX_FILES = 10_000
"""Files that are named for one problem; more than that are counted."""


@dataclass(frozen=True, slots=True)
class LostFile:
    """A file that cannot be read any more, in the trees of the refs or snapshots ``harms``."""

    path: bytes
    harms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One damaged or missing object, why, and which refs or snapshots it harms.

    ``files`` are at most ``MAX_FILES`` of the ``lost`` files that it keeps from being read.
    """

    object: str
    reason: str
    harms: tuple[str, ...] = ()
    files: tuple[LostFile, ...] = ()
    lost: int = 0


@dataclass(slots=True)
class Report:
    """What was checked: counts of objects, and bytes of packs read.

    ``data_packs`` of ``packs`` were read whole, and ``earlier_packs``, of ``earlier_bytes``, by
    the run that this one continues. ``damaged`` says of the packs that are to be on the damaged
    list why; ``sound`` are the packs that were read whole and are as they should be;
    ``quarantined`` are damaged, and nothing needs them; ``unneeded`` are on the list, and nothing
    names them at all. ``false_locations`` are manifests whose locations are damaged or lead to what
    is not there. ``started`` is when the data began to be read (RFC 3339). ``warnings`` are no
    damage.
    """

    snapshots: int = 0
    packs: int = 0
    frames: int = 0
    chunks: int = 0
    bytes_read: int = 0
    data_packs: int = 0
    earlier_packs: int = 0
    earlier_bytes: int = 0
    started: str = ""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    damaged: dict[bytes, str] = field(default_factory=dict)
    sound: set[bytes] = field(default_factory=set)
    quarantined: set[bytes] = field(default_factory=set)
    unneeded: set[bytes] = field(default_factory=set)
    false_locations: set[bytes] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems
