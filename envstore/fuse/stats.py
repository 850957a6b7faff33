"""A socket beside each mount's record that tells what the mount has done so far."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from envstore.errors import NotFoundError


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """Yield an address for ``path`` that is short enough for a socket, however long it is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


async def answer(
    path: Path,
    report: Callable[[], dict[str, Any]],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer every connection to the socket ``path`` with one JSON object, until cancelled."""
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
        path.unlink(missing_ok=True)
        with _address(path) as address:
            await listener.bind(address)
        listener.listen(16)
        listeners = [trio.SocketListener(listener)]

        async def tell(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):  # asked and gone
                await stream.send_all(json.dumps(report()).encode())
            await stream.aclose()

        task_status.started()
        await trio.serve_listeners(tell, listeners)


def read_stats(path: Path) -> dict[str, Any]:
    """Return what the server behind the socket ``path`` has counted; see ``Metrics.report``.

    Raises ``NotFoundError`` when no server answers there.
    """
    data = bytearray()
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            _address(path) as address,
        ):
            client.connect(address)
            while piece := client.recv(1 << 16):
                data += piece
    except OSError as error:
        raise NotFoundError(f"no mount server answers at {path}: {error.strerror}") from error
    found: dict[str, Any] = json.loads(data)
    return found
