"""How many bytes the node cache takes: accounted for under a lock, kept below a cap.

The accounted total is never below the real one: space is reserved (a temporary file of full size,
under the lock) before it is used and released after it is freed, so a process killed anywhere
leaves at worst a total that is too high, which the next eviction corrects by counting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from envstore.errors import NoSpaceError
from envstore.store.binary import U64
from envstore.store.private import make_private

_LOW_WATER = 0.9
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Bytes accounted for, number of blobs, and the cap in bytes; then what whole files there are.

    ``bytes`` is that of blobs and files together, ``pinned`` that of files that stay.
    """

    bytes: int
    blobs: int
    capacity: int
    files: int = 0
    pinned: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """What lies in the cache: when it was last used, the bytes it takes, where."""

    used_ns: int
    size: int
    path: bytes
    pinned: bool


class CacheFullError(NoSpaceError):
    """The cap leaves no room just now, although the disk may: the data is sound, but not kept."""


class CacheSpace:
    """What lies below ``root``, and how much that is; for any thread of any process.

    Raises ``OSError``, and ``reserve`` also ``CacheFullError``.
    """

    def __init__(self, root: Path, capacity: int) -> None:
        """Use ``root``, made if missing. Raises ``OSError``."""
        self.root = root
        self.capacity = capacity
        self.blobs = os.fsencode(root / "blobs")
        self.files = os.fsencode(root / "files")
        self._partial = os.fsencode(root / "partial")
        self._lock_path = os.fsencode(root / "lock")
        self.make_directories()

    def usage(self) -> CacheUsage:
        """Return what is accounted for."""
        with self.locked() as lock:
            blobs = sum(len(files) for _, _, files in os.walk(self.blobs))
            files = self._list(self.files)
            pinned = sum(item.size for item in files if item.pinned)
            return CacheUsage(self._total(lock), blobs, self.capacity, len(files), pinned)

    def filled(self) -> int:
        """Return the bytes accounted for as they were last written down. Waits for nobody."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            data = os.pread(fd, U64.size, 0)
        finally:
            os.close(fd)
        return int(U64.unpack(data)[0]) if len(data) == U64.size else 0

    def clear(self) -> int:
        """Remove all that is not pinned; returns the bytes freed."""
        with self.locked() as lock:
            before = self._total(lock)
            self._evict(lock, 0)
            return before - self._total(lock)

    def make_room(self, size: int) -> bool:
        """Give back enough for some files of ``size``; returns whether anything was removed."""
        with self.locked() as lock:
            return self._evict(lock, self._total(lock) - 16 * _rounded(size))

    def drop(self, path: bytes) -> None:
        """Remove one file, if it is there."""
        with self.locked() as lock:
            total = self._total(lock)
            try:
                size = os.stat(path).st_size
                os.unlink(path)
            except FileNotFoundError:
                return
            self._set_total(lock, total - _rounded(size))

    def reserve(self, size: int, *, evict: bool = True) -> tuple[int, bytes]:
        """Account for ``size`` bytes and return a temporary file of that size, locked as ours."""
        need = _rounded(size)
        if need > self.capacity:
            raise CacheFullError(
                f"the cache {self.root} is capped at {self.capacity} bytes, one blob needs {need}",
                hint="raise ENVSTORE_CACHE_SIZE",
            )
        partial = b"%b/%b" % (self._partial, secrets.token_hex(16).encode())
        with self.locked() as lock:
            if self._total(lock) + need > self.capacity:
                if evict:
                    self._evict(lock, min(int(self.capacity * _LOW_WATER), self.capacity - need))
                if self._total(lock) + need > self.capacity:
                    raise CacheFullError(
                        f"the cache {self.root} is full of what is pinned or being written",
                        hint="raise ENVSTORE_CACHE_SIZE",
                    )
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.ftruncate(fd, size)
                self._set_total(lock, self._total(lock) + need)
            except BaseException:
                os.close(fd)
                os.unlink(partial)
                raise
        return fd, partial

    def settle(self, fd: int, partial: bytes, size: int, *, kept: bool) -> None:
        """Remove a temporary name, and give its bytes back if the file has no other."""
        try:
            # Unlinking and giving back are one step under the lock, or a count between the
            # two would be lowered twice.
            with self.locked() as lock:
                total = self._total(lock)
                os.unlink(partial)
                if not kept:
                    self._set_total(lock, total - _rounded(size))
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Hold off everybody who would reserve, release or evict."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            fd = os.open(self._lock_path, flags, 0o600)
        except FileNotFoundError:
            self.make_directories()
            fd = os.open(self._lock_path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def make_directories(self) -> None:
        """Make what is not there of the directories."""
        for directory in (self._partial, self.blobs, self.files):
            make_private(directory)

    def _evict(self, lock: int, goal: int) -> bool:
        """Remove what is not pinned, oldest use first, until at most ``goal`` bytes are left.

        Counts anew. Returns whether anything was removed.
        """
        found = self._list(self.blobs) + self._list(self.files)
        total = self._reserved() + sum(item.size for item in found)
        removed = False
        for item in sorted(found, key=attrgetter("used_ns")):
            if total <= goal:
                break
            if item.pinned:
                continue
            os.unlink(item.path)
            total -= item.size
            removed = True
        self._set_total(lock, total)
        return removed

    def _list(self, top: bytes) -> list[_Kept]:
        found = []
        with os.scandir(top) as directories:
            for directory in directories:
                with os.scandir(directory.path) as listing:
                    for item in listing:
                        st = item.stat(follow_symlinks=False)
                        # A blob's second name is that of a writer about to remove it.
                        pinned = st.st_nlink > 1 and top == self.files
                        size = _rounded(st.st_size)
                        found.append(_Kept(st.st_mtime_ns, size, item.path, pinned))
        return found

    def _reserved(self) -> int:
        """Count files being written; those whose writer died are removed."""
        total = 0
        with os.scandir(self._partial) as listing:
            for item in listing:
                try:
                    fd = os.open(item.path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(item.path)
                except BlockingIOError:
                    total += _rounded(os.fstat(fd).st_size)
                finally:
                    os.close(fd)
        return total

    def _total(self, lock: int) -> int:
        data = os.pread(lock, U64.size, 0)
        if len(data) == U64.size:
            return int(U64.unpack(data)[0])
        # The file is new, or was lost in a crash: what is there has to be counted.
        found = self._list(self.blobs) + self._list(self.files)
        total = self._reserved() + sum(item.size for item in found)
        self._set_total(lock, total)
        return total

    def _set_total(self, lock: int, total: int) -> None:
        os.pwrite(lock, U64.pack(max(0, total)), 0)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
