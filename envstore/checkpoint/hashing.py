"""Names the chunks of what is staged: reads ahead in threads, hands on in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from envstore.checkpoint.layout import StagedFile
from envstore.store.chunking import TENSOR_PIECE, Chunk
from envstore.store.digest import digest

BATCH = 4 << 20
"""Bytes that one task hashes: one large chunk, or many small ones."""
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a slot that become one chunk: of which segment of which file, by their numbers."""

    file: int
    segment: int
    start: int
    length: int


def spans(files: Iterable[StagedFile]) -> list[Span]:
    """Cut each segment every 4 MiB from its own start; the chunks come as they lie in the slot.

    Segments at offset 0 lie in another wave and are left out.
    """
    found = [
        Span(i, j, offset + at, min(TENSOR_PIECE, length - at))
        for i, file in enumerate(files)
        for j, (offset, length) in enumerate(file.segments)
        if offset
        for at in range(0, length, TENSOR_PIECE)
    ]
    return sorted(found, key=lambda span: span.start)


class Filling(Protocol):
    """How far a view is filled."""

    def reached(self, end: int) -> bool:
        """Return whether all bytes before the offset ``end`` are there."""
        ...

    def wait(self, end: int) -> None:
        """Return once they are, or raise."""
        ...


class HashPool:
    """A few threads that hash; BLAKE3 runs at 1-2 GB/s in each. Always ``close``."""

    def __init__(self, threads: int | None = None) -> None:
        """``threads`` is by default one for each core, at most 4."""
        self.threads = threads or min(4, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="hash")

    def run(
        self, wanted: Iterable[Span], view: memoryview, filling: Filling
    ) -> Iterator[list[tuple[Span, Chunk]]]:
        """Yield the chunks of ``wanted``, in its order, in batches of about 4 MiB.

        Bytes are touched when ``filling`` says that they are there. What is hashed is handed on
        before that is waited for. Chunks refer to ``view``.
        """
        pending: deque[tuple[list[Span], Future[list[Chunk]]]] = deque()
        try:
            for batch in _batches(wanted):
                end = max(span.start + span.length for span in batch)
                while pending and not filling.reached(end):
                    done, task = pending.popleft()
                    yield list(zip(done, task.result(), strict=True))
                filling.wait(end)
                pending.append((batch, self._pool.submit(_hash, view, batch)))
                while len(pending) > self.threads + _AHEAD or (pending and pending[0][1].done()):
                    done, task = pending.popleft()
                    yield list(zip(done, task.result(), strict=True))
            while pending:
                done, task = pending.popleft()
                yield list(zip(done, task.result(), strict=True))
        finally:
            for _, task in pending:
                task.cancel()
            for _, task in pending:
                if not task.cancelled():
                    task.exception()  # nobody touches ``view`` after this

    def close(self) -> None:
        """Wait for the threads to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _batches(wanted: Iterable[Span]) -> Iterator[list[Span]]:
    batch: list[Span] = []
    size = 0
    for span in wanted:
        if batch and size + span.length > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += span.length
    if batch:
        yield batch


def _hash(view: memoryview, batch: Sequence[Span]) -> list[Chunk]:
    found = []
    for span in batch:
        data = view[span.start : span.start + span.length]
        found.append(Chunk(digest(data), data))
    return found
