"""Mounts that shells share: made when the first one asks, found by the others."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from envstore.errors import AccessDeniedError, UsageError
from envstore.fuse.background import MountRequest, start_mount
from envstore.fuse.mount import active_mounts, clear_dead
from envstore.fuse.mountinfo import resolve
from envstore.fuse.records import MountRecord


def place_of(name: str, snapshot: str) -> Path:
    """Return where a snapshot (hex digest) that is called ``name`` is mounted for shells.

    Below ``XDG_RUNTIME_DIR``, which is short and one's own, or else below ``XDG_DATA_HOME``. A
    ref that moves leads elsewhere, so who uses the old snapshot is not disturbed.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isabs(base) or not _is_own(base):
        base = os.environ.get("XDG_DATA_HOME", "")
        if not os.path.isabs(base):  # to be ignored, says the standard
            base = os.path.expanduser("~/.local/share")
    label = name.replace("/", "+").replace(":", "+").removesuffix("+latest")
    label = "" if name.startswith("@") else f"{label}-"
    return Path(base) / "envstore" / "envs" / f"{label}{snapshot[:12]}"


def _is_own(directory: str) -> bool:
    """Whether a directory is this user's, and not left over from whoever became root here."""
    try:
        return os.stat(directory).st_uid == os.geteuid()
    except OSError:
        return False


def mount_or_join(request: MountRequest, snapshot: str) -> tuple[MountRecord, bool]:
    """Mount as ``start_mount`` does, unless that snapshot is mounted there already.

    The mount point is made if it is not there. Returns whether a mount was made. Raises what
    ``start_mount`` does, and ``UsageError`` if something else is mounted there.
    """
    mountpoint = Path(os.path.abspath(request.mountpoint))
    with _alone(mountpoint):
        clear_dead(mountpoint)
        for record, alive in active_mounts():
            if alive and record.mountpoint == resolve(mountpoint):
                if record.snapshot != snapshot:
                    raise UsageError(
                        f"{record.mountpoint} is a mount of another snapshot, {record.name}",
                        hint=f"envstore umount {record.mountpoint}",
                    )
                if record.prefix not in ("", str(mountpoint)):
                    raise UsageError(
                        f"{record.mountpoint} is mounted for use at {record.prefix}",
                        hint=f"envstore umount {record.mountpoint}",
                    )
                return record, False
        try:
            mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise AccessDeniedError(f"cannot make {mountpoint}: {error.strerror}") from error
        return start_mount(replace(request, mountpoint=str(mountpoint))), True


@contextmanager
def _alone(mountpoint: Path) -> Iterator[None]:
    """Let nobody else mount beside ``mountpoint`` meanwhile."""
    try:
        mountpoint.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(mountpoint.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AccessDeniedError(f"cannot use {mountpoint.parent}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
