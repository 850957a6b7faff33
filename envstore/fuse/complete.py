"""Mounts of snapshots that are whole on this machine: by the kernel alone, without any server."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime

from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mount import check_mountpoint
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.session import close_mount


def mount_complete(request: MountRequest) -> MountRecord | None:
    """Mount what ``request`` names if it is hydrated; ``None`` if that takes a server.

    Only ``@digest`` can be known without asking the store, and only root has the fast path.
    Raises what keeps it from being mounted although it is hydrated, unless ``fast_path`` is
    ``auto``.
    """
    if not request.ref.startswith("@") or os.geteuid() != 0 or request.fast_path == "off":
        return None
    from envstore.fuse.hydrated import find_hydrated
    from envstore.fuse.overlay import mount_fast
    from envstore.fuse.placing import placed_image
    from envstore.store.cache import default_cache

    cache = default_cache()
    found = find_hydrated(cache, request.ref)
    if found is None:
        return None
    request = request.placed()
    mountpoint = check_mountpoint(request.mountpoint)
    files = RecordFiles(mountpoint)
    files.prepare()
    name = found.record.ref
    try:
        image = placed_image(found, cache, os.fsencode(request.prefix))
        mount_fast(image, found.local, None, mountpoint, source=f"envstore:{name}")
    except UsageError:
        raise
    except EnvstoreError:
        if request.fast_path == "on":
            raise
        return None
    record = MountRecord(
        mountpoint=mountpoint,
        name=request.ref,
        snapshot=found.record.snapshot,
        manifest=found.record.manifest,
        holder_pid=0,
        store="",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        log="",
        stats="",
        control="",
        fast_path=True,
        prefix=request.prefix,
    )
    try:
        files.save(record)
    except BaseException:
        with contextlib.suppress(EnvstoreError):
            close_mount(mountpoint, lazy=True)
        raise
    return record
