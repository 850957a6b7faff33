"""The trainer's side of slots: reserve them, choose one for a save, fill it, hand it over.

Killed at any instruction, it leaves the newest part that was staged: a save goes to a slot that
holds nothing which is still needed, and counts once the word ``staged`` is stored, at the end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import time
import weakref
from dataclasses import dataclass

from envstore.checkpoint import memory
from envstore.checkpoint.errors import CheckpointError, SlotSpaceError
from envstore.checkpoint.slotformat import (
    BROKEN,
    CONTROL_BYTES,
    DURABLE,
    EMPTY,
    STAGED,
    WAVE,
    WRITING,
    Control,
    ControlWords,
    aligned,
)
from envstore.checkpoint.slots import TRAINER_LOCK, SlotDirectory
from envstore.store.digest import digest

_ROUND = 64 << 10
_POLL = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG)


@dataclass(slots=True)
class _Mapped:
    """A slot as the trainer has it open: mapped once, so that later saves take no faults."""

    fd: int
    mapping: mmap.mmap
    view: memoryview
    words: ControlWords

    @property
    def size(self) -> int:
        return len(self.mapping)

    def unmap(self) -> None:
        """Unmap it; what still refers to its memory (a traceback) keeps that until it goes."""
        self.words.release()
        with contextlib.suppress(BufferError):
            self.view.release()
            self.mapping.close()

    def close(self) -> None:
        """Unmap it and close its file."""
        self.unmap()
        os.close(self.fd)


class SlotWriter:
    """One slot during one save. Not thread-safe, but for ``fill``, which one thread calls."""

    def __init__(self, number: int, sequence: int, held: _Mapped) -> None:
        self.number = number
        self.sequence = sequence
        self._held = held
        self._wave = 0
        self._last = True
        self._end = CONTROL_BYTES

    @property
    def view(self) -> memoryview:
        """All bytes of the slot, writable. Offsets of segments count from its start."""
        return self._held.view

    @property
    def wave(self) -> int:
        """The wave that is being written."""
        return self._wave

    def begin(self, header: bytes, header_at: int, *, last: bool = True) -> None:
        """Write the header of this wave (``encode_header``); from here on readers may look on.

        ``header_at`` is the end of the data.
        """
        words = self._held.words
        self._last = last
        self._end = header_at
        self._held.view[header_at : header_at + len(header)] = header
        words.filled = CONTROL_BYTES
        words.write(
            Control(self.sequence, self._wave, last, header_at, len(header), digest(header))
        )
        fcntl.flock(self._held.fd, fcntl.LOCK_UN)

    def fill(self, offset: int) -> None:
        """Say that all data below ``offset`` is final."""
        self._held.words.filled = offset

    def finish(self) -> None:
        """Say that the wave is complete. If it is the last, the part is staged from here on."""
        self._held.words.filled = self._end
        self._held.words.set_state(STAGED if self._last else WAVE)

    def abandon(self) -> None:
        """Give the slot back without a part in it."""
        self._held.words.set_state(BROKEN)
        fcntl.flock(self._held.fd, fcntl.LOCK_UN)

    def taken(self) -> bool:
        """Whether the persister needs the wave no more and has left the slot.

        If so, the slot is held alone, and the next wave may ``begin``.
        """
        words = self._held.words
        if words.taken != self._wave + 1 or not _lock(self._held.fd):
            return False
        words.set_state(WRITING)
        self._wave += 1
        return True


class SlotOwner:
    """The one process that saves into the ``count`` slots of a directory.

    With ``limit`` no slot takes more bytes than that to have some to spare.

    Raises ``CheckpointError`` if another process that saves the same rank of the same run does
    not end within ``patience`` seconds. Not thread-safe. A child of ``fork`` has no part in it.
    """

    def __init__(
        self,
        directory: SlotDirectory,
        count: int = 2,
        *,
        limit: int | None = None,
        patience: float = 10.0,
    ) -> None:
        directory.create()
        self.directory = directory
        self._count = count
        self._limit = limit
        self._mapped: dict[int, _Mapped] = {}
        self._pid = os.getpid()
        self._changed = threading.Event()
        self._lock_fd = _become_trainer(directory, patience)
        _owners.add(self)

    def reserve(self, size: int) -> None:
        """Have all slots of ``size`` bytes or more, with all their memory faulted in.

        They only grow. Raises ``SlotSpaceError``, with what was there before unchanged.
        """
        self._check_process()
        for number in range(self._count):
            self._grow(number, size)

    def has_room(self, size: int) -> bool:
        """Whether all slots are as large as that already."""
        return all(self._open(number).size >= size for number in range(self._count))

    @property
    def is_ours(self) -> bool:
        """Whether it is open, and in the process that opened it."""
        return self._lock_fd >= 0 and self._pid == os.getpid()

    def acquire(self, size: int, *, timeout: float = 0.0) -> SlotWriter | None:
        """Return a slot of ``size`` bytes or more for a new save, held alone until ``begin``.

        ``None`` if after ``timeout`` seconds each slot still holds a part that the store lacks,
        or the newest part of all, or has a reader. With one slot the newest part is given up once
        the store has it. Raises ``SlotSpaceError``.
        """
        self._check_process()
        end = time.monotonic() + timeout
        while True:
            self._changed.clear()
            number = self._choose()
            if number is not None:
                break
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._changed.wait(min(left, _POLL))
        try:
            held = self._grow(number, size)
            sequence = 1 + max(self._sequence(each) for each in range(self._count))
        except BaseException:
            fcntl.flock(self._mapped[number].fd, fcntl.LOCK_UN)
            raise
        held.words.set_state(WRITING)
        held.words.taken = 0
        return SlotWriter(number, sequence, held)

    def wake(self) -> None:
        """Have ``acquire`` look again at once: a slot may have become free. Thread-safe."""
        self._changed.set()

    def close(self) -> None:
        """Let go of the slots; what is staged stays there. Idempotent."""
        _owners.discard(self)
        if self._lock_fd < 0:
            return
        for held in self._mapped.values():
            held.close()
        self._mapped.clear()
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _choose(self) -> int | None:
        """Lock and return the slot that is needed least, or ``None``."""
        states = {number: self._state(number) for number in range(self._count)}
        sequences = {number: self._sequence(number) for number in states}
        complete = [number for number, state in states.items() if state in (STAGED, DURABLE)]
        newest = max(complete, key=sequences.__getitem__, default=None)
        order = {EMPTY: 0, BROKEN: 1, WRITING: 2, WAVE: 2, DURABLE: 3}
        free = [
            number
            for number, state in states.items()
            if state != STAGED and (number != newest or self._count == 1)
        ]
        for number in sorted(free, key=lambda each: (order[states[each]], sequences[each])):
            if _lock(self._open(number).fd):
                return number
        return None

    def _state(self, number: int) -> str:
        held = self._open(number)
        return held.words.state(held.size)

    def _sequence(self, number: int) -> int:
        held = self._open(number)
        control = held.words.read(held.size)
        return control.sequence if control else 0

    def _open(self, number: int) -> _Mapped:
        """Return the slot, mapped; it is made, as small as can be, if it is missing."""
        held = self._mapped.get(number)
        if held is None:
            held = self._mapped[number] = self._map(number, CONTROL_BYTES)
        return held

    def _grow(self, number: int, size: int) -> _Mapped:
        """Return the slot with room for ``size`` bytes, faulted in. Its content stays."""
        held = self._open(number)
        if held.size < size:
            # Some more than asked for: a state whose header grows a little must not grow each time.
            room = aligned(size + size // 64, _ROUND)
            if self._limit is not None:
                room = max(size, min(room, self._limit))
            larger = self._map(number, room, held.fd)
            held.unmap()
            held = self._mapped[number] = larger
        return held

    def _map(self, number: int, size: int, fd: int = -1) -> _Mapped:
        path = self.directory.slot_path(number)
        known = fd
        try:
            if known < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(path, flags, 0o600)
            if size > _ROUND:
                self._check_memory(size - os.fstat(fd).st_size)
            memory.make_room(fd, size)
            mapping = mmap.mmap(fd, 0)
            memory.fault_in(mapping)
        except SlotSpaceError:
            if known < 0:
                os.close(fd)
            raise
        except OSError as error:
            there = os.fstat(fd).st_size if fd >= 0 else 0
            if known < 0 <= fd:
                os.close(fd)
            raise self._space_error(number, size, there, error) from error
        view = memoryview(mapping)
        return _Mapped(fd, mapping, view, ControlWords(view))

    def _check_memory(self, more: int) -> None:
        """Raise ``SlotSpaceError`` where taking so much would end with a killed process."""
        if memory.is_memory(self.directory.path) and more > (left := memory.left()):
            raise SlotSpaceError(
                f"no memory for a slot in {self.directory.path}: it needs {more} bytes more, and"
                f" {left} are left",
                hint="raise the memory limit, limit the slots (Staging(max_bytes=...)), or name a"
                " place on a disk with ENVSTORE_SLOTS",
            )

    def _space_error(self, number: int, size: int, there: int, error: OSError) -> CheckpointError:
        path = self.directory.slot_path(number)
        if error.errno not in _FULL:
            return CheckpointError(
                f"cannot make {path}: {error.strerror}",
                hint="name a writable memory volume with ENVSTORE_SLOTS",
            )
        found = os.statvfs(self.directory.path)
        return SlotSpaceError(
            f"no room for slot {number} of {self._count} in {self.directory.path}: it needs"
            f" {size - there} bytes more, and {found.f_bavail * found.f_frsize} of"
            f" {found.f_blocks * found.f_frsize} are free",
            hint="enlarge it (docker: --shm-size; Kubernetes: an emptyDir with medium: Memory),"
            " name another place with ENVSTORE_SLOTS, or use one slot (slots=1)",
        )

    def _check_process(self) -> None:
        if not self.is_ours:
            raise CheckpointError(
                "these slots are closed, or belong to the process that this one was forked from",
                hint="save in the process that made the run",
            )

    def _forget(self) -> None:
        """In a child of ``fork``: give up the lock, which else would outlive the trainer."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


_owners: weakref.WeakSet[SlotOwner] = weakref.WeakSet()


def _forget_all() -> None:
    for owner in list(_owners):
        owner._forget()


os.register_at_fork(after_in_child=_forget_all)


def _lock(fd: int) -> bool:
    """Try to hold a slot alone."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _become_trainer(directory: SlotDirectory, patience: float) -> int:
    """Return a locked descriptor of the directory's ``trainer`` file."""
    path = directory.path / TRAINER_LOCK
    end = time.monotonic() + patience
    while True:
        directory.create()  # a persister that ended may have removed it
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        held = _lock(fd)
        try:
            current = held and os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            current = False
        if current:
            os.truncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        other = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if not held:
            if time.monotonic() > end:
                raise CheckpointError(
                    f"process {other} saves this rank of this run already ({path})",
                    hint=(
                        "that is this one: close() the Run that it made before"
                        if other == str(os.getpid())
                        else "end it, or save under another name"
                    ),
                )
            time.sleep(_POLL)
