"""The holder's control socket: questions of one line, answered when there is an answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.peers import is_ours
from envstore.fuse.sockets import MAX_LINE, told

_MOST = 64
"""Connections at a time; the one that has been silent for longest makes way for the next."""
_PAUSE = 0.01
"""Seconds after nobody could be let in, as the next try comes at once."""

Ask = Callable[["Connection", dict[str, Any]], None]


class Connection:
    """Somebody who asks. ``answer`` may come at any later time, and may come to nobody."""

    def __init__(self, end: socket.socket, ask: Ask) -> None:
        self._socket = end
        self._ask = ask
        self._received = bytearray()
        self.open = True
        self.asked = False

    def fileno(self) -> int:
        """Return the descriptor, which may be handed to another process."""
        return self._socket.fileno()

    def answer(self, **answer: object) -> None:
        """Answer and hang up."""
        if self.open:
            with contextlib.suppress(OSError):
                self._socket.settimeout(1.0)
                self._socket.sendall(json.dumps(answer).encode())
            self.close()

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self._socket.close()

    def hear(self) -> None:
        """Take what has come; asks when it is a whole question."""
        try:
            piece = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._received += piece
        if not piece or len(self._received) > MAX_LINE:
            self.close()
        elif self._received.endswith(b"\n"):
            self.asked = True
            try:
                question = json.loads(self._received)
                if not isinstance(question, dict):
                    raise ValueError("not an object")
                self._ask(self, question)
            except OSError as error:  # no open file is left, or no memory: others go on
                self.answer(error=told(EnvstoreError(f"no answer: {error.strerror}")))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.answer(error=told(UsageError(f"not a question: {error!r}")))


class Control:
    """All connections to a listening socket, for a loop around poll(2)."""

    def __init__(self, listener: int, ask: Ask) -> None:
        """Have ``ask`` answer what is asked at the listening descriptor ``listener``."""
        self._listener = listener
        self._ask = ask
        self._connections: list[Connection] = []

    def watch(self, poller: select.poll, handlers: dict[int, Callable[[], None]]) -> None:
        """Add what is to be waited for."""
        poller.register(self._listener, select.POLLIN)
        handlers[self._listener] = self._accept
        self._connections = [one for one in self._connections if one.open]
        for connection in self._connections:
            if not connection.asked:
                poller.register(connection.fileno(), select.POLLIN)
                handlers[connection.fileno()] = connection.hear

    def adopt(self, fd: int) -> Connection:
        """Return the connection of somebody who has asked another holder."""
        os.set_inheritable(fd, False)
        connection = Connection(socket.socket(fileno=fd), self._ask)
        connection.asked = True
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Hang up on everybody."""
        for connection in self._connections:
            if connection.open:
                connection.close()

    def _accept(self) -> None:
        try:
            with socket.socket(fileno=os.dup(self._listener)) as listener:
                client, _ = listener.accept()
            if not is_ours(client):
                client.close()
                return
            client.setblocking(False)
            self._connections.append(Connection(client, self._ask))
        except OSError:
            time.sleep(_PAUSE)
        silent = [one for one in self._connections if one.open and not one.asked]
        if len(silent) > _MOST:
            silent[0].close()
