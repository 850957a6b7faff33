"""A TCP proxy on loopback that can be told to fail like a network: refuse, cut, swallow."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class TcpProxy:
    """Passes bytes between its clients and ``target`` until told otherwise.

    Every switch may be thrown at any time and applies from the next bytes on; with ``times`` it
    goes back by itself once it has broken that many connections.
    """

    def __init__(self, target: str) -> None:
        split = urlsplit(target)
        assert split.hostname is not None
        assert split.port is not None
        self._target = (split.hostname, split.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._mode = ""
        self._times: int | None = None
        self._budget = 0
        self.connections = 0
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
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

    def restore(self) -> None:
        """Pass everything again."""
        self._set("", None)

    def _set(self, mode: str, times: int | None) -> None:
        with self._lock:
            self._mode, self._times = mode, times

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
            for source, sink, answers in ((client, server, False), (server, client, True)):
                thread = threading.Thread(
                    target=self._pump, args=(source, sink, answers), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                keep, last = len(data), False
                if answers and self._breaks("swallow answers"):
                    break
                if answers and passed + len(data) > self._budget and self._breaks("cut answers"):
                    keep, last = max(0, self._budget - passed), True
                header = data.find(b"\r\n\r\n")
                if not answers and header >= 0 and self._breaks("headers only"):
                    keep, last = header + 4, True
                sink.sendall(data[:keep])
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
