from __future__ import annotations

import hashlib
import http.client
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.link import proxy

DELAY_MS = 40.0


class Echo(BaseHTTPRequestHandler):
    """Answers a POST with its body's digest and the body."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Digest", hashlib.sha256(body).hexdigest())
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxied() -> Iterator[int]:
    with (
        serving(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as target,
        proxy(target, DELAY_MS) as port,
    ):
        yield port


def test_bytes_come_through_as_they_are_in_both_directions(proxied: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxied, timeout=60)
    for size in (0, 1, 70_000, 9_000_001):
        body = os.urandom(size)
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        assert answer.getheader("X-Digest") == hashlib.sha256(body).hexdigest()
        assert answer.read() == body
    connection.close()


def test_every_request_of_a_kept_connection_is_delayed(proxied: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxied, timeout=60)
    for number in range(5):
        started = time.monotonic()
        connection.request("GET", f"/{number}")
        answer = connection.getresponse()
        assert time.monotonic() - started >= DELAY_MS / 1000
        assert answer.read() == b"/%d" % number
    connection.close()


def test_pipelined_requests_are_all_answered_in_order(proxied: int) -> None:
    with socket.create_connection(("127.0.0.1", proxied), timeout=60) as client:
        started = time.monotonic()
        for number in range(50):
            client.sendall(b"GET /%02d HTTP/1.1\r\nHost: x\r\n\r\n" % number)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := client.recv(1 << 16):
            if not received:
                assert time.monotonic() - started >= DELAY_MS / 1000
            received += piece
    assert [part[:3] for part in received.split(b"\r\n\r\n")[1:]] == [
        b"/%02d" % number for number in range(50)
    ]


def test_a_server_that_hangs_up_ends_the_clients_connection(proxied: int) -> None:
    with socket.create_connection(("127.0.0.1", proxied), timeout=60) as client:
        client.sendall(b"nonsense\r\n\r\n")
        received = b""
        while piece := client.recv(1 << 16):
            received += piece
    assert b"400" in received


def test_a_server_that_is_not_there_ends_the_clients_connection() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody's else, and refusing as long as it is not listening
        with (
            proxy(f"127.0.0.1:{bound.getsockname()[1]}", DELAY_MS) as listening,
            socket.create_connection(("127.0.0.1", listening), timeout=60) as client,
        ):
            assert client.recv(1) == b""
