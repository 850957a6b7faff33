"""Children of the holder: how they are started, watched and ended; signals that end it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from envstore.errors import EnvstoreError
from envstore.fuse.channel import Channel

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that have a holder unmount."""

_MAX_LOG = 8 << 20

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class ServerProcess:
    """A server: how to talk to it, and when (monotonic seconds) it was heard of last.

    ``serving`` is when it began to serve, 0 before; ``ready`` that it only waits for its turn,
    ``retired`` that it was asked to end.
    """

    pid: int
    pidfd: int
    channel: Channel
    beat: float
    serving: float = 0.0
    ready: bool = False
    retired: bool = False

    def kill(self) -> None:
        """Have it end at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ended(self, deadline: float = 0.0) -> bool:
        """Whether it has ended, with all its threads; waits until ``deadline``."""
        return _readable(self.pidfd, max(0.0, deadline - time.monotonic()))

    def speaks(self) -> bool:
        """Whether there is something from it to receive."""
        return _readable(self.channel.fileno(), 0.0)

    def reap(self) -> str:
        """Wait for its end and let go of it; returns how it ended, as far as can be known."""
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            status = 0  # the child of a holder that is no more
        self.channel.close()
        os.close(self.pidfd)
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return "ended" if not status else f"failed with exit status {status}"


def _readable(fd: int, within: float) -> bool:
    poller = select.poll()  # select(2) knows only the first 1024 descriptors
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(within * 1000))


def start_server() -> ServerProcess:
    """Fork a server, which waits for what it is told. Raises ``OSError``."""
    ours, theirs = Channel.pair()

    def serve() -> int:
        from envstore.fuse.serving import run_server

        return run_server(theirs)

    try:
        pid, pidfd = fork(serve, keep=(theirs.fileno(),))
        return ServerProcess(pid, pidfd, ours, time.monotonic())
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()


def bound_log() -> None:
    """Begin the log anew before servers that die for ever fill a disk with it."""
    with contextlib.suppress(OSError):
        found = os.fstat(2)
        if stat.S_ISREG(found.st_mode) and found.st_size > _MAX_LOG:
            os.ftruncate(2, 0)


def load_server_code() -> None:
    """Import what a server needs, so that those forked from here have it at once."""
    import gc

    import boto3  # noqa: F401
    import botocore.httpsession  # noqa: F401

    import envstore.fuse.serving
    import envstore.store.objects.s3  # noqa: F401

    gc.collect()
    gc.freeze()


def fork(work: Callable[[], int], keep: tuple[int, ...] = ()) -> tuple[int, int]:
    """Run ``work`` in a child that has no other open file than ``keep`` and the standard ones.

    Call from a process of one thread. Returns the child's process id and a descriptor of it.
    Raises ``OSError``; then nothing runs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Before there is a child: afterwards nobody could wait for its end.
    room = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = os.fork()
    finally:
        os.close(room)
    if pid:
        return pid, os.pidfd_open(pid)
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Ctrl-C goes to everybody at the terminal, but is for the holder to answer.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _close_all_but(keep)
        status = work()
    except EnvstoreError as error:
        _log.error("%s", error)
    except BaseException:  # noqa: BLE001 - whatever it was, this process must not go on as a holder
        _log.exception("failed")
    finally:
        os._exit(status)


@contextlib.contextmanager
def wakened_by_signals() -> Iterator[int]:
    """Yield a descriptor that can be read once any of ``SIGNALS`` came, which does nothing else."""
    wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
    try:
        yield wake
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        os.close(wake)


def _ignore(number: int, frame: object) -> None:
    """Be there, so that the signal only wakes the loop."""


def _close_all_but(keep: tuple[int, ...]) -> None:
    """Close what was inherited: a device held by accident would keep a dead mount waiting."""
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


class Helpers:
    """Children that do one thing each, for the holder's loop, which never waits for them."""

    def __init__(self) -> None:
        """Have none yet."""
        self._running: dict[int, tuple[int, Callable[[int], None]]] = {}

    def start(
        self, work: Callable[[], int], done: Callable[[int], None], keep: tuple[int, ...] = ()
    ) -> int:
        """Run ``work`` in a child, and ``done`` with its exit status when it has ended.

        The child has the descriptors ``keep``; returns its own, which is the loop's to close.
        """
        pid, pidfd = fork(work, keep)
        self._running[pidfd] = (pid, done)
        return pidfd

    def watch(self, poller: select.poll, handlers: dict[int, Callable[[], None]]) -> None:
        """Add what is to be waited for."""
        for pidfd in self._running:
            poller.register(pidfd, select.POLLIN)
            handlers[pidfd] = partial(self._on_end, pidfd)

    def _on_end(self, pidfd: int) -> None:
        pid, done = self._running.pop(pidfd)
        os.close(pidfd)
        done(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
