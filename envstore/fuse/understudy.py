"""A small process that waits for the holder's death, to start the next one.

A server could not do that: it has given up the privileges that a holder needs, and can start no
program. The understudy is the holder's child, knows nothing and has nothing open but one end of a
channel, until a server that has lost its holder sends all that the mount is (see ``Kept``). It
takes that from a server, but not what the mount is for, which it has known from the beginning: who
is over a server cannot have a holder mount or unmount anything else. It ends when neither holder
nor servers are left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from envstore.fuse.channel import Channel, Message
from envstore.fuse.keeping import Keepsake, Kept, MountRequest, write_state
from envstore.fuse.processes import SIGNALS, fork

if TYPE_CHECKING:
    import select

NAME = "understudy"
"""What the servers' end of the channel is called among the files of ``Kept``."""

_AGAIN_AFTER = 1.0

_log = logging.getLogger(__name__)


class Understudy:
    """The one of a mount. For the holder's loop."""

    def __init__(self, kept: Kept, tell: Callable[[int], None]) -> None:
        """Have one for ``kept`` from ``start`` on; ``tell`` servers of another's channel."""
        self._kept = kept
        self._tell = tell
        self._pid = 0
        self._pidfd = -1
        self._again: float | None = None

    def start(self) -> None:
        """Have one. Raises ``OSError``."""
        ours, theirs = Channel.pair()
        request = self._kept.request
        try:
            self._pid, self._pidfd = fork(lambda: wait(theirs, request), keep=(theirs.fileno(),))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        before = self._kept.files.get(NAME)
        self._kept.files[NAME] = ours.socket.detach()
        if before is not None:
            os.close(before)
            self._tell(self._kept.files[NAME])

    def start_soon(self) -> None:
        """Have one at the next turn of the loop."""
        self._again = time.monotonic()

    def end(self) -> None:
        """Have none."""
        self._again = None
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._collect()

    def watch(self, poller: select.poll, handlers: dict[int, Callable[[], None]]) -> None:
        """Add what is to be waited for."""
        if self._pidfd >= 0:
            poller.register(self._pidfd, 1)  # POLLIN
            handlers[self._pidfd] = self._on_end

    def deadline(self) -> float | None:
        """Return when the clock alone gives something to do."""
        return self._again

    def on_time(self) -> None:
        """See to what is due."""
        if self._again is not None and time.monotonic() >= self._again:
            self._again = None
            try:
                self.start()
            except OSError as error:
                _log.warning("no understudy can be started: %s", error.strerror)
                self._again = time.monotonic() + _AGAIN_AFTER

    def _on_end(self) -> None:
        self._collect()
        self._again = time.monotonic() + _AGAIN_AFTER

    def _collect(self) -> None:
        os.close(self._pidfd)
        self._pidfd = -1
        os.waitpid(self._pid, 0)


def call(kept: Kept, pidfd: int, channel: Channel) -> None:
    """Have the understudy start another holder, with the server behind ``pidfd`` and ``channel``.

    For that server. Raises ``OSError``.
    """
    with contextlib.ExitStack() as opened:
        end = Channel.duplicate(kept.files[NAME])
        opened.callback(end.close)
        kept.send(end)
        for key, keepsake in kept.keepsakes.items():
            end.send("keep", keepsake.files, key=key, body=keepsake.body)
        end.send("server", (pidfd, channel.fileno()), pid=os.getpid())


def background_script() -> str:
    """Return the program that is a holder."""
    from envstore.fuse import background

    return os.path.abspath(background.__file__)


def wait(end: Channel, request: MountRequest) -> int:
    """Be the understudy of a mount that ``request`` describes, until ``end`` is closed."""
    for number in SIGNALS:  # which are for the holder
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    kept: Kept | None = None
    holder: subprocess.Popen[bytes] | None = None
    while (message := end.receive()) is not None:
        match message.kind:
            case "kept":
                _close(kept)
                kept = Kept.received(message.body, message.files)
                kept.request = request
            case "keep" if kept is not None:
                key = message.body["key"]
                kept.keepsakes[key] = Keepsake(message.body["body"], message.files)
            case "server" if kept is not None:
                if holder is not None:
                    holder.poll()  # collects it
                holder = _start_holder(kept, message)
                _close(kept)
                kept = None
    return 0


def _start_holder(kept: Kept, message: Message) -> subprocess.Popen[bytes] | None:
    """Start another holder, which goes on with the server that the message describes."""
    pidfd, channel = message.files
    server = {"pid": message.body["pid"], "pidfd": pidfd, "channel": channel}
    state: dict[str, Any] = {"kept": kept.save(), "server": server}
    memory = -1
    try:
        memory = write_state(state)
        return subprocess.Popen(
            [sys.executable, "-P", background_script(), "--resume", str(memory)],
            pass_fds=(*kept.descriptors(), pidfd, channel, memory),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        _log.error("no other holder can be started: %s", error)
        return None
    finally:
        for fd in (*message.files, *([memory] if memory >= 0 else [])):
            os.close(fd)


def _close(kept: Kept | None) -> None:
    for fd in kept.descriptors() if kept is not None else ():
        os.close(fd)
