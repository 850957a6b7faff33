"""Packs: immutable objects of many frames that carry their own index at the end.

Layout: ``ESPACK01``, the frames' stored bytes, the sealed frame table, then a footer of the
table's sealed length (32 bits) and ``ESPKEND1``. The name is the BLAKE3 of the whole object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from envstore.errors import CorruptError
from envstore.store.binary import U32, seal, unseal
from envstore.store.digest import digest
from envstore.store.frames import Frame, decode_table, encode_table

TARGET_SIZE = 32 << 20
MAX_TABLE = 256 << 20
HEADER = b"ESPACK01"
FOOTER = b"ESPKEND1"
TABLE_MAGIC = b"ESTABL01"
FOOTER_SIZE = 4 + len(FOOTER)


def pack_key(name: bytes) -> str:
    """Return the object key of the pack called ``name``."""
    text = name.hex()
    return f"packs/{text[:2]}/{text}"


@dataclass(frozen=True, slots=True)
class Pack:
    """One pack: its digest, its size in bytes and its frames in order of offset."""

    digest: bytes
    size: int
    frames: tuple[Frame, ...]

    def offsets(self) -> list[int]:
        """Return where each frame starts in the pack."""
        found, at = [], len(HEADER)
        for frame in self.frames:
            found.append(at)
            at += frame.stored
        return found


class PackBuilder:
    """Collects frames until they fill a pack. Not safe for concurrent use."""

    def __init__(self) -> None:
        self._parts: list[bytes] = [HEADER]
        self._frames: list[Frame] = []
        self.size = len(HEADER)

    def add(self, frame: Frame, data: bytes) -> None:
        """Append one encoded frame."""
        self._frames.append(frame)
        self._parts.append(data)
        self.size += len(data)

    @property
    def full(self) -> bool:
        """Whether the target size is reached."""
        return self.size >= TARGET_SIZE

    def finish(self) -> tuple[Pack, bytes] | None:
        """Return the pack and its bytes, or ``None`` if no frame was added."""
        if not self._frames:
            return None
        table = seal(TABLE_MAGIC, encode_table(self._frames))
        data = b"".join((*self._parts, table, U32.pack(len(table)), FOOTER))
        return Pack(blake3(data).digest(), len(data), tuple(self._frames)), data


def read_table(tail: bytes, size: int, what: str) -> tuple[Frame, ...] | int:
    """Return the frames from the last bytes of a pack of ``size`` bytes.

    Returns the number of tail bytes needed instead when ``tail`` is too short. Raises
    ``CorruptError`` naming ``what``.
    """
    if len(tail) < FOOTER_SIZE or tail[-len(FOOTER) :] != FOOTER:
        raise CorruptError(f"{what} does not end as a pack does; it is truncated or altered")
    (length,) = U32.unpack(tail[-FOOTER_SIZE : -len(FOOTER)])
    needed = length + FOOTER_SIZE
    if needed > size - len(HEADER):
        raise CorruptError(f"{what} claims a table longer than itself")
    if needed > len(tail):
        return int(needed)
    sealed = tail[len(tail) - needed : len(tail) - FOOTER_SIZE]
    body, _ = unseal(TABLE_MAGIC, sealed, limit=MAX_TABLE, what=f"the table of {what}")
    frames = tuple(decode_table(body))
    if len(HEADER) + sum(frame.stored for frame in frames) + needed != size:
        raise CorruptError(f"{what} is not as long as its table says")
    return frames


def parse_pack(data: bytes, name: bytes) -> Pack:
    """Check a whole pack against its name and return its frames. Raises ``CorruptError``."""
    what = f"pack {name.hex()}"
    if digest(data) != name:
        raise CorruptError(f"{what} does not match its name")
    if data[: len(HEADER)] != HEADER:
        raise CorruptError(f"{what} does not start as a pack does")
    frames = read_table(data, len(data), what)
    if isinstance(frames, int):
        raise CorruptError(f"{what} claims a table longer than itself")
    return Pack(name, len(data), frames)


def frame_bytes(pack: Pack, data: bytes) -> Sequence[tuple[Frame, memoryview]]:
    """Return each frame of ``pack`` with its stored bytes in ``data``."""
    view = memoryview(data)
    offsets = pack.offsets()
    return [
        (frame, view[start : start + frame.stored])
        for frame, start in zip(pack.frames, offsets, strict=True)
    ]
