"""Reads zip archives strictly: what two readers could understand in two ways is refused.

Central directory and local headers must agree, members must not overlap, nothing may stand before
the first or behind the last of them, and sizes are what was declared. Methods are "stored" and
"deflated", as in all wheels and ``.conda`` files.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 20
"""Bytes of content handed on at a time, at most."""
MAX_DIRECTORY = 128 << 20
"""Bytes of a central directory: about a million members."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 0x2041, 0x0800
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64 = 0x0001
_COMPRESSED = 256 << 10


class ZipError(Exception):
    """The archive is damaged, ambiguous, or of a kind that no package has; says what is wrong."""


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One member. ``name`` is its path, ``raw`` the bytes of it in the archive.

    ``offset`` is that of its local header, ``packed`` its size in the archive, ``mode`` the Unix
    mode, 0 if the archive has none.
    """

    name: str
    raw: bytes
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    mode: int

    @property
    def is_directory(self) -> bool:
        """Whether it stands for a directory."""
        return self.name.endswith("/")


class ZipReader:
    """An open archive of ``size`` bytes; ``members`` are in the order of their content.

    Raises ``ZipError``, ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.fstat(self._fd).st_size
            count, size, self._directory = self._end()
            members = self._list(count, size)
            self.members = tuple(sorted(members, key=lambda member: member.offset))
            self._check_order()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> ZipReader:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def pieces(self, member: ZipMember) -> Iterator[bytes]:
        """Yield the content of a member; when all of it came, its size and checksum were right."""
        at = self._data(member)
        pieces = self._inflated(member, at) if member.method else self._stored(member, at)
        crc = got = 0
        for piece in pieces:
            got += len(piece)
            if got > member.size:
                raise ZipError(f"{member.name} is longer than it says")
            crc = zlib.crc32(piece, crc)
            yield piece
        if got != member.size:
            raise ZipError(f"{member.name} has {got} bytes instead of {member.size}")
        if crc != member.crc:
            raise ZipError(f"the checksum of {member.name} is wrong")

    def read(self, member: ZipMember) -> bytes:
        """Return the whole content of a member."""
        return b"".join(self.pieces(member))

    def _stored(self, member: ZipMember, at: int) -> Iterator[bytes]:
        for done in range(0, member.size, PIECE):
            yield self._exactly(min(PIECE, member.size - done), at + done)

    def _inflated(self, member: ZipMember, at: int) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        end = at + member.packed
        try:
            while at < end and not inflate.eof:
                packed = self._exactly(min(_COMPRESSED, end - at), at)
                at += len(packed)
                while packed and not inflate.eof:
                    yield inflate.decompress(packed, PIECE)
                    packed = inflate.unconsumed_tail
            # Input may be used up while there is output left that did not fit.
            while not inflate.eof and (piece := inflate.decompress(b"", PIECE)):
                yield piece
        except zlib.error:
            raise ZipError(f"{member.name} cannot be decompressed") from None
        if not inflate.eof or inflate.unused_data or at < end:
            raise ZipError(f"{member.name} is not the compressed data that it says")

    def _data(self, member: ZipMember) -> int:
        """Return where a member's content starts; its local header must say the same of it."""
        header = self._exactly(_LOCAL.size + len(member.raw), member.offset)
        fields = _LOCAL.unpack_from(header)
        magic, _, flags, method = fields[:4]
        name_size, extra_size = fields[-2:]
        same = name_size == len(member.raw) and header[_LOCAL.size :] == member.raw
        if magic != b"PK\3\4" or not same or method != member.method:
            raise ZipError(f"{member.name} is not where the directory says")
        if flags & _ENCRYPTED:
            raise ZipError(f"{member.name} is encrypted")
        start: int = member.offset + _LOCAL.size + name_size + extra_size
        if start + member.packed > self._directory:
            raise ZipError(f"{member.name} reaches into the directory")
        return start

    def _check_order(self) -> None:
        end = 0
        for member in self.members:
            if member.offset < end or (not end and member.offset):
                raise ZipError(f"something unlisted or overlapping lies before {member.name}")
            end = member.offset + _LOCAL.size + len(member.raw) + member.packed
        if end > self._directory:
            raise ZipError("its last member reaches into the directory")

    def _list(self, count: int, size: int) -> list[ZipMember]:
        if size > MAX_DIRECTORY:
            raise ZipError(f"its directory of {size} bytes is longer than {MAX_DIRECTORY}")
        data = self._exactly(size, self._directory)
        members = []
        at = 0
        while at < len(data):
            if len(data) - at < _CENTRAL.size:
                raise ZipError("its directory is damaged")
            fields = _CENTRAL.unpack_from(data, at)
            at += _CENTRAL.size
            name_size, extra_size, comment_size = fields[10:13]
            raw = data[at : at + name_size]
            extra = data[at + name_size : at + name_size + extra_size]
            at += name_size + extra_size + comment_size
            if fields[0] != b"PK\1\2" or at > len(data):
                raise ZipError("its directory is damaged")
            members.append(_member(fields, raw, extra))
        if len(members) != count:
            raise ZipError(f"its directory has {len(members)} members instead of {count}")
        return members

    def _end(self) -> tuple[int, int, int]:
        """Return the number of members, and size and offset of the directory."""
        start = max(0, self.size - _END.size - _MAX_COMMENT)
        tail = self._exactly(self.size - start, start)
        found = tail.rfind(b"PK\5\6")
        if found < 0 or len(tail) - found < _END.size:
            raise ZipError("it is no zip archive, or was cut off")
        _, disk, first, here, count, size, offset, comment = _END.unpack_from(tail, found)
        end = start + found
        if end + _END.size + comment != self.size:
            raise ZipError("something follows its end")
        if _FULL16 in (disk, first, here, count) or _FULL32 in (size, offset):
            end, disk, first, here, count, size, offset = self._end64(end)
        if disk or first or here != count:
            raise ZipError("it is a part of several")
        if offset + size != end:
            raise ZipError("its directory is not at its end")
        return count, size, offset

    def _end64(self, end: int) -> tuple[int, int, int, int, int, int, int]:
        at = end - _LOCATOR.size
        magic, _, where, disks = _LOCATOR.unpack(self._exactly(_LOCATOR.size, at))
        if magic != b"PK\6\7" or disks > 1 or where + _END64.size != at:
            raise ZipError("its end is damaged")
        magic, _, _, _, disk, first, here, count, size, offset = _END64.unpack(
            self._exactly(_END64.size, where)
        )
        if magic != b"PK\6\6":
            raise ZipError("its end is damaged")
        return where, disk, first, here, count, size, offset

    def _exactly(self, size: int, at: int) -> bytes:
        if at < 0 or at + size > self.size:
            raise ZipError("it ends too early")
        data = os.pread(self._fd, size, at)
        while len(data) < size:
            more = os.pread(self._fd, size - len(data), at + len(data))
            if not more:
                raise ZipError("it ends too early")
            data += more
        return data


def _member(fields: tuple[int, ...], raw: bytes, extra: bytes) -> ZipMember:
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    attributes, offset = fields[15:17]
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise ZipError(f"{raw!r} is no valid name") from None
    if _FULL32 in (size, packed, offset):
        size, packed, offset = _wide(extra, (size, packed, offset), name)
    if flags & _ENCRYPTED:
        raise ZipError(f"{name} is encrypted")
    if method not in (_STORED, _DEFLATED):
        raise ZipError(f"{name} is compressed with method {method}, which is not supported")
    if (method == _STORED and packed != size) or (name.endswith("/") and size):
        raise ZipError(f"{name} has contradictory sizes")
    return ZipMember(name, raw, method, crc, packed, size, offset, attributes >> 16)


def _wide(extra: bytes, values: tuple[int, int, int], name: str) -> list[int]:
    """Return the sizes and the offset, those that do not fit 32 bits from the ZIP64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == _ZIP64:
            found = extra[at : at + length]
            wide = iter(struct.unpack(f"<{len(found) // 8}Q", found[: len(found) // 8 * 8]))
            try:
                return [next(wide) if value == _FULL32 else value for value in values]
            except StopIteration:
                break
        at += length
    raise ZipError(f"{name} does not say how large it is")
