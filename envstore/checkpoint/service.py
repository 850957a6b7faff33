"""One persister: serves one slot directory, over its socket, until nobody needs it any more.

It ends when it is asked to (``close``), when it is told to (``terminate``), or once the trainer
is gone, everything is in the store, and nobody came back for ``linger`` seconds. Then the slots
are removed, unless a trainer has them. What could not be stored keeps it, and the slots, alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import selectors
import shutil
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.checkpoint.bandwidth import TokenBucket
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.peeking import peek
from envstore.checkpoint.persisting import PENDING, Worker
from envstore.checkpoint.slotformat import DURABLE, STAGED
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.stores import Stores
from envstore.checkpoint.talking import MAX_UNREAD, SOCKET, Lines, encode, listen, may_ask
from envstore.errors import CorruptError
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore

LOCK = "lock"
LOG = "log"
LINGER_SECONDS = 600.0
LOCK_SECONDS = 10.0
"""How long to wait for another persister of the same directory to end."""
MAX_CLIENTS = 64
MAX_REMEMBERED = 64
"""Outcomes that are told again to a trainer that asks."""

_PATIENCE = 60.0  # how long ``flush`` and ``close`` wait for other ranks
_LOOK_SECONDS = 1.0
_LET_GO_SECONDS, _LET_GO_POLL = 5.0, 0.02

_log = logging.getLogger(__name__)


class BusyError(CheckpointError):
    """Another persister serves the directory."""


@dataclass(slots=True, eq=False)
class _Client:
    """Somebody at the socket. A *trainer* said its process id."""

    connection: socket.socket
    lines: Lines = field(default_factory=Lines)
    unsent: bytearray = field(default_factory=bytearray)
    trainer: bool = False
    told: bool = False
    flush: float | None = None


class Persister:
    """Serves ``directory``. ``run`` it in one thread; ``terminate`` may come from any."""

    def __init__(
        self,
        directory: Path,
        *,
        bandwidth: float | None = None,
        linger: float = LINGER_SECONDS,
        allowed: Sequence[str] = (),
        store: str = "",
        trusted: bool = True,
        open_objects: Callable[[str], ObjectStore] = open_objects,
    ) -> None:
        """See ``spawning.PersisterOptions``; ``allowed`` are patterns of URLs of stores.

        Not ``trusted`` is a directory that others than this process's user write into.
        """
        self._slots = SlotDirectory(directory)
        self._directory = directory
        self._own_limit = bandwidth
        self._bucket = TokenBucket(bandwidth)
        self._linger = linger
        self._stores = Stores(self._bucket, allowed, open_objects=open_objects)
        self._store = store
        self._trusted = trusted
        self._messages: deque[dict[str, Any]] = deque()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, _Client] = {}
        self._remembered: dict[str, dict[str, Any]] = {}
        self._terminated = threading.Event()
        self._closing: float | None = None
        self._alone_since = time.monotonic()
        self._looked_again = False

    # For other threads and signal handlers.

    def terminate(self) -> None:
        """Finish what is staged, then end."""
        self._terminated.set()
        self._wake()

    def _tell(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake already
            os.write(self._wake_out, b"\0")

    # The thread that serves.

    def run(self) -> None:
        """Serve until the end.

        Raises ``BusyError`` if another persister serves the directory and goes on to do so, and
        ``CheckpointError`` if the directory cannot be used.
        """
        try:
            lock = _lock(self._directory)
            try:
                with _listening(self._directory) as listener:
                    self._serve(listener)
            finally:
                os.close(lock)
        finally:
            self._selector.close()
            os.close(self._wake_in)
            os.close(self._wake_out)

    def _serve(self, listener: socket.socket) -> None:
        worker = Worker(
            self._slots,
            self._stores,
            tell=self._tell,
            turned=self._wake,
            store=self._store,
            trusted=self._trusted,
        )
        worker.start()
        hurried = False
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        try:
            while True:
                self._send_messages()
                self._answer_flushes(worker)
                if self._terminated.is_set() and not hurried:
                    hurried = True
                    worker.hurry()
                if self._may_end(worker):
                    break
                if not worker.is_alive():
                    raise CheckpointError("the thread that saves has ended; its log says why")
                for key, _ in self._selector.select(_LOOK_SECONDS):
                    if key.fileobj is listener:
                        self._accept(listener)
                    elif key.fileobj == self._wake_in:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._wake_in, 1 << 12)
                    elif key.data.connection in self._clients:
                        self._attend(key.data, worker)
        finally:
            worker.stop()
            worker.join()
            self._hang_up(listener)
        self._remove()

    def _hang_up(self, listener: socket.socket) -> None:
        """Say the last words, and be found no more."""
        self._send_messages()
        for client in list(self._clients.values()):
            if client.told:
                self._send(client, {"say": "closed"})
        with contextlib.suppress(OSError):
            os.unlink(self._directory / SOCKET)
        self._selector.unregister(listener)
        listener.close()
        for client in list(self._clients.values()):
            self._drop(client)

    def _may_end(self, worker: Worker) -> bool:
        trainers = any(client.trainer for client in self._clients.values())
        alone = not trainers and not self._slots.trainer_alive()
        if not alone:
            self._alone_since = time.monotonic()
            self._looked_again = False
        if not worker.idle:
            return False
        if self._closing is not None:
            return self._settled(worker, self._closing)
        if self._terminated.is_set():
            return True
        if alone and not self._directory.exists():
            return True  # whoever removed it wants nothing more, and nobody would find this
        if not alone or time.monotonic() - self._alone_since < self._linger:
            return False
        if not self._looked_again:
            # The trainer may have staged something just before it ended.
            self._looked_again = True
            worker.wake()
            return False
        return True

    def _settled(self, worker: Worker, since: float) -> bool:
        """Whether all is done that was asked for at ``since``; other ranks have a while."""
        late = time.monotonic() - since > _PATIENCE
        return worker.idle and (late or not worker.waiting)

    def _remove(self) -> None:
        """Remove the slots and what else lies in the directory, unless a trainer has them.

        One that asked for the end has a moment to let go of them.
        """
        end = time.monotonic() + (_LET_GO_SECONDS if self._closing is not None else 0.0)
        while self._slots.trainer_alive():
            if time.monotonic() >= end:
                return
            time.sleep(_LET_GO_POLL)
        shutil.rmtree(self._directory / PENDING, ignore_errors=True)
        for path in [*self._directory.glob("waves-*"), *(self._directory / n for n in (LOG, LOCK))]:
            with contextlib.suppress(OSError):
                path.unlink()
        if not self._slots.remove():
            _log.info("the slots stay: a trainer has come")

    # Those who ask.

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        try:
            owner = os.stat(self._directory).st_uid
            allowed = may_ask(connection, owner) and len(self._clients) < MAX_CLIENTS
        except OSError:
            allowed = False
        if allowed:
            client = self._clients[connection] = _Client(connection)
            self._selector.register(connection, selectors.EVENT_READ, client)
        else:
            connection.close()

    def _attend(self, client: _Client, worker: Worker) -> None:
        """Send what waits for a client and hear what it asks."""
        self._push(client)
        if client.connection not in self._clients:
            return
        try:
            data = client.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            worker.wake()
            return
        try:
            for message in client.lines.feed(data):
                if client.connection in self._clients:
                    self._answer(client, message, worker)
        except CorruptError as error:
            _log.warning("somebody at the socket is not understood: %s", error.message)
            self._drop(client)

    def _answer(self, client: _Client, message: dict[str, Any], worker: Worker) -> None:
        match message.get("ask"):
            case "hello":
                client.told = True
                client.trainer = isinstance(message.get("pid"), int)
                if client.trainer:
                    self._closing = None  # whoever asked for the end was another
                if client.trainer and "bandwidth" in message:
                    self._set_limit(message["bandwidth"])
                self._send(client, {"say": "hello", "pid": os.getpid()})
            case "writing" | "wave":
                worker.wake()
            case "staged":
                self._send(client, self._acknowledge(message, worker))
            case "flush":
                client.flush = time.monotonic()
                worker.wake(retry=True)
            case "status":
                said = {"say": "status", "pid": os.getpid(), "bandwidth": self._bucket.rate}
                self._send(client, said | worker.status())
            case "close":
                self._closing = time.monotonic()
                worker.wake(retry=True)
            case other:
                raise CorruptError(f"nobody knows how to {str(other)[:40]!r}")

    def _set_limit(self, asked: Any) -> None:
        """Limit uploads as the trainer asks, but no less than this process was told to."""
        if asked is not None and not (isinstance(asked, int | float) and asked > 0):
            raise CorruptError("a bandwidth is a number of bytes a second")
        limits = [limit for limit in (asked, self._own_limit) if limit is not None]
        self._bucket.limit(min(limits, default=None))

    def _acknowledge(self, message: dict[str, Any], worker: Worker) -> dict[str, Any]:
        """Return the answer to who says that a part is staged: whether it is there."""
        id, number = message.get("id"), message.get("slot")
        if not isinstance(id, str) or not isinstance(number, int):
            raise CorruptError("a staged part has an id and a slot")
        if id in self._remembered:
            return self._remembered[id]
        page = peek(self._slots.slot_path(number), number)
        if page is not None and page.state in (STAGED, DURABLE):
            worker.ask(id, number)
            return {"say": "local", "id": id}
        return {
            "say": "failed",
            "id": id[:100],
            "error": f"nothing is staged in {self._slots.slot_path(number)}",
            "hint": "save again",
            "kind": "CheckpointError",
            "final": True,
        }

    def _answer_flushes(self, worker: Worker) -> None:
        for client in list(self._clients.values()):
            if client.flush is not None and self._settled(worker, client.flush):
                client.flush = None
                self._send(client, {"say": "flushed"})

    def _send_messages(self) -> None:
        while self._messages:
            message = self._messages.popleft()
            if message["say"] == "durable" or message.get("final"):
                self._remembered[message["id"]] = message
                while len(self._remembered) > MAX_REMEMBERED:
                    del self._remembered[next(iter(self._remembered))]
            for client in list(self._clients.values()):
                if client.told:
                    self._send(client, message)

    def _send(self, client: _Client, message: dict[str, Any]) -> None:
        if client.connection in self._clients:
            client.unsent += encode(message)
            self._push(client)

    def _push(self, client: _Client) -> None:
        """Send as much as goes; a client that never reads is dropped."""
        try:
            while client.unsent:
                del client.unsent[: client.connection.send(client.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            client.unsent.clear()  # reading will tell that it is gone
        if len(client.unsent) > MAX_UNREAD:
            self._drop(client)
        elif client.connection in self._clients:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
            self._selector.modify(client.connection, events, client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection, None) is not None:
            self._selector.unregister(client.connection)
            client.connection.close()


def _listening(directory: Path) -> socket.socket:
    try:
        return listen(directory)
    except OSError as error:
        raise CheckpointError(f"cannot listen in {directory}: {error.strerror}") from error


def _lock(directory: Path) -> int:
    """Return a descriptor that holds the lock of the persister of ``directory``."""
    path = directory / LOCK
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path} is not a file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended may have removed it since it was opened.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > end:
            raise BusyError(f"another persister serves {directory}")
        time.sleep(0.02)
