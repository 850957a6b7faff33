"""A TCP proxy on loopback that can be told to fail like a network, or like a server behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class _Link:
    """What is to become of the answers on one connection."""

    def __init__(self) -> None:
        self.hangs = False
        self.alters: int | None = None
        """Bytes of the body until the one to alter."""
        self._in_body = False

    def altered(self, data: bytes) -> bytes:
        """Return a piece of an answer, with a byte of its body altered if it is its turn."""
        if self.alters is None:
            self._in_body = False
            return data
        start = 0
        if not self._in_body:
            start = data.find(b"\r\n\r\n") + 4
            if start < 4:
                return data
            self._in_body = True
        at = start + self.alters
        if at >= len(data):
            self.alters -= len(data) - start
            return data
        self.alters = None
        return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _error(status: int) -> bytes:
    code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}[status]
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    return (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


class TcpProxy:
    """Passes bytes between its clients and ``target`` until told otherwise.

    Every switch may be thrown at any time and applies from the next bytes on; with ``times`` it
    goes back by itself once it has broken that many connections.
    """

    def __init__(self, target: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        split = urlsplit(target)
        assert split.hostname is not None
        assert split.port is not None
        self._target = (split.hostname, split.port)
        self._listener = socket.create_server(address, backlog=128)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._mode = ""
        self._times: int | None = None
        self._budget = 0
        self._about = b""
        self._status = 0
        self._seconds = 0.0
        self._told = 0
        self.connections = 0
        self.endpoint = f"http://{address[0]}:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        self._set("cut", None)
        self._close_all()

    def swallow_answers(self, *, times: int | None = None) -> None:
        """Pass requests on, then close the connection instead of passing the answer back."""
        self._set("swallow answers", times)

    def cut_requests_before_body(self, *, times: int | None = None) -> None:
        """Pass the header of a request on, then close the connection."""
        self._set("headers only", times)

    def cut_answers_after(self, count: int, *, times: int | None = None) -> None:
        """Close a connection once ``count`` bytes of answers have passed back on it."""
        self._budget = count
        self._set("cut answers", times)

    def hang(self, *, about: bytes = b"", times: int | None = None) -> None:
        """Pass requests on and nothing of the answers, and keep the connections open.

        Of requests that contain ``about`` in their header only, as the next two. Restoring
        closes those connections.
        """
        self._set("hang", times, about)

    def answer(self, status: int, *, about: bytes = b"", times: int | None = None) -> None:
        """Answer requests with an error instead of passing them on, and close the connection."""
        self._status = status
        self._set("answer", times, about)

    def alter_answers_after(
        self, count: int, *, about: bytes = b"", times: int | None = None
    ) -> None:
        """Flip every bit of the byte that follows ``count`` bytes of the answer's body."""
        self._budget = count
        self._set("alter", times, about)

    def delay(self, seconds: float) -> None:
        """Let each piece of an answer, of up to 64 KiB, wait so long before it is passed back."""
        self._seconds = seconds
        self._set("delay", None)

    def restore(self) -> None:
        """Pass everything again."""
        self._set("", None)

    def _set(self, mode: str, times: int | None, about: bytes = b"") -> None:
        with self._changed:
            self._mode, self._times, self._about = mode, times, about
            self._told += 1
            self._changed.notify_all()

    def _breaks(self, mode: str) -> bool:
        """Return whether a connection is to be broken in the way of ``mode``, and count it."""
        with self._lock:
            if self._mode != mode:
                return False
            if self._times is not None:
                self._times -= 1
                if self._times <= 0:
                    self._mode = ""
            return True

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._set("cut", None)
        # Closing alone would not wake the thread that waits for the next client.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self._close_all()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._breaks("cut"):
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            link = _Link()
            for source, sink, answers in ((client, server, False), (server, client, True)):
                thread = threading.Thread(
                    target=self._pump, args=(source, sink, answers, link), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool, link: _Link) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                keep, last = len(data), False
                if answers and self._breaks("swallow answers"):
                    break
                if answers and self._breaks("delay"):
                    with self._changed:
                        self._changed.wait(self._seconds)
                if answers and passed + len(data) > self._budget and self._breaks("cut answers"):
                    keep, last = max(0, self._budget - passed), True
                header = data.find(b"\r\n\r\n")
                if not answers and header >= 0 and self._breaks("headers only"):
                    keep, last = header + 4, True
                if not answers and header >= 0 and self._about in data[:header]:
                    if self._breaks("answer"):
                        source.sendall(_error(self._status))
                        break
                    link.hangs = self._breaks("hang")
                    link.alters = self._budget if self._breaks("alter") else None
                if answers and link.hangs:
                    with self._changed:
                        told = self._told
                        self._changed.wait_for(lambda told=told: self._told != told)
                    break
                sink.sendall(link.altered(data[:keep]) if answers else data[:keep])
                if last:
                    break
                passed += len(data)
        self._shut(source)
        self._shut(sink)

    def _close_all(self) -> None:
        with self._lock:
            ends = list(self._open)
        for end in ends:
            self._shut(end)

    def _shut(self, end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
        with self._lock:
            self._open.discard(end)


@contextmanager
def tcp_proxy(target: str) -> Iterator[TcpProxy]:
    """Yield a proxy in front of the HTTP endpoint ``target``."""
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
