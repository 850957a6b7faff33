"""The node cache: verified blobs on disk under a hard byte cap, shared by all processes.

Every blob is a file named by the BLAKE3 of its content. Beside the blobs lie whole files of
mounted trees, for the kernel to read by itself; one that has a second name is pinned, which means
that it counts but is never evicted.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError, UsageError
from envstore.store.cachespace import CacheSpace, CacheUsage
from envstore.store.objects.vectors import read_into
from envstore.store.private import make_private
from envstore.store.seals import is_sealed, seal

DEFAULT_CAPACITY = 20 << 30
_TOUCH_NS = 1_000_000_000
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Filling:
    """A whole file that is being written, of ``size`` bytes that are accounted for already.

    Whoever began it must ``finish`` or ``abandon`` it.
    """

    fd: int
    path: bytes
    size: int


def parse_size(text: str) -> int:
    """Return the bytes that ``20G``, ``512MiB`` or ``1000`` stand for. Raises ``UsageError``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint="write for example 512M or 20G")
    return int(match[1]) << " KMGT".index(match[2].upper() or " ") * 10


def default_directory() -> Path:
    """Return the cache directory: ``ENVSTORE_CACHE_DIR``, else the user's cache directory."""
    chosen = os.environ.get("ENVSTORE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "envstore"


def default_cache() -> BlobCache:
    """Return the cache that the environment variables describe."""
    size = os.environ.get("ENVSTORE_CACHE_SIZE")
    return BlobCache(default_directory(), parse_size(size) if size else DEFAULT_CAPACITY)


class Held(enum.Enum):
    """Whether the cache has a blob, and if so whether it was verified since the machine started.

    A caller to whom a blob is ``DOUBTFUL`` checks its digest, and then calls ``seal`` or ``drop``.
    """

    NOT = enum.auto()
    DOUBTFUL = enum.auto()
    SEALED = enum.auto()


class BlobCache:
    """Blobs by digest; every method may be called from any thread of any process.

    What is read was verified when it was put in, but a disk can rot and power can fail between
    the two: a caller that needs certainty checks the digest of what it got and calls ``drop``.
    """

    def __init__(self, root: Path, capacity: int = DEFAULT_CAPACITY) -> None:
        """Use ``root``, made if missing. Raises ``AccessDeniedError``, ``NoSpaceError``."""
        self.root = root
        self.capacity = capacity
        self.files = root / "files"
        self._touched: dict[bytes, int] = {}
        with self.errors():
            self._space = CacheSpace(root, capacity)

    def path(self, name: bytes) -> bytes:
        """Return where the blob called ``name`` is or would be."""
        text = name.hex().encode()
        return b"%b/%b/%b" % (self._space.blobs, text[:2], text)

    def contains(self, name: bytes) -> bool:
        """Return whether the blob is there."""
        return os.path.exists(self.path(name))

    def expect(self, name: bytes) -> bool:
        """Have the disk begin to read a blob that will be asked for soon; whether it is there."""
        try:
            fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
        return True

    def read(
        self, name: bytes, offset: int = 0, length: int | None = None, *, nowait: bool = False
    ) -> bytes | None:
        """Return ``length`` bytes (all by default) from ``offset``, ``None`` if not cached.

        With ``nowait`` raises ``BlockingIOError`` when the disk would have to be waited for. A
        blob shorter than asked counts as not cached.
        """
        try:
            fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from error
        try:
            if length is None:
                length = max(0, os.fstat(fd).st_size - offset)
            if nowait:
                data = self._read_cached(fd, offset, length)
            else:
                data = os.pread(fd, length, offset)
            self._touch(name, fd)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._error(error) from error
        finally:
            os.close(fd)
        return data if len(data) == length else None

    def read_into(self, name: bytes, views: Sequence[memoryview]) -> Held:
        """Fill ``views``, one after the other, with the blob; returns what is known of it.

        If it is absent, or shorter than they are, they hold anything.
        """
        try:
            fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Held.NOT
        except OSError as error:
            raise self._error(error) from error
        try:
            sealed = is_sealed(name, os.fstat(fd).st_mtime_ns)
            got = read_into(fd, 0, views)
            self._touch(name, fd)
        except OSError as error:
            raise self._error(error) from error
        finally:
            os.close(fd)
        if got != sum(map(len, views)):
            return Held.NOT
        return Held.SEALED if sealed else Held.DOUBTFUL

    def seal(self, name: bytes) -> None:
        """Remember that the blob, if it is still there, was found to be as its name says."""
        stamp = seal(name, time.time_ns())
        with self.errors(), contextlib.suppress(FileNotFoundError):
            os.utime(self.path(name), ns=(stamp, stamp))

    def put(self, name: bytes, data: bytes | memoryview) -> None:
        """Keep ``data``, whose digest the caller has checked to be ``name``.

        Evicts what was used longest ago when the cap would be passed. Raises ``NoSpaceError``
        when the disk is full even then; ``CacheFullError`` when the blob alone exceeds the cap,
        or others that are being written take all of it.
        """
        path = self.path(name)
        if os.path.exists(path):
            return
        with self.errors():
            try:
                self._store(name, path, data)
            except FileNotFoundError:
                # Somebody has removed the cache; a mount that runs must not need a restart.
                self._space.make_directories()
                self._store(name, path, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # The disk can be full below our cap: give back our own oldest blobs first.
                if not self._space.make_room(len(data)):
                    raise
                self._store(name, path, data)

    def drop(self, name: bytes) -> None:
        """Forget one blob, if it is there."""
        with self.errors():
            self._space.drop(self.path(name))

    def usage(self) -> CacheUsage:
        """Return what is accounted for."""
        with self.errors():
            return self._space.usage()

    def filled(self) -> int:
        """Return the bytes accounted for as they were last written down. Waits for nobody."""
        with self.errors():
            return self._space.filled()

    def clear(self) -> int:
        """Remove all that is not pinned; returns the bytes freed. Running mounts fetch again."""
        with self.errors():
            return self._space.clear()

    def begin(self, size: int, *, evict: bool = True) -> Filling:
        """Return a new file of ``size`` zeros to be filled.

        Without ``evict`` nothing is removed to make room. Raises as ``put`` does.
        """
        with self.errors():
            fd, partial = self._space.reserve(size, evict=evict)
            return Filling(fd, partial, size)

    def finish(self, filling: Filling, path: bytes) -> None:
        """Give a file that was filled its name below ``files``, unless somebody was first."""
        with self.errors():
            kept = False
            try:
                kept = _link(filling.path, path)
            finally:
                self._space.settle(filling.fd, filling.path, filling.size, kept=kept)

    def abandon(self, filling: Filling) -> None:
        """Remove a file that was begun, and give its bytes back."""
        with self.errors():
            self._space.settle(filling.fd, filling.path, filling.size, kept=False)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Hold off everybody who would evict something or begin to write."""
        with self.errors(), self._space.locked():
            yield

    def _store(self, name: bytes, path: bytes, data: bytes | memoryview) -> None:
        fd, partial = self._space.reserve(len(data))
        kept = False
        try:
            view = memoryview(data)
            at = 0
            while at < len(view):
                at += os.pwrite(fd, view[at:], at)
            stamp = seal(name, time.time_ns())
            os.utime(fd, ns=(stamp, stamp))
            kept = _link(partial, path)
        finally:
            self._space.settle(fd, partial, len(data), kept=kept)

    def _read_cached(self, fd: int, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        got = 0
        while got < length:
            try:
                step = os.preadv(fd, [view[got:]], offset + got, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    raise BlockingIOError from error
                raise
            if not step:
                break
            got += step
        return bytes(view[:got])

    def _touch(self, name: bytes, fd: int) -> None:
        now = time.time_ns()
        # The distance, for a clock that is set back must not end this for as long.
        if abs(now - self._touched.get(name, 0)) > _TOUCH_NS:
            if len(self._touched) > 100_000:
                self._touched.clear()
            self._touched[name] = now
            if is_sealed(name, os.fstat(fd).st_mtime_ns):
                now = seal(name, now)
            os.utime(fd, ns=(now, now))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Say of what goes wrong on the disk that it is the cache's."""
        try:
            yield
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> EnvstoreError:
        reason = f"the cache {self.root}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(reason, hint="free space or move it with ENVSTORE_CACHE_DIR")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return AccessDeniedError(reason, hint="fix permissions or set ENVSTORE_CACHE_DIR")
        return EnvstoreError(reason, hint="set ENVSTORE_CACHE_DIR to a directory on a local disk")


def _link(partial: bytes, path: bytes) -> bool:
    """Give the finished file its name; ``False`` if another process was first."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        make_private(os.path.dirname(path))
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
    return True
