"""The values that the parts of a checkpoint hand to each other.

A *part* is what one rank saves: a small tree of files, ``state.json`` and one
``<item>.safetensors`` for each item that holds tensors, at the top if there is one rank and below
``ranks/<rank>/`` otherwise. A slot in memory, a part in the store and a committed checkpoint show
the same paths, so that one reader reads all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from envstore.errors import UsageError
from envstore.store.refs import RefName, is_part

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True, order=True)
class RunName:
    """``namespace/name`` of a run, under which all its checkpoints lie."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> RunName:
        """Parse ``[namespace/]name``. Raises ``UsageError``."""
        if ":" in text:
            raise UsageError(f"{text!r} is not the name of a run", hint="leave out the ':tag'")
        ref = RefName.parse(text)
        return cls(ref.namespace, ref.name)

    def ref(self, tag: str) -> RefName:
        """Return the ref with ``tag`` under this name. Raises ``UsageError``."""
        if not is_part(tag):
            raise UsageError(f"{tag!r} is not a valid tag")
        return RefName(self.namespace, self.name, tag)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """One attempt to save one step: by which incarnation (epoch), and its how manieth.

    They order as they count: of the same step the later epoch, then the later attempt, wins.
    """

    step: int
    epoch: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.step:012d}-{self.epoch:08d}-{self.attempt:04d}"


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One file of a part in a slot: its path and its ``(offset in the slot, length)`` segments.

    A segment is a header, a tensor or a blob: chunks are cut at its start and end, and every
    4 MiB from its start.
    """

    path: str
    segments: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(length for _, length in self.segments)


@dataclass(frozen=True, slots=True)
class Orders:
    """What a persister must know besides the bytes, as the trainer wrote it into the slot.

    ``bases`` are refs or digests of snapshots to share chunks with. ``keep`` is a retention
    policy as ``policies.encode_keep`` wrote it, ``""`` to keep all. ``codec`` is one of ``raw``,
    ``split`` (byte planes, zstd) and ``xor`` (difference to an anchor, byte planes, zstd).
    """

    store: str
    run: str
    checkpoint: CheckpointId
    rank: int
    world_size: int
    saved: str
    bases: tuple[str, ...] = ()
    keep: str = ""
    codec: str = "raw"
    pin: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Want:
    """A range of one file that is to be read into a writable, C-contiguous ``view`` of bytes."""

    path: str
    start: int
    view: memoryview


class Tree(Protocol):
    """Files of a checkpoint, wherever they lie. Safe to use from one thread at a time."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by path."""
        ...

    def read(self, path: str) -> bytes:
        """Return a whole (small) file. Raises ``NotFoundError`` and the errors of the store."""
        ...

    def read_into(self, wants: Sequence[Want]) -> None:
        """Fill every view, verified; in whatever order is fastest.

        Raises ``CorruptError`` naming the file, ``NotFoundError``, and the errors of the store;
        the views then hold anything.
        """
        ...

    def close(self) -> None:
        """Give back what is held open; idempotent."""
        ...


class Piece(Protocol):
    """A run of bytes that is still where the trainer keeps it: a tensor, an array, a header."""

    @property
    def nbytes(self) -> int:
        """How many bytes it will have."""
        ...

    @property
    def stable(self) -> bool:
        """Whether it provably stays as it is until the next step of an optimizer."""
        ...

    def copy_into(self, view: memoryview) -> None:
        """Copy all of it into ``view``, which is that long. May use several threads."""
        ...


@dataclass(frozen=True, slots=True)
class CapturedFile:
    """One file of a part that is to be staged, in pieces."""

    path: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Captured:
    """A state, described and ready to be copied. It refers to the live tensors."""

    files: tuple[CapturedFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def part_prefix(rank: int, world_size: int) -> str:
    """Return what the paths of a rank's files begin with: nothing if it is the only one."""
    return "" if world_size == 1 else f"ranks/{rank:05d}/"
