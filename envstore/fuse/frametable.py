"""The frames of a snapshot out of a tree image, without an object for each that nobody asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import overload

from envstore.store.digest import DIGEST_SIZE
from envstore.store.locations import FrameRef

_MADE = 20_000


@dataclass(frozen=True, slots=True)
class FrameColumns:
    """Columns of an image: numbers by frame, and where in ``memory`` the digests lie."""

    memory: mmap
    packs_at: int
    digests_at: int
    packs: Sequence[int]
    offsets: Sequence[int]
    stored: Sequence[int]
    raw: Sequence[int]
    codecs: Sequence[int]


class FrameTable(Sequence[FrameRef]):
    """Frames by number; remembers those asked for lately."""

    def __init__(self, columns: FrameColumns) -> None:
        self._c = columns
        self._made: dict[int, FrameRef] = {}

    def __len__(self) -> int:
        return len(self._c.codecs)

    @overload
    def __getitem__(self, at: int) -> FrameRef: ...

    @overload
    def __getitem__(self, at: slice) -> list[FrameRef]: ...

    def __getitem__(self, at: int | slice) -> FrameRef | list[FrameRef]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        frame = self._made.get(at)
        if frame is None:
            if len(self._made) >= _MADE:
                self._made.clear()
            frame = self._made[at] = self._make(at)
        return frame

    def __iter__(self) -> Iterator[FrameRef]:
        return map(self._make, range(len(self)))

    def _make(self, number: int) -> FrameRef:
        c = self._c
        if not 0 <= number < len(c.codecs):
            raise IndexError(f"no frame {number}")
        pack = c.packs_at + c.packs[number] * DIGEST_SIZE
        name = c.digests_at + number * DIGEST_SIZE
        return FrameRef(
            c.memory[pack : pack + DIGEST_SIZE],
            c.offsets[number],
            c.stored[number],
            c.raw[number],
            c.codecs[number],
            c.memory[name : name + DIGEST_SIZE],
        )


@dataclass(frozen=True, slots=True)
class ImageLocations:
    """Where the chunks of a snapshot lie: ``store.locations.Located`` out of a tree image."""

    frames: FrameTable
    ref_frames: Sequence[int]
    ref_offsets: Sequence[int]
