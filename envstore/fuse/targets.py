"""Places that somebody else names for mounts to be made at: only below directories we allow.

What is below such a directory is walked with a descriptor for each step, and no link is followed,
so that a name that is exchanged meanwhile leads nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from envstore.errors import UsageError
from envstore.fuse.mountinfo import MountInfo, list_mounts

_LONGEST = 4096
_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_MOUNT_ID = re.compile(rb"^mnt_id:\t(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Target:
    """A place for a mount: its ``path`` as it was named, and the steps to it from ``base``."""

    path: str
    base: str
    steps: tuple[str, ...]


def find_target(path: object, allowed: Mapping[str, str]) -> Target:
    """Return the target that ``path`` names, without a look at any file.

    ``allowed`` are absolute, normalised paths, each with what it is without links. Raises
    ``UsageError``.
    """
    if not isinstance(path, str) or not 0 < len(path) <= _LONGEST or not _is_name(path):
        raise UsageError("a target is an absolute path")
    if not path.startswith("/") or path.startswith("//") or os.path.normpath(path) != path:
        raise UsageError(f"the target {path!r} is not an absolute path in its simplest form")
    for base, real in allowed.items():
        start = base if base.endswith("/") else base + "/"
        if path.startswith(start):
            return Target(path, real, tuple(path[len(start) :].split("/")))
    raise UsageError(f"the target {path!r} is not below {' or '.join(allowed)}")


def _is_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def opened_parent(target: Target) -> Iterator[int]:
    """Yield a target's parent directory, open. Raises ``UsageError``, ``FileNotFoundError``."""
    fd = os.open(target.base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for step in target.steps[:-1]:
            below = _step(target, fd, step)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def open_target(target: Target, parent: int) -> int:
    """Return a target's own directory, open. Raises ``UsageError``, ``FileNotFoundError``."""
    return _step(target, parent, target.steps[-1])


def _step(target: Target, directory: int, name: str) -> int:
    try:
        return os.open(name, _STEP, dir_fd=directory)
    except FileNotFoundError:
        raise
    except NotADirectoryError:
        raise UsageError(
            f"the target {target.path!r} cannot be used: {name!r} is a link or no directory"
        ) from None
    except OSError as error:
        raise UsageError(f"the target {target.path!r} cannot be used: {error.strerror}") from error


def mounts_at(parent: int, name: str) -> list[MountInfo]:
    """Return the mounts on an entry of an open directory, the lowest first. Touches none."""
    path = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), name)
    above, found = mount_id(parent), []
    there = {one.parent: one for one in list_mounts() if one.mountpoint == path}
    while (mounted := there.pop(above, None)) is not None:
        found.append(mounted)
        above = mounted.id
    return found


def mount_id(fd: int) -> int:
    """Return which mount an open file is in, as the mount table numbers them."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        found = _MOUNT_ID.search(info.read())
    if found is None:
        raise OSError(f"descriptor {fd} is in no mount")
    return int(found[1])


def is_empty(directory: int) -> bool:
    """Whether an open directory, on which nothing is mounted, has no entry."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(fd) as listing:
            return next(listing, None) is None
    finally:
        os.close(fd)
