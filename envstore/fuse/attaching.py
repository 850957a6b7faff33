"""What a child of the holder does at a target: a mount is put there, or all of ours are taken away.

A mount is made apart, asked for its root, and only then moved to its place, as a whole: whatever
fails or is killed before leaves nothing, and what can hang, which is asking, has nothing to undo.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, ConflictError, EnvstoreError, UsageError
from envstore.fuse.forest import OBJECTS
from envstore.fuse.mountinfo import MountInfo
from envstore.fuse.overlay import make_fast
from envstore.fuse.session import is_ours
from envstore.fuse.syscalls import (
    MOUNT_SETATTR,
    MOVE_EMPTY_SOURCE,
    MOVE_EMPTY_TARGET,
    MOVE_MOUNT,
    OPEN_TREE,
    checked,
    system,
)
from envstore.fuse.targets import (
    Target,
    is_empty,
    mount_id,
    mounts_at,
    open_target,
    opened_parent,
)

_TREE_CLONE, _CLOEXEC, _AT_EMPTY_PATH = 1, os.O_CLOEXEC, 0x1000
_RDONLY_NOSUID_NODEV = 1 | 2 | 4
_MS_PRIVATE = 1 << 18
_ATTRIBUTES = struct.Struct("=QQQQ")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_MODE = 0o750

_log = logging.getLogger(__name__)

Tell = Callable[[str, int], None]
"""Notes, for who has to undo it, that a directory was ``made``, or which mount is ``moving``."""


@dataclass(frozen=True, slots=True)
class Showing:
    """What is to be shown at a target.

    ``subtree`` is a directory of the server's file system ``root``, which has the device number
    ``device``; ``fast`` are the parts of a fast path, ``source`` its name in the mount table, and
    ``required`` that there must be one. ``before`` is the device and whether it is fast of what
    this lease shows there already; ``pending`` that an attempt of its may have got there.
    """

    root: str
    subtree: str
    device: str
    fast: dict[str, str] | None
    source: str
    required: bool
    before: tuple[str, bool] | None = None
    pending: bool = False


def attach(target: Target, showing: Showing, tell: Tell) -> dict[str, Any]:
    """Mount on a target, made if missing; returns its ``device``, and if it is ``fast``.

    Raises ``UsageError``, ``ConflictError`` (something else is there), ``EnvstoreError``; then
    nothing is left.
    """
    name = target.steps[-1]
    with _opened(target) as parent:
        there = mounts_at(parent, name)
        if there and showing.pending:
            _take_off(target, parent)
        elif there:
            if showing.before is not None and there[-1].device == showing.before[0]:
                return {"device": there[-1].device, "fast": showing.before[1]}
            raise ConflictError(
                f"something else is mounted on {target.path}: {there[-1].source}",
                hint="hide it first, or unmount it",
            )
        mount, fast = _make(showing)
        try:
            device = _ask(mount, showing, fast=fast)
            _put(mount, target, parent, tell)
        finally:
            os.close(mount)
    return {"device": device, "fast": fast}


def take_away(target: Target, tell: Tell) -> dict[str, Any]:
    """Unmount all of ours that is stacked at a target, dead or alive, and remove the directory.

    None is touched. Fine if nothing is there. Raises ``UsageError``, ``ConflictError`` (others'
    mounts or files are there), ``EnvstoreError``.
    """
    name = target.steps[-1]
    with contextlib.suppress(FileNotFoundError), opened_parent(target) as parent:
        _take_off(target, parent)
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            raise UsageError(f"the target {target.path} is no directory: it is left") from None
        except OSError as error:
            kind = ConflictError if error.errno == errno.ENOTEMPTY else UsageError
            raise kind(f"the target {target.path} cannot be removed: {error.strerror}") from error
    return {}


def undo(target: Target, *, made: bool, mount: int | None, tell: Tell) -> dict[str, Any]:
    """Take back what an attempt that did not end has done, as far as it has told."""
    name = target.steps[-1]
    with contextlib.suppress(FileNotFoundError), opened_parent(target) as parent:
        there = mounts_at(parent, name)
        if mount is not None and there and there[-1].id == mount:
            _unmount(target, parent)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)
    return {}


@contextlib.contextmanager
def _opened(target: Target) -> Any:
    try:
        with opened_parent(target) as parent:
            yield parent
    except FileNotFoundError:
        raise UsageError(
            f"the directory that the target {target.path} is to be in does not exist"
        ) from None


def _make(showing: Showing) -> tuple[int, bool]:
    """Return a mount without a place, and whether it is fast."""
    if showing.fast is not None:
        objects = Path(showing.root) / (showing.subtree + os.fsdecode(OBJECTS))
        image, local = (Path(showing.fast[name]) for name in ("image", "local"))
        try:
            return make_fast(image, local, objects, source=showing.source), True
        except EnvstoreError as error:
            if showing.required:
                raise
            _log.warning("no fast path: %s", error)
    elif showing.required:
        raise EnvstoreError(f"there is no fast path for {showing.source}")
    return _clone(showing), False


def _clone(showing: Showing) -> int:
    place = os.path.join(showing.root, showing.subtree)
    try:
        source = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount = system(OPEN_TREE, source, b"", _TREE_CLONE | _CLOEXEC | _AT_EMPTY_PATH)
        finally:
            os.close(source)
        try:
            # Private, or whatever is mounted in one would appear in all.
            wanted = _ATTRIBUTES.pack(_RDONLY_NOSUID_NODEV, 0, _MS_PRIVATE, 0)
            system(MOUNT_SETATTR, mount, b"", _AT_EMPTY_PATH, wanted, len(wanted))
        except BaseException:
            os.close(mount)
            raise
    except PermissionError as error:
        raise AccessDeniedError(f"{place} cannot be shown: {error.strerror}") from error
    except OSError as error:
        raise EnvstoreError(f"{place} cannot be shown: {error.strerror}") from error
    return mount


def _ask(mount: int, showing: Showing, *, fast: bool) -> str:
    """List the root of a mount, which takes a server that answers; returns the device number."""
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            with os.scandir(directory) as listing:
                next(listing, None)
            number = os.fstat(directory).st_dev
        finally:
            os.close(directory)
    except OSError as error:
        raise EnvstoreError(f"{showing.subtree} is not served: {error.strerror}") from error
    device = f"{os.major(number)}:{os.minor(number)}"
    if not fast and device != showing.device:
        raise EnvstoreError(f"the node server's file system is not on {showing.root}")
    return device


def _put(mount: int, target: Target, parent: int, tell: Tell) -> None:
    """Move a mount to its place."""
    name = target.steps[-1]
    made = _make_directory(target, parent)
    moved = False
    try:
        if made:
            tell("made", 1)
        try:
            directory = open_target(target, parent)
            try:
                if mount_id(directory) != mount_id(parent):
                    raise ConflictError(f"something was mounted on {target.path} meanwhile")
                if not made and not is_empty(directory):
                    raise UsageError(f"the target {target.path} is not empty")
                tell("moving", mount_id(mount))
                system(
                    MOVE_MOUNT, mount, b"", directory, b"", MOVE_EMPTY_SOURCE | MOVE_EMPTY_TARGET
                )
                moved = True
            finally:
                os.close(directory)
            if mount_id(mount) not in [one.id for one in mounts_at(parent, name)[-1:]]:
                raise ConflictError(f"{target.path} was exchanged meanwhile")
        except OSError as error:
            raise EnvstoreError(f"cannot mount on {target.path}: {error.strerror}") from error
    except BaseException:
        if moved:
            checked("umount2", b"/proc/self/fd/%d" % mount, _MNT_DETACH)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        raise


def _make_directory(target: Target, parent: int) -> bool:
    try:
        os.mkdir(target.steps[-1], _MODE, dir_fd=parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot make the target {target.path}: {error.strerror}") from error
    return True


def _take_off(target: Target, parent: int) -> None:
    """Unmount all of ours that is stacked at a target."""
    for mounted in reversed(mounts_at(parent, target.steps[-1])):
        if not is_ours(mounted):
            raise ConflictError(f"{_described(mounted)} is mounted on {target.path}: it is left")
        _unmount(target, parent)


def _described(mounted: MountInfo) -> str:
    return f"{mounted.source} ({mounted.type})"


def _unmount(target: Target, parent: int) -> None:
    """Take the uppermost mount off a target, whoever uses it."""
    place = os.fsencode(f"/proc/self/fd/{parent}/{target.steps[-1]}")
    try:
        checked("umount2", place, _MNT_DETACH | _UMOUNT_NOFOLLOW)
    except OSError as error:
        raise EnvstoreError(f"cannot unmount {target.path}: {error.strerror}") from error
