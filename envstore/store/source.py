"""Where a push takes its bytes from: a tree of entries, read window by window."""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError

WINDOW = 4 << 20
"""Bytes handed on at a time; a multiple of the hole granularity, so holes never straddle."""

_ZEROS = bytes(WINDOW)

_STAT = struct.Struct("<QQQQQI")
_U64 = (1 << 64) - 1
_LAST_NS = (1 << 63) - 1  # in the year 2262; file systems go on to 2446 and beyond

_FINE_NS, _COARSE_NS = 50_000_000, 2_000_000_000


class Kind(enum.IntEnum):
    """What a tree entry is. The numbers are the format's."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2


class ChangedError(EnvstoreError):
    """A file changed while it was read, so no consistent snapshot of it exists."""

    def __init__(self, path: bytes) -> None:
        super().__init__(
            f"{os.fsdecode(path)} changed while it was being read",
            hint="push again when nothing writes to it",
        )


class OmitEntry(Exception):  # noqa: N818 - a signal between source and push, not an error
    """Raised by ``read`` before the first piece: the entry is left out of the snapshot.

    Not ``lasting`` means that another try may find content although nothing in the tree changed.
    """

    def __init__(self, *, lasting: bool = True) -> None:
        super().__init__()
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One entry of a tree as the source found it.

    ``path`` is relative, ``/``-separated raw bytes. ``mode`` holds the permission bits to store.
    ``link`` is shared by the names of one hard-linked file and ``None`` for all others.
    ``signature`` changes whenever the content may have changed. ``settled`` is false when the
    file changed so recently that another change could leave the signature as it is. ``relocation``
    is that of ``Entry``.
    """

    path: bytes
    kind: Kind
    mode: int = 0o644
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    link: tuple[int, int] | None = None
    signature: bytes = b""
    settled: bool = True
    relocation: bytes = b""


class Source(Protocol):
    """A tree to push. ``read`` is called from one thread at a time, in ``order``.

    ``warnings`` are lines for the user about what could not be kept.
    """

    kind: str
    """``env``, ``model`` or ``dir``."""
    root: Path
    identity: str
    """Names this tree and the way it is read, as the key of the stat cache."""
    warnings: list[str]

    def scan(self) -> list[SourceEntry]:
        """Return every entry below the root, the root itself excluded, in any order."""
        ...

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """Return the key by which contents are laid into packs: neighbours are fetched together."""
        ...

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """Announce the files that will be read, in that order, so that work can start ahead."""
        ...

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """Yield the content in pieces of ``WINDOW`` bytes, only the last one shorter.

        Raises ``ChangedError`` when the file is not what ``scan`` saw.
        """
        ...

    def attributes(self) -> dict[str, str]:
        """Return facts about the tree worth keeping in the snapshot (interpreter, platform)."""
        ...

    def root_attributes(self) -> tuple[int, int]:
        """Return mode bits and mtime (ns) of the tree's own directory, zeros if normalised."""
        ...

    def close(self) -> None:
        """Release processes and handles; idempotent."""
        ...


def stat_signature(st: os.stat_result) -> bytes:
    """Return the bytes that change when a file's content may have changed."""
    return _STAT.pack(
        st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns & _U64, st.st_ctime_ns & _U64, st.st_mode
    )


def is_settled(st: os.stat_result, now_ns: int) -> bool:
    """Return whether a change after ``now_ns`` is certain to alter the file's signature.

    Time stamps move in ticks (10 ms at most on Linux, 2 s on file systems that store whole
    seconds), so a file changed within the last tick could change again unseen.
    """
    coarse = st.st_ctime_ns % 1_000_000_000 == 0
    return now_ns - st.st_ctime_ns > (_COARSE_NS if coarse else _FINE_NS)


def access_error(error: OSError, path: bytes) -> EnvstoreError:
    """Turn an ``OSError`` met in the user's tree into an error that names the path."""
    name = os.fsdecode(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(f"cannot read {name}: {error.strerror}", hint="check permissions")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE):
        return ChangedError(path)
    return EnvstoreError(f"cannot read {name}: {error.strerror}")


class DirectorySource:
    """A directory (or one file) on disk, every byte, permission bit and mtime of it.

    Files are opened without following links and checked before and after reading, so a file
    that is replaced, truncated or written to meanwhile is noticed.
    """

    def __init__(self, root: Path, *, kind: str = "dir", normalise: bool = False) -> None:
        """Take ``root``; with ``normalise`` times and permissions are reduced to what is portable.

        Raises ``NotFoundError``, ``UsageError`` (neither a directory nor a file).
        """
        self.kind = kind
        self.root = Path(os.path.abspath(root))
        self._normalise = normalise
        self._scanned = 0
        try:
            st = os.stat(self.root)
        except FileNotFoundError:
            raise NotFoundError(f"no such path: {root}") from None
        except OSError as error:
            raise access_error(error, os.fsencode(root)) from error
        self.warnings: list[str] = []
        self._single = stat.S_ISREG(st.st_mode)
        if not self._single and not stat.S_ISDIR(st.st_mode):
            raise UsageError(f"{root} is neither a directory nor a regular file")
        self._base = os.fsencode(self.root.parent if self._single else self.root)
        self.identity = f"{self.root}\0{kind}\0{int(normalise)}"

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``; a socket, device or FIFO is refused by name."""
        self._scanned = time.time_ns()
        if self._single:
            name = os.fsencode(self.root.name)
            return [self._entry(name, os.stat(self.root))]
        entries: list[SourceEntry] = []
        pending = [b""]
        while pending:
            directory = pending.pop()
            for name, st, target in self._list(directory):
                path = directory + b"/" + name if directory else name
                entries.append(self._entry(path, st, target))
                if stat.S_ISDIR(st.st_mode):
                    pending.append(path)
        return entries

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``: path order."""
        return 0, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``; the kernel's own readahead is enough here."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        path = entry.path
        try:
            fd = self._open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise access_error(error, path) from error
        try:
            st = os.fstat(fd)
            if stat_signature(st) != entry.signature:
                raise ChangedError(path)
            sparse = st.st_blocks * 512 < entry.size
            for at in range(0, entry.size, WINDOW):
                size = min(entry.size - at, WINDOW)
                if sparse and _next_data(fd, at, entry.size) >= at + size:
                    yield _ZEROS[:size]
                    continue
                piece = _read_full(fd, size, at)
                if len(piece) < size:
                    raise ChangedError(path)
                yield piece
            if stat_signature(os.fstat(fd)) != entry.signature:
                raise ChangedError(path)
        except OSError as error:
            raise access_error(error, path) from error
        finally:
            os.close(fd)

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        if self._normalise or self._single:
            return 0, 0
        st = os.stat(self.root)
        return stat.S_IMODE(st.st_mode), self._mtime(b".", st)

    def close(self) -> None:
        """See ``Source.close``."""

    def _entry(self, path: bytes, st: os.stat_result, target: bytes = b"") -> SourceEntry:
        mode, mtime_ns = stat.S_IMODE(st.st_mode), self._mtime(path, st)
        link = (st.st_dev, st.st_ino) if st.st_nlink > 1 else None
        if stat.S_ISDIR(st.st_mode):
            kind, normal_mode, link = Kind.DIRECTORY, 0o755, None
        elif stat.S_ISLNK(st.st_mode):
            kind, normal_mode, mode = Kind.SYMLINK, 0o777, 0o777
        elif stat.S_ISREG(st.st_mode):
            kind, normal_mode = Kind.FILE, 0o755 if mode & 0o111 else 0o644
        else:
            what = "socket" if stat.S_ISSOCK(st.st_mode) else "device or FIFO"
            where = os.fsdecode(os.path.join(self._base, path))
            raise UsageError(f"{where} is a {what}", hint="remove it or push a tree without it")
        if self._normalise:
            mode, mtime_ns, link = normal_mode, 0, None
        size = st.st_size if kind is Kind.FILE else 0
        return SourceEntry(
            path, kind, mode, mtime_ns, size, target, link,
            stat_signature(st), is_settled(st, self._scanned),
        )  # fmt: skip

    def _mtime(self, path: bytes, st: os.stat_result) -> int:
        if abs(st.st_mtime_ns) <= _LAST_NS:
            return st.st_mtime_ns
        if not self._normalise:
            warning = (
                f"{os.fsdecode(path)}: its time stamp is too far from 1970 to be kept as it is"
            )
            if warning not in self.warnings:
                self.warnings.append(warning)
        return _LAST_NS if st.st_mtime_ns > 0 else -_LAST_NS

    def _list(self, directory: bytes) -> list[tuple[bytes, os.stat_result, bytes]]:
        found = []
        try:
            fd = self._open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with os.scandir(fd) as listing:
                    for item in listing:
                        st = item.stat(follow_symlinks=False)
                        link = stat.S_ISLNK(st.st_mode)
                        name = os.fsencode(item.name)
                        target = os.readlink(name, dir_fd=fd) if link else b""
                        found.append((name, st, target))
            finally:
                os.close(fd)
        except OSError as error:
            raise access_error(error, os.path.join(self._base, directory)) from error
        return found

    def _open(self, path: bytes, flags: int) -> int:
        flags |= os.O_CLOEXEC
        full = os.path.join(self._base, path) if path else self._base
        if len(full) < 4096:
            return os.open(full, flags)
        # Longer than PATH_MAX: legal on disk, reachable only one component at a time.
        fd = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        parts = path.split(b"/")
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            step = flags if last else os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                deeper = os.open(part, step, dir_fd=fd)
            finally:
                os.close(fd)
            fd = deeper
        return fd


def _next_data(fd: int, at: int, size: int) -> int:
    """Return where the first byte not in a hole lies, from ``at`` on."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size  # nothing but a hole up to the end


def _read_full(fd: int, size: int, at: int) -> bytes:
    piece = os.pread(fd, size, at)
    if len(piece) == size or not piece:
        return piece
    pieces = [piece]
    got = len(piece)
    while got < size:
        piece = os.pread(fd, size - got, at + got)
        if not piece:
            break
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)
