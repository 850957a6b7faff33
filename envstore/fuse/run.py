"""Runs one command in a mounted environment, and leaves nothing behind when it ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.errors import EnvstoreError, NotFoundError
from envstore.fuse.background import MountRequest, start_background
from envstore.fuse.mount import unmount
from envstore.fuse.mountinfo import find_mount, resolve
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.stats import read_stats
from envstore.store.profiles import NO_PROFILE

_FORWARDED = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)
_END_WITHIN = 30.0

_log = logging.getLogger(__name__)


class CommandNotFoundError(NotFoundError):
    """No such command in the environment or elsewhere on PATH; shells say 127 for it."""

    exit_code = 127


class CannotExecuteError(EnvstoreError):
    """The command is there but cannot be executed; shells say 126 for it."""

    exit_code = 126


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended: its exit status, or 128 and the number of the signal it died of.

    ``stats`` is what its mount has counted (see ``Metrics.report``), ``None`` if the server was
    killed meanwhile; ``logical_bytes`` the size of what was mounted, to whole blocks. ``log`` is
    kept, and named here, if reads failed or the server was killed.
    """

    status: int
    record: MountRecord
    mount_seconds: float
    run_seconds: float
    logical_bytes: int
    stats: dict[str, Any] | None
    log: Path | None


def run(
    store: str,
    ref: str,
    command: Sequence[str],
    surroundings: Callable[[Path], Mapping[str, str]],
    *,
    profile: str = "",
    record: bool = False,
) -> Ran:
    """Mount ``ref`` in a private directory, run ``command`` in it, wait, and unmount.

    ``surroundings`` says which environment variables it gets in the tree mounted at a path;
    ``ENVSTORE_SNAPSHOT`` is added, the digest of what is mounted.
    ``profile`` names the start profile to follow, see ``MountRequest``. With ``record`` none is
    followed, and the stats hold a ``recording`` of what was read (see ``Recorder.report``).

    Signals that are sent to this process meanwhile are passed on. Call from the main thread.
    Raises what ``start_background`` does, ``CommandNotFoundError``, ``CannotExecuteError``.
    """
    with _private_directory() as prefix:
        files = RecordFiles(str(prefix))
        started = time.monotonic()
        followed = NO_PROFILE if record else profile
        request = MountRequest(store, ref, str(prefix), profile=followed, record=record)
        mount = start_background(request)
        mounted = time.monotonic()
        space = os.statvfs(prefix)
        size = space.f_blocks * space.f_frsize
        environment = {**surroundings(prefix), "ENVSTORE_SNAPSHOT": mount.snapshot}
        program = find_program(command[0], environment)
        status = run_process(program, command, environment)
        ended = time.monotonic()
        stats = _stats(files)
    sound = stats is not None and not stats["errors"]
    if sound:
        files.log.unlink(missing_ok=True)
    log = None if sound else files.log
    return Ran(status, mount, mounted - started, ended - mounted, size, stats, log)


def _stats(files: RecordFiles) -> dict[str, Any] | None:
    try:
        return read_stats(files.stats)
    except NotFoundError as error:
        _log.warning("%s", error)
        return None


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """Yield a directory to mount on; whatever is mounted there afterwards is unmounted."""
    directory = Path(resolve(tempfile.mkdtemp(prefix="envstore-run-")))
    try:
        yield directory
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        try:
            _leave(directory)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(directory: Path) -> None:
    files = RecordFiles(str(directory))
    unused = True
    while directory.exists():
        if find_mount(str(directory)) is not None:
            # Lazily: what the command left running in the background may go on using it.
            unused = unmount(directory, lazy=True, wait=False)
        else:
            # A server that was being started ends by itself when nobody waits for it any more.
            files.wait()
        try:
            # The copies of the mount that containers started meanwhile have made go with it.
            directory.rmdir()
        except OSError as error:
            # It may have mounted since we looked.
            if error.errno != errno.EBUSY:
                raise
    if unused and files.wait(_END_WITHIN):
        files.clear()
    if not files.alive():
        # No other mount will ever have this name.
        files.log.with_suffix(".lock").unlink(missing_ok=True)


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """Return the path of the program that a shell would start for ``name``.

    Raises ``CommandNotFoundError``, ``CannotExecuteError``.
    """
    found = shutil.which(name, path=environment.get("PATH", os.defpath))
    if found is not None:
        return found
    directories = [""] if "/" in name else environment.get("PATH", os.defpath).split(":")
    for directory in directories:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            what = "is a directory" if os.path.isdir(path) else "is not executable"
            raise CannotExecuteError(f"{path} {what}")
    where = "" if "/" in name else " in the environment or on PATH"
    raise CommandNotFoundError(f"there is no command {name}{where}")


def run_process(program: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start ``program`` with the arguments ``command``; returns how it ended, see ``Ran``.

    Signals sent to this process are passed on; those of the terminal reach the command by
    themselves, as it is in the same process group. Raises ``CannotExecuteError``.
    """
    # Ignored, it would have the kernel collect the child before its status is known.
    ours = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    try:
        try:
            child = os.posix_spawn(
                program,
                list(command),
                environment,
                setsigmask=before,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as error:
            raise _cannot_start(program, error) from error
        status = os.waitstatus_to_exitcode(_wait(child))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, ours)
    return status if status >= 0 else 128 - status


def _cannot_start(program: str, error: OSError) -> EnvstoreError:
    if isinstance(error, FileNotFoundError):
        # The program itself was found a moment ago.
        return CommandNotFoundError(
            f"cannot start {program}: its interpreter or loader is not there",
            hint="look at its first line, or run: file -L on it",
        )
    return CannotExecuteError(f"cannot start {program}: {error.strerror}")


def _wait(child: int) -> int:
    while True:
        received = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
        if received.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
        elif received.si_code <= 0:
            # Sent by a process, and to us alone; a positive code is the kernel's, that is the
            # terminal's, which sends to the whole group.
            _log.info("passing on signal %d", received.si_signo)
            os.kill(child, received.si_signo)
