"""Directories for what is unpacked on its way into the store, none of which is left for good."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "unpacked-"


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Give a new directory below ``parent``, which is made if need be, and remove it at the end.

    What killed processes left there is removed first. Whose directory is in use is told by locks,
    since processes in different containers may have the same number. Raises ``OSError``.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(parent):
        for path in parent.glob(f"{_PREFIX}*"):
            _remove_unused(path)
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
        held = os.open(made.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with made:
            yield Path(made.name)
    finally:
        os.close(held)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let nobody see a directory that is made and not yet locked."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_unused(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # gone meanwhile, or nothing of ours
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
