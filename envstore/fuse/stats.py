"""A socket beside each mount's record that tells what the mount has done so far."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from envstore.errors import NotFoundError
from envstore.fuse.peers import is_ours
from envstore.fuse.sockets import short_address

_WITHIN = 10.0
_MAX_ANSWER = 16 << 20


async def answer(
    listener: trio.SocketListener,
    report: Callable[[], dict[str, Any]],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer every connection to ``listener`` with one JSON object, until cancelled."""

    async def tell(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # asked and gone
            if is_ours(stream.socket):
                await stream.send_all(json.dumps(report()).encode())
        await stream.aclose()

    task_status.started()
    await trio.serve_listeners(tell, [listener])


def read_stats(path: Path) -> dict[str, Any]:
    """Return what the server behind the socket ``path`` has counted; see ``Metrics.report``.

    Raises ``NotFoundError`` when no server answers there.
    """
    data = bytearray()
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            short_address(path) as address,
        ):
            client.settimeout(_WITHIN)
            client.connect(address)
            while (piece := client.recv(1 << 16)) and len(data) < _MAX_ANSWER:
                data += piece
    except OSError as error:
        raise NotFoundError(f"no mount server answers at {path}: {error.strerror}") from error
    try:
        found: dict[str, Any] = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        raise NotFoundError(
            f"the mount server at {path} ended in the middle of its answer", hint="ask again"
        ) from None
    return found
