"""What an attempt to fetch an archive gives: its bytes, or why not. Local files."""

from __future__ import annotations

import os
import stat
from typing import IO, Protocol
from urllib.parse import unquote_to_bytes

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError
from envstore.resolver.packages.credentials import shown


class Failed(Exception):  # noqa: N818 - carries the error to raise to whoever may try again
    """An attempt that did not work.

    ``passing``: another one may; ``wait`` is how many seconds the server asked to leave it alone.
    ``unreachable``: the server said nothing at all.
    """

    def __init__(
        self, error: EnvstoreError, *, passing: bool, wait: float = 0, unreachable: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.passing = passing
        self.wait = wait
        self.unreachable = unreachable


class Body(Protocol):
    """An opened archive. ``start`` is where its bytes begin, ``total`` its whole size if told.

    ``version`` is a strong ETag, or empty.
    """

    start: int
    total: int | None
    version: str

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end. Raises ``Failed``."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class _FileBody:
    """A local file."""

    version = ""

    def __init__(self, file: IO[bytes], start: int) -> None:
        self._file = file
        self.total: int | None = os.fstat(file.fileno()).st_size
        self.start = file.seek(start)

    def read(self, size: int) -> bytes:
        """See ``Body.read``."""
        try:
            return self._file.read(size)
        except OSError as error:
            raise Failed(_file_error(self._file.name, error), passing=False) from error

    def close(self) -> None:
        """See ``Body.close``."""
        self._file.close()


class Nothing:
    """What lies behind the end of an archive: whoever asked must begin again."""

    start = -1
    total: int | None = None
    version = ""

    def read(self, size: int) -> bytes:
        """See ``Body.read``."""
        return b""

    def close(self) -> None:
        """See ``Body.close``."""


def open_file(host: str, path: str, start: int) -> Body:
    """Open the file that the parts of a ``file`` URL name. Raises ``Failed``."""
    if host not in ("", "localhost"):
        raise Failed(
            UsageError(f"file://{host}/...: three slashes make a local path"), passing=False
        )
    name = unquote_to_bytes(path)
    try:
        if b"\0" in name:
            raise FileNotFoundError
        # Opening a pipe would wait for somebody to write to it.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise Failed(UsageError(f"{path} is not a regular file"), passing=False)
        return _FileBody(open(os.fsdecode(name), "rb", buffering=0), start)
    except OSError as error:
        raise Failed(_file_error(path, error), passing=False) from error


def _file_error(name: object, error: OSError) -> EnvstoreError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFoundError(f"{name} is not there")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"cannot read {name}: {error.strerror}", hint="check permissions")
    return EnvstoreError(f"cannot read {name}: {error.strerror}")


def malformed(url: str) -> Failed:
    """Return the failure for what cannot be asked for."""
    return Failed(UsageError(f"cannot fetch {shown(url)}: it is not a URL"), passing=False)
