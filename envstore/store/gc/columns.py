"""Locations as columns of numbers: neither marking nor moving makes an object for each frame.

Decoding costs what unpacking and hashing the body does, and 24 bytes of memory for each frame;
references stay packed and are read in blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.binary import U32, Cursor, pack_array, seal, unpack_array, unseal
from envstore.store.digest import DIGEST_SIZE
from envstore.store.frames import MAX_SIZE, Codec
from envstore.store.locations import MAGIC, MAX_BODY, NOWHERE

BLOCK = 1 << 20
"""References that are unpacked at once."""


@dataclass(slots=True)
class Columns:
    """The columns of one manifest's locations; see ``Locations`` for what they mean.

    ``packs`` are digests; ``numbers``, ``offsets``, ``stored`` and ``raw`` and the bytes of
    ``codecs`` have one item for each frame, ``names`` 32 bytes. Parts and references are packed
    pairs of columns, frames and offsets.
    """

    packs: list[bytes]
    numbers: array[int]
    offsets: array[int]
    stored: array[int]
    raw: array[int]
    codecs: bytearray
    names: bytearray
    parts: tuple[memoryview, memoryview]
    refs: tuple[memoryview, memoryview]

    def anchors(self) -> list[int]:
        """Return the numbers of the frames that others are differences to."""
        return [at + 1 for at, codec in enumerate(self.codecs) if codec == Codec.XOR]

    def blocks(self) -> Iterator[tuple[array[int], array[int]]]:
        """Yield frame numbers and offsets of all parts and references, holes left out."""
        for frames, offsets in (self.parts, self.refs):
            for start in range(0, len(frames), 4 * BLOCK):
                found = unpack_array(frames[start : start + 4 * BLOCK], 4)
                places = unpack_array(offsets[start : start + 4 * BLOCK], 4)
                if max(found, default=0) == NOWHERE:
                    pairs = [pair for pair in zip(found, places, strict=True) if pair[0] != NOWHERE]
                    found = array("I", (frame for frame, _ in pairs))
                    places = array("I", (place for _, place in pairs))
                yield found, places

    def seal(self) -> bytes:
        """Return the object to store."""
        sides = (*self.parts, *self.refs)
        return seal(
            MAGIC,
            b"".join(
                (
                    U32.pack(len(self.packs)),
                    U32.pack(len(self.numbers)),
                    U32.pack(len(self.parts[0]) // 4),
                    U32.pack(len(self.refs[0]) // 4),
                    *self.packs,
                    *map(pack_array, (self.numbers, self.offsets, self.stored, self.raw)),
                    self.codecs,
                    self.names,
                    *sides,
                )
            ),
        )


def open_columns(data: bytes, manifest: bytes) -> Columns:
    """Decode the locations of ``manifest``, without knowing how many references it has.

    Otherwise as strict as ``open_locations``. Raises ``CorruptError``,
    ``UnsupportedFormatError``.
    """
    what = f"locations of manifest {manifest.hex()}"
    body, _ = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    cursor = Cursor(body)
    pack_count, frame_count, part_count, ref_count = (cursor.u32() for _ in range(4))
    packs = [cursor.digest() for _ in range(pack_count)]
    numbers, offsets, stored, raw = (cursor.array(frame_count, 4) for _ in range(4))
    codecs = bytearray(cursor.take(frame_count))
    names = bytearray(cursor.take(frame_count * DIGEST_SIZE))
    part_frames, part_offsets = (cursor.take(4 * part_count) for _ in range(2))
    ref_frames, ref_offsets = (cursor.take(4 * ref_count) for _ in range(2))
    cursor.finish()
    if frame_count and (
        max(numbers) >= pack_count or max(raw) > MAX_SIZE or max(stored) > MAX_SIZE
    ):
        raise CorruptError(f"{what}: a frame out of bounds")
    found = Columns(
        packs, numbers, offsets, stored, raw, codecs, names,
        (part_frames, part_offsets), (ref_frames, ref_offsets),
    )  # fmt: skip
    for at in found.anchors() if Codec.XOR in codecs else ():
        if at >= frame_count or codecs[at] >= Codec.XOR or raw[at] != raw[at - 1]:
            raise CorruptError(f"{what}: a difference without its anchor")
    if max(unpack_array(part_frames, 4), default=-1) >= frame_count:
        raise CorruptError(f"{what}: a part in no frame")
    for frames, _ in found.blocks():
        if max(frames, default=-1) >= frame_count:
            raise CorruptError(f"{what}: a chunk in no frame")
    return found
