"""Packs: immutable objects of many frames that carry their own index at the end.

Layout: ``ESPACK02``, the frames' stored bytes, the sealed frame table, then a footer of the
table's sealed length (32 bits) and ``ESPKEND2``. The name is the BLAKE3 of the table's body, which
holds the digest of every frame: nothing has to be read a second time to name it. Packs of version
1, which are read too, are named by the BLAKE3 of the whole object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.binary import U32, seal, unseal
from envstore.store.digest import digest
from envstore.store.frames import Frame, decode_table, encode_table
from envstore.store.objects.body import Buffer

TARGET_SIZE = 32 << 20
MAX_TABLE = 256 << 20
HEADER = b"ESPACK02"
FOOTER = b"ESPKEND2"
OLD_HEADER = b"ESPACK01"
OLD_FOOTER = b"ESPKEND1"
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
    """Collects frames until they fill a pack; copies none. Not safe for concurrent use."""

    def __init__(self) -> None:
        self._parts: list[Buffer] = [HEADER]
        self._frames: list[Frame] = []
        self.size = len(HEADER)

    def add(self, frame: Frame, data: Buffer) -> None:
        """Append one encoded frame, whose ``data`` must stay as it is until it is written."""
        self._frames.append(frame)
        self._parts.append(data)
        self.size += len(data)

    @property
    def full(self) -> bool:
        """Whether the target size is reached."""
        return self.size >= TARGET_SIZE

    def finish(self) -> tuple[Pack, list[Buffer]] | None:
        """Return the pack and its bytes in pieces, or ``None`` if no frame was added."""
        if not self._frames:
            return None
        body = encode_table(self._frames)
        table = seal(TABLE_MAGIC, body)
        pieces = [*self._parts, table, U32.pack(len(table)), FOOTER]
        size = self.size + len(table) + FOOTER_SIZE
        return Pack(digest(body), size, tuple(self._frames)), pieces


def read_table(tail: bytes, size: int, name: bytes) -> tuple[Frame, ...] | int:
    """Return the frames from the last bytes of the pack ``name``, of ``size`` bytes.

    Returns the number of tail bytes needed instead when ``tail`` is too short. Raises
    ``CorruptError``; of a pack of version 1, only the whole shows whether it has its name.
    """
    what = f"pack {name.hex()}"
    footer = tail[-len(FOOTER) :]
    if len(tail) < FOOTER_SIZE or footer not in (FOOTER, OLD_FOOTER):
        raise CorruptError(f"{what} does not end as a pack does; it is truncated or altered")
    (length,) = U32.unpack(tail[-FOOTER_SIZE : -len(FOOTER)])
    needed = length + FOOTER_SIZE
    if needed > size - len(HEADER):
        raise CorruptError(f"{what} claims a table longer than itself")
    if needed > len(tail):
        return int(needed)
    sealed = tail[len(tail) - needed : len(tail) - FOOTER_SIZE]
    body, found = unseal(TABLE_MAGIC, sealed, limit=MAX_TABLE, what=f"the table of {what}")
    if footer == FOOTER and found != name:
        raise CorruptError(f"{what} does not match its name")
    frames = tuple(decode_table(body))
    if len(HEADER) + sum(frame.stored for frame in frames) + needed != size:
        raise CorruptError(f"{what} is not as long as its table says")
    return frames


def parse_pack(data: bytes, name: bytes) -> Pack:
    """Check a whole pack against its name and return its frames. Raises ``CorruptError``.

    The name of a pack of version 2 says which frames it holds, and not how they are stored: to
    see that they can be read, decode them.
    """
    what = f"pack {name.hex()}"
    versions = {(HEADER, FOOTER), (OLD_HEADER, OLD_FOOTER)}
    header, footer = data[: len(HEADER)], data[-len(FOOTER) :]
    if (header, footer) not in versions:
        raise CorruptError(f"{what} does not start and end as a pack does")
    if header == OLD_HEADER and digest(data) != name:
        raise CorruptError(f"{what} does not match its name")
    frames = read_table(data, len(data), name)
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
