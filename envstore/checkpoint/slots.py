"""Slots: named files in shared memory that hold a staged part, and outlive who wrote them.

A slot directory belongs to one rank of one run on one node: ``slot-0``, ``slot-1`` and so on (see
``slotformat`` for their bytes), and ``trainer``, a lock that the process that saves holds as long
as it lives. Its mode is 0700 and that of the files 0600.

Who may do what. The trainer alone writes into slots (``slotwriting``). Whoever reads one holds a
shared ``flock`` on it; the trainer gives a slot to a new save only under an exclusive one, which
it gives back as soon as the control page and the header of that save are written. So what a
reader has open is never changed under it, but for what a slot that is ``writing`` still waits
for: ``filled`` grows, and the state becomes ``staged`` at the very end. A persister may therefore
begin early, and commits only what is ``staged``. A slot that is ``writing`` while nobody holds
``trainer`` is what a killed trainer left behind.

A state that does not fit into a slot comes in waves: ``wave`` says that one is complete and that
another follows. Each carries whole segments, and lists all others at the offset 0. The persister
puts what it made of the wave where it outlives it, calls ``take_wave`` and closes the slot; the
trainer then writes the next wave into it. The part is complete with the last wave, which ends
``staged``.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from envstore.checkpoint import memory
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.layout import Orders, RunName, StagedFile, Want
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
    Header,
    decode_header,
)
from envstore.errors import CorruptError, NotFoundError
from envstore.store.digest import digest

TRAINER_LOCK = "trainer"
_SLOT = re.compile(r"slot-(0|[1-9][0-9]{0,3})")
_PIECE = 32 << 20
_THREADS = min(4, os.cpu_count() or 1)


def slot_root(given: str | Path | None = None) -> Path:
    """Return the directory of all slots.

    It is ``given``, ``ENVSTORE_SLOTS`` or ``/dev/shm/envstore-<uid>``.
    """
    if given is not None:
        return Path(given).absolute()
    named = os.environ.get("ENVSTORE_SLOTS")
    return Path(named) if named else _shared_memory()


def run_directory(store: str, run: RunName, root: str | Path | None = None) -> Path:
    """Return the directory of a run's slots on this node; one directory for each rank is in it."""
    return slot_root(root) / blake3(f"{store}\n{run}".encode()).hexdigest()[:16]


def slot_directory(store: str, run: RunName, rank: int, root: str | Path | None = None) -> Path:
    """Return where the slots of a rank lie. ``store`` is the store's URL."""
    return run_directory(store, run, root) / f"{rank:05d}"


def _shared_memory() -> Path:
    """Return where slots lie if nobody says where; anybody can make a directory beside it."""
    return Path(f"/dev/shm/envstore-{os.geteuid()}")  # noqa: S108


class StagedSlot:
    """A slot that somebody wrote, mapped and locked against its next use until ``close``.

    Get one from ``SlotDirectory.read_slot``. Structure was checked; the data is as it lies there.
    Close it soon: a trainer that needs the slot waits. Safe to read from several threads.
    """

    def __init__(
        self, number: int, path: Path, fd: int, mapping: mmap.mmap, control: Control, header: Header
    ) -> None:
        self.number = number
        self.path = path
        self.sequence = control.sequence
        self.wave = control.wave
        self.last = control.last
        self.orders: Orders = header.orders
        self.files: tuple[StagedFile, ...] = header.files
        self._end = control.header_at
        self._fd = fd
        self._mapping = mapping
        self._memory = memoryview(mapping)
        self._words = ControlWords(self._memory)
        self._open = True

    @property
    def state(self) -> str:
        """``writing``, ``wave``, ``staged``, ``durable`` or ``broken``, as it is now."""
        return self._words.state(len(self._mapping))

    @property
    def filled(self) -> int:
        """Offset in the slot below which all data is final, as it is now."""
        state = self.state
        if state in (STAGED, DURABLE, WAVE):
            return self._end
        return max(CONTROL_BYTES, min(self._words.filled, self._end))

    @property
    def complete(self) -> bool:
        """Whether a whole part lies here, in one wave and staged."""
        return self.wave == 0 and self.last and self.state in (STAGED, DURABLE)

    @property
    def view(self) -> memoryview:
        """All bytes of the slot, read-only. Offsets of segments count from its start."""
        return self._memory.toreadonly()

    def copy_into(self, start: int, view: memoryview) -> None:
        """Copy the bytes of the slot from ``start`` into all of ``view``, without the GIL."""
        memory.copy(view, self._memory[start : start + view.nbytes])

    def mark_durable(self) -> None:
        """Say that the store has the part: the trainer may use the slot again once it is closed."""
        if self.state == STAGED:
            self._words.set_state(DURABLE)

    def mark_broken(self) -> None:
        """Say that nobody will ever store the part: the slot may be used again."""
        self._words.set_state(BROKEN)

    def take_wave(self) -> None:
        """Say that this wave is needed no more. ``close`` the slot next; the trainer waits."""
        self._words.taken = self.wave + 1

    def close(self) -> None:
        """Unlock the slot and forget it; idempotent. Views of it must not be used any more."""
        if not self._open:
            return
        self._open = False
        self._words.release()
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # views outlive it: the memory goes with the last
            self._memory.release()
            self._mapping.close()

    def __enter__(self) -> StagedSlot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SlotDirectory:
    """The slots of one rank. Holds nothing open; safe to share between threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def create(self) -> None:
        """Make the directory unless it is there, and make sure that nobody else may enter.

        Raises ``CheckpointError``.
        """
        try:
            self.path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = [self.path.parent, self.path]
            if self.path.parent.parent == _shared_memory():
                own.insert(0, self.path.parent.parent)
            for directory in own:
                directory.mkdir(mode=0o700, exist_ok=True)
                found = os.lstat(directory)
                if (
                    not stat.S_ISDIR(found.st_mode)
                    or found.st_uid != os.geteuid()
                    or found.st_mode & 0o077
                ):
                    raise CheckpointError(
                        f"{directory} is not a directory that only user {os.geteuid()} may enter",
                        hint="remove it, or name another place with ENVSTORE_SLOTS",
                    )
        except OSError as error:
            raise CheckpointError(
                f"cannot make the slot directory {self.path}: {error.strerror}",
                hint="name a writable memory volume with ENVSTORE_SLOTS",
            ) from error

    def slot_path(self, number: int) -> Path:
        """Return the file of slot ``number``."""
        return self.path / f"slot-{number}"

    def numbers(self) -> list[int]:
        """Return the numbers of the slots that exist, ascending."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _SLOT.fullmatch(name)))

    def read_slot(self, number: int) -> StagedSlot | None:
        """Open a slot for reading; ``None`` if there is nothing to read.

        That is: no slot, an empty or broken one, one whose control page or header is damaged, or
        one that the trainer is about to use again.
        """
        path = self.slot_path(number)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size < CONTROL_BYTES:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            undo.callback(fcntl.flock, fd, fcntl.LOCK_UN)
            mapping = mmap.mmap(fd, found.st_size)
            undo.callback(mapping.close)
            checked = _check(mapping, found.st_size, str(path))
            if checked is None:
                return None
            undo.pop_all()
            return StagedSlot(number, path, fd, mapping, *checked)

    def slots(self) -> list[StagedSlot]:
        """Open all slots that can be read, the oldest save first. Close each of them."""
        found = [slot for number in self.numbers() if (slot := self.read_slot(number))]
        return sorted(found, key=lambda slot: slot.sequence)

    def trainer_alive(self) -> bool:
        """Whether a process holds the slots to save into them."""
        with self._trainer_lock(fcntl.LOCK_SH) as free:  # two may ask at once
            return not free

    def remove(self) -> bool:
        """Remove all slots and the directory, unless a trainer or a reader is there.

        A part that is ``staged`` but not ``durable`` stays. Returns whether all is gone. Files
        that others put there are theirs to remove first.
        """
        with self._trainer_lock() as free:
            if not free:
                return False
            gone = [_remove_slot(self.slot_path(number)) for number in self.numbers()]
            if not all(gone):
                return False
            with contextlib.suppress(OSError):
                (self.path / TRAINER_LOCK).unlink()
            with contextlib.suppress(OSError):
                self.path.rmdir()
                self.path.parent.rmdir()  # the last rank of the run on this node
            return True

    @contextlib.contextmanager
    def _trainer_lock(self, kind: int = fcntl.LOCK_EX) -> Iterator[bool]:
        """Yield whether nobody held the lock of the trainer; it is held meanwhile."""
        try:
            fd = os.open(self.path / TRAINER_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            yield True
            return
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(fd)


def _check(mapping: mmap.mmap, size: int, what: str) -> tuple[Control, Header] | None:
    """Return what the control page and the header say, or ``None`` if they are not to be used."""
    with memoryview(mapping) as view:
        words = ControlWords(view)
        try:
            control = words.read(size)
            state = words.state(size)
            if control is None or state in (EMPTY, BROKEN):
                return None
            end = control.header_at + control.header_bytes
            data = bytes(view[control.header_at : end])
            if digest(data) != control.header_digest:
                return None
            if state != WRITING and words.filled != control.header_at:
                return None
        finally:
            words.release()
    try:
        header = decode_header(data, first=CONTROL_BYTES, end=control.header_at, what=what)
    except CorruptError:
        return None
    if control.wave == 0 and control.last and any(_absent(file) for file in header.files):
        return None
    return control, header


def _absent(file: StagedFile) -> bool:
    return any(start == 0 for start, _ in file.segments)


def _remove_slot(path: Path) -> bool:
    """Remove a slot that nobody has open and whose part the store has, or that holds none."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return not path.exists()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(fd).st_size
        if size >= CONTROL_BYTES:
            with mmap.mmap(fd, CONTROL_BYTES) as page, memoryview(page) as view:
                words = ControlWords(view)
                state = words.state(size)
                words.release()
            if state == STAGED:
                return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class SlotTree:
    """The files of complete slots, one for each rank, as a ``layout.Tree``.

    It owns the slots and closes them. What is read is checked for structure, not for content:
    memory of this node is trusted to keep what the trainer wrote.
    """

    def __init__(self, slots: Iterable[StagedSlot]) -> None:
        self._slots = list(slots)
        self._files: dict[str, tuple[StagedSlot, StagedFile]] = {}
        for slot in self._slots:
            if not slot.complete:
                raise CorruptError(f"{slot.path} holds no complete part")
            for file in slot.files:
                if file.path in self._files:
                    raise CorruptError(f"{slot.path}: another slot has {file.path} too")
                self._files[file.path] = (slot, file)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by path."""
        return {path: file.size for path, (_, file) in self._files.items()}

    def read(self, path: str) -> bytes:
        """Return a whole file. Raises ``NotFoundError``."""
        slot, file = self._find(path)
        return b"".join(slot.view[start : start + length] for start, length in file.segments)

    def read_into(self, wants: Sequence[Want]) -> None:
        """Copy into every view, with several threads if there is much to copy.

        Raises ``NotFoundError``, and ``CorruptError`` for a range that is not in the file.
        """
        copies = [copy for want in wants for copy in self._copies(want)]
        if sum(view.nbytes for _, _, view in copies) < _PIECE:
            for slot, start, view in copies:
                slot.copy_into(start, view)
            return
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="envstore-slot") as pool:
            for _ in pool.map(lambda one: one[0].copy_into(one[1], one[2]), copies):
                pass

    def close(self) -> None:
        """Close the slots; idempotent."""
        for slot in self._slots:
            slot.close()

    def _find(self, path: str) -> tuple[StagedSlot, StagedFile]:
        try:
            return self._files[path]
        except KeyError:
            raise NotFoundError(f"{path} is not in the slots") from None

    def _copies(self, want: Want) -> Iterator[tuple[StagedSlot, int, memoryview]]:
        slot, file = self._find(want.path)
        view = want.view.cast("B")
        if want.start < 0 or want.start + view.nbytes > file.size:
            raise CorruptError(f"{want.path} has {file.size} bytes, not {want.start}+{view.nbytes}")
        at = 0  # where the segment begins in the file
        done = 0
        for start, length in file.segments:
            position = want.start + done
            while done < view.nbytes and position < at + length:
                count = min(at + length - position, view.nbytes - done, _PIECE)
                yield slot, start + position - at, view[done : done + count]
                done += count
                position += count
            at += length
