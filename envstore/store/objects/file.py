"""Objects as files in a directory, safe for concurrent processes and for crashes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blake3 import blake3

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.objects import nofollow
from envstore.store.objects.base import ObjectInfo, Traffic, ignore
from envstore.store.objects.body import Body, length, views
from envstore.store.objects.keys import check_key, check_prefix, is_key
from envstore.store.objects.url import FileLocation
from envstore.store.objects.vectors import read_into

# Both begin with a dot, which no key may: they cannot collide with an object.
_TEMPORARY = ".tmp"
_LOCKS = ".locks"
# Held by all who delete within a deadline; the others there are named by two hexadecimal digits.
_DELETING = "gc"
_SETTLE_SECONDS = 30.0
_SETTLE_PAUSE = 0.05

# No upload of one object lasts a day; an older temporary file belongs to a process that died.
_TEMPORARY_SECONDS = 24 * 3600

# Bytes read at a time where they are handed on one by one.
_PIECE = 1 << 20

_LOCK_FLAGS = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class FileObjects:
    """An ``ObjectStore`` in a directory.

    An object is the file of its key. It is written to ``.tmp`` beside the objects, fsync'ed,
    renamed into place, and its directory fsync'ed: readers and crashes see all of it or nothing.
    A temporary file left by a crash is never listed, and the first write of a later process
    removes it once it is a day old. ``put_if`` compares and renames under a ``flock`` on one of
    256 files in ``.locks`` (chosen by the key, never removed), which the kernel releases when
    its holder dies; ``put`` and ``delete`` take it too. ``delete_within`` shares one more
    lock, from before its check until the object is gone, and ``settle`` takes it alone: a process
    that is stopped in between keeps it, and a dead one does not. The version of an object is the
    BLAKE3 of its content.

    Files and directories are created with the process's umask (0666 and 0777 less the umask):
    a umask of 077 makes a private store, 002 and a set-group-ID directory one for a group.
    Symbolic links inside the store are refused, so that none leads a write outside of it.
    A key may not be the directory of another key (``a`` and ``a/b``).
    """

    def __init__(self, root: Path, *, create: bool = False) -> None:
        self.url = FileLocation(root).url
        self.traffic = Traffic()
        self._root = root
        self._swept = False
        if create:
            with self._errors("create", ""):
                _make_root(root)
        # A missing directory shows here rather than in the middle of something.
        with self._errors("open", ""):
            self._require_root()

    def get(self, key: str) -> bytes:
        """Return the whole object. Raises ``NotFoundError``."""
        *folders, name = check_key(key)
        with (
            self._errors("read", key),
            self._directory(folders) as parent,
            nofollow.open_object(parent, name) as file,
        ):
            data = file.readall()
        self.traffic.add(requests=1, bytes_in=len(data))
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``.

        Raises ``NotFoundError``; ``CorruptError`` if the object is too short.
        """
        if start < 0 or length < 0:
            raise ValueError(f"negative range {start}+{length}")
        *folders, name = check_key(key)
        with (
            self._errors("read", key),
            self._directory(folders) as parent,
            nofollow.open_object(parent, name) as file,
        ):
            data = nofollow.read_range(file, start, length)
        self.traffic.add(requests=1, bytes_in=len(data))
        if len(data) != length:
            raise self._too_short(key, start, length, len(data))
        return data

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on; see ``get_range``."""
        if start < 0:
            raise ValueError(f"negative range from {start}")
        *folders, name = check_key(key)
        with (
            self._errors("read", key),
            self._directory(folders) as parent,
            nofollow.open_object(parent, name) as file,
        ):
            got = read_into(file.fileno(), start, views)
        self.traffic.add(requests=1, bytes_in=got)
        wanted = sum(map(len, views))
        if got != wanted:
            raise self._too_short(key, start, wanted, got)
        arrived(got)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield exactly ``length`` bytes from ``start``; see ``get_range``."""
        if start < 0 or length < 0:
            raise ValueError(f"negative range {start}+{length}")
        *folders, name = check_key(key)
        with self._errors("read", key):
            with self._directory(folders) as parent:
                file = nofollow.open_object(parent, name)
            with file:
                self.traffic.add(requests=1)
                got = 0
                while got < length:
                    wanted = min(_PIECE, length - got)
                    data = nofollow.read_range(file, start + got, wanted)
                    self.traffic.add(bytes_in=len(data))
                    got += len(data)
                    if len(data) != wanted:
                        raise self._too_short(key, start, length, got)
                    yield data

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its version. Raises ``NotFoundError``."""
        data = self.get(key)
        return data, _version(data)

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key``; atomic, and durable once this returns."""
        self._write(key, data, conditional=False, version=None)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` if the object still has ``version`` (``None``: does not exist).

        Returns the new version. Raises ``ConflictError``.
        """
        self._write(key, data, conditional=True, version=version)
        return _version(data)

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None`` if it does not exist."""
        *folders, name = check_key(key)
        self.traffic.add(requests=1)
        with self._errors("read", key):
            try:
                with self._directory(folders) as parent:
                    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                self._require_root()
                return None
            _refuse_symlink(status, name)
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``, in no particular order.

        A file whose name cannot be a key is passed over.
        """
        check_prefix(prefix)
        self.traffic.add(requests=1)
        pending = [prefix.rpartition("/")[0]]
        while pending:
            folder = pending.pop()
            for key, status in self._entries(folder):
                if stat.S_ISDIR(status.st_mode):
                    if f"{key}/".startswith(prefix) or key.startswith(prefix):
                        pending.append(key)
                elif stat.S_ISREG(status.st_mode) and key.startswith(prefix):
                    yield ObjectInfo(key, status.st_size)

    def delete(self, key: str) -> None:
        """Remove the object; not an error if it does not exist."""
        *folders, name = check_key(key)
        self.traffic.add(requests=1)
        with self._errors("delete", key):
            try:
                with self._directory(folders) as parent, self._locked(key):
                    os.unlink(name, dir_fd=parent)
                    os.fsync(parent)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._require_root()

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object while ``check`` holds, and nobody in ``settle`` goes on until then."""
        check_key(key)
        with self._lock(_DELETING, fcntl.LOCK_SH):
            check()
            self.delete(key)

    def settle(self, seconds: float) -> None:
        """Return once no other process is within ``delete_within``.

        Raises ``UnavailableError`` if one still is after half a minute.
        """
        latest = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                with self._lock(_DELETING, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    return
            except BlockingIOError:
                if time.monotonic() > latest:
                    path = self._path(f"{_LOCKS}/{_DELETING}")
                    raise UnavailableError(
                        f"a process that was collecting garbage is stopped and holds {path}",
                        hint=f"`lslocks` or `fuser {path}` tells which: continue it, or end it",
                    ) from None
            time.sleep(_SETTLE_PAUSE)

    def now(self) -> float:
        """Return the time of the file system, by a new file in ``.tmp``."""
        with (
            self._errors("write", _TEMPORARY, writing=True),
            self._directory((_TEMPORARY,), create=True) as temporary,
        ):
            return nofollow.clock(temporary)

    def close(self) -> None:
        """Do nothing: no file stays open between two calls."""

    def _write(self, key: str, data: Body, *, conditional: bool, version: str | None) -> None:
        *folders, name = check_key(key)
        self.traffic.add(requests=1, bytes_out=length(data))
        with (
            self._errors("write", key, writing=True),
            self._directory((_TEMPORARY,), create=True) as temporary,
        ):
            self._sweep(temporary)
            # Written before the lock is taken, so that it is held for a rename and no longer.
            draft = nofollow.write_new(temporary, views(data))
            placed = False
            try:
                with self._directory(folders, create=True) as parent, self._locked(key):
                    if conditional and self._current(parent, name) != version:
                        raise ConflictError(f"{self._path(key)} was changed by somebody else")
                    os.rename(draft, name, src_dir_fd=temporary, dst_dir_fd=parent)
                    placed = True
                    os.fsync(parent)
            finally:
                if not placed:
                    os.unlink(draft, dir_fd=temporary)

    def _current(self, parent: int, name: str) -> str | None:
        try:
            with nofollow.open_object(parent, name) as file:
                return _version(file.readall())
        except FileNotFoundError:
            return None

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with self._flock(blake3(key.encode()).hexdigest(length=1), fcntl.LOCK_EX):
            yield

    @contextmanager
    def _lock(self, name: str, how: int) -> Iterator[None]:
        """Hold a lock, with other errors than ``BlockingIOError`` translated."""
        with ExitStack() as held:
            with self._errors("lock", f"{_LOCKS}/{name}", writing=True):
                try:
                    held.enter_context(self._flock(name, how))
                except BlockingIOError:
                    taken = True
                else:
                    taken = False
            if taken:
                raise BlockingIOError
            yield

    @contextmanager
    def _flock(self, name: str, how: int) -> Iterator[None]:
        with self._directory((_LOCKS,), create=True) as locks:
            # Few enough to be left there for good: removing a lock file while others wait on
            # it would let two of them hold "the" lock.
            fd = os.open(name, _LOCK_FLAGS, 0o666, dir_fd=locks)
        try:
            fcntl.flock(fd, how)
            try:
                yield
            finally:
                # Not left to close: a child forked meanwhile shares the lock and would keep it.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def _sweep(self, temporary: int) -> None:
        if self._swept:
            return
        self._swept = True
        dead = time.time() - _TEMPORARY_SECONDS
        for name, status in nofollow.entries(temporary):
            if status.st_mtime < dead and stat.S_ISREG(status.st_mode):
                try:
                    os.unlink(name, dir_fd=temporary)
                except FileNotFoundError:
                    continue  # another process sweeps too

    def _entries(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        parts = folder.split("/") if folder else ()
        with self._errors("list", folder):
            try:
                with self._directory(parts) as fd:
                    found = nofollow.entries(fd)
            except (FileNotFoundError, NotADirectoryError):
                self._require_root()
                return  # no such folder, or removed since it was seen
            for name, status in found:
                key = f"{folder}/{name}" if folder else name
                if is_key(key):
                    _refuse_symlink(status, name)
                    yield key, status

    def _require_root(self) -> None:
        """Tell an object that is not there from a store that is not there."""
        with self._directory(()):
            pass

    @contextmanager
    def _directory(self, parts: Sequence[str], *, create: bool = False) -> Iterator[int]:
        with nofollow.open_directory(self._root, parts, create=create) as fd:
            yield fd

    @contextmanager
    def _errors(self, verb: str, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translated(error, verb, key, writing=writing) from error

    def _translated(self, error: OSError, verb: str, key: str, *, writing: bool) -> EnvstoreError:
        path = self._path(key)
        code = error.errno
        if code in (errno.ENOENT, errno.ENOTDIR) and not self._root.is_dir():
            what = "is not a directory" if self._root.exists() else "does not exist"
            return NotFoundError(
                f"the store {self._root} {what}",
                hint="run `envstore init`, or name another store with --store or ENVSTORE_URL",
            )
        if code in (errno.ENOTDIR, errno.EISDIR) and writing:
            return UsageError(f"cannot write {path}: a file and a directory of one name collide")
        if code in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return NotFoundError(f"{path} does not exist")
        if code in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(
                f"no space left for {path}",
                hint="free space on that disk, raise its quota, or use another store",
            )
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return AccessDeniedError(
                f"cannot {verb} {path}: {os.strerror(code)}",
                hint="check the owner and mode of the store's directories, and how it is mounted",
            )
        if code == errno.ELOOP:
            return AccessDeniedError(
                f"cannot {verb} {path}: {error.filename or key} is a symbolic link",
                hint="inside a store links are not followed: bind-mount the directory instead",
            )
        reason = os.strerror(code) if code is not None else str(error)
        return UnavailableError(f"cannot {verb} {path}: {reason}", hint="check that disk")

    def _too_short(self, key: str, start: int, length: int, got: int) -> CorruptError:
        return CorruptError(
            f"{self._path(key)} is too short: of {length} bytes from {start} on, {got} are there",
            hint="run `envstore verify`",
        )

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else str(self._root)


def _make_root(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    fd = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refuse_symlink(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)


def _version(data: bytes) -> str:
    return blake3(data).hexdigest()
