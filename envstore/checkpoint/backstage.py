"""What makes a process a good persister: polite, deaf to the terminal, with a log that ends."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import platform
import signal
from collections.abc import Callable
from pathlib import Path

from envstore.checkpoint.service import LINGER_SECONDS, LOG, BusyError, Persister
from envstore.confinement.capabilities import CHOWN, DAC_OVERRIDE, FOWNER
from envstore.confinement.process import keep_capabilities, keep_to_itself, refuse
from envstore.confinement.programs import starts_programs
from envstore.errors import EnvstoreError
from envstore.redaction import protect_logs

MAX_LOG = 1 << 20
"""Bytes of a log; a longer one loses its older half."""

ENDING = (signal.SIGTERM, signal.SIGINT)

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_BEST_EFFORT_LAST = 2 << 13 | 7
_OOM_LESS = 100
BUSY = 75  # EX_TEMPFAIL

_log = logging.getLogger(__name__)


def settle_in(nice: int) -> None:
    """Make this process give way to others, and none that it was started by matter to it."""
    os.chdir("/")
    # Those that ask it to end wait until it knows how, see ``heed``.
    signal.pthread_sigmask(signal.SIG_SETMASK, ENDING)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for ignored in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_DFL)
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _BEST_EFFORT_LAST)
    # The memory of the slots counts as this process's too: rather lose the trainer than both.
    with contextlib.suppress(OSError, ValueError):
        path = Path("/proc/self/oom_score_adj")
        path.write_text(str(max(-1000, int(path.read_text()) - _OOM_LESS)))


def confine(*, watching: bool) -> None:
    """Give up what a persister has no use for; one that is ``watching`` starts others.

    Of root what it may do with files stays: slots and stores in directories may be others', and
    what it makes beside their slots is to be theirs. Raises ``ConfinementError``.
    """
    keep_to_itself()
    keep_capabilities({CHOWN, DAC_OVERRIDE, FOWNER} if os.geteuid() == 0 else ())
    if not watching:
        refuse(executing=not starts_programs())


def serve(options: argparse.Namespace) -> int:
    """Serve one slot directory, see ``persister``; returns an exit status."""
    directory = Path(options.directory)
    if options.detach:
        logging.basicConfig(
            handlers=[BoundedLog(directory / LOG)],
            format="%(asctime)s %(levelname)s %(message)s",
            level=logging.INFO,
        )
    else:
        shown = os.path.realpath(directory)
        logging.basicConfig(
            format=f"%(asctime)s %(levelname)s {shown}: %(message)s", level=logging.INFO
        )
    protect_logs()
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    linger = LINGER_SECONDS if options.linger is None else options.linger
    try:
        persister = Persister(
            directory,
            bandwidth=options.bandwidth,
            linger=linger,
            allowed=options.allow_store,
            store=options.store,
            trusted=not options.distrust,
        )
        _end_on_signals(persister)
        _log.info("process %d serves %s", os.getpid(), directory)
        persister.run()
    except BusyError as error:
        _log.info("%s", error)
        return BUSY
    except EnvstoreError as error:
        _log.error("%s", error)
        return error.exit_code
    except Exception:  # noqa: BLE001 - the log is the only place for a traceback
        _log.exception("the persister failed")
        return 1
    _log.info("process %d has nothing left to do", os.getpid())
    return 0


def _end_on_signals(persister: Persister) -> None:
    asked = False

    def end(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            # Whatever is under way is as if this process had been killed: the slots stay.
            os._exit(1)
        asked = True
        persister.terminate()

    heed(end)


def heed(end: Callable[[int, object], None]) -> None:
    """Have ``end`` called by the signals that ask a process to end, and let them come."""
    for number in ENDING:
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


class BoundedLog(logging.Handler):
    """Appends to a file, whose older half is cut off when it grows too long."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            os.write(self._fd, (self.format(record) + "\n").encode(errors="replace"))
            size = os.fstat(self._fd).st_size
            if size > MAX_LOG:
                rest = os.pread(self._fd, MAX_LOG // 2, size - MAX_LOG // 2)
                os.ftruncate(self._fd, 0)
                os.write(self._fd, rest.partition(b"\n")[2])
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()
