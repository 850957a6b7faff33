"""Answers HTTP for probes, Prometheus and ``envstore k8s status``, with bounds on everything.

Whoever reaches the port may ask: nothing is changed here, and nothing secret is said. A client
has a few seconds to ask and to read the answer, and there are so many at once; others wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from envstore.csi.metrics import Pages
from envstore.errors import AccessDeniedError
from envstore.fuse.prometheus import CONTENT_TYPE, check_address
from envstore.fuse.sockets import claim

_CLIENTS = 16
_SECONDS = 5.0
_MAX_REQUEST = 8 << 10
_BACKLOG = 128
_PAUSE = 0.1

_log = logging.getLogger("envstore.csi")

_Answer = tuple[HTTPStatus, str, str]


class PageServer:
    """Serves ``/metrics``, ``/status``, ``/healthz`` and ``/livez`` until it is closed.

    ``/livez`` is about the driver alone, ``/healthz`` about the node server as well: 200 if they
    answer, 503 if not.
    """

    def __init__(self, address: str, pages: Pages) -> None:
        """Listen at HOST:PORT or at the path of a socket.

        Raises ``UsageError``, ``AccessDeniedError`` if the address cannot be had.
        """
        self._pages = pages
        self._routes: dict[str, Callable[[], _Answer]] = {
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE, pages.metrics()),
            "/status": lambda: (HTTPStatus.OK, "application/json", json.dumps(pages.status())),
            "/healthz": lambda: _verdict(pages.healthy()),
            "/livez": lambda: _verdict(pages.live()),
        }
        self._listener = _listen(address)
        self._path = None if check_address(address) else address
        self._room = threading.BoundedSemaphore(_CLIENTS)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="csi-pages", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens at; 0 for a socket with a path."""
        return 0 if self._path else int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Take no more questions; those under way are answered."""
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for _ in range(_CLIENTS):
            self._room.acquire()
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _run(self) -> None:
        while True:
            self._room.acquire()
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                self._room.release()
                if self._closing:
                    return
                _log.warning("a client of the metrics is not served: %s", error.strerror)
                time.sleep(_PAUSE)
                continue
            threading.Thread(target=self._converse, args=(client,), daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        try:
            with client:
                self._answer(client)
        except OSError:
            return  # asked and gone
        finally:
            self._room.release()

    def _answer(self, client: socket.socket) -> None:
        words = _request_line(client)
        if not words:
            return
        if words[0] not in ("GET", "HEAD") or len(words) < 2:
            found = _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is known here")
        else:
            found = self._page(words[1].partition("?")[0])
        status, kind, text = found
        body = text.encode("utf-8", "backslashreplace")
        head = (
            f"HTTP/1.0 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\n"
            "Connection: close\r\n\r\n"
        )
        client.settimeout(_SECONDS)
        client.sendall(head.encode() + (b"" if words[0] == "HEAD" else body))

    def _page(self, path: str) -> _Answer:
        make = self._routes.get(path)
        if make is None:
            return _refusal(HTTPStatus.NOT_FOUND, f"look at {', '.join(self._routes)}")
        try:
            return make()
        except Exception:  # noqa: BLE001 - whatever is wrong with a page, others go on
            _log.exception("%s failed", path)
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "see the log")


def _verdict(problem: str) -> _Answer:
    if problem:
        return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, problem)
    return HTTPStatus.OK, "text/plain; charset=utf-8", "ok\n"


def _refusal(status: HTTPStatus, text: str) -> _Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n"


def _request_line(client: socket.socket) -> list[str]:
    """Return the words of the first line once the whole head is there; none if it never is."""
    request = bytearray()
    end = time.monotonic() + _SECONDS
    while b"\r\n\r\n" not in request and b"\n\n" not in request:
        left = end - time.monotonic()
        if left <= 0:
            return []
        client.settimeout(left)
        piece = client.recv(_MAX_REQUEST)
        request += piece
        if not piece or len(request) > _MAX_REQUEST:
            return []
    return request.splitlines()[0].decode("latin-1").split(" ")


def _listen(address: str) -> socket.socket:
    place = check_address(address)
    if place is None:
        listener = claim(address)
        os.chmod(address, 0o660)
        listener.setblocking(True)
        return listener
    try:
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        return socket.create_server(place, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise AccessDeniedError(f"cannot listen at {address}: {error.strerror}") from error
