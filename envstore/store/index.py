"""Index segments: what one push added, and the lookup built from them for the next.

A segment lists packs with their frame tables. It may name a chunk that another segment names
too: a missed dedup costs bytes, never correctness.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from envstore.errors import CorruptError
from envstore.store.binary import U32, U64, Cursor, seal, unseal
from envstore.store.digest import digest
from envstore.store.frames import Codec, decode_table, encode_table
from envstore.store.locations import FrameRef, Locations
from envstore.store.packs import Pack

MAGIC = b"ESINDX01"
MAX_BODY = 1 << 30
MAX_CHUNKS = 65_536
"""Chunks after which a push starts another segment (about 4 GiB of data)."""


def segment_key(name: bytes) -> str:
    """Return the object key of an index segment."""
    return f"index/{name.hex()}"


def encode_segment(packs: Sequence[Pack]) -> tuple[bytes, bytes]:
    """Return the name and the bytes of the segment that lists ``packs``."""
    body = [U32.pack(len(packs))]
    for pack in packs:
        table = encode_table(pack.frames)
        body += (pack.digest, U64.pack(pack.size), U32.pack(len(table)), table)
    raw = b"".join(body)
    return digest(raw), seal(MAGIC, raw)


def open_segment(data: bytes, name: bytes) -> list[Pack]:
    """Return the packs listed in the stored segment ``name``. Raises ``CorruptError``."""
    what = f"index segment {name.hex()}"
    raw, found = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    if found != name:
        raise CorruptError(f"{what} does not match its name")
    return parse_segment(raw)


def parse_segment(raw: bytes) -> list[Pack]:
    """Return the packs listed in the body of a segment. Raises ``CorruptError``."""
    cursor = Cursor(raw)
    packs = []
    for _ in range(cursor.u32()):
        pack, size = cursor.digest(), cursor.u64()
        packs.append(Pack(pack, size, tuple(decode_table(cursor.take(cursor.u32())))))
    cursor.finish()
    return packs


_PENDING = FrameRef(b"", 0, 0, 0, 0, b"")


class DedupIndex:
    """Finds chunks by digest among the packs and snapshots it was fed.

    About 200 bytes of memory for each chunk; the first place fed for a chunk wins. ``own`` are the
    numbers of the frames that are being made. Not safe for concurrent use.
    """

    def __init__(self) -> None:
        self.frames: list[FrameRef] = []
        self.own: set[int] = set()
        self._lost: set[bytes] = set()
        self._places: dict[bytes, int] = {}
        self._known: dict[tuple[bytes, int], int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, name: bytes) -> tuple[int, int] | None:
        """Return the frame number and the offset in it of a chunk, if known."""
        place = self._places.get(name)
        return None if place is None else (place >> 32, place & 0xFFFFFFFF)

    def reserve(self) -> int:
        """Return the number of a frame that is still being made; ``settle`` tells where it is."""
        self.frames.append(_PENDING)
        self.own.add(len(self.frames) - 1)
        return len(self.frames) - 1

    def settle(self, number: int, frame: FrameRef) -> None:
        """Say where the frame reserved as ``number`` came to lie."""
        self.frames[number] = frame

    def learn(self, name: bytes, number: int, offset: int) -> None:
        """Say that a chunk lies in a frame, wherever it was before."""
        self._places[name] = number << 32 | offset

    def reused(self, names: Iterable[bytes]) -> dict[bytes, int]:
        """Return the packs of earlier pushes that hold these chunks, and how long each must be."""
        needed: dict[bytes, int] = {}
        places = (self._places.get(name) for name in names)
        for number in {place >> 32 for place in places if place is not None}:
            if number not in self.own:
                for frame in filter(None, (self.frames[number], self.frames[number].anchor)):
                    end = frame.offset + frame.stored
                    needed[frame.pack] = max(end, needed.get(frame.pack, 0))
        return needed

    def forget_packs(self, packs: Collection[bytes]) -> None:
        """Make every chunk unknown that was to be found in ``packs``, now and in later feeds."""
        self._lost.update(packs)
        gone = {
            number
            for number, frame in enumerate(self.frames)
            if frame.pack in packs or (frame.anchor is not None and frame.anchor.pack in packs)
        }
        self._places = {
            name: place for name, place in self._places.items() if place >> 32 not in gone
        }

    def trust_packs(self, packs: Collection[bytes]) -> None:
        """Let chunks be found in ``packs`` again that are fed from here on."""
        self._lost.difference_update(packs)

    def add_packs(self, packs: Iterable[Pack]) -> None:
        """Learn every chunk of ``packs`` but of differences: only locations name their anchors."""
        for pack in packs:
            if pack.digest in self._lost:
                continue
            for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
                if frame.codec == Codec.XOR:
                    continue
                number = self._frame(
                    FrameRef(
                        pack.digest, offset, frame.stored, frame.raw, frame.codec, frame.digest
                    )
                )
                places = self._places
                for name, start, _ in frame.chunks():
                    places.setdefault(name, number << 32 | start)

    def add_located(
        self, frames: Sequence[FrameRef], chunks: Iterable[tuple[bytes, int, int]]
    ) -> None:
        """Learn ``(digest, number in frames, offset)`` chunks, as a snapshot's locations tell."""
        numbers: dict[int, int] = {}
        for name, frame, offset in chunks:
            if name in self._places or frame >= len(frames) or frames[frame].pack in self._lost:
                continue
            number = numbers.get(frame)
            if number is None:
                anchor = frames[frame].anchor
                if frames[frame].codec == Codec.XOR and (
                    anchor is None or anchor.pack in self._lost
                ):
                    continue
                number = numbers[frame] = self._frame(frames[frame])
            self._places[name] = number << 32 | offset

    def _frame(self, frame: FrameRef) -> int:
        key = frame.pack, frame.offset
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self.frames)
            self.frames.append(frame)
        return number


class LocationsBuilder:
    """Turns places of an index into the numbering of one manifest's locations."""

    def __init__(self, frames: Sequence[FrameRef]) -> None:
        self._source = frames
        self._numbers: dict[int, int] = {}
        self.result = Locations()

    def part(self, place: tuple[int, int]) -> None:
        """Say where the next manifest part lies."""
        self.result.part_frames.append(self._number(place[0]))
        self.result.part_offsets.append(place[1])

    def ref(self, place: tuple[int, int]) -> None:
        """Say where the next chunk reference lies."""
        self.result.ref_frames.append(self._number(place[0]))
        self.result.ref_offsets.append(place[1])

    def hole(self) -> None:
        """Say that the next chunk reference is a hole."""
        self.result.ref_frames.append(0xFFFFFFFF)
        self.result.ref_offsets.append(0)

    def _number(self, frame: int) -> int:
        number = self._numbers.get(frame)
        if number is None:
            number = self._numbers[frame] = len(self.result.frames)
            found = self._source[frame]
            self.result.frames.append(found)
            if found.anchor is not None:
                self.result.frames.append(found.anchor)
        return number
