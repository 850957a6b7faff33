"""Where frames have come to lie: what a repack writes down before it changes any locations.

``gc/moves`` holds the moves of the batch that is being worked on. Whoever finds it there takes up
where a collector died: to move a place twice changes nothing. It is removed once all locations
lead to the new places.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.binary import U32, Cursor, pack_array, seal, unseal
from envstore.store.digest import DIGEST_SIZE
from envstore.store.frames import MAX_SIZE
from envstore.store.locations import FrameRef

KEY = "gc/moves"
MAGIC = b"ESMOVE01"
MAX_BODY = 1 << 30


@dataclass(frozen=True, slots=True)
class Move:
    """A frame and where its bytes lie now.

    ``places`` says of each chunk that was taken over where it is in the new raw frame, by where
    it was in the old one; ``None`` stands for all of it, as it was.
    """

    old: FrameRef
    new: FrameRef
    places: Mapping[int, int] | None = None


def encode_moves(moves: Iterable[Move]) -> bytes:
    """Return the object to store."""
    rows = list(moves)
    packs: dict[bytes, int] = {}
    parts: list[bytes] = []
    for side in ([row.old for row in rows], [row.new for row in rows]):
        numbers = array("I", (packs.setdefault(frame.pack, len(packs)) for frame in side))
        parts += [
            pack_array(numbers),
            pack_array(array("I", (frame.offset for frame in side))),
            pack_array(array("I", (frame.stored for frame in side))),
            pack_array(array("I", (frame.raw for frame in side))),
            bytes(frame.codec for frame in side),
            b"".join(frame.digest for frame in side),
        ]
    maps = [dict(row.places) if row.places is not None else {} for row in rows]
    body = b"".join(
        (
            U32.pack(len(packs)),
            U32.pack(len(rows)),
            *packs,
            *parts,
            pack_array(array("I", map(len, maps))),
            pack_array(array("I", (old for places in maps for old in places))),
            pack_array(array("I", (new for places in maps for new in places.values()))),
        )
    )
    return seal(MAGIC, body)


def open_moves(data: bytes) -> list[Move]:
    """Decode ``gc/moves``. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    body, _ = unseal(MAGIC, data, limit=MAX_BODY, what=KEY)
    cursor = Cursor(body)
    pack_count, count = cursor.u32(), cursor.u32()
    table = bytes(cursor.take(pack_count * DIGEST_SIZE))
    packs = [table[at : at + DIGEST_SIZE] for at in range(0, len(table), DIGEST_SIZE)]
    old, new = (_frames(cursor, count, packs) for _ in range(2))
    lengths = cursor.array(count, 4)
    before, after = (cursor.array(sum(lengths), 4) for _ in range(2))
    cursor.finish()
    found: list[Move] = []
    at = 0
    for one, two, length in zip(old, new, lengths, strict=True):
        places = dict(zip(before[at : at + length], after[at : at + length], strict=True))
        whole = (one.raw, one.codec, one.digest) == (two.raw, two.codec, two.digest)
        if bool(places) == whole or max(places.values(), default=0) >= max(1, two.raw):
            raise CorruptError(f"{KEY}: a frame that becomes another")
        found.append(Move(one, two, places or None))
        at += length
    return found


def _frames(cursor: Cursor, count: int, packs: list[bytes]) -> list[FrameRef]:
    numbers, offsets, stored, raw = (cursor.array(count, 4) for _ in range(4))
    codecs = bytes(cursor.take(count))
    names = bytes(cursor.take(count * DIGEST_SIZE))
    if count and (max(numbers) >= len(packs) or max(raw) > MAX_SIZE or max(stored) > MAX_SIZE):
        raise CorruptError(f"{KEY}: a frame out of bounds")
    return [
        FrameRef(
            packs[numbers[at]], offsets[at], stored[at], raw[at], codecs[at],
            names[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE],
        )
        for at in range(count)
    ]  # fmt: skip
