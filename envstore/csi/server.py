"""A gRPC server at a Unix socket, from the first call to the last."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import grpc

from envstore.csi.calls import Guard, Observe
from envstore.errors import AccessDeniedError, UsageError
from envstore.fuse.sockets import short_address, somebody_listens

_log = logging.getLogger("envstore.csi")

WORKERS = 64
"""Calls that are worked on at once; more wait."""

GRACE = 8.0
"""Seconds that calls under way have to end once the server is told to stop."""

# Far more than the limits of all fields of any request make together.
_LARGEST_MESSAGE = 256 << 10
_LOCK_PATIENCE = 10.0

Service = Callable[[grpc.Server], None]
"""Adds a service to a server, as the generated ``add_..._to_server`` do."""


class Server:
    """A gRPC server at the socket ``path``, which others may call once this is made.

    ``observe``, if given, puts ``Guard`` before every handler. The socket is for this user and
    group alone; its directory is made if it is missing. A socket that nobody listens at is
    replaced, with no moment in which there is none. Raises ``UsageError`` if somebody listens
    there already or something else is there, ``AccessDeniedError``.
    """

    def __init__(
        self,
        path: str,
        services: Sequence[Service],
        *,
        observe: Observe | None = None,
        workers: int = WORKERS,
    ) -> None:
        self.path = path
        self._pools = [
            ThreadPoolExecutor(workers, thread_name_prefix="csi"),
            ThreadPoolExecutor(2, thread_name_prefix="csi-identity"),
        ]
        self._guard = Guard(self._pools[1], observe) if observe else None
        self._server = grpc.server(
            self._pools[0],
            interceptors=[self._guard] if self._guard else [],
            options=[
                ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
                ("grpc.so_reuseport", 0),
            ],
        )
        for add in services:
            add(self._server)
        try:
            self._socket = self._listen()
        except BaseException:
            self._server.stop(None)
            self._end_workers()
            raise

    def stop(self, grace: float = GRACE) -> bool:
        """Take no more calls and wait for those under way; returns whether all of them ended.

        After ``grace`` seconds callers hear that they are cancelled, though the work for them may
        still go on in this process. The socket is removed, unless it is another's by now.
        """
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._socket:
                os.unlink(self.path)
        self._server.stop(grace).wait()
        self._end_workers()
        return self._guard is None or not self._guard.under_way

    def _end_workers(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> tuple[int, int]:
        directory = os.path.dirname(self.path)
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            with _locked(directory):
                if somebody_listens(self.path):
                    raise UsageError(
                        f"somebody listens at {self.path} already",
                        hint="stop the other driver, or use another path",
                    )
                # gRPC removes what it listens at when it ends, even if that is another's by then;
                # and nobody shall find a socket that is not theirs to use, or that does not answer.
                fresh = os.path.join(directory, f".{os.getpid()}.sock")
                with short_address(fresh) as address:
                    self._server.add_insecure_port(f"unix:{address}")
                os.chmod(fresh, 0o660)
                self._server.start()
                os.rename(fresh, self.path)
                return _identity(self.path)
        except OSError as error:
            raise AccessDeniedError(f"cannot listen at {self.path}: {error.strerror}") from error
        except RuntimeError as error:  # of gRPC, which does not say why
            raise AccessDeniedError(f"cannot listen at {self.path}") from error


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Keep others who start at the same moment from claiming a socket in ``directory``."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


class Signals:
    """Waits for SIGTERM or SIGINT in the main thread; ``stop`` does what a signal does."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def __enter__(self) -> Signals:
        self._before = {
            number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Let ``wait`` return."""
        self._told.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether it is time to stop, after ``timeout`` seconds at the latest."""
        return self._told.wait(timeout)
