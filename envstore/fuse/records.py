"""What this user has mounted: one small record, log and lock for each mount point.

The lock is held as long as a server lives, so that even after kill -9 everybody can tell, and
wait for, the end of a server without trusting process numbers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError
from envstore.store.digest import digest
from envstore.store.private import make_private, private

_FLOCK = struct.Struct("hhqqi4x")
_POLL = 0.01


@dataclass(frozen=True, slots=True)
class MountRecord:
    """One mount as its holder described it.

    ``name`` is what the user asked for, ``snapshot`` and ``manifest`` are hex digests, ``store``
    a URL without secrets, ``started`` RFC 3339 UTC. ``log``, ``stats`` and ``control`` are paths;
    the last two are sockets (see ``stats.read_stats`` and ``Holder``). ``node`` is the control
    socket of the node server that serves the mount under ``lease``. Where there is neither that
    nor ``control``, the mount is the kernel's alone. ``prefix`` is the path it was made for.
    """

    mountpoint: str
    name: str
    snapshot: str
    manifest: str
    holder_pid: int
    store: str
    started: str
    log: str
    stats: str
    control: str
    fast_path: bool = False
    node: str = ""
    lease: str = ""
    prefix: str = ""

    @property
    def served(self) -> bool:
        """Whether there must be a process for the mount to work."""
        return bool(self.control or self.node)

    def encode(self) -> dict[str, Any]:
        """Return the record as JSON."""
        return asdict(self)

    def with_holder(self, pid: int) -> MountRecord:
        """Return the record of the same mount in other hands."""
        return replace(self, holder_pid=pid)


def state_directory() -> Path:
    """Return the directory of this user's mount records."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says the standard
        base = os.path.expanduser("~/.local/state")
    return Path(base) / "envstore" / "mounts"


class RecordFiles:
    """The files that belong to one mount point, whether they exist or not."""

    def __init__(self, mountpoint: str) -> None:
        """Name the files for the resolved path ``mountpoint``."""
        self.mountpoint = mountpoint
        self.directory = state_directory()
        self.id = digest(os.fsencode(mountpoint)).hex()[:16]
        self.record = self.directory / f"{self.id}.json"
        self.log = self.directory / f"{self.id}.log"
        self.stats = self.directory / f"{self.id}.sock"
        self.control = self.directory / f"{self.id}.control"
        self._private = self.directory / f"{self.id}.fuse"
        self._lock = self.directory / f"{self.id}.lock"

    def prepare(self) -> None:
        """Make the directory. Raises ``AccessDeniedError``, ``NoSpaceError``."""
        try:
            make_private(self.directory)
        except OSError as error:
            raise _state_error(self.directory, error) from error

    def acquire(self) -> int | None:
        """Take the lock; returns a descriptor to keep open, or ``None`` if a server lives."""
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _state_error(self._lock, error) from error
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))
            except BlockingIOError:
                # A shared lock is somebody in `wait`, who lets go at once.
                if _lock_holder(fd) == fcntl.F_WRLCK:
                    os.close(fd)
                    return None
            except BaseException:
                os.close(fd)
                raise
            else:
                return fd

    def holds(self, lock: int) -> bool:
        """Whether an open file is the lock of this mount point, and not that of another place."""
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self._lock))
        except FileNotFoundError:
            return False

    def alive(self) -> bool:
        """Whether a server of this mount point lives."""
        try:
            fd = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return _lock_holder(fd) == fcntl.F_WRLCK
        finally:
            os.close(fd)

    def wait(self, within: float | None = None) -> bool:
        """Wait until no server of this mount point lives any more; return whether that is so.

        ``within`` is how many seconds at most, without end by default.
        """
        try:
            fd = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if within is None:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _lock(fcntl.F_RDLCK))
                return True
            deadline = time.monotonic() + within
            while _lock_holder(fd) == fcntl.F_WRLCK:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL)
            return True
        finally:
            os.close(fd)

    def describe(self, loaded: dict[str, Any], prefix: str) -> MountRecord:
        """Return the record of a mount that this process holds, of what a server has loaded."""
        return MountRecord(
            mountpoint=self.mountpoint,
            name=loaded["name"],
            snapshot=loaded["snapshot"],
            manifest=loaded["manifest"],
            holder_pid=os.getpid(),
            store=loaded["store"],
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            log=str(self.log),
            stats=str(self.stats),
            control=str(self.control),
            fast_path=loaded["fast"],
            prefix=prefix,
        )

    def load(self) -> MountRecord | None:
        """Return the record, ``None`` if there is none or it is not whole."""
        try:
            return _checked(MountRecord(**json.loads(self.record.read_bytes())))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError):
            return None  # of another version, or half gone with a full disk: as good as none

    def save(self, record: MountRecord) -> None:
        """Write the record in one piece."""
        partial = self.record.with_suffix(".tmp")
        try:
            with open(partial, "w", opener=private) as file:
                json.dump(asdict(record), file, indent=1)
            partial.replace(self.record)
        except OSError as error:
            raise _state_error(self.record, error) from error

    def clear(self) -> None:
        """Remove record and sockets; the log stays for whoever wants to know what happened."""
        for path in (self.record, self.stats, self.control):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._private.rmdir()

    def make_private(self) -> str:
        """Make and return a directory to mount on what is not meant to be seen."""
        try:
            self._private.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise _state_error(self._private, error) from error
        return str(self._private)


def list_records() -> Iterator[tuple[MountRecord, bool]]:
    """Yield this user's mount records, each with whether its server lives."""
    for path in sorted(state_directory().glob("*.json")):
        with contextlib.suppress(
            ValueError, TypeError, KeyError, RecursionError, FileNotFoundError
        ):
            files = RecordFiles(json.loads(path.read_bytes())["mountpoint"])
            record = files.load()
            if record is not None:
                yield record, files.alive()


def _checked(record: MountRecord) -> MountRecord:
    """Return ``record`` if its fields are of their types. Raises ``TypeError``."""
    for name, value in asdict(record).items():
        expected = {"holder_pid": int, "fast_path": bool}.get(name, str)
        if type(value) is not expected:
            raise TypeError(name)
    return record


def _lock(kind: int) -> bytes:
    """Return the ``struct flock`` for a lock on a whole file."""
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _lock_holder(fd: int) -> int:
    """Return the kind of lock in the way of an exclusive one, or ``F_UNLCK``."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK))
    return int(_FLOCK.unpack(answer)[0])


def _state_error(path: Path, error: OSError) -> EnvstoreError:
    message = f"cannot write {path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(message, hint="free space, or set XDG_STATE_HOME")
    return AccessDeniedError(message, hint="fix permissions, or set XDG_STATE_HOME")
