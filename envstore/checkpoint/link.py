"""The trainer's end of the socket to its persister, which is replaced if it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.spawning import PersisterOptions, ensure_persister
from envstore.checkpoint.talking import Lines, connect, encode
from envstore.errors import EnvstoreError

_log = logging.getLogger("envstore.checkpoint")

_SEND_SECONDS = 10
_TRIES = 5
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
_SETTLED_SECONDS = 5.0
_RECEIVE = 1 << 16

Heard = Callable[[Mapping[str, Any]], None]


class Link:
    """Tells a persister what is staged, and tells ``heard`` what the persister says.

    It is the ``Listener`` of a ``Stager``. One thread listens; ``heard`` is called from it, with
    each message as it came (untrusted), and with ``{"say": "failed", ..., "final": False}`` for
    each part that waits while no persister can be started. If the persister dies while parts are
    not durable, another is started and told of them; it finds everything else in the slots. One
    that ended with nothing left to do is replaced when the next save begins. Thread-safe. In a
    child of ``fork`` it does nothing.

    The constructor starts the persister, or finds it: about 0.2 s. Raises ``CheckpointError`` if
    that fails.
    """

    def __init__(
        self,
        directory: SlotDirectory,
        options: PersisterOptions,
        heard: Heard,
        *,
        ensure: Callable[..., int] = ensure_persister,
    ) -> None:
        self._directory = directory
        self._options = options
        self._heard = heard
        self._ensure = ensure
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None
        self._pending: dict[str, int] = {}  # which slot each part that is not durable lies in
        self._refused: dict[str, EnvstoreError] = {}
        self._wanted = False  # a save is under way: there is to be a persister
        self._trouble: EnvstoreError | None = None
        self._answers: dict[str, Mapping[str, Any]] = {}
        self._closing = False
        self._closed = False  # and the persister was told so
        self._connect()
        self._thread = threading.Thread(target=self._listen, name="envstore-link", daemon=True)
        self._thread.start()
        _links.add(self)

    # What a stager tells.

    def writing(self, slot: int, checkpoint: CheckpointId) -> None:
        """Say that a part, or the next wave of it, begins to lie in ``slot``."""
        if not self._is_ours:
            return
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
        self._send({"ask": "writing", "slot": slot, "id": str(checkpoint)})

    def wave(self, slot: int, checkpoint: CheckpointId, wave: int) -> None:
        """Say that a wave is complete in ``slot``."""
        self._send({"ask": "wave", "slot": slot, "id": str(checkpoint), "wave": wave})

    def staged(self, slot: int, checkpoint: CheckpointId) -> None:
        """Say that a part is whole; each new persister is told so, too, until it is durable."""
        if not self._is_ours:
            return
        id = str(checkpoint)
        with self._changed:
            self._pending[id] = slot
            self._wanted = False
            self._changed.notify_all()
        self._send({"ask": "staged", "slot": slot, "id": id})

    def check(self, checkpoint: CheckpointId) -> None:
        """Raise what the persister said of this save for good, or why there is no persister."""
        if not self._is_ours:
            return
        with self._changed:
            error = self._refused.get(str(checkpoint)) or self._trouble
        if error is not None:
            raise error

    # What a run asks.

    @property
    def pending(self) -> list[str]:
        """The ids of the parts that are staged and not known to be durable."""
        if not self._is_ours:
            return []
        with self._changed:
            return list(self._pending)

    def flush(self, timeout: float = 0.0) -> bool:
        """Have everything that is staged uploaded now; returns whether it was, in ``timeout`` s."""
        return self._ask("flush", "flushed", timeout) is not None

    def status(self, timeout: float = 5.0) -> Mapping[str, Any] | None:
        """Return what the persister says of itself, ``None`` if it does not answer in time."""
        return self._ask("status", "status", timeout)

    def close(self) -> None:
        """Have the persister finish, remove the slots and end; let go of it. Idempotent.

        It does not wait for that. If the persister died and parts are pending, another is started.
        The ``Stager`` is to be closed before.
        """
        if not self._is_ours:
            return
        with self._changed:
            self._closing = True
            client = self._socket
            self._changed.notify_all()
        if client is not None and self._send({"ask": "close"}):
            self._closed = True
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        _links.discard(self)
        if not self._closed:
            self._directory.remove()  # there is no persister to do it, unless it still has work

    # How it is done.

    @property
    def _is_ours(self) -> bool:
        """Whether this is no child of ``fork``, where a lock may be held by nobody for ever."""
        return self._pid == os.getpid()

    def _ask(self, ask: str, say: str, timeout: float) -> Mapping[str, Any] | None:
        if not self._is_ours:
            return None
        end = time.monotonic() + timeout
        with self._changed:
            self._answers.pop(say, None)
        self._send({"ask": ask})
        with self._changed:
            while say not in self._answers and not self._closing:
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            return self._answers.pop(say, None)

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Send if somebody is there. Who comes later is told what still matters."""
        if not self._is_ours:
            return False
        with self._changed:
            client = self._socket
        if client is None:
            return False
        try:
            with self._sending:
                client.sendall(encode(message))
            return True
        except OSError:  # gone, or it does not read: the thread looks for another
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            return False

    def _connect(self) -> None:
        """Have a persister and be connected to it. Raises ``CheckpointError``."""
        for _ in range(_TRIES):  # one that answered may have been about to end
            self._ensure(self._directory.path, self._options)
            client = connect(self._directory.path, _SEND_SECONDS)
            if client is not None:
                break
        else:
            raise CheckpointError(f"the persister of {self._directory.path} has ended again")
        client.settimeout(None)  # for reading; writing must end
        client.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0)
        )
        hello = {"ask": "hello", "pid": os.getpid(), "bandwidth": self._options.bandwidth}
        with self._changed:
            self._socket = client
            self._trouble = None
            again = dict(self._pending)
        self._send(hello)
        for id, slot in again.items():
            self._send({"ask": "staged", "slot": slot, "id": id})

    def _listen(self) -> None:
        """Hear what persisters say, one after another, until closed."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            self._hear()
            if time.monotonic() - began > _SETTLED_SECONDS:
                pause = _FIRST_PAUSE
            while self._needs_another(pause):
                pause = min(2 * pause, _LONGEST_PAUSE)
                try:
                    self._connect()
                    break
                except EnvstoreError as error:
                    self._without(error)
                    if self._closing:
                        return
            else:
                return
            if self._closing:
                self._closed = self._send({"ask": "close"})

    def _needs_another(self, pause: float) -> bool:
        """Wait until a persister is needed, and a pause; false once closed and told so."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._pending or self._wanted)
            self._changed.wait_for(lambda: self._closing, pause)
            return not self._closing or (bool(self._pending) and not self._closed)

    def _hear(self) -> None:
        """Hear one persister to its end."""
        with self._changed:
            client = self._socket
        if client is None:
            return
        lines = Lines()
        try:
            while not self._closed and (data := client.recv(_RECEIVE)):
                for message in lines.feed(data):
                    self._take(message)
        except OSError:
            pass
        except EnvstoreError as error:
            _log.warning("the persister is not understood: %s", error)
        finally:
            with self._changed:
                self._socket = None
                self._changed.notify_all()
            with self._sending:
                client.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        say, id = message.get("say"), message.get("id")
        with self._changed:
            if say in ("flushed", "status"):
                self._answers[say] = message
            final = say == "durable" or (say == "failed" and message.get("final") is True)
            if final and isinstance(id, str):
                self._pending.pop(id, None)
                if say == "failed":
                    self._refused[id] = CheckpointError(str(message.get("error")))
                    while len(self._refused) > 64:
                        del self._refused[next(iter(self._refused))]
            self._changed.notify_all()
        self._pass_on(message)

    def _without(self, error: EnvstoreError) -> None:
        """Take note that there is no persister and none could be started."""
        _log.warning("%s", error)
        with self._changed:
            self._trouble = error
            waiting = list(self._pending)
        for id in waiting:
            self._pass_on(
                {
                    "say": "failed",
                    "id": id,
                    "error": error.message,
                    "hint": error.hint,
                    "kind": type(error).__name__,
                    "final": False,
                }
            )

    def _pass_on(self, message: Mapping[str, Any]) -> None:
        try:
            self._heard(message)
        except Exception:  # noqa: BLE001 - whatever it is, the next message must be heard
            _log.exception("what the persister said could not be noted: %s", message)

    def _forget(self) -> None:
        """In a child of ``fork``: drop its copy of the socket, so that the trainer's end is one."""
        if self._socket is not None:
            self._socket.close()


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _forget_all() -> None:
    for link in list(_links):
        link._forget()


os.register_at_fork(after_in_child=_forget_all)
