"""``~/.conda/environments.txt``: where editors look for environments outside of conda's own."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from envstore.errors import AccessDeniedError, UsageError


def register(prefix: Path) -> bool:
    """Add ``prefix`` to the user's list of conda environments; returns whether it was new there.

    Conda itself takes prefixes out again that are gone. Raises ``UsageError`` for what conda
    would not take for an environment, ``AccessDeniedError`` if the list cannot be written.
    """
    if not (prefix / "conda-meta/history").is_file():
        raise UsageError(
            f"{prefix} is no conda environment, so it cannot be listed as one",
            hint="leave out --register",
        )
    path = Path.home() / ".conda" / "environments.txt"
    line = os.fsencode(prefix)
    if b"\n" in line:
        raise UsageError("a directory with a newline in its name cannot be listed")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            if line in known.splitlines():
                return False
            between = b"\n" if known and not known.endswith(b"\n") else b""
            file.write(between + line + b"\n")
    except OSError as error:
        raise AccessDeniedError(f"cannot write {path}: {error.strerror}") from error
    return True
