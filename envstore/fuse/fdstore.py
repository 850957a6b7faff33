"""Keeps copies of a node server's descriptors, so that its mounts outlive all of its processes.

The node server sends what it keeps, and every change (see ``Deposit``); when none of its processes
lives any more, the next node server that comes gets all of it. This process looks into nothing of
what it keeps, imports next to nothing, and opens no file: there is little that could end it.

A node server is known by a pipe that all of its processes have open: it sends the end from which
can be read, and once that says the other is closed, nobody of them lives. So a node server whose
holder is replaced by another is the same, and no other gets what it has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # at the end, so that it can hide nothing
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from envstore.confinement.process import confine
from envstore.errors import EnvstoreError
from envstore.fuse.channel import Channel, Message
from envstore.fuse.limits import allow_many_files
from envstore.fuse.peers import is_ours

FORMAT = 1
"""Of what is said here, between versions."""

_MOST_CALLERS = 16
_MOST_KEEPSAKES = 16_384
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Deposit:
    """What one node server has given: what it says of itself, and its keepsakes."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None
        self.files: tuple[int, ...] = ()
        self.device = -1
        self.keepsakes: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self.whole = False

    def take(self, message: Message) -> None:
        """Do what the node server says. Raises ``ValueError``, ``KeyError``, ``TypeError``."""
        body, files = message.body, message.files
        if message.kind == "kept":
            # The device is sent behind all that have names.
            named = len(body["names"])
            _close(self.files)
            self.kept, self.files = body, files
            self.device = files[named] if len(files) > named else -1
        elif message.kind == "keep":
            self.drop(body["key"])
            self.keepsakes[body["key"]] = (body, files)
        elif message.kind == "drop" and not files:
            self.drop(body["key"])
        elif message.kind == "whole" and not files:
            self.whole = self.device >= 0
        else:
            raise ValueError("not known here")

    def drop(self, key: str) -> None:
        _, files = self.keepsakes.pop(key, (None, ()))
        _close(files)

    def send(self, channel: Channel) -> None:
        """Give everything to the next node server; keeps it, too. Raises ``OSError``."""
        channel.send("kept", self.files, **(self.kept or {}))
        for body, files in self.keepsakes.values():
            channel.send("keep", files, **body)
        channel.send("whole")

    def count(self) -> int:
        """Return how many descriptors there are."""
        return len(self.files) + sum(len(files) for _, files in self.keepsakes.values())

    def close(self) -> None:
        _close(self.files)
        for _, files in self.keepsakes.values():
            _close(files)


class FdStore:
    """The loop around a listening socket."""

    def __init__(self, listener: socket.socket) -> None:
        """Answer at ``listener``, of type ``SOCK_SEQPACKET``."""
        allow_many_files()
        self._listener = listener
        self._callers: list[Channel] = []
        self._owner: Channel | None = None
        self._life = -1
        self._held: _Deposit | None = None
        self._coming: _Deposit | None = None
        self._ending = False
        self._wake = -1

    def run(self) -> None:
        """Go on until told to end, and then until all that is kept was taken."""
        self._wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        while not self._ending or self._needed():
            self._turn()

    def _needed(self) -> bool:
        """Whether nobody else has all that is kept here."""
        return self._held is not None and (self._owner is None or self._coming is not None)

    def _turn(self) -> None:
        handlers: dict[int, Callable[[], None]] = {
            self._wake: self._on_signal,
            self._listener.fileno(): self._accept,
        }
        # What the owner has said comes before that it has died.
        channels = [*([self._owner] if self._owner is not None else []), *self._callers]
        for channel in channels:
            handlers[channel.fileno()] = lambda channel=channel: self._hear(channel)  # type: ignore[misc]
        poller = select.poll()
        for fd in handlers:
            poller.register(fd, select.POLLIN)
        if self._life >= 0:
            handlers[self._life] = self._on_life
            poller.register(self._life, 0)
        if self._held is not None and self._held.device >= 0:
            handlers[self._held.device] = self._on_unmounted
            poller.register(self._held.device, 0)
        for fd, _ in poller.poll():
            # What one handler closes must not be looked for by the next.
            if self._still(fd, channels):
                handlers[fd]()

    def _still(self, fd: int, channels: list[Channel]) -> bool:
        watched = [self._wake, self._listener.fileno(), self._life]
        watched += [one.fileno() for one in channels if one.socket.fileno() >= 0]
        return fd in watched or (self._held is not None and fd == self._held.device)

    # --- who calls ------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            end, _ = self._listener.accept()
            if not is_ours(end):
                end.close()
                return
            end.setblocking(True)
            self._callers.append(Channel.of(end))
            if len(self._callers) > _MOST_CALLERS:
                self._callers.pop(0).close()

    def _hear(self, channel: Channel) -> None:
        message = None
        try:
            message = channel.receive()
            if message is None:
                self._hung_up(channel)
            elif channel is self._owner:
                self._told(channel, message)
            else:
                self._callers.remove(channel)
                self._greeted(channel, message)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _say(f"a caller is cut off: {error!r}")
            self._hung_up(channel)
            _close(tuple(fd for fd in message.files if fd != self._life) if message else ())

    def _greeted(self, channel: Channel, message: Message) -> None:
        """See who somebody is, and give him what is his to have."""
        if message.kind != "hello" or len(message.files) != 1:
            raise ValueError("not a greeting")
        (life,), own = message.files, bool(message.body["own"])
        if self._life >= 0 and _closed(self._life):
            self._on_life()
        if message.body["format"] != FORMAT:
            channel.send("refused", format=FORMAT)
        elif self._life >= 0 and not _same(self._life, life):
            channel.send("busy")
        else:
            self._forget_life()
            self._life, self._owner, self._coming = life, channel, _Deposit()
            if self._held is None or own:
                channel.send("begin")
            else:
                _say(f"a node server takes over {self._held.count()} descriptors")
                self._held.send(channel)
            return
        _close((life,))
        channel.close()

    def _told(self, owner: Channel, message: Message) -> None:
        if message.kind == "forget" and not message.files:
            self._drop()
            self._coming = _Deposit()
            owner.send("forgotten")
            return
        if message.kind == "sync" and not message.files:
            owner.send("synced")
            return
        deposit = self._coming or self._held
        if deposit is None:
            raise ValueError("there is nothing to change")
        if len(deposit.keepsakes) > _MOST_KEEPSAKES:  # of few descriptors each
            raise ValueError("too much to keep")
        deposit.take(message)
        if deposit is self._coming and deposit.whole:
            if self._held is not None:
                self._held.close()
            self._held, self._coming = deposit, None
            _say(f"keeping {deposit.count()} descriptors of a node server")

    def _hung_up(self, channel: Channel) -> None:
        channel.close()
        if channel in self._callers:
            self._callers.remove(channel)
        if channel is self._owner:
            # Its servers may live, and one of them may start another holder, which comes back.
            self._owner = None
            if self._coming is not None:
                self._coming.close()
                self._coming = None

    # --- what ends ------------------------------------------------------------------------------

    def _on_life(self) -> None:
        """Learn that a node server has ended, with all of its processes."""
        if self._owner is not None:
            while _readable(self._owner.fileno()):  # its last words
                owner = self._owner
                self._hear(owner)
                if self._owner is not owner:
                    break
            else:
                self._hung_up(self._owner)
        self._forget_life()
        if self._held is not None:
            _say("the node server is gone: its mounts wait for the next one")

    def _forget_life(self) -> None:
        if self._owner is not None:
            self._hung_up(self._owner)
        if self._life >= 0:
            os.close(self._life)
            self._life = -1

    def _on_unmounted(self) -> None:
        self._drop()
        if self._owner is not None and self._coming is None:
            self._coming = _Deposit()

    def _drop(self) -> None:
        """Forget a mount that has come to its end."""
        if self._held is not None:
            _say("nothing is mounted any more: forgetting it")
            self._held.close()
            self._held = None

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 64)
        if self._ending:
            raise SystemExit(1)
        self._ending = True
        if self._needed():
            _say("this alone keeps mounts: waiting for a node server; a second signal drops them")


def listen(path: str) -> socket.socket:
    """Return a socket listening at ``path``, for this user alone. Raises ``OSError``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    address = f"/proc/self/fd/{directory}/{os.path.basename(path)}"  # short enough for a socket
    before = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "something else is there")
            if _listened(address):
                raise FileExistsError(errno.EADDRINUSE, "somebody listens there already")
            os.unlink(path)
        listener.bind(address)
    finally:
        os.umask(before)
        os.close(directory)
    listener.listen(_MOST_CALLERS)
    listener.setblocking(False)
    return listener


def _listened(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.setblocking(False)
        try:
            caller.connect(address)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _closed(life: int) -> bool:
    """Whether nobody has the other end of a pipe open."""
    poller = select.poll()
    poller.register(life, 0)
    return bool(poller.poll(0))


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def _close(files: tuple[int, ...]) -> None:
    for fd in files:
        os.close(fd)


def _ignore(number: int, frame: object) -> None:
    """Be there, so that the signal only wakes the loop."""


def _say(what: str) -> None:
    """Log without the import of a library for it."""
    with contextlib.suppress(OSError):
        os.write(2, f"INFO fdstore: {what}\n".encode(errors="replace"))


def main(path: str) -> int:
    """Keep what node servers bring to ``path``."""
    try:
        listener = listen(path)
    except OSError as error:
        os.write(
            2, f"envstore: cannot listen at {path}: {error.strerror}\n".encode(errors="replace")
        )
        return 1
    try:
        # It only keeps what it is given. The socket's directory is left to it, for the end.
        confine([os.path.dirname(path) or "."], (), executing=False)
    except EnvstoreError as error:
        os.write(2, f"envstore: {error}\n".encode(errors="replace"))
        return error.exit_code
    _say(f"listening at {path}")
    FdStore(listener).run()
    with contextlib.suppress(OSError):
        os.unlink(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
