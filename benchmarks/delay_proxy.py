"""A TCP proxy that adds latency to every request, and costs little: run as a process of its own.

What a client sends is passed on a fixed time after it came; what the server sends is passed on at
once. Every request is so answered later by exactly that time, however the connection is used:
kept alive, pipelined, with bodies. Nothing is parsed. Answers are moved by the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import queue
import signal
import socket
import sys
import threading
import time

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PIECE = 1 << 18
_PIPE_BYTES = 1 << 20
_PIECES_WAITING = 64


def serve(listener: socket.socket, target: tuple[str, int], delay: float) -> None:
    """Pass every connection of ``listener`` on to ``target``, requests ``delay`` seconds late."""
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connect, args=(client, target, delay), daemon=True).start()


def _connect(client: socket.socket, target: tuple[str, int], delay: float) -> None:
    """Pass one connection on, until either side ends it."""
    try:
        server = socket.create_connection(target)
    except OSError:
        client.close()
        return
    with client, server:
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(_PIECES_WAITING)
        threads = [
            threading.Thread(target=_take, args=(client, waiting, delay), daemon=True),
            threading.Thread(target=_release, args=(waiting, server), daemon=True),
        ]
        for thread in threads:
            thread.start()
        _answer(server, client)
        # Nobody is left to answer what the client may still say.
        _shut(client, socket.SHUT_RD)
        for thread in threads:
            thread.join()


def _take(client: socket.socket, waiting: queue.Queue[tuple[float, bytes]], delay: float) -> None:
    """Note when everything the client says may leave; its end is an empty piece."""
    while True:
        try:
            piece = client.recv(_PIECE)
        except OSError:
            piece = b""
        waiting.put((time.monotonic() + delay, piece))
        if not piece:
            return


def _release(waiting: queue.Queue[tuple[float, bytes]], server: socket.socket) -> None:
    """Send every piece when its time has come; drop what a server that has gone cannot take."""
    broken = False
    while True:
        due, piece = waiting.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not piece:
            _shut(server, socket.SHUT_WR)
            return
        if not broken:
            try:
                server.sendall(piece)
            except OSError:
                broken = True


def _answer(server: socket.socket, client: socket.socket) -> None:
    """Move what the server says to the client, inside the kernel, until either has gone."""
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with contextlib.suppress(OSError):
            while moved := os.splice(server.fileno(), into, _PIPE_BYTES):
                while moved:
                    moved -= os.splice(out, client.fileno(), moved)
    finally:
        os.close(out)
        os.close(into)
    _shut(client, socket.SHUT_WR)
    # A client that has gone must not leave the server talking into a full socket.
    _shut(server, socket.SHUT_RD)


def _shut(side: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(how)


def listen(address: str, port: int, namespace: str | None) -> socket.socket:
    """Return a listening socket, in another network namespace (the path of one) if given."""
    if namespace is None:
        return socket.create_server((address, port), backlog=256)
    enter = ctypes.CDLL(None, use_errno=True).setns
    with open("/proc/self/ns/net") as home, open(namespace) as other:
        if enter(other.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            # It stays there, while the connections to the target are made at home.
            return socket.create_server((address, port), backlog=256)
        finally:
            enter(home.fileno(), _CLONE_NEWNET)


def main() -> int:
    """Listen, print the port, and serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay_proxy")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--namespace", help="path of the network namespace to listen in")
    options = parser.parse_args()
    address, _, port = options.listen.rpartition(":")
    host, _, target = options.to.rpartition(":")
    # Whoever started this may be killed: the kernel then kills it too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    with listen(address, int(port), options.namespace) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, (host, int(target)), options.delay_ms / 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
