"""Mount points: whether something can be mounted there, what is, and how it goes away."""

from __future__ import annotations

import os

from envstore.errors import EnvstoreError, NotFoundError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse.mountinfo import find_mount, resolve
from envstore.fuse.records import MountRecord, RecordFiles, list_records
from envstore.fuse.sockets import ask, give_back

_WITHIN = 5.0
_END_WITHIN = 30.0


def check_mountpoint(path: str | os.PathLike[str]) -> str:
    """Return the resolved mount point if something can be mounted there.

    Raises ``NotFoundError``, ``UsageError`` (not a directory, not empty, or mounted already).
    """
    mountpoint = resolve(path)
    mounted = find_mount(mountpoint)
    if mounted is not None and sessions.is_ours(mounted):
        if _served(RecordFiles(mountpoint)):
            raise UsageError(
                f"{mountpoint} is already a mount of {mounted.source}",
                hint=f"envstore umount {mountpoint}",
            )
        raise UsageError(
            f"{mountpoint} holds a mount whose server has died",
            hint=f"envstore umount {mountpoint}",
        )
    try:
        with os.scandir(mountpoint) as listing:
            empty = next(listing, None) is None
    except FileNotFoundError:
        raise NotFoundError(
            f"the mount point {mountpoint} does not exist", hint=f"mkdir -p {mountpoint}"
        ) from None
    except NotADirectoryError:
        raise UsageError(f"the mount point {mountpoint} is not a directory") from None
    except OSError as error:
        raise UsageError(
            f"the mount point {mountpoint} cannot be read: {error.strerror}"
        ) from error
    if not empty:
        raise UsageError(
            f"the mount point {mountpoint} is not empty", hint="mount on an empty directory"
        )
    return mountpoint


def unmount(path: str | os.PathLike[str], *, lazy: bool = False, wait: bool = True) -> bool:
    """Unmount what is mounted on ``path`` and return when its server has ended.

    With ``lazy`` a mount in use is taken out of the name space at once, and its server goes on
    until the last user is gone. So it does where a container or the like has copied this name
    space meanwhile and keeps the mount; that is not waited for without end. A mount whose server
    has died is cleared away. A node server is in use as long as mounts are served from it.

    Returns whether nobody here uses it any more. Without ``wait`` its server may be about to end.

    Raises ``NotFoundError`` (nothing mounted there), ``UsageError`` (not ours),
    ``BusyError``, ``EnvstoreError``.
    """
    mountpoint = resolve(path)
    mounted = find_mount(mountpoint)
    if mounted is None:
        raise NotFoundError(
            f"nothing is mounted on {mountpoint}", hint="see: envstore mount --help"
        )
    if not sessions.is_ours(mounted):
        raise UsageError(
            f"{mountpoint} is a mount of {mounted.source} ({mounted.type}), not of envstore",
            hint=f"umount {mountpoint}",
        )
    files = RecordFiles(mountpoint)
    record = files.load()
    detached = False
    leases = _leases(record)
    if leases and not lazy:
        raise sessions.BusyError(
            f"{mountpoint} serves {leases} other mounts", hint="unmount them first, or use --lazy"
        )
    try:
        sessions.close_mount(mountpoint)
    except sessions.BusyError:
        if not lazy:
            raise
        sessions.close_mount(mountpoint, lazy=True)
        detached = True
    detached = detached or leases > 0
    if record is not None and record.node:
        give_back(record.node, record.lease, lazy=detached)
    elif detached:
        return False
    if wait and files.wait(_END_WITHIN):
        # Who was killed could not do it.
        files.clear()
    return not detached


def clear_dead(path: str | os.PathLike[str]) -> None:
    """Take away a mount of ours on ``path`` that nobody serves any more, if there is one."""
    mountpoint = resolve(path)
    mounted = find_mount(mountpoint)
    if mounted is not None and sessions.is_ours(mounted) and not _served(RecordFiles(mountpoint)):
        unmount(mountpoint, lazy=True)


def _leases(record: MountRecord | None) -> int:
    """Return how many mounts the node server behind a record has to serve."""
    if record is None or not record.control:
        return 0
    try:
        return int(ask(record.control, _WITHIN, ask="status")["leases"])
    except EnvstoreError:
        return 0  # it has died


def active_mounts() -> list[tuple[MountRecord, bool]]:
    """Return this user's mounts, each with whether its server lives; forgets those of the past."""
    found = []
    for record, own in list_records():
        alive = own or _served(RecordFiles(record.mountpoint))
        mounted = find_mount(record.mountpoint)
        if own or (mounted is not None and sessions.is_ours(mounted)):
            found.append((record, alive))
        else:
            RecordFiles(record.mountpoint).clear()
    return found


def _served(files: RecordFiles) -> bool:
    """Whether somebody answers for a mount, by itself or as one of a node's."""
    record = files.load()
    if record is not None and not record.served:
        return True
    if record is None or not record.node:
        return files.alive()
    try:
        ask(record.node, _WITHIN, ask="state")
    except EnvstoreError:
        return False
    return True
