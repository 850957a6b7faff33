"""Reads and cuts a source's files on a thread of its own, in order, with bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from envstore.store.chunking import Chunk, Cutter, Hole
from envstore.store.source import WINDOW, OmitEntry, Source, SourceEntry

_BATCH_BYTES = 1 << 20
_BATCH_FILES = 256
_QUEUED = 12


@dataclass(slots=True)
class Piece:
    """Consecutive chunks and holes of one file; ``whole`` is its digest on the last piece.

    A file that its source leaves out is one piece with ``omitted`` set; ``lasting`` is that of
    ``OmitEntry``.
    """

    entry: SourceEntry
    items: list[Chunk | Hole]
    whole: bytes | None
    omitted: bool = False
    lasting: bool = True


def read_files(source: Source, entries: Sequence[SourceEntry]) -> Iterator[Piece]:
    """Yield the pieces of ``entries`` in order; reading and hashing run ahead on a thread.

    At most about ``_QUEUED`` x 4 MiB are in memory. Errors of the source are raised here;
    closing the generator stops the thread.
    """
    batches: queue.Queue[list[Piece] | BaseException | None] = queue.Queue(_QUEUED)
    stop = threading.Event()

    def offer(item: list[Piece] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                batches.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            source.expect(entries)
            for batch in _batches(_pieces(source, entries, stop)):
                offer(batch)
            offer(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=work, name="read", daemon=True)
    thread.start()
    try:
        while True:
            batch = batches.get()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            yield from batch
    finally:
        stop.set()
        thread.join()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Hand pieces over in batches: a queue operation costs more than reading a small file."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += sum(len(item.data) for item in piece.items if isinstance(item, Chunk))
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(
    source: Source, entries: Sequence[SourceEntry], stop: threading.Event
) -> Iterator[Piece]:
    cutter = Cutter()
    for entry in entries:
        if stop.is_set():
            return
        tensors = entry.path.endswith(b".safetensors")
        items: list[Chunk | Hole] = []
        held = 0
        try:
            for item in cutter.cut(source.read(entry), entry.size, tensors=tensors):
                if isinstance(item, bytes):
                    yield Piece(entry, items, item)
                    continue
                items.append(item)
                held += len(item.data) if isinstance(item, Chunk) else 0
                if held >= WINDOW:
                    yield Piece(entry, items, None)
                    items, held = [], 0
        except OmitEntry as omission:
            yield Piece(entry, [], None, omitted=True, lasting=omission.lasting)
