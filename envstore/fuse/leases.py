"""Mounts through a node server: asks it to serve a snapshot, and shows that where it is wanted."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import Any

from envstore.errors import AccessDeniedError, EnvstoreError, UnavailableError
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mount import check_mountpoint
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.session import bind, close_mount
from envstore.fuse.sockets import ask_lasting, give_back

_WITHIN = 120.0


def default_socket() -> str:
    """Return where this machine's node server listens: ``ENVSTORE_NODE_SOCKET``, or below /run."""
    return os.environ.get("ENVSTORE_NODE_SOCKET") or "/run/envstore/node.sock"


def node_for(choice: str) -> str | None:
    """Return the socket of the node server to use, ``None`` to do without.

    ``choice`` is ``on``, ``off`` or ``auto``. Raises ``NotFoundError``, ``AccessDeniedError``,
    ``UnavailableError`` if it must be used and cannot.
    """
    if choice == "off":
        return None
    path = default_socket()
    try:
        if os.geteuid() != 0:
            raise AccessDeniedError("only root can mount through the node server")
        if ask_lasting(path, _WITHIN, ask="state")["state"] != "serving":
            raise UnavailableError(f"the node server at {path} is ending")
    except EnvstoreError:
        if choice == "on":
            raise
        return None
    return path


def mount_through(node: str, request: MountRequest) -> MountRecord:
    """Mount what ``request`` names on its mount point, served by the node server at ``node``.

    Takes milliseconds if the node serves the snapshot already. Raises what keeps it from being
    made; then nothing is mounted.
    """
    request = request.placed()
    mountpoint = check_mountpoint(request.mountpoint)
    files = RecordFiles(mountpoint)
    files.prepare()
    found = ask_lasting(
        node,
        _WITHIN,
        ask="mount",
        store=request.store,
        ref=request.ref,
        target=mountpoint,
        profile=request.profile,
        fast_path=request.fast_path,
        prefix=request.prefix,
        namespace=os.stat("/proc/self/ns/mnt").st_ino,
    )
    try:
        fast = _show(found, mountpoint, request)
        record = MountRecord(
            mountpoint=mountpoint,
            name=request.ref,
            snapshot=found["snapshot"],
            manifest=found["manifest"],
            holder_pid=0,
            store=found["store"],
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            log="",
            stats="",
            control="",
            fast_path=fast,
            node=node,
            lease=found["id"],
            prefix=request.prefix,
        )
        files.save(record)
    except BaseException:
        with contextlib.suppress(EnvstoreError):
            close_mount(mountpoint, lazy=True)
        give_back(node, found["id"])
        raise
    return record


def _show(found: dict[str, Any], mountpoint: str, request: MountRequest) -> bool:
    if found["fast"] is not None:
        from envstore.fuse.fast import lay_fast_path

        return lay_fast_path(
            found["fast"],
            found["root"],
            found["subtree"],
            mountpoint,
            f"envstore:{request.ref}",
            required=request.fast_path == "on",
        )
    bind(os.path.join(found["root"], found["subtree"]), mountpoint)
    return False
