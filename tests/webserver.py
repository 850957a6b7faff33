"""A real web server on loopback that serves bytes from memory and misbehaves on command.

with running_web() as web:
    web.files["/a.whl"] = b"..."
    web.faults["/a.whl"] = [status(503), cut(1000), reset]   # one for each request, in order
    url = web.url("/a.whl")
    ...
    web.seen[0].headers["Range"]

It is a proxy too, for plain requests (to itself, whatever they name) and for CONNECT (to ports of
this machine).
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass(frozen=True)
class Seen:
    """A request that came in."""

    path: str
    headers: Message


Fault = Callable[["Handler", bytes], None]


@dataclass
class Web:
    """What a server serves and has been asked. ``logins`` are ``Authorization`` values wanted.

    ``ranges`` says whether ranges are honoured; ``gate`` holds back every body until it is set.
    """

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    logins: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etag: str = ""
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    tunnels: list[str] = field(default_factory=list)
    scheme: str = "http"
    released: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Return the URL of ``path``; ``host`` may be any name of this machine."""
        return f"{self.scheme}://{host}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    web: Web

    def setup(self) -> None:
        super().setup()
        self.web.connections += 1

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        web = self.web
        web.seen.append(Seen(self.path, self.headers))
        if path.startswith("http://"):  # asked as a proxy
            path = "/" + path.split("/", 3)[3]
        wanted = web.logins.get(path)
        if wanted is not None and self.headers.get("Authorization") != wanted:
            return self.say(403 if "Authorization" in self.headers else 401)
        data = web.files.get(path)
        fault = web.faults[path].pop(0) if web.faults.get(path) else web.always.get(path)
        if fault is not None:
            return fault(self, data or b"")
        if data is None:
            return self.say(404)
        return self.serve(data)

    def do_CONNECT(self) -> None:
        self.web.tunnels.append(self.path)
        self.web.seen.append(Seen(self.path, self.headers))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pass_on, args=(there, self.connection))
            back.start()
            _pass_on(self.connection, there)
            back.join()
        self.close_connection = True

    def serve(self, data: bytes, *, stop_after: int | None = None) -> None:
        """Answer with ``data``, or the range asked for; with ``stop_after`` break off then."""
        match = _RANGE.fullmatch(self.headers.get("Range", "")) if self.web.ranges else None
        fresh = self.headers.get("If-Range") in (None, self.web.etag)
        start = int(match[1]) if match and fresh else 0
        if start and start >= len(data):
            return self.say(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.web.etag:
            self.send_header("ETag", self.web.etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if stop_after is None:
            self.wfile.write(body)
        else:
            self.wfile.write(body[:stop_after])
            self.hang_up()

    def say(self, code: int, *headers: tuple[str, str]) -> None:
        """Answer with a status and a short body."""
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"sorry")

    def hang_up(self, *, reset: bool = False) -> None:
        """End the connection."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def status(code: int, *headers: tuple[str, str]) -> Fault:
    """A fault: another status."""
    return lambda handler, data: handler.say(code, *headers)


def cut(after: int) -> Fault:
    """A fault: the body ends after so many bytes of what was promised."""
    return lambda handler, data: handler.serve(data, stop_after=after)


def redirect(url: str, code: int = 302) -> Fault:
    """A fault: it is elsewhere."""
    return status(code, ("Location", url))


def reset(handler: Handler, data: bytes) -> None:
    """A fault: the connection is torn down without an answer."""
    handler.hang_up(reset=True)


def wrong(handler: Handler, data: bytes) -> None:
    """A fault: as many bytes, but others."""
    handler.serve(bytes(len(data)))


def silence(handler: Handler, data: bytes) -> None:
    """A fault: nothing is said until ``released`` is set."""
    handler.web.released.wait(60)
    handler.hang_up()


def stall(after: int) -> Fault:
    """A fault: nothing comes after so many bytes until ``released`` is set."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.web.released.wait(60)
        handler.hang_up()

    return fault


@contextmanager
def running_web(certificate: Path | None = None) -> Iterator[Web]:
    """Start a server, yield it, end it and its threads.

    It speaks TLS with a ``certificate``: a PEM file with the key in it.
    """
    web = Web(scheme="https" if certificate else "http")

    class Bound(Handler):
        pass

    Bound.web = web
    server = _Server(("127.0.0.1", 0), Bound)
    web.port = server.server_address[1]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # Not by the thread that accepts: one client's handshake must not keep others waiting.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield web
    finally:
        web.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are part of the tests."""
