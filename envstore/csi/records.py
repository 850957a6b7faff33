"""What is published on this node: one small file for each target path, without secrets.

A record is written before anything is done for a target and removed when nothing of it is left,
so that whoever starts after a crash knows what there may be to clean up.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.csi.refusal import RefusedError
from envstore.csi.request import KUBERNETES, VolumeRequest, parse_request
from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError
from envstore.store.digest import digest

FORMAT = 1
MAX_RECORD = 64 << 10
"""Bytes of a record: several times what the longest paths and attributes make."""

_LEASE = re.compile(r"[0-9a-f]{16}")
_POD = ("namespace", "name", "uid", "service_account")
_MOST_DAMAGED = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publication:
    """One volume at one target path.

    ``volume`` is the volume id, ``lease`` what the node server knows it by. ``store`` is the name
    of the store that it is of, also where the request names none, and ``url`` where that was when
    it was mounted. ``access`` is the CSI access mode. Before a publish was answered with success,
    ``complete`` is false, and there may or may not be a lease or a mount; the same is true once
    what was published is ``ending``.
    ``digest`` is the snapshot's, in hex, empty until it is known; ``asked`` and ``of`` are the
    words in which the node server was asked for it (see ``nodeserver.Wanted``). ``entries`` counts
    files, directories and links, ``size`` is the bytes of all files. ``started`` is RFC 3339 UTC.
    """

    volume: str
    target: str
    lease: str
    store: str
    url: str
    access: str
    readonly: bool
    request: VolumeRequest
    started: str
    complete: bool = False
    ending: bool = False
    digest: str = ""
    asked: str = ""
    of: str = ""
    entries: int = 0
    size: int = 0
    fast: bool = False

    @property
    def published(self) -> bool:
        """Whether somebody relies on it."""
        return self.complete and not self.ending

    def encode(self) -> bytes:
        """Return the record as a file's content."""
        request = self.request
        body: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        body["attributes"] = request.attributes()
        body["ephemeral"] = request.ephemeral
        body["pod"] = request.pod and {name: getattr(request.pod, name) for name in _POD}
        return json.dumps({"format": FORMAT, **body}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Publication:
        """Return the record that a file holds. Raises ``ValueError`` if it is damaged."""
        body = json.loads(data)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"not a record of format {FORMAT}")
        try:
            plain = {name: _checked(name, kind, body[name]) for name, kind in _PLAIN.items()}
            request = parse_request(_context(body))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no such record: {error}") from None
        except RefusedError as error:
            raise ValueError(error.message) from None
        return cls(request=request, **plain)


_PLAIN: dict[str, type] = {
    "volume": str,
    "target": str,
    "lease": str,
    "store": str,
    "url": str,
    "access": str,
    "readonly": bool,
    "started": str,
    "complete": bool,
    "ending": bool,
    "digest": str,
    "asked": str,
    "of": str,
    "entries": int,
    "size": int,
    "fast": bool,
}


class Records:
    """All records of a node, in memory and in a directory. Safe for many threads.

    Whoever changes the record of a target sees to it that nobody else does.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read what is there; a damaged record is set aside.

        Raises ``AccessDeniedError``, ``NoSpaceError``, ``EnvstoreError``.
        """
        self._directory = Path(directory)
        self._lock = threading.Lock()
        self._known: dict[str, Publication] = {}
        with self._errors():
            self._make()
            for path in sorted(self._directory.iterdir()):
                if path.suffix == ".tmp":
                    with contextlib.suppress(OSError):
                        path.unlink()
                elif path.suffix == ".json":
                    self._load(path)
            damaged = sorted(
                self._directory.glob("*.damaged"), key=lambda one: one.lstat().st_mtime
            )
            for path in damaged[:-_MOST_DAMAGED]:
                path.unlink()

    def find(self, target: str) -> Publication | None:
        """Return the record of a target path."""
        with self._lock:
            return self._known.get(target)

    def all(self) -> list[Publication]:
        """Return every record."""
        with self._lock:
            return [*self._known.values()]

    def of(self, volume: str) -> list[Publication]:
        """Return the records of a volume."""
        return [record for record in self.all() if record.volume == volume]

    def save(self, record: Publication) -> None:
        """Write a record in one piece, on the disk when this returns.

        Raises ``AccessDeniedError``, ``NoSpaceError``, ``EnvstoreError``.
        """
        path = self._path(record.target)
        partial = path.with_suffix(".tmp")
        with self._errors():
            try:
                try:
                    fd = os.open(partial, _WRITE, 0o600)
                except FileNotFoundError:  # somebody has removed the directory
                    self._make()
                    fd = os.open(partial, _WRITE, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(record.encode())
                    file.flush()
                    os.fsync(fd)
                partial.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
            self._sync()
        self.note(record)

    def note(self, record: Publication) -> None:
        """Know more of a target that has a record, without writing that down."""
        with self._lock:
            self._known[record.target] = record

    def remove(self, target: str) -> None:
        """Forget a target. Raises ``AccessDeniedError``, ``EnvstoreError``."""
        with self._errors():
            self._path(target).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # of the directory: so has the record
                self._sync()
        with self._lock:
            self._known.pop(target, None)

    def _make(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)

    def _path(self, target: str) -> Path:
        return self._directory / f"{digest(os.fsencode(target)).hex()[:32]}.json"

    def _load(self, path: Path) -> None:
        try:
            record = Publication.decode(_read(path))
            if self._path(record.target) != path:
                raise ValueError("it is of another target")
        except (OSError, ValueError, RecursionError) as error:
            _log.error("setting aside the damaged record %s: %s", path, error)
            path.replace(path.with_suffix(".damaged"))
        else:
            self._known[record.target] = record

    def _sync(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translated(self._directory, error) from error


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_RECORD + 1)
    if len(data) > MAX_RECORD:
        raise ValueError(f"it is longer than {MAX_RECORD} bytes")
    return data


def _checked(name: str, kind: type, value: object) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} is not a {kind.__name__}")
    if name == "lease" and _LEASE.fullmatch(str(value)) is None:
        raise ValueError("lease is not of 16 hex digits")
    return value


def _context(body: dict[str, Any]) -> dict[str, str]:
    """Return the attributes that a request was parsed from, as far as they matter."""
    found = {str(name): str(value) for name, value in body["attributes"].items()}
    found[KUBERNETES + "ephemeral"] = "true" if body["ephemeral"] else "false"
    pod = body["pod"] or {}
    for name, value in pod.items():
        word = "serviceAccount.name" if name == "service_account" else f"pod.{name}"
        if value:
            found[KUBERNETES + word] = str(value)
    return found


def _translated(directory: Path, error: OSError) -> EnvstoreError:
    message = f"cannot keep records in {directory}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(message, hint="free space on that disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(message, hint="check the owner and mode of the state directory")
    return EnvstoreError(message)
