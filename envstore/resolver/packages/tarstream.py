"""Reads tar archives forwards, member by member, without trusting what their headers say.

The standard library's reader takes a damaged header for the end of the archive, reads headers of
any size into memory and searches them with expressions of quadratic cost. This one knows the
members that packages have (ustar, GNU long names, PAX) and refuses all others.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
PIECE = 1 << 20
"""Bytes of content handed on at a time."""
MAX_HEADER = 64 << 10
"""Bytes of one extended header: two paths of 4096 bytes and some attributes fit many times."""
MAX_PADDING = 16 << 20
"""Bytes of zeros that may end an archive; tar's largest usual block has 1 MiB."""
MAX_HEADERS = 256 << 20
"""Bytes of all extended headers together."""

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_ZEROS = bytes(BLOCK)
_DECIMALS = 9
_LAST_NS = (1 << 63) - 1


class TarError(Exception):
    """The archive is damaged, or holds what no package has; says what is wrong."""


class Type(enum.Enum):
    """What a member is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"


_TYPES = {b"0": Type.FILE, b"\0": Type.FILE, b"7": Type.FILE} | {
    b"1": Type.HARDLINK,
    b"2": Type.SYMLINK,
    b"5": Type.DIRECTORY,
}
_SPECIAL = {b"3": "character device", b"4": "block device", b"6": "FIFO", b"S": "sparse file"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: ``name`` and ``target`` as the archive has them; ``mtime_ns`` since 1970."""

    name: bytes
    type: Type
    mode: int
    mtime_ns: int
    size: int
    target: bytes


class TarStream:
    """The members of an archive, in order. ``read(n)`` returns fewer than n bytes only at its end.

    Iterate over the stream for members, and over ``pieces`` for the content of the last one; what
    is not read of it is skipped. Raises ``TarError``.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._headers = 0
        self._left = 0
        self._padding = 0
        self._global: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Member]:
        """Yield the members up to the end mark; an archive without one was cut off."""
        extended = dict(self._global)
        while True:
            self._skip()
            block = self._exactly(BLOCK)
            if block == _ZEROS:
                if extended != self._global:
                    raise TarError("it ends with a header that belongs to nothing")
                self._finish()
                return
            fields = _HEADER.unpack(block)
            kind, size = self._check(block, fields), _number(fields[4], "size")
            if kind in (b"x", b"g", b"L", b"K"):
                body = self._extension(size)
                if kind == b"x":
                    extended |= _records(body)
                elif kind == b"g":
                    self._global |= _records(body)
                    extended = self._global | extended
                else:
                    extended[b"path" if kind == b"L" else b"linkpath"] = body.partition(b"\0")[0]
                continue
            member = _member(kind, fields, size, extended)
            extended = dict(self._global)
            if member.type is Type.FILE:
                self._expect(member.size)
            elif member.size:
                raise TarError(f"{_text(member.name)} is a {member.type.value} with content")
            yield member

    def pieces(self) -> Iterator[bytes]:
        """Yield what is left of the last member's content, ``PIECE`` bytes at a time."""
        while self._left:
            piece = self._exactly(min(self._left, PIECE))
            self._left -= len(piece)
            yield piece

    def _finish(self) -> None:
        """Read what pads the archive, so that the decompressor compares its checksum."""
        left = MAX_PADDING
        while data := self._read(min(left, PIECE) + 1):
            left -= len(data)
            if left < 0 or data.strip(b"\0"):
                raise TarError("something follows its end")

    def _expect(self, size: int) -> None:
        self._left, self._padding = size, -size % BLOCK

    def _skip(self) -> None:
        for _ in self.pieces():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    def _extension(self, size: int) -> bytes:
        self._headers += size + BLOCK
        if size > MAX_HEADER or self._headers > MAX_HEADERS:
            raise TarError("its extended headers are too long")
        self._expect(size)
        return b"".join(self.pieces())

    def _exactly(self, count: int) -> bytes:
        data = self._read(count)
        while len(data) < count:
            more = self._read(count - len(data))
            if not more:
                raise TarError("it ends too early")
            data += more
        return data

    @staticmethod
    def _check(block: bytes, fields: tuple[bytes, ...]) -> bytes:
        said = _number(fields[6], "checksum")
        # The checksum itself counts as blanks.
        if said != sum(block) - sum(fields[6]) + 8 * 0x20:
            raise TarError("the checksum of a header is wrong")
        return fields[7]


def _member(
    kind: bytes, fields: tuple[bytes, ...], size: int, extended: dict[bytes, bytes]
) -> Member:
    name, target = fields[0].partition(b"\0")[0], fields[8].partition(b"\0")[0]
    prefix = fields[15].partition(b"\0")[0]
    if prefix and fields[9] == b"ustar\0":
        name = prefix + b"/" + name
    name = extended.get(b"path", name)
    if kind not in _TYPES:
        what = _SPECIAL.get(kind, f"member of unknown type {kind!r}")
        raise TarError(f"{_text(name)} is a {what}")
    if any(key.startswith(b"GNU.sparse.") for key in extended):
        raise TarError(f"{_text(name)} is a sparse file")
    mtime_ns = _number(fields[5], "time", signed=True) * 1_000_000_000
    if b"mtime" in extended:
        mtime_ns = _nanoseconds(extended[b"mtime"])
    if abs(mtime_ns) > _LAST_NS:
        raise TarError(f"{_text(name)} has a time too far from 1970")
    if b"size" in extended:
        size = _decimal(extended[b"size"], "size")
    type_ = _TYPES[kind]
    if type_ is Type.FILE and name.endswith(b"/"):
        type_ = Type.DIRECTORY
    mode = _number(fields[1], "mode")
    return Member(name, type_, mode, mtime_ns, size, extended.get(b"linkpath", target))


def _records(body: bytes) -> dict[bytes, bytes]:
    """Return the records of a PAX header, each ``length key=value`` and a newline."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        blank = body.find(b" ", at, at + 12)
        length = _decimal(body[at:blank], "record") if blank > at else 0
        record = body[blank + 1 : at + length]
        key, mark, value = record.partition(b"=")
        if blank <= at or at + length > len(body) or not mark or not value.endswith(b"\n"):
            raise TarError("an extended header is damaged")
        records[key] = value[:-1]
        at += length
    return records


def _number(field: bytes, what: str, *, signed: bool = False) -> int:
    """Return a header's number: octal text, or binary when its first bit is set."""
    if field[0] & 0x80:
        value: int = int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
        if field[0] == 0xFF and signed:
            value = int.from_bytes(field, "big", signed=True)
        elif field[0] != 0x80:
            raise TarError(f"a header has no valid {what}")
        return value
    text: bytes = field.replace(b"\0", b" ").strip(b" ")
    if not text:
        return 0
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise TarError(f"a header has no valid {what}")
    return int(text, 8)


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 19:
        raise TarError(f"an extended header has no valid {what}")
    return int(text)


def _nanoseconds(text: bytes) -> int:
    """Return a PAX time, seconds with any number of decimals, in nanoseconds."""
    whole, _, part = text.partition(b".")
    negative = whole.startswith(b"-")
    seconds = _decimal(whole[1:] if negative else whole, "time")
    digits = part[:_DECIMALS].ljust(_DECIMALS, b"0")
    nanoseconds = seconds * 1_000_000_000 + _decimal(digits, "time")
    return -nanoseconds if negative else nanoseconds


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
