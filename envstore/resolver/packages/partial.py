"""A file that is being fetched, and the directory that such files lie in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
from pathlib import Path

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError

_LEFTOVER_SECONDS = 7 * 86400
_TICK = 0.1


class StoppedError(Exception):
    """The fetch was given up."""


class Partial:
    """A file that is being fetched, locked against other processes, with digests so far.

    ``algorithms`` are the names of the digests to take. Where it is left without ``rename``, it
    stays for the next attempt if that may ``resume`` it and if it holds anything.
    """

    def __init__(
        self, path: Path, algorithms: tuple[str, ...], stopped: threading.Event, *, resume: bool
    ) -> None:
        self._path, self._algorithms, self._stopped = path, algorithms, stopped
        self._fd, self._resume, self._renamed = -1, resume, False
        self._digests = self._new_digests()
        self.version = ""
        self.size = 0

    def __enter__(self) -> Partial:
        self._fd = self._open()
        try:
            while data := os.read(self._fd, 1 << 20):
                self._count(data)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._renamed and not (self._resume and self.size):
            self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def digest(self, algorithm: str) -> str:
        """Return one of the digests of what is there, in hex."""
        return self._digests[algorithm].hexdigest()

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._count(data)

    def restart(self) -> None:
        """Forget what is there."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.size, self.version = 0, ""
        self._digests = self._new_digests()

    def rename(self, final: Path) -> None:
        """Give it its final name."""
        os.rename(self._path, final)
        self._renamed = True

    def _new_digests(self) -> dict[str, hashlib._Hash]:
        return {name: hashlib.new(name, usedforsecurity=False) for name in self._algorithms}

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        for digest in self._digests.values():
            digest.update(data)

    def _open(self) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                self._lock(fd)
                # Whoever had it may have finished and renamed it.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock(self, fd: int) -> None:
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._stopped.wait(_TICK):
                    raise StoppedError from None


def remove_leftovers(directory: Path) -> None:
    """Remove what nobody has written or asked for in a week."""
    oldest = time.time() - _LEFTOVER_SECONDS
    with os.scandir(directory) as listing:
        for item in listing:
            with contextlib.suppress(FileNotFoundError):
                if item.is_file(follow_symlinks=False) and item.stat().st_mtime < oldest:
                    os.unlink(item.path)


def disk_error(directory: Path, error: OSError) -> EnvstoreError:
    """Return what an error of the disk that archives are kept on means to the user."""
    reason = f"cannot keep archives in {directory}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(reason, hint="free space, or move the cache with ENVSTORE_CACHE_DIR")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(reason, hint="fix permissions, or set ENVSTORE_CACHE_DIR")
    return EnvstoreError(reason, hint="set ENVSTORE_CACHE_DIR to a directory on a local disk")
