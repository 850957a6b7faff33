"""Serves a snapshot at a mount point, in the foreground, until it is unmounted."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType

from envstore.errors import NotFoundError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse.content import Content, load_content
from envstore.fuse.mountinfo import MountInfo, find_mount, resolve
from envstore.fuse.records import MountRecord, RecordFiles, list_records
from envstore.store.repository import Repository

READAHEAD_KIB = 1024
"""What the kernel reads ahead where it lets us say so; requests are at most this large."""

_log = logging.getLogger(__name__)


def check_mountpoint(path: str | os.PathLike[str]) -> str:
    """Return the resolved mount point if something can be mounted there.

    Raises ``NotFoundError``, ``UsageError`` (not a directory, not empty, or mounted already).
    """
    mountpoint = resolve(path)
    mounted = find_mount(mountpoint)
    if mounted is not None and is_ours(mounted):
        if RecordFiles(mountpoint).alive():
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


def serve(
    repository: Repository,
    snapshot: bytes,
    mountpoint: str | os.PathLike[str],
    *,
    name: str = "",
    allow_other: bool = False,
    ready: Callable[[MountRecord], None] = lambda record: None,
) -> None:
    """Mount ``snapshot`` on the directory ``mountpoint`` and serve it until it is unmounted.

    ``repository`` must have a cache. ``name`` is shown as the mounted source. ``ready`` is called
    once, when the mount answers. SIGTERM and SIGINT unmount; a mount in use is then detached and
    served until the last user is gone, or a second signal comes. Call from the main thread.

    Raises ``UsageError``, ``NotFoundError``, ``AccessDeniedError``, ``CorruptError``,
    ``UnavailableError``.
    """
    if repository.cache is None:
        raise UsageError("a mount needs a cache")
    mountpoint = check_mountpoint(mountpoint)
    sessions.check_device()
    content = load_content(repository, snapshot, name)
    try:
        from envstore.fuse.serving import serve_session
    except ImportError as error:
        raise NotFoundError(
            f"mounting needs pyfuse3 and trio: {error}", hint="pip install 'envstore[fuse]'"
        ) from error
    # Until the event loop takes signals over, a signal must still leave through `finally`.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with _claim(mountpoint) as files:
            session = sessions.open_session(
                mountpoint, source=f"envstore:{content.name}", allow_other=allow_other
            )
            try:
                _raise_readahead(mountpoint)
                record = _record(session, content, repository, files)
                files.save(record)
                serve_session(session, content, repository, files.stats, partial(ready, record))
            finally:
                # First the device: with nobody to answer, an unmount might wait for ever.
                os.close(session.fd)
                _ensure_unmounted(mountpoint)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _record(
    session: sessions.Session, content: Content, repository: Repository, files: RecordFiles
) -> MountRecord:
    return MountRecord(
        mountpoint=session.mountpoint,
        name=content.name,
        snapshot=content.snapshot.hex(),
        manifest=content.manifest.hex(),
        pid=os.getpid(),
        store=repository.objects.url,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        log=str(files.log),
        stats=str(files.stats),
    )


@contextlib.contextmanager
def _claim(mountpoint: str) -> Iterator[RecordFiles]:
    """Hold the mount point's lock, so that there is one server of it."""
    files = RecordFiles(mountpoint)
    files.prepare()
    lock = files.acquire()
    if lock is None:
        raise UsageError(
            f"{mountpoint} is being served already", hint=f"envstore umount {mountpoint}"
        )
    try:
        files.clear()
        yield files
    finally:
        files.clear()
        os.close(lock)


def _ensure_unmounted(mountpoint: str) -> None:
    """Leave no dead mount behind when serving ends for another reason than an unmount."""
    mounted = find_mount(mountpoint)
    if mounted is not None and is_ours(mounted):
        sessions.close_mount(mountpoint, lazy=True)


def _raise_readahead(mountpoint: str) -> None:
    """Let the kernel read ahead further than its 128 KiB, where it allows it (root)."""
    mounted = find_mount(mountpoint)
    if mounted is None or os.geteuid() != 0:
        return
    try:
        Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").write_text(str(READAHEAD_KIB))
    except OSError as error:
        _log.info("kernel readahead stays as it is: %s", error)


def is_ours(mounted: MountInfo) -> bool:
    """Whether a mount is one of envstore's."""
    return mounted.type == f"fuse.{sessions.SUBTYPE}"


def unmount(path: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """Unmount what is mounted on ``path`` and return when its server has ended.

    With ``lazy`` a mount in use is taken out of the name space at once, and its server goes on
    until the last user is gone. A mount whose server has died is cleared away.

    Raises ``NotFoundError`` (nothing mounted there), ``UsageError`` (not ours),
    ``BusyError``, ``EnvstoreError``.
    """
    mountpoint = resolve(path)
    mounted = find_mount(mountpoint)
    if mounted is None:
        raise NotFoundError(
            f"nothing is mounted on {mountpoint}", hint="see: envstore mount --help"
        )
    if not is_ours(mounted):
        raise UsageError(
            f"{mountpoint} is a mount of {mounted.source} ({mounted.type}), not of envstore",
            hint=f"umount {mountpoint}",
        )
    files = RecordFiles(mountpoint)
    try:
        sessions.close_mount(mountpoint)
    except sessions.BusyError:
        if not lazy:
            raise
        sessions.close_mount(mountpoint, lazy=True)
        return
    files.wait()
    # Who was killed could not do it.
    files.clear()


def active_mounts() -> list[tuple[MountRecord, bool]]:
    """Return this user's mounts, each with whether its server lives; forgets those of the past."""
    found = []
    for record, alive in list_records():
        mounted = find_mount(record.mountpoint)
        if alive or (mounted is not None and is_ours(mounted)):
            found.append((record, alive))
        else:
            RecordFiles(record.mountpoint).clear()
    return found
