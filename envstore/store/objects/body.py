"""What ``put`` stores: bytes, or several buffers one after the other that nobody has to join."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Buffer: TypeAlias = bytes | memoryview
Body: TypeAlias = Buffer | Sequence[Buffer]
"""Contiguous buffers. Whoever puts them keeps them as they are until ``put`` returns."""


def views(body: Body) -> list[memoryview]:
    """Return the buffers of ``body`` as bytes, without the empty ones."""
    buffers = (body,) if isinstance(body, bytes | memoryview) else body
    return [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]


def length(body: Body) -> int:
    """Return how many bytes ``body`` holds."""
    return sum(view.nbytes for view in views(body))


def joined(body: Body) -> bytes:
    """Return ``body`` as one string of bytes, copied unless it is one already."""
    return body if isinstance(body, bytes) else b"".join(views(body))


class BodyFile(io.RawIOBase):
    """A file of the bytes of a body, which are not copied. Not safe for concurrent use."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._views = views(body)
        self._length = sum(view.nbytes for view in self._views)
        self._at = 0
        # The buffer that the next byte is in, and where it begins.
        self._number = 0
        self._start = 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, no farther than the end; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = min(base + offset, self._length)
        self._number = self._start = 0
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` with what comes next; returns how many bytes that was."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._number < len(self._views):
            view = self._views[self._number]
            inside = self._at - self._start
            piece = view[inside : inside + len(target) - done]
            target[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
            if self._at >= self._start + len(view):
                self._start += len(view)
                self._number += 1
        return done
