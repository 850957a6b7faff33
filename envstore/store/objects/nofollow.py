"""Reaching files below a directory without ever following a symbolic link.

Every function raises plain ``OSError``; a symbolic link where a directory or a file should be is
``ELOOP``.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from envstore.store.objects.writeback import PIECE, begin_writeback

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody left there must not hang.
_OBJECT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

# Buffers of one call: what POSIX calls IOV_MAX, 1024 on Linux.
_AT_ONCE = os.sysconf("SC_IOV_MAX")


@contextmanager
def open_directory(root: Path, parts: Sequence[str], *, create: bool = False) -> Iterator[int]:
    """Yield a descriptor of the directory ``parts`` below ``root``.

    ``create`` makes what is missing. ``root`` itself may be, or lie behind, a symbolic link.
    """
    fd = os.open(root, _DIRECTORY)
    try:
        for part in parts:
            below = _step(fd, part, create=create)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _step(fd: int, name: str, *, create: bool) -> int:
    try:
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    except NotADirectoryError:
        # What the kernel says of a symbolic link too.
        if is_symlink(fd, name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        raise
    except FileNotFoundError:
        if not create:
            raise
    try:
        os.mkdir(name, dir_fd=fd)
    except FileExistsError:
        pass  # another process was faster
    else:
        os.fsync(fd)
    return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)


def is_symlink(directory: int, name: str) -> bool:
    """Return whether ``name`` in ``directory`` is a symbolic link."""
    return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)


def open_object(directory: int, name: str) -> io.FileIO:
    """Open the regular file ``name`` for reading; anything else there counts as not existing."""
    fd = os.open(name, _OBJECT, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return io.FileIO(fd)


def read_range(file: io.FileIO, start: int, length: int) -> bytes:
    """Return ``length`` bytes from ``start``, or fewer where the file ends."""
    fd = file.fileno()
    data = os.pread(fd, length, start)
    if len(data) == length or not data:
        return data
    pieces = [data]
    got = len(data)
    while got < length and (data := os.pread(fd, length - got, start + got)):
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


def write_new(directory: int, buffers: Sequence[memoryview]) -> str:
    """Write ``buffers`` to a new file in ``directory``, durable, and return its name.

    On failure nothing is left behind.
    """
    name = f"{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(name, _NEW, 0o666, dir_fd=directory)
    try:
        try:
            _write_all(fd, buffers)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(name, dir_fd=directory)
        raise
    return name


def clock(directory: int) -> float:
    """Return the time of the file system that ``directory`` is on, in seconds since 1970.

    That is the time it gives a new file, which is removed at once. Over a network it is the
    server's.
    """
    name = f"{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(name, _NEW, 0o666, dir_fd=directory)
    try:
        os.utime(fd)
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=directory)


def _write_all(fd: int, buffers: Sequence[memoryview]) -> None:
    waiting = deque(buffers)
    at = begun = 0
    while waiting:
        written = os.writev(fd, _piece(waiting))
        at += written
        if at - begun >= PIECE:
            begin_writeback(fd, begun, at - begun)
            begun = at
        # The kernel may take less than it was given.
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:
            waiting[0] = waiting[0][written:]


def _piece(waiting: deque[memoryview]) -> list[memoryview]:
    """Return what to write next: about ``PIECE`` bytes, and no more buffers than one call takes."""
    found: list[memoryview] = []
    size = 0
    for buffer in islice(waiting, _AT_ONCE):
        found.append(buffer[: PIECE - size])
        size += len(found[-1])
        if size >= PIECE:
            break
    return found


def entries(directory: int) -> Sequence[tuple[str, os.stat_result]]:
    """Return the names in ``directory`` with the status of each, links not followed."""
    found: list[tuple[str, os.stat_result]] = []
    with os.scandir(directory) as scan:
        for entry in scan:
            try:
                found.append((entry.name, entry.stat(follow_symlinks=False)))
            except FileNotFoundError:
                continue  # removed since the directory was read
    return found
