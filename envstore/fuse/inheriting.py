"""How a node server goes on with what an fdstore has kept of one that is no more.

The former one may have lived in another container: its sockets' names, records and the mount of
its own may be there, or not. What is there goes on being used, so that nobody who waits at one of
its sockets is sent away; what is not is made anew.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from envstore.errors import AccessDeniedError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse.keeping import Kept, MountRequest
from envstore.fuse.mount import clear_dead
from envstore.fuse.mountinfo import find_mount, resolve
from envstore.fuse.records import RecordFiles
from envstore.fuse.sockets import claim, listen, short_address

_CREDENTIALS = struct.Struct("iII")


def prepare_places(request: MountRequest) -> None:
    """Make the directories of a node server that begins, and clear away what a dead one has left.

    Raises ``UsageError``.
    """
    clear_dead(request.mountpoint)
    _make_directory(request.mountpoint)
    _make_directory(os.path.dirname(request.node))


def check_same(kept: Kept, request: MountRequest) -> None:
    """See that a node server may go on with what another has left. Raises ``UsageError``."""
    former, wanted = kept.request, _placed(request)
    for what, one, other in (
        ("on the directory", former.mountpoint, wanted.mountpoint),
        ("with the socket", former.node, wanted.node),
    ):
        if one != other:
            raise UsageError(
                f"the fdstore at {request.fdstore} keeps a node server {what} {one}, not {other}",
                hint="start it with the same paths",
            )


def inherit(kept: Kept, request: MountRequest) -> RecordFiles:
    """Make what ``kept`` is of whole again, for a node server as ``request`` describes it.

    Touches no mount. Raises ``UsageError``, ``AccessDeniedError``, ``EnvstoreError``.
    """
    request = kept.request = _placed(request)
    files = RecordFiles(request.mountpoint)
    files.prepare()
    _lock(kept, files)
    _make_directory(os.path.dirname(request.node))
    places: tuple[tuple[str, str | Path, Callable[..., socket.socket]], ...] = (
        ("stats", files.stats, listen),
        ("control", files.control, listen),
        ("node", request.node, claim),
    )
    for name, path, again in places:
        if not _leads_to(path, kept.files[name]):
            os.close(kept.files[name])
            kept.files[name] = again(path).detach()
    mounted = find_mount(request.mountpoint)
    if mounted is None or mounted.device != kept.device:
        if mounted is None:
            _make_directory(request.mountpoint)
        sessions.mount_again(kept.session(), source="envstore:node")
    return files


def _placed(request: MountRequest) -> MountRequest:
    """Return the request with its directory as the mount table names it, without touching that."""
    parent, name = os.path.split(os.path.abspath(request.mountpoint))
    return replace(request, mountpoint=os.path.join(resolve(parent), name))


def _lock(kept: Kept, files: RecordFiles) -> None:
    """Have the lock of the mount's records; the former's is still held, where it is the same."""
    if files.holds(kept.files["lock"]):
        return
    lock = files.acquire()
    if lock is None:
        raise UsageError(f"{files.mountpoint} is being served by another already")
    os.close(kept.files["lock"])
    kept.files["lock"] = lock


def _leads_to(path: str | Path, listener: int) -> bool:
    """Whether who connects to ``path`` gets to ``listener``, told by who has begun to listen."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
        socket.socket(fileno=os.dup(listener)) as ours,
    ):
        client.setblocking(False)
        try:
            with short_address(path) as address:
                client.connect(address)
        except BlockingIOError:
            return True  # many wait there already
        except OSError:
            return False
        return _listens(client) == _listens(ours)


def _listens(end: socket.socket) -> tuple[int, ...]:
    found = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(found)


def _make_directory(place: str) -> None:
    try:
        os.makedirs(place, mode=0o755, exist_ok=True)
    except PermissionError as error:
        raise AccessDeniedError(f"cannot make the directory {place}: {error.strerror}") from error
    except OSError as error:
        raise UsageError(f"cannot make the directory {place}: {error.strerror}") from error
