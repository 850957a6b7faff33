"""Relocated files: read, range by range, as an installer would have written them at a prefix."""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.relocation import MAX_SHEBANG, Mode, Relocation, check_room

_STANDIN = "\ud800"  # for the mark, in text: nothing that was decoded holds it
_SHEBANG = re.compile("#! *([/\ud800](?:\\\\ |[^ \n\r\t])*)(.*)")
_PYTHON = re.compile(r"python(?:\d+(?:\.\d+)?)?")
_BLOCK, _STEP = 4096, 1 << 20

Source = Callable[[int, int], bytes]
"""Returns as many bytes from an offset of the stored file as are asked for."""


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
            raise CorruptError(f"{len(stored)} stored bytes where {self.size} should be")
        return b"".join(
            one if isinstance(one, bytes) else stored[one[0] : one[1]] for one in self.pieces
        )


_STORED, _PREFIX, _ZEROS, _HEAD = range(4)


def relocated_size(relocation: Relocation, prefix: bytes) -> int:
    """Return the size of a file at ``prefix``, which must have room for it."""
    if relocation.mode is Mode.BINARY:
        return relocation.size
    size = relocation.size + len(relocation.offsets) * (len(prefix) - relocation.placeholder)
    if relocation.shebang:
        size += len(_shebang(relocation.shebang, prefix)) - relocation.head()
    return size


class Relocated:
    """A file as it is at ``prefix``: its ``size``, and how to read it. Thread-safe."""

    def __init__(self, relocation: Relocation, prefix: bytes) -> None:
        """Raises ``UsageError`` if ``prefix`` is longer than a binary has room for."""
        check_room(relocation, prefix)
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
        self.size: int = self._starts[-1]
        self.stored: int = relocation.size

    @property
    def segments(self) -> int:
        """Of how many pieces the file is made."""
        return len(self._kinds)

    @property
    def base(self) -> int:
        """Where ``settle`` wants the stored bytes."""
        return -(-self.size // _BLOCK) * _BLOCK

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
        starts, kinds, sources = self._starts, self._kinds, self._sources
        stop = min(offset + size, self.size)
        pieces: list[bytes | tuple[int, int]] = []
        low = high = 0
        number = bisect_right(starts, offset) - 1
        while offset < stop:
            end = min(starts[number + 1], stop)
            kind, at = kinds[number], offset - starts[number]
            if kind == _STORED:
                at += sources[number]
                if not high:
                    low = at
                high = at + end - offset
                pieces.append((at - low, high - low))
            elif kind == _ZEROS:
                pieces.append(bytes(end - offset))
            else:
                whole = self._prefix if kind == _PREFIX else self._head
                pieces.append(whole[at : at + end - offset])
            offset = end
            number += 1
        return Cut(low, high - low, tuple(pieces))

    def read(self, offset: int, size: int, source: Source) -> bytes:
        """Return a range, clipped to the end of the file. Raises ``CorruptError``."""
        cut = self.cut(offset, size)
        return cut.join(source(cut.start, cut.size) if cut.size else b"")

    def settle(self, fd: int) -> None:
        """Make the file open as ``fd``, which has its stored bytes from ``base`` on, what it is.

        They lie where nothing of them is overwritten before it is read. Raises ``OSError``,
        ``CorruptError`` if it is too short.
        """

        def stored(offset: int, size: int) -> bytes:
            data = b""
            while len(data) < size:
                piece = os.pread(fd, size - len(data), self.base + offset + len(data))
                if not piece:
                    break
                data += piece
            return data

        for at in range(0, self.size, _STEP):
            view = memoryview(self.read(at, _STEP, stored))
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], at + done)
        os.ftruncate(fd, self.size)


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
    if " " not in path and len(found) > MAX_SHEBANG:
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
