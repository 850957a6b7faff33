"""Cuts file contents into chunks: content-defined for most, along tensors for safetensors.

A chunk boundary depends only on bytes near it (FastCDC, Xia et al., "The Design of Fast
Content-Defined Chunking for Data Deduplication Based Storage Systems", IEEE TPDS 2020) or on the
format's own structure, so equal content in different files and releases is found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from blake3 import blake3
from pyfastcdc import FastCDC

from envstore.errors import EnvstoreError
from envstore.store.digest import EMPTY, digest
from envstore.store.safetensors import tensor_cuts

CHUNKER_ID = "fastcdc-2020/16384/65536/262144/nc1"
MIN_SIZE, AVERAGE_SIZE, MAX_SIZE = 16 << 10, 64 << 10, 256 << 10
TENSOR_PIECE = 4 << 20
HOLE_BLOCK = 1 << 20

_ZERO_BLOCK = bytes(HOLE_BLOCK)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of bytes of one file and the digest that names it."""

    digest: bytes
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Hole:
    """``length`` zero bytes at a multiple of 1 MiB; stored as a length only."""

    length: int


class Cutter:
    """Cuts one file at a time; not safe for concurrent use (the cut library keeps state)."""

    def __init__(self) -> None:
        """Raises ``EnvstoreError`` if the compiled cut library is missing: it would take 200x."""
        if FastCDC.__module__ != "pyfastcdc.cy.fastcdc":
            raise EnvstoreError(
                "the compiled core of pyfastcdc is missing",
                hint="reinstall pyfastcdc from a wheel for this platform",
            )
        self._cdc = FastCDC(
            min_size=MIN_SIZE,
            avg_size=AVERAGE_SIZE,
            max_size=MAX_SIZE,
            normalized_chunking=1,
            seed=0,
        )

    def cut(
        self, windows: Iterable[bytes], size: int, *, tensors: bool = False
    ) -> Iterator[Chunk | Hole | bytes]:
        """Yield a file's chunks and holes in order, then its whole-file digest as ``bytes``.

        ``windows`` are consecutive pieces, each but the last a multiple of ``HOLE_BLOCK`` long.
        With ``tensors`` a safetensors header in the first window decides the cuts; content that
        is not one falls back to content-defined cuts.
        """
        pieces = iter(windows)
        first = next(pieces, b"")
        # Not ``size``, which may be an estimate: the cuts must follow from the content alone.
        if len(first) <= MIN_SIZE:
            data = b"".join((first, *pieces))
            name = digest(data) if data else EMPTY
            if data:
                yield Chunk(name, data)
            yield name
            return
        whole = blake3()
        cuts = tensor_cuts(first, size, TENSOR_PIECE) if tensors else None
        spans = _with_first(first, pieces, whole.update)
        if cuts is not None:
            yield from _cut_at(spans, cuts)
        else:
            yield from self._cut_by_content(spans)
        yield whole.digest()

    def _cut_by_content(self, windows: Iterable[bytes]) -> Iterator[Chunk | Hole]:
        carry: bytes | memoryview = b""
        for run in _split_holes(windows):
            if isinstance(run, Hole):
                if carry:
                    yield from self._finish(carry)
                    carry = b""
                yield run
                continue
            data = b"".join((carry, run)) if carry else run
            carry = b""
            view = memoryview(data)
            for piece in self._cdc.cut_buf(view):
                end = piece.offset + piece.length
                if end == len(data):
                    # The next window may move this cut, unless the chunk is as long as can be.
                    carry = view[piece.offset :]
                    break
                part = view[piece.offset : end]
                yield Chunk(digest(part), part)
        if carry:
            yield from self._finish(carry)

    def _finish(self, data: bytes | memoryview) -> Iterator[Chunk]:
        view = memoryview(data)
        for piece in self._cdc.cut_buf(view):
            part = view[piece.offset : piece.offset + piece.length]
            yield Chunk(digest(part), part)


def _with_first(
    first: bytes, rest: Iterator[bytes], update: Callable[[bytes], object]
) -> Iterator[bytes]:
    if first:
        update(first)
        yield first
    for window in rest:
        update(window)
        yield window


def _split_holes(windows: Iterable[bytes]) -> Iterator[bytes | memoryview | Hole]:
    """Take zero blocks out of the stream; runs between them are passed on window by window."""
    hole = 0
    for window in windows:
        if len(window) < HOLE_BLOCK:
            if hole:
                yield Hole(hole)
                hole = 0
            yield window
            continue
        view = memoryview(window)
        start = 0
        for at in range(0, len(window), HOLE_BLOCK):
            # Not by comparing views, which Python does byte by byte.
            if window.startswith(_ZERO_BLOCK, at):
                if at > start:
                    yield view[start:at]
                start = at + HOLE_BLOCK
                hole += HOLE_BLOCK
            elif hole:
                yield Hole(hole)
                hole = 0
        if start < len(window):
            yield view[start:] if start else window
    if hole:
        yield Hole(hole)


def _cut_at(windows: Iterable[bytes], cuts: list[int]) -> Iterator[Chunk]:
    """Cut at absolute offsets; ``cuts`` are the ends of the chunks, ascending."""
    ends = iter(cuts)
    end = next(ends)
    at = 0
    pending: list[memoryview] = []
    for window in windows:
        view = memoryview(window)
        while view:
            take = min(len(view), end - at)
            pending.append(view[:take])
            view = view[take:]
            at += take
            if at == end:
                data = pending[0] if len(pending) == 1 else b"".join(pending)
                yield Chunk(digest(data), data)
                pending = []
                end = next(ends, -1)
