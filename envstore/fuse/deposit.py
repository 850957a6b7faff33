"""The holder's side of an fdstore: everything that is kept is there, too, as soon as can be.

Nothing here waits, but for the end of the node server that had been there before: an fdstore that
is slow, hangs or dies delays no server, and the next one gets everything anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

from envstore.errors import UnavailableError, UnsupportedFormatError, UsageError
from envstore.fuse import understudy
from envstore.fuse.channel import Channel, Message
from envstore.fuse.fdstore import FORMAT
from envstore.fuse.keeping import Keepsake, Kept
from envstore.fuse.mirror import Mirror
from envstore.fuse.protocol import Flag
from envstore.fuse.session import is_gone
from envstore.fuse.sockets import short_address

LIFE = ("life", "watch")
"""The ends of a pipe: the first is open in every process of a node server, and nowhere else."""

_OF_PROCESSES = (*LIFE, understudy.NAME)
"""Files that mean nothing when no process is left."""

_AGAIN_AFTER = 1.0
_FLUSH_EVERY = 0.05
_ASK_EVERY = 0.25
_ANSWER_WITHIN = 10.0
_LAST_WITHIN = 2.0

_log = logging.getLogger(__name__)


def open_life() -> dict[str, int]:
    """Return the descriptors by which an fdstore knows that a node server lives."""
    watch, life = os.pipe2(os.O_CLOEXEC)
    return dict(zip(LIFE, (life, watch), strict=True))


class Deposit:
    """What an fdstore has of a node server. For the holder's loop."""

    def __init__(self, kept: Kept, channel: Channel | None = None) -> None:
        """Have all of ``kept`` at its request's fdstore, to which ``claim`` may have led."""
        self._kept = kept
        self._channel: Channel | None = None
        self._mirror: Mirror | None = None
        self._main = False
        self._whole = False
        self._next = 0.0
        self._complained = False
        if channel is not None:
            self._channel = channel
            self._begin(channel)

    @property
    def possible(self) -> bool:
        """Whether another process than a server's could go on with this mount at all."""
        return self._kept.fuse >= 0 and bool(self._kept.flags & Flag.HAS_RESEND)

    @property
    def complete(self) -> bool:
        """Whether the fdstore has everything as it is now."""
        behind = self._mirror is None or self._mirror.behind
        return self._whole and not self._main and not behind

    def changed(self, key: str = "") -> None:
        """Note that a keepsake has changed, or what is no keepsake."""
        if key and self._mirror is not None:
            self._mirror.changed(key)
        elif not key:
            self._main = True

    def watch(self, poller: select.poll, handlers: dict[int, Callable[[], None]]) -> None:
        """Add what is to be waited for."""
        if self._channel is not None:
            poller.register(self._channel, select.POLLIN)
            handlers[self._channel.fileno()] = partial(self._hear, self._channel)

    def deadline(self) -> float | None:
        """Return when the clock alone gives something to do."""
        if not self.possible:
            return None
        if self._channel is None:
            return self._next
        waits = self._mirror is not None and not self.complete
        return time.monotonic() + _FLUSH_EVERY if waits else None

    def on_time(self) -> None:
        """Send what can be sent; connect if need be."""
        if not self.possible:
            return
        if self._channel is None and time.monotonic() >= self._next:
            self._connect()
        if self._mirror is not None:
            try:
                self._flush(self._mirror)
            except OSError as error:
                self._lose(error.strerror or str(error))

    def finish(self) -> bool:
        """Send everything and have it confirmed, within seconds; returns whether it was."""
        end = time.monotonic() + _LAST_WITHIN
        while not self.complete and self._mirror is not None and time.monotonic() < end:
            self.on_time()
            time.sleep(0.001)
        if self._channel is not None and self.complete and _confirmed(self._channel, "sync"):
            return True
        self._lose("it does not confirm what it has")
        return False

    def forget(self) -> None:
        """Have the fdstore drop everything: the mount ends."""
        if self._channel is None:
            return
        _confirmed(self._channel, "forget")
        self._channel.close()
        self._channel = self._mirror = None

    # --- parts ----------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._next = time.monotonic() + _AGAIN_AFTER
        try:
            self._channel = _greet(self._kept.request.fdstore, self._kept.files["watch"], own=True)
        except OSError as error:
            self._lose(error.strerror or str(error))

    def _hear(self, channel: Channel) -> None:
        try:
            message = channel.receive()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._lose(repr(error))
            return
        if message is None:
            self._lose("it has hung up")
        elif message.kind == "begin":
            self._begin(channel)
        else:
            for fd in message.files:
                os.close(fd)
            self._lose(f"it says {message.kind!r}")

    def _begin(self, channel: Channel) -> None:
        self._mirror = Mirror(channel, self._kept.keepsakes)
        for key in self._kept.keepsakes:
            self._mirror.changed(key)
        self._main, self._whole, self._complained = True, False, False

    def _flush(self, mirror: Mirror) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._main:
                files, body = self._kept.told(_OF_PROCESSES)
                mirror.channel.post("kept", files, **body)
                self._main = False
            mirror.flush()
            if not self._whole and not mirror.behind:
                mirror.channel.post("whole")
                self._whole = True

    def _lose(self, reason: str) -> None:
        if not self._complained:
            _log.warning("no fdstore at %s: %s", self._kept.request.fdstore, reason)
            self._complained = True
        if self._channel is not None:
            self._channel.close()
        self._channel = self._mirror = None
        self._whole = False
        self._next = time.monotonic() + _AGAIN_AFTER


def claim(path: str, watch: int) -> tuple[Channel | None, Kept | None]:
    """Have the fdstore at ``path`` to oneself, and what it kept of a node server that is no more.

    ``watch`` is that of ``open_life``. Waits while that node server lives. Without an fdstore
    there is nothing to have, and whoever starts is told of it later. What is kept stays there
    until all is deposited anew.

    Raises ``UnavailableError`` (it does not answer), ``UnsupportedFormatError``, ``UsageError``.
    """
    told = False
    with _ended_by_signals():
        while True:
            try:
                channel = _greet(path, watch, own=False)
            except (FileNotFoundError, ConnectionRefusedError):
                _log.warning("no fdstore listens at %s yet", path)
                return None, None
            except OSError as error:
                raise UsageError(f"no fdstore can be used at {path}: {error.strerror}") from error
            try:
                message = _received(channel, path)
                if message.kind == "begin":
                    return channel, None
                if message.kind == "kept":
                    kept = _rest(channel, path, message)
                    if not is_gone(kept.fuse):
                        return channel, kept
                    for fd in kept.descriptors():
                        os.close(fd)
                    _confirmed(channel, "forget")
                    return channel, None
            except BaseException:
                channel.close()
                raise
            channel.close()
            if message.kind != "busy":
                raise UnsupportedFormatError(
                    f"the fdstore at {path} is of another version of envstore",
                    hint="start it again when no mounts are in use",
                )
            if not told:
                _log.warning("the node server that uses %s lives: waiting for its end", path)
                told = True
            time.sleep(_ASK_EVERY)


def _rest(channel: Channel, path: str, first: Message) -> Kept:
    """Return all that the fdstore has, of which the ``first`` message was received."""
    try:
        kept = Kept.received(first.body, first.files)
    except BaseException:
        for fd in first.files:
            os.close(fd)
        raise
    while (message := _received(channel, path)).kind == "keep":
        kept.keepsakes[message.body["key"]] = Keepsake(message.body["body"], message.files)
    return kept


def _confirmed(channel: Channel, wish: str) -> bool:
    """Have the fdstore ``sync`` or ``forget``; returns whether it says that it did."""
    try:
        channel.post(wish)
        while _answers(channel, _LAST_WITHIN):
            message = channel.receive()
            if message is None:
                return False
            if message.kind in ("synced", "forgotten"):
                return True
    except (OSError, ValueError):
        pass
    return False


def _received(channel: Channel, path: str) -> Message:
    message = channel.receive() if _answers(channel, _ANSWER_WITHIN) else None
    if message is None:
        raise UnavailableError(
            f"the fdstore at {path} does not answer",
            hint="it may be keeping mounts: end it only if it hangs",
        )
    return message


def _greet(path: str, watch: int, *, own: bool) -> Channel:
    """Connect, and say who we are. Raises ``OSError``."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        end.setblocking(False)
        with short_address(path) as address:
            end.connect(address)
        end.setblocking(True)
        channel = Channel.of(end)
        channel.post("hello", (watch,), format=FORMAT, own=own)
    except BaseException:
        end.close()
        raise
    return channel


def _answers(channel: Channel, within: float) -> bool:
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(within * 1000))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end this process, which may be the first of a container."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
