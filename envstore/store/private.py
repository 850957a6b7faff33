"""Files and directories that are their user's alone, whatever the umask is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_private(directory: str | bytes | os.PathLike[str]) -> None:
    """Make a directory, and those above it that are missing, for this user alone.

    One that is there stays as it is. Raises ``OSError``.
    """
    path = Path(os.fsdecode(directory))
    missing = [path, *path.parents]
    while missing and missing[-1].exists():
        missing.pop()
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o700)
    if not path.is_dir():
        path.mkdir(mode=0o700)  # says what is in the way


def private(path: str, flags: int) -> int:
    """Open a file as ``opener`` of ``open`` does; one that is made is this user's alone."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
