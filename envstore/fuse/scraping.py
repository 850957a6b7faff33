"""A server's metrics over HTTP, for Prometheus."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable

import trio

from envstore.fuse.prometheus import CONTENT_TYPE, check_address
from envstore.fuse.sockets import listen

_MAX_REQUEST, _SECONDS, _CLIENTS = 8 << 10, 10, 16
_AGAIN_AFTER = 5.0

_log = logging.getLogger(__name__)


async def serve_metrics(
    address: str,
    render: Callable[[], str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer ``GET /metrics`` at HOST:PORT or a socket's path with what ``render`` returns.

    Until cancelled. An address that cannot be had is tried again and again, for the server
    before this one may still hold it. Raises ``UsageError`` for what is no address.
    """
    place = check_address(address)
    task_status.started()
    listeners: list[trio.SocketListener] = []
    complained = False
    while not listeners:
        try:
            listeners = await _listeners(address, place)
        except OSError as error:
            if not complained:
                _log.warning("no metrics at %s yet: %s", address, error.strerror or error)
            complained = True
            await trio.sleep(_AGAIN_AFTER)
    limiter = trio.CapacityLimiter(_CLIENTS)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_SECONDS):
                async with limiter:
                    await _answer(stream, render)

    await trio.serve_listeners(answer, listeners)


async def _listeners(address: str, place: tuple[str, int] | None) -> list[trio.SocketListener]:
    if place is not None:
        return list(await trio.open_tcp_listeners(place[1], host=place[0]))
    if os.path.lexists(address) and not _is_socket(address):
        raise FileExistsError(errno.EEXIST, f"{address} exists and is no socket")
    listener = listen(address)
    os.chmod(address, 0o660)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


async def _answer(stream: trio.SocketStream, render: Callable[[], str]) -> None:
    """Answer one HTTP request and close the connection."""
    request = bytearray()
    try:
        while b"\r\n\r\n" not in request and b"\n\n" not in request:
            piece = await stream.receive_some()
            request += piece
            if not piece or len(request) > _MAX_REQUEST:
                return
        words = bytes(request).split(b"\r\n", 1)[0].split(b" ")
        if words[0] not in (b"GET", b"HEAD") or len(words) < 2:
            status, body = "405 Method Not Allowed", b"only GET is known here\n"
        elif words[1].split(b"?", 1)[0] != b"/metrics":
            status, body = "404 Not Found", b"look at /metrics\n"
        else:
            try:
                status, body = "200 OK", render().encode()
            except Exception:  # noqa: BLE001 - a bug here must not end the mount
                _log.exception("rendering metrics failed")
                status, body = "500 Internal Server Error", b"see the log\n"
        kind = CONTENT_TYPE if status[0] == "2" else "text/plain"
        head = (
            f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        await stream.send_all(head.encode() + (b"" if words[0] == b"HEAD" else body))
    except trio.BrokenResourceError:
        return  # asked and gone
