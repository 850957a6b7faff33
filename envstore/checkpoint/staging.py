"""Copying a captured state into a slot, at once or while the training goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from envstore.checkpoint.errors import CheckpointError, SlotSpaceError
from envstore.checkpoint.layout import Captured, CheckpointId, Orders, Piece, StagedFile
from envstore.checkpoint.overlap import StepGate
from envstore.checkpoint.slotformat import (
    CONTROL_BYTES,
    MAX_HEADER,
    Header,
    aligned,
    encode_header,
)
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner, SlotWriter

_FILL_EVERY = 1 << 20
_POLL = 0.01
_NICE = 10


class Listener(Protocol):
    """Who is told how a save goes on: the link to the persister. Called from any thread."""

    def writing(self, slot: int, checkpoint: CheckpointId) -> None:
        """The plan of the part is in the slot, or that of its next wave; data follows."""
        ...

    def wave(self, slot: int, checkpoint: CheckpointId, wave: int) -> None:
        """A wave is complete, and another will follow once it is taken."""
        ...

    def staged(self, slot: int, checkpoint: CheckpointId) -> None:
        """The part is whole in the slot."""
        ...

    def check(self, checkpoint: CheckpointId) -> None:
        """Raise what keeps the waves of this save from being taken for good, if anything does."""
        ...


@dataclass(frozen=True, slots=True)
class Staged:
    """A save on its way into a slot. ``done`` has no result; it fails if the copy failed."""

    slot: int
    checkpoint: CheckpointId
    size: int
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece, and where its segment lies: which file, which segment of it, where in the slot."""

    piece: Piece
    file: int
    segment: int
    start: int


@dataclass(frozen=True, slots=True)
class _Wave:
    placed: tuple[_Placed, ...]
    end: int
    header: bytes = b""


class Stager:
    """Copies states into the slots of a directory. One per process and directory.

    ``max_bytes`` limits the memory of all slots together; a larger state goes in waves, and
    ``stage`` then lasts as long as the upload of all but the last. With ``overlap`` (needs torch)
    ``stage`` returns once all is copied that may change before the next step of an optimizer;
    that step waits for the rest, see ``overlap``. Not thread-safe, but for ``slot_freed``.

    Raises ``CheckpointError`` if another process saves into the directory and does not end within
    ``patience`` seconds.
    """

    def __init__(
        self,
        directory: SlotDirectory,
        listener: Listener,
        *,
        slots: int = 2,
        max_bytes: int | None = None,
        overlap: bool = False,
        patience: float = 10.0,
    ) -> None:
        self._limit = max_bytes // slots if max_bytes is not None else None
        self._gate = StepGate() if overlap else None
        try:
            self._owner = SlotOwner(directory, slots, limit=self._limit, patience=patience)
        except BaseException:
            if self._gate is not None:
                self._gate.close()
            raise
        self._listener = listener
        self._worker: threading.Thread | None = None

    def prewarm(self, size: int) -> None:
        """Reserve the slots for parts of ``size`` bytes (``Captured.size``), memory and all.

        About 0.5 s for each GiB and slot. Raises ``SlotSpaceError``.
        """
        self.wait()
        room = CONTROL_BYTES + size + size // 64
        self._owner.reserve(room if self._limit is None else min(room, self._limit))

    def stage(self, captured: Captured, orders: Orders, *, timeout: float = 0.0) -> Staged | None:
        """Copy the state into a slot, or begin to (``overlap``); ``None`` if no slot gets free.

        Waits for an earlier copy first, and up to ``timeout`` seconds for a slot. If it raises,
        nothing that was staged is lost. Raises ``SlotSpaceError`` if there is not the memory or
        the largest tensor exceeds the limit, what ``Listener.check`` raises, and what the pieces
        raise.
        """
        self.wait()
        waves = _plan(captured, orders, self._limit)
        size = max(wave.end + len(wave.header) for wave in waves)
        writer = self._owner.acquire(size, timeout=timeout)
        if writer is None:
            return None
        staged = Staged(writer.number, orders.checkpoint, captured.size)
        if self._gate is not None and len(waves) == 1:
            self._stage_later(self._gate, writer, waves[0], staged, size)
            return staged
        with _abandoning(writer):
            for number, wave in enumerate(waves):
                last = number == len(waves) - 1
                writer.begin(wave.header, wave.end, last=last)
                self._listener.writing(writer.number, staged.checkpoint)
                _copy(writer, wave.placed)
                writer.finish()
                if not last:
                    self._listener.wave(writer.number, staged.checkpoint, number)
                    self._wait_until_taken(writer, staged.checkpoint)
        self._listener.staged(staged.slot, staged.checkpoint)
        staged.done.set_result(None)
        if not self._owner.has_room(size):
            with contextlib.suppress(RuntimeError):  # no threads any more: the interpreter ends
                self._start(lambda: self._enlarge(size))
        return staged

    def slot_freed(self) -> None:
        """Say that a slot may have become free, so that ``stage`` looks at once. Thread-safe."""
        self._owner.wake()

    def wait(self) -> None:
        """Wait until no copy is under way. Does not raise if it failed."""
        worker = self._worker
        if worker is not None:
            worker.join()
            self._worker = None

    def close(self) -> None:
        """Wait for the copy, then let go of the slots; what is staged stays. Idempotent."""
        if not self._owner.is_ours:
            return
        self.wait()
        if self._gate is not None:
            self._gate.close()
        self._owner.close()

    def _stage_later(
        self, gate: StepGate, writer: SlotWriter, wave: _Wave, staged: Staged, size: int
    ) -> None:
        """Copy now what may change at any time, and the rest in a thread."""
        now = [placed for placed in wave.placed if not placed.piece.stable]
        later = wave.placed[len(now) :]

        def copy_rest() -> None:
            try:
                with _abandoning(writer):
                    _copy(writer, later)
                    writer.finish()
            except BaseException as error:  # noqa: BLE001 - who waits for the save raises it
                staged.done.set_exception(error)
                return
            finally:
                gate.open()
            self._listener.staged(staged.slot, staged.checkpoint)
            staged.done.set_result(None)
            self._enlarge(size)

        with _abandoning(writer):
            writer.begin(wave.header, wave.end)
            self._listener.writing(writer.number, staged.checkpoint)
            _copy(writer, now)
            gate.shut()
            try:
                self._start(copy_rest)
            except BaseException:
                gate.open()
                raise

    def _enlarge(self, size: int) -> None:
        """Give the other slots the size that a save turned out to need, off the hot path."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        with contextlib.suppress(SlotSpaceError):  # the save that needs one will raise it
            self._owner.reserve(size)

    def _start(self, work: Callable[[], None]) -> None:
        # No daemon: the interpreter waits for it at exit.
        worker = threading.Thread(target=work, name="envstore-staging")
        worker.start()
        self._worker = worker

    def _wait_until_taken(self, writer: SlotWriter, checkpoint: CheckpointId) -> None:
        while not writer.taken():
            self._listener.check(checkpoint)
            time.sleep(_POLL)


@contextlib.contextmanager
def _abandoning(writer: SlotWriter) -> Iterator[None]:
    """Give the slot back, without a part in it, if anything goes wrong."""
    try:
        yield
    except BaseException:
        writer.abandon()
        raise


def _copy(writer: SlotWriter, placed: Sequence[_Placed]) -> None:
    """Copy the pieces, one after another: torch has threads of its own for each."""
    view = writer.view
    told = 0
    for one in placed:
        size = one.piece.nbytes
        end = one.start + size
        one.piece.copy_into(view[one.start : end])
        if end - told >= _FILL_EVERY:
            writer.fill(end)
            told = end


def _plan(captured: Captured, orders: Orders, limit: int | None) -> list[_Wave]:
    """Give each piece its place, in as many waves as the limit of a slot asks for.

    Pieces that are not stable come first, so that ``filled`` grows while they are copied. Raises
    ``SlotSpaceError`` for a piece that is too large for any wave.
    """
    pieces = [
        (piece, file, segment)
        for file, one in enumerate(captured.files)
        for segment, piece in enumerate(one.pieces)
    ]
    pieces.sort(key=lambda item: item[0].stable)
    room = None
    if limit is not None:
        # All offsets as long as can be: no header of a wave is longer.
        longest = [_Placed(piece, file, segment, limit) for piece, file, segment in pieces]
        room = limit - len(_header(captured, orders, longest))
    waves = []
    placed: list[_Placed] = []
    at = CONTROL_BYTES
    for piece, file, segment in pieces:
        end = aligned(at + piece.nbytes)
        if room is not None and end > room:
            if CONTROL_BYTES + aligned(piece.nbytes) > room:
                raise SlotSpaceError(
                    f"{piece.nbytes} bytes of {captured.files[file].path} do not fit into a slot"
                    f" of {limit} bytes: no piece of a state may be larger than a slot",
                    hint="allow more memory (Staging(max_bytes=...)) or use one slot (slots=1)",
                )
            waves.append(_Wave(tuple(placed), at))
            placed = []
            at, end = CONTROL_BYTES, CONTROL_BYTES + aligned(piece.nbytes)
        placed.append(_Placed(piece, file, segment, at))
        at = end
    waves.append(_Wave(tuple(placed), at))
    return [_Wave(wave.placed, wave.end, _header(captured, orders, wave.placed)) for wave in waves]


def _header(captured: Captured, orders: Orders, placed: Sequence[_Placed]) -> bytes:
    """Return the header of a wave. Raises ``CheckpointError`` if no reader would take it."""
    segments = [[(0, piece.nbytes) for piece in file.pieces] for file in captured.files]
    for one in placed:
        segments[one.file][one.segment] = (one.start, one.piece.nbytes)
    files = tuple(
        StagedFile(file.path, tuple(found))
        for file, found in zip(captured.files, segments, strict=True)
    )
    data = encode_header(Header(orders, files))
    if len(data) > MAX_HEADER:
        raise CheckpointError(
            f"the plan of the state takes {len(data)} bytes, more than {MAX_HEADER}",
            hint="save fewer, larger tensors",
        )
    return data
