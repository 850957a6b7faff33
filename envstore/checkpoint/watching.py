"""Serves every slot directory that appears below a root, with a process for each.

Processes, not threads: a slot whose file is cut short under its reader ends the one that reads
it and nobody else. Whoever writes slots may be anybody (a pod, of whom a node's service thinks
nothing good), so no symbolic link is followed below the root.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from envstore.checkpoint.backstage import BUSY, ENDING, heed
from envstore.redaction import protect_logs

POLL_SECONDS = 0.5
AGAIN_SECONDS = 5.0
"""When a directory whose persister ended, and which is still there, is served again."""
DEPTH = 3

_RANK = re.compile(r"[0-9]{5,9}")
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Served:
    """A directory by its descriptor, and the process that serves it."""

    path: str
    fd: int
    process: subprocess.Popen[bytes] | None = None
    again: float = 0.0


def watch(root: str, arguments: list[str]) -> int:
    """Serve what is below ``root`` until SIGTERM or SIGINT, then finish what is staged.

    ``arguments`` are passed to each persister. Returns an exit status, that of a failure if one of
    them could not finish. Call from the main thread.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    protect_logs()
    ended = threading.Event()
    served: dict[tuple[int, int], _Served] = {}

    def end(number: int, frame: object) -> None:
        if ended.is_set():
            for item in list(served.values()):
                _signal(item, signal.SIGTERM)
            os._exit(1)
        ended.set()

    heed(end)
    _log.info("process %d serves all slots below %s", os.getpid(), root)
    while not ended.is_set():
        _find(root, served)
        for key, item in list(served.items()):
            _tend(item, arguments)
            if item.process is None and not os.fstat(item.fd).st_nlink:
                os.close(served.pop(key).fd)
        ended.wait(POLL_SECONDS)
    # What a trainer staged a moment ago, or what is to be tried again, has one more try, too.
    _find(root, served)
    failed = 0
    for item in served.values():
        item.again = 0.0
        _tend(item, arguments)
        _signal(item, signal.SIGTERM)
    for item in served.values():
        failed |= item.process is not None and item.process.wait() not in (0, BUSY)
        os.close(item.fd)
    return int(failed)


def _find(root: str, served: dict[tuple[int, int], _Served]) -> None:
    for path, fd in slot_directories(root):
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) in served:
            os.close(fd)
        else:
            served[found.st_dev, found.st_ino] = _Served(path, fd)


def _tend(item: _Served, arguments: list[str]) -> None:
    """Collect a process that ended; start one if it is time to."""
    now = time.monotonic()
    if item.process is not None:
        code = item.process.poll()
        if code is None:
            return
        level = logging.WARNING if code else logging.INFO
        _log.log(level, "the persister of %s ended with status %d", item.path, code)
        item.process = None
        item.again = now + AGAIN_SECONDS
        if not code:
            # What it could not remove by its descriptor; not if a trainer has come meanwhile.
            with contextlib.suppress(OSError):
                os.rmdir(item.path)
    if now < item.again or not os.fstat(item.fd).st_nlink:
        return
    program = str(Path(__file__).with_name("persister.py"))
    # One that is told to end while it starts still has to look for what is staged.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        item.process = subprocess.Popen(
            [sys.executable, "-P", program, *arguments, f"/proc/self/fd/{item.fd}"],
            stdin=subprocess.DEVNULL,
            pass_fds=(item.fd,),
            start_new_session=True,  # a terminal's ^C comes to this process, which passes it on
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _log.info("process %d serves %s", item.process.pid, item.path)


def _signal(item: _Served, number: signal.Signals) -> None:
    if item.process is not None:
        with contextlib.suppress(ProcessLookupError):
            item.process.send_signal(number)


def slot_directories(root: str) -> Iterator[tuple[str, int]]:
    """Yield the slot directories up to 3 levels below ``root``: path and an open descriptor.

    They are those named by a rank. The caller closes the descriptors.
    """
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # it may come yet
    yield from _below(root, fd, DEPTH)


def _below(path: str, fd: int, depth: int) -> Iterator[tuple[str, int]]:
    try:
        for name in sorted(os.listdir(fd)):
            try:
                found = os.open(name, _FLAGS, dir_fd=fd)
            except OSError:
                continue  # no directory, a link, or gone
            inner = os.path.join(path, name)
            if _RANK.fullmatch(name):
                yield inner, found
            elif depth > 1:
                yield from _below(inner, found, depth - 1)
            else:
                os.close(found)
    finally:
        os.close(fd)
