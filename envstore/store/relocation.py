"""Relocation: files that hold the path they were built for, read as if built for another.

What is stored is the file as its package has it, with a *placeholder* where its own prefix should
be, and a small plan that says where. From both the bytes for any prefix can be had, range by range:
exactly those that conda's installers write (rattler's ``link``; CEP 26 has the shebang rules).
"""

from __future__ import annotations

import enum
import mmap
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from envstore.errors import CorruptError, UsageError

PLACEHOLDER = b"/envstore-prefix-0b1d6f6e7c5a4f0f9f6b2e43d0a7c981"
"""Stands for the prefix in text files that envstore makes itself."""

MAX_ENCODED = 1 << 18
"""Bytes of an encoded plan, about as many as there can be occurrences."""
MAX_PREFIX = 4095
"""Bytes of a prefix or placeholder: what Linux takes for a path."""

_MAX_PACKAGE = 255
MAX_SHEBANG = 127
"""Bytes of a script's first line that Linux reads."""
_MAX_NUMBER = (1 << 64) - 1
_LAST_SHIFT = 63
MARK = b"\n"
"""Stands for a placeholder in a first line: the one byte that none holds."""

_Key = TypeVar("_Key")


class Mode(enum.IntEnum):
    """How the prefix lies in a file: as text, or in strings that a zero byte ends."""

    TEXT = 1
    BINARY = 2


@dataclass(frozen=True, slots=True)
class Relocation:
    """Where a file of ``size`` bytes holds its placeholder, of ``placeholder`` bytes.

    ``offsets`` ascend. ``ends`` are, in a binary, the ends of the strings that hold some of them:
    of their zero bytes or of the file. ``shebang`` is the first line of a text, without its
    newline, if it may have to be rewritten; each placeholder in it is one newline, and
    ``offsets`` are only those behind it. ``package`` is what a user is told it came from.
    """

    mode: Mode
    placeholder: int
    size: int
    offsets: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    shebang: bytes = b""
    package: str = ""

    def head(self) -> int:
        """Return the length of the stored first line that ``shebang`` stands for."""
        return len(self.shebang) + self.shebang.count(MARK) * (self.placeholder - 1)

    def encode(self) -> bytes:
        """Return the bytes that ``decode`` reads: about 30 and 1-3 for each occurrence."""
        package = self.package.encode()
        out = bytearray(_number(self.mode) + _number(len(package)) + package)
        out += _number(self.placeholder) + _number(self.size)
        if self.mode is Mode.TEXT:
            out += _number(len(self.shebang)) + self.shebang + _number(len(self.offsets))
            at = self.head()
            for offset in self.offsets:
                out += _number(offset - at)
                at = offset + self.placeholder
        else:
            out += _number(len(self.ends))
            at = number = 0
            for end in self.ends:
                last = bisect_right(self.offsets, end - 1)
                out += _number(last - number)
                for offset in self.offsets[number:last]:
                    out += _number(offset - at)
                    at = offset + self.placeholder
                out += _number(end - at)
                at, number = end, last
        return bytes(out)

    def nameless(self) -> bytes:
        """Return what ``encode`` would without the package, which changes no byte of the file."""
        return replace(self, package="").encode()

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Relocation:
        """Return what ``encode`` made ``data`` of. Raises ``CorruptError`` for all else."""
        if len(data) > MAX_ENCODED:
            raise CorruptError(f"relocation: {len(data)} bytes are too many")
        return _Decoder(bytes(data)).read()


class _Decoder:
    """Reads the fields of one plan off ``data``, never past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self) -> Relocation:
        number = self._number()
        if number not in (Mode.TEXT, Mode.BINARY):
            raise CorruptError(f"relocation: mode {number} is unknown")
        mode = Mode(number)
        try:
            package = self._take(self._number(_MAX_PACKAGE)).decode()
        except UnicodeDecodeError:
            raise CorruptError("relocation: the package's name is no UTF-8") from None
        placeholder, size = self._number(MAX_PREFIX), self._number()
        if not placeholder:
            raise CorruptError("relocation: an empty placeholder")
        shebang = b""
        offsets: list[int] = []
        ends: list[int] = []
        at = 0
        if mode is Mode.TEXT:
            shebang = self._take(self._number())
            if shebang and not shebang.startswith(b"#!"):
                raise CorruptError("relocation: a first line that is no shebang")
            at = Relocation(mode, placeholder, size, shebang=shebang).head()
            at = self._offsets(offsets, at, placeholder)
        else:
            for _ in range(self._number(len(self._data))):
                before = len(offsets)
                at = self._offsets(offsets, at, placeholder) + self._number()
                if len(offsets) == before:
                    raise CorruptError("relocation: a string without a placeholder")
                ends.append(at)
        if at > size or not (offsets or shebang):
            raise CorruptError("relocation: a place outside of the file, or none")
        if self._at != len(self._data):
            raise CorruptError("relocation: stray bytes at the end")
        return Relocation(mode, placeholder, size, tuple(offsets), tuple(ends), shebang, package)

    def _offsets(self, offsets: list[int], at: int, placeholder: int) -> int:
        """Append some offsets to ``offsets``; returns where the last placeholder ends."""
        for _ in range(self._number(len(self._data))):
            at += self._number()
            offsets.append(at)
            at += placeholder
        return at

    def _take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise CorruptError("relocation: cut off")
        return self._data[start : self._at]

    def _number(self, limit: int = _MAX_NUMBER) -> int:
        value = shift = 0
        while True:
            if self._at >= len(self._data):
                raise CorruptError("relocation: cut off")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > _LAST_SHIFT:
                break
        if value > limit or (shift and not byte) or shift > _LAST_SHIFT:
            raise CorruptError("relocation: a number too large, or not in its shortest form")
        return value


def _number(value: int) -> bytes:
    """Return ``value`` as LEB128: seven bits a byte, the lowest first, bit 7 where more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def plan(
    data: bytes | mmap.mmap, placeholder: bytes, mode: Mode, package: str = ""
) -> Relocation | None:
    """Return how the file ``data`` is to be relocated, ``None`` if it is the same for any prefix.

    ``package`` is its name for users, such as ``openssl-3.3.1``. Raises ``CorruptError`` for a
    placeholder that is no absolute path, or that occurs too often.
    """
    if not placeholder.startswith(b"/") or not {0, 10}.isdisjoint(placeholder):
        raise CorruptError(f"{package or 'a package'}: {placeholder!r} is no prefix")
    if len(placeholder) > MAX_PREFIX:
        raise CorruptError(f"{package or 'a package'}: a prefix of {len(placeholder)} bytes")
    width = len(placeholder)
    package = package.encode()[:_MAX_PACKAGE].decode(errors="ignore")
    offsets: list[int] = []
    ends: list[int] = []
    shebang = b""
    at = 0
    if mode is Mode.TEXT:
        line = _first_line(data)
        if placeholder in line or len(line) > MAX_SHEBANG or not _is_utf8(line):
            shebang = line.replace(placeholder, MARK)
            at = len(line)
    while (found := data.find(placeholder, at)) >= 0:
        offsets.append(found)
        at = found + width
        if mode is Mode.BINARY:
            end = data.find(b"\0", at)
            end = len(data) if end < 0 else end
            while (found := data.find(placeholder, at, end)) >= 0 and len(offsets) < MAX_ENCODED:
                offsets.append(found)
                at = found + width
            ends.append(end)
            at = end
        if len(offsets) >= MAX_ENCODED:  # each of them takes a byte at least
            raise _too_many(package)
    if not offsets and not shebang:
        return None
    made = Relocation(mode, width, len(data), tuple(offsets), tuple(ends), shebang, package)
    if len(made.encode()) > MAX_ENCODED:
        raise _too_many(package)
    return made


def _too_many(package: str) -> CorruptError:
    return CorruptError(f"{package or 'a package'}: a file holds its prefix in too many places")


def _first_line(data: bytes | mmap.mmap) -> bytes:
    """Return the shebang of a text without its newline, empty if it has none."""
    if data[:2] != b"#!":
        return b""
    end = data.find(b"\n", 0, MAX_ENCODED)
    return data[:end] if end >= 0 else data[: MAX_ENCODED + 1]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def link_relocation(target: bytes, placeholder: bytes) -> bytes:
    """Return the relocation of a symbolic link: ``placeholder`` if it leads there or below."""
    inside = target == placeholder or target.startswith(placeholder + b"/")
    return placeholder if inside and placeholder else b""


def relocated_target(target: bytes, relocation: bytes, prefix: bytes) -> bytes:
    """Return where a symbolic link with this ``relocation`` leads in a tree at ``prefix``."""
    return prefix + target[len(relocation) :]


def check_prefix(prefix: bytes) -> None:
    """See that files can be relocated to ``prefix``. Raises ``UsageError``."""
    if prefix[:1] != b"/" or prefix[-1:] == b"/" or not {0, 10}.isdisjoint(prefix):
        raise UsageError(
            f"{os.fsdecode(prefix)!r} is no prefix to relocate to",
            hint="it must be an absolute path of one line, without / at its end",
        )
    if len(prefix) > MAX_PREFIX:
        raise UsageError(f"a prefix of {len(prefix)} bytes is too long for a path")


def tightest(plans: Mapping[_Key, Relocation]) -> _Key | None:
    """Return which of the files bounds how long a prefix may be, ``None`` if none does."""
    binaries = (key for key, plan in plans.items() if plan.mode is Mode.BINARY)
    return min(binaries, key=lambda key: plans[key].placeholder, default=None)


def check_room(relocation: Relocation, prefix: bytes, path: bytes = b"one of its files") -> None:
    """See that there is room for ``prefix`` in the file at ``path``. Raises ``UsageError``."""
    if relocation.mode is Mode.BINARY and len(prefix) > relocation.placeholder:
        raise UsageError(
            f"the prefix {os.fsdecode(prefix)} has {len(prefix)} characters, and "
            f"{relocation.package or 'a package'} has room for {relocation.placeholder} only "
            f"(in {os.fsdecode(path)})",
            hint="use a shorter path, or give a shorter --prefix",
        )
