"""Relocation: files that hold the path they were built for, read as if built for another.

What is stored is the file as its package has it, with a *placeholder* where its own prefix should
be, and a small plan that says where. From both the bytes for any prefix can be had, range by range:
exactly those that conda's installers write (rattler's ``link``; CEP 26 has the shebang rules).
"""

from __future__ import annotations

import enum
import mmap
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from envstore.errors import CorruptError, UsageError
from envstore.store.binary import Cursor

PLACEHOLDER = b"/envstore-prefix-0b1d6f6e7c5a4f0f9f6b2e43d0a7c981"
"""Stands for the prefix in text files that envstore makes itself."""

MAX_ENCODED = 1 << 18
"""Bytes of an encoded plan, about as many as there can be occurrences."""
MAX_PREFIX = 4095
"""Bytes of a prefix or placeholder: what Linux takes for a path."""

_MAX_PACKAGE = 255
_MAX_SHEBANG = 127
_MAX_NUMBER = (1 << 64) - 1
_MARK = b"\n"  # the one byte that no first line holds
_STANDIN = "\ud800"  # what it becomes in text: no text that was decoded holds it
_SHEBANG = re.compile("#! *([/\ud800](?:\\\\ |[^ \n\r\t])*)(.*)")
_PYTHON = re.compile(r"python(?:\d+(?:\.\d+)?)?")

Source = Callable[[int, int], bytes]
"""Returns as many bytes from an offset of the stored file as are asked for."""


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
        return len(self.shebang) + self.shebang.count(_MARK) * (self.placeholder - 1)

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

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Relocation:
        """Return what ``encode`` made ``data`` of. Raises ``CorruptError`` for all else."""
        if len(data) > MAX_ENCODED:
            raise CorruptError(f"relocation: {len(data)} bytes are too many")
        found = _Decoder(data).read()
        if found.encode() != data:
            raise CorruptError("relocation: not in its shortest form")
        return found


class _Decoder:
    def __init__(self, data: bytes | memoryview) -> None:
        self._cursor = Cursor(data)
        self._length = len(data)

    def read(self) -> Relocation:
        take = self._cursor.take
        number = self._number()
        if number not in (Mode.TEXT, Mode.BINARY):
            raise CorruptError(f"relocation: mode {number} is unknown")
        mode = Mode(number)
        try:
            package = bytes(take(self._number(_MAX_PACKAGE))).decode()
        except UnicodeDecodeError:
            raise CorruptError("relocation: the package's name is no UTF-8") from None
        placeholder, size = self._number(MAX_PREFIX), self._number()
        shebang = b""
        ends: list[int] = []
        if not placeholder:
            raise CorruptError("relocation: an empty placeholder")
        if mode is Mode.TEXT:
            shebang = bytes(take(self._number(self._length)))
            plan = Relocation(mode, placeholder, size, shebang=shebang)
            offsets = self._offsets(plan.head(), placeholder, self._number(self._length))
            at = offsets[-1] + placeholder if offsets else plan.head()
            if shebang and not shebang.startswith(b"#!"):
                raise CorruptError("relocation: a first line that is no shebang")
            if at > size or not (offsets or shebang):
                raise CorruptError("relocation: a place outside of the file")
        else:
            offsets = []
            at = 0
            for _ in range(self._number(self._length)):
                some = self._offsets(at, placeholder, self._number(self._length))
                if not some:
                    raise CorruptError("relocation: a string without a placeholder")
                offsets += some
                at = some[-1] + placeholder + self._number()
                ends.append(at)
            if at > size or not offsets:
                raise CorruptError("relocation: a place outside of the file")
        self._cursor.finish()
        return Relocation(mode, placeholder, size, tuple(offsets), tuple(ends), shebang, package)

    def _offsets(self, at: int, placeholder: int, count: int) -> list[int]:
        offsets = []
        for _ in range(count):
            at += self._number()
            offsets.append(at)
            at += placeholder
        return offsets

    def _number(self, limit: int = _MAX_NUMBER) -> int:
        value = shift = 0
        while True:
            (byte,) = self._cursor.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise CorruptError("relocation: a number is too long")
        if value > limit:
            raise CorruptError(f"relocation: {value} is more than {limit}")
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
        if placeholder in line or len(line) > _MAX_SHEBANG or not _is_utf8(line):
            shebang = line.replace(placeholder, _MARK)
            at = len(line)
    while (found := data.find(placeholder, at)) >= 0:
        offsets.append(found)
        at = found + width
        if mode is Mode.BINARY:
            end = data.find(b"\0", at)
            end = len(data) if end < 0 else end
            while (found := data.find(placeholder, at, end)) >= 0:
                offsets.append(found)
                at = found + width
            ends.append(end)
            at = end
    if not offsets and not shebang:
        return None
    made = Relocation(mode, width, len(data), tuple(offsets), tuple(ends), shebang, package)
    if len(made.encode()) > MAX_ENCODED:
        raise CorruptError(f"{package or 'a package'}: a file holds its prefix in too many places")
    return made


def _first_line(data: bytes | mmap.mmap) -> bytes:
    """Return the shebang of a text without its newline, empty if it has none."""
    if data[:2] != b"#!":
        return b""
    end = data.find(b"\n")
    return data[:end] if end >= 0 else data[:]


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
    if not prefix.startswith(b"/") or not {0, 10}.isdisjoint(prefix):
        raise UsageError(
            f"{prefix.decode(errors='replace')!r} is no prefix", hint="give an absolute path"
        )
    if len(prefix) > MAX_PREFIX:
        raise UsageError(f"a prefix of {len(prefix)} bytes is too long for a path")


def check_room(relocation: Relocation, prefix: bytes, path: bytes) -> None:
    """See that there is room for ``prefix`` in the file at ``path``. Raises ``UsageError``."""
    if relocation.mode is Mode.BINARY and len(prefix) > relocation.placeholder:
        where = path.decode(errors="replace")
        package = relocation.package or "a package"
        raise UsageError(
            f"the prefix {prefix.decode(errors='replace')} has {len(prefix)} bytes, and {package} "
            f"has room for {relocation.placeholder} in {where}",
            hint="choose a shorter path",
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A range of a relocated file: what to read of the stored one, and what to make of that.

    ``pieces`` are literal bytes, and ``(start, end)`` in the ``size`` bytes read from ``start``.
    """

    start: int
    size: int
    pieces: tuple[bytes | tuple[int, int], ...]

    def join(self, stored: bytes | memoryview) -> bytes:
        """Return the range, given the ``size`` stored bytes from ``start`` on."""
        if len(stored) != self.size:
            raise CorruptError(
                f"relocation: {len(stored)} stored bytes where {self.size} should be"
            )
        return b"".join(
            one if isinstance(one, bytes) else stored[one[0] : one[1]] for one in self.pieces
        )


_STORED, _PREFIX, _ZEROS, _HEAD = range(4)


class Relocated:
    """A file as it is at ``prefix``: its ``size``, and how to read it. Thread-safe."""

    def __init__(self, relocation: Relocation, prefix: bytes) -> None:
        """Raises ``UsageError`` if ``prefix`` is longer than a binary has room for."""
        check_room(relocation, prefix, b"one of its files")
        self._prefix = prefix
        self._head = b""
        # Segment i is what lies from starts[i] up to starts[i + 1]; stored bytes from sources[i].
        self._starts = array("Q", [0])
        self._sources = array("Q")
        self._kinds = bytearray()
        at = 0
        if relocation.shebang:
            self._head = _shebang(relocation.shebang, prefix)
            self._add(_HEAD, len(self._head))
            at = relocation.head()
        ends = iter(relocation.ends)
        end = next(ends, None)
        for offset in relocation.offsets:
            if end is not None and offset >= end:
                at = self._finish_string(at, end)
                end = next(ends, None)
            self._add(_STORED, offset - at, at)
            self._add(_PREFIX, len(prefix))
            at = offset + relocation.placeholder
        if end is not None:
            at = self._finish_string(at, end)
        self._add(_STORED, relocation.size - at, at)
        self.size = self._starts[-1]

    def _finish_string(self, at: int, end: int) -> int:
        self._add(_STORED, end - at, at)
        self._add(_ZEROS, end - self._starts[-1])
        return end

    def _add(self, kind: int, length: int, source: int = 0) -> None:
        if length:
            self._kinds.append(kind)
            self._sources.append(source)
            self._starts.append(self._starts[-1] + length)

    def cut(self, offset: int, size: int) -> Cut:
        """Return how to read a range, clipped to the end of the file."""
        starts = self._starts
        stop = min(offset + size, self.size)
        found: list[tuple[int, int, int]] = []
        number = bisect_right(starts, offset) - 1
        low = high = -1
        while offset < stop:
            end = min(starts[number + 1], stop)
            kind = self._kinds[number]
            at = offset - starts[number]
            if kind == _STORED:
                at += self._sources[number]
                low = at if low < 0 else low
                high = at + end - offset
            found.append((kind, at, end - offset))
            offset = end
            number += 1
        pieces = tuple(self._piece(kind, at, length, low) for kind, at, length in found)
        return Cut(max(low, 0), high - low, pieces)

    def _piece(self, kind: int, at: int, length: int, low: int) -> bytes | tuple[int, int]:
        if kind == _STORED:
            return at - low, at - low + length
        if kind == _ZEROS:
            return bytes(length)
        whole = self._prefix if kind == _PREFIX else self._head
        return whole[at : at + length]

    def read(self, offset: int, size: int, source: Source) -> bytes:
        """Return a range, clipped to the end of the file. Raises ``CorruptError``."""
        cut = self.cut(offset, size)
        return cut.join(source(cut.start, cut.size) if cut.size else b"")


def _shebang(template: bytes, prefix: bytes) -> bytes:
    """Return the first line of a script at ``prefix``: one that the kernel can follow.

    It cannot where the path holds a blank, or the line is longer than 127 bytes.
    """
    line = template.decode(errors="replace").replace("\n", _STANDIN)
    path = prefix.decode(errors="surrogateescape")
    if " " in path:
        # In this order, as only one of the two detours lets a blank follow.
        line = _detour(line) if _STANDIN in line else line
    found = line.replace(_STANDIN, path).encode(errors="surrogateescape")
    if " " not in path and len(found) > _MAX_SHEBANG:
        found = _detour(line.replace(_STANDIN, path)).encode(errors="surrogateescape")
    return found


def _detour(line: str) -> str:
    """Return a first line that finds its interpreter without the kernel's help."""
    match = _SHEBANG.fullmatch(line)
    if match is None:
        return line
    path, rest = match.groups()
    name = path.rpartition("/")[2]
    if _PYTHON.fullmatch(name):
        # For sh the start of a command, for Python that of a string.
        return f"#!/bin/sh\n'''exec' \"{path}\"{rest} \"$0\" \"$@\" #'''"
    return f"#!/usr/bin/env {name}{rest}"
