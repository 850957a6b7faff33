"""Pull: writes a snapshot's tree into a directory.

Every frame is fetched once, in large requests and in parallel, and its chunks are written to
wherever they belong; nothing is held but the frames being written. The tree grows in a hidden
directory beside the destination, or in it if that exists (it may be a mount point, or where a
shell stands), and takes its place only when it is complete. Files that hold their own prefix are
relocated to where the tree will be.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    UsageError,
)
from envstore.store.filling import Filling, Write, reach
from envstore.store.leases import leased
from envstore.store.locations import Located, Locations
from envstore.store.manifest import HOLE, NORMAL_MTIME_NS, Entry, Root, read_entries
from envstore.store.relocated import Relocated
from envstore.store.relocation import (
    Relocation,
    check_prefix,
    check_room,
    relocated_target,
    tightest,
)
from envstore.store.repository import Repository
from envstore.store.source import Kind

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Progress(Protocol):
    """Told how many of how many file bytes are written."""

    def __call__(self, done: int, total: int) -> None:
        """Both in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull wrote: number of files and their bytes, and bytes fetched for it."""

    files: int
    logical_bytes: int
    fetched_bytes: int
    requests: int


def pull(
    repository: Repository,
    snapshot: bytes,
    destination: Path,
    progress: Progress | None = None,
    *,
    prefix: bytes = b"",
) -> PullResult:
    """Write the tree of ``snapshot`` to ``destination``, which must be absent or empty.

    It is made to work at ``prefix``, by default the absolute path of ``destination``. A lease of
    the snapshot is held meanwhile, where that may be. Raises ``UsageError`` (destination in use,
    prefix too long), ``CorruptError``, ``NoSpaceError``, ``AccessDeniedError``; the destination
    is then as it was.
    """
    destination = Path(os.path.abspath(destination))
    _check_destination(destination)
    with leased(repository, snapshot, "pull"):
        return _pull(repository, snapshot, destination, progress, prefix)


def _pull(
    repository: Repository,
    snapshot: bytes,
    destination: Path,
    progress: Progress | None,
    prefix: bytes,
) -> PullResult:
    traffic = repository.objects.traffic
    requests, received = traffic.requests, traffic.bytes_in
    root, locations = repository.located(repository.snapshot(snapshot).manifest)
    entries = list(read_entries(repository.parts(root, locations)))
    place = _Place(entries, prefix or os.fsencode(destination))
    exists = destination.exists()
    home = destination if exists else destination.parent
    partial = home / f".envstore-{secrets.token_hex(8)}.partial"
    try:
        try:
            partial.mkdir()
            top = os.open(partial, _DIRECTORY)
            try:
                _write_tree(repository, top, root, entries, locations, place, progress)
                if exists:
                    _move_up(top, partial, root)
                else:
                    _set_root(top, root)
                    partial.rename(destination)
            finally:
                os.close(top)
        except OSError as error:
            raise _write_error(error, destination) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return PullResult(
        root.files, root.logical, traffic.bytes_in - received, traffic.requests - requests
    )


class _Place:
    """Where a tree will be used, and what it makes of its entries. Raises ``UsageError``."""

    def __init__(self, entries: Sequence[Entry], prefix: bytes) -> None:
        self._prefix = prefix
        if any(entry.relocation for entry in entries):
            check_prefix(prefix)
        plans = {
            entry.path: Relocation.decode(entry.relocation)
            for entry in entries
            if entry.relocation and entry.kind is Kind.FILE
        }
        path = tightest(plans)
        if path is not None:
            check_room(plans[path], prefix, path)
        self.files = {path: Relocated(plan, prefix) for path, plan in plans.items()}

    def target(self, entry: Entry) -> bytes:
        if not entry.relocation:
            return entry.target
        return relocated_target(entry.target, entry.relocation, self._prefix)


def _check_destination(destination: Path) -> None:
    try:
        if not destination.parent.is_dir():
            raise UsageError(f"{destination.parent} is not a directory", hint="create it first")
        if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
            raise UsageError(f"{destination} exists and is not a directory")
        if destination.exists() and any(destination.iterdir()):
            raise UsageError(f"{destination} is not empty", hint="pull into a new directory")
    except OSError as error:
        raise _write_error(error, destination) from error


def _write_error(error: OSError, destination: Path) -> EnvstoreError:
    where = f"cannot write {destination}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(where, hint="free space there")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(where, hint="choose a directory you may write to")
    if error.errno == errno.EEXIST and isinstance(error.filename, bytes):
        # No tree has a name twice, and nobody else writes there: two names are one to this place.
        name = os.fsdecode(error.filename)
        return EnvstoreError(
            f"cannot write {destination}: {name!r} is there under another name",
            hint="pull to a file system that tells upper from lower case, and all of Unicode apart",
        )
    return EnvstoreError(where)


def _move_up(top: int, partial: Path, root: Root) -> None:
    """Move what is in ``partial``, open as ``top``, into the directory that holds it."""
    there = os.open(partial.parent, _DIRECTORY)
    moved = []
    try:
        try:
            for name in os.listdir(top):
                os.rename(name, name, src_dir_fd=top, dst_dir_fd=there)
                moved.append(name)
        except BaseException:
            for name in moved:
                os.rename(name, name, src_dir_fd=there, dst_dir_fd=top)
            raise
        partial.rmdir()
        if os.geteuid() in (0, os.fstat(there).st_uid):
            _set_root(there, root)  # of a directory that is not ours, mode and time stay
    finally:
        os.close(there)


def _write_tree(
    repository: Repository,
    top: int,
    root: Root,
    entries: Sequence[Entry],
    locations: Locations,
    place: _Place,
    progress: Progress | None,
) -> None:
    linked = {entry.link for entry in entries if entry.link}
    originals: dict[bytes, Entry] = {}
    for entry in entries:
        with reach(top, entry.path) as (fd, name):
            if entry.kind is Kind.DIRECTORY:
                os.mkdir(name, dir_fd=fd)
            elif entry.kind is Kind.SYMLINK:
                os.symlink(place.target(entry), name, dir_fd=fd)
            elif entry.link:
                _make_link(top, originals.get(entry.link), entry, fd, name)
            else:
                relocated = place.files.get(entry.path)
                _make_file(fd, name, entry.size + (relocated.base if relocated else 0))
        if entry.path in linked and entry.kind is Kind.FILE and not entry.link:
            originals[entry.path] = entry
    writes = _plan(entries, locations, place)
    paths = [entry.path for entry in entries]
    done = 0
    whereabouts = repository.whereabouts(root, locations)
    filling = Filling(repository.fetcher, whereabouts, top, paths)
    for written in filling.in_parallel(locations, writes):
        done += written
        if progress:
            progress(done, root.logical)
    for entry in entries:
        if entry.path in place.files and not entry.link:
            with reach(top, entry.path) as (folder, name):
                _relocate(folder, name, place.files[entry.path])
    # Children first: writing into a directory would move its time stamp again.
    for entry in reversed(entries):
        with reach(top, entry.path) as (fd, name):
            _set_attributes(fd, name, entry)


def _make_file(folder: int, name: bytes, size: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _relocate(folder: int, name: bytes, relocated: Relocated) -> None:
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        relocated.settle(fd)
    finally:
        os.close(fd)


def _make_link(top: int, original: Entry | None, entry: Entry, folder: int, name: bytes) -> None:
    if original is None or original.refs != entry.refs or original.relocation != entry.relocation:
        raise CorruptError(f"manifest: {entry.path!r} is a further name of no such file")
    with reach(top, original.path) as (source, first):
        os.link(first, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)


def _set_attributes(folder: int, name: bytes, entry: Entry) -> None:
    normal = 0o755 if entry.executable or entry.kind is Kind.DIRECTORY else 0o644
    if entry.kind is not Kind.SYMLINK:
        os.chmod(name, normal if entry.mode is None else entry.mode, dir_fd=folder)
    mtime = NORMAL_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
    os.utime(name, ns=(mtime, mtime), dir_fd=folder, follow_symlinks=False)


def _set_root(fd: int, root: Root) -> None:
    if root.mode:
        os.fchmod(fd, root.mode)
        os.utime(fd, ns=(root.mtime_ns, root.mtime_ns))


def _plan(entries: Sequence[Entry], locations: Located, place: _Place) -> dict[int, list[Write]]:
    """Return what is to be written from each frame."""
    writes: dict[int, list[Write]] = defaultdict(list)
    number = 0
    for i, entry in enumerate(entries):
        relocated = place.files.get(entry.path)
        at = relocated.base if relocated else 0
        for name, size in entry.refs:
            if name != HOLE and not entry.link:
                frame = locations.ref_frames[number]
                if frame >= len(locations.frames):
                    raise CorruptError(f"locations: a chunk of {entry.path!r} is nowhere")
                start = locations.ref_offsets[number]
                writes[frame].append(Write(number, i, at, start, size, name))
            at += size
            number += 1
    return writes
