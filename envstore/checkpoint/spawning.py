"""Starts the persister of a slot directory as a process of its own, or finds the one that is there.

It must outlive the trainer however that ends, so it is nobody's child: a fresh interpreter in a
session of its own, that forks once more and is adopted by init. It shares no descriptor, thread,
lock or CUDA context with the trainer, and the trainer imports none of its libraries. What ends
all processes of a container or control group ends it too: a sidecar is for that.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.talking import Lines, connect, encode
from envstore.errors import EnvstoreError

LOG = "log"
START_SECONDS = 60.0
"""How long a persister may take to answer on a busy machine."""

_ASK_SECONDS = 10.0
_AGAIN_SECONDS = 20.0
_PAUSE = 0.005
_LONGEST_PAUSE = 0.1
# What of Python's own variables says where modules are; others would change how it behaves.
_KEPT = {
    "PYTHONHOME", "PYTHONPATH", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONNOUSERSITE",
    "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE", "PYTHONUTF8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PersisterOptions:
    """How a persister is to be started.

    ``mode`` is ``daemon``, or ``external`` if somebody else (a sidecar, a node's service) starts
    it. ``bandwidth`` limits its uploads, in bytes a second. ``linger`` is how long, in seconds,
    it keeps slots for a trainer that comes back; ``None`` leaves that to ``ENVSTORE_SLOTS_LINGER``
    or 10 minutes. ``store`` is opened ahead of the first save. ``environ`` is instead of this
    process's environment.
    """

    mode: Literal["daemon", "external"] = "daemon"
    bandwidth: float | None = None
    linger: float | None = None
    store: str = ""
    environ: Mapping[str, str] | None = field(default=None, repr=False)

    def arguments(self) -> list[str]:
        """Return them as the persister takes them on its command line."""
        found = []
        if self.bandwidth is not None:
            found += ["--bandwidth", repr(float(self.bandwidth))]
        if self.linger is not None:
            found += ["--linger", repr(float(self.linger))]
        if self.store:
            found += ["--store", self.store]
        return found


def ensure_persister(
    directory: Path, options: PersisterOptions | None = None, *, timeout: float = START_SECONDS
) -> int:
    """Return the process id of the persister of ``directory``, started if there is none.

    Returns once it answers; about 0.2 s if it has to be started. With ``mode="external"`` waits
    for it up to ``timeout`` seconds. Raises ``CheckpointError`` with what its log says if it does
    not come up, ``AccessDeniedError`` if it is another user's.
    """
    options = options or PersisterOptions()
    end = time.monotonic() + timeout
    found = ask_hello(directory)
    started = -math.inf
    pause = _PAUSE
    while found is None:
        now = time.monotonic()
        if not directory.is_dir():
            raise CheckpointError(
                f"there is no slot directory {directory}",
                hint="whoever saves makes it, and holds it as long as there is something to save",
            )
        if now > end:
            raise _absent(directory, options, timeout)
        if options.mode == "daemon" and now - started > _AGAIN_SECONDS:
            # Again, if the first has given way to one that was about to end.
            started = now
            _start(directory, options)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        found = ask_hello(directory)
    return found


def ask_hello(directory: Path) -> int | None:
    """Return the process id of whoever serves ``directory``, or ``None`` if nobody answers.

    Raises ``AccessDeniedError``.
    """
    client = connect(directory, _ASK_SECONDS)
    if client is None:
        return None
    lines = Lines()
    with client:
        try:
            client.sendall(encode({"ask": "hello"}))
            while data := client.recv(1 << 16):
                for message in lines.feed(data):
                    if message.get("say") == "hello" and isinstance(message.get("pid"), int):
                        return int(message["pid"])
        except (OSError, EnvstoreError):
            return None
    return None


def _start(directory: Path, options: PersisterOptions) -> None:
    """Start a persister. It goes on by itself; the process started here ends at once."""
    environ = dict(os.environ if options.environ is None else options.environ)
    for name in [name for name in environ if name.startswith("PYTHON") and name not in _KEPT]:
        del environ[name]
    program = str(Path(__file__).with_name("persister.py"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        log = os.open(directory / LOG, flags, 0o600)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory / LOG}: {error.strerror}", hint="set ENVSTORE_SLOTS"
        ) from error
    try:
        starter = subprocess.Popen(
            [sys.executable, "-P", program, "--detach", *options.arguments(), str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise CheckpointError(f"cannot start the persister: {error}") from error
    finally:
        os.close(log)
    with starter:
        code = starter.wait()
    if code:
        raise CheckpointError(
            f"the persister of {directory} ended with status {code}: {_last_line(directory)}",
            hint=f"see {directory / LOG}",
        )


def _absent(directory: Path, options: PersisterOptions, timeout: float) -> CheckpointError:
    if options.mode == "external":
        return CheckpointError(
            f"no persister has come to {directory} within {timeout:.0f} s",
            hint="start one with `python -m envstore.checkpoint.persister --watch ROOT`, with "
            "the volume of the slots mounted at the same ROOT",
        )
    return CheckpointError(
        f"the persister of {directory} does not answer after {timeout:.0f} s: "
        f"{_last_line(directory)}",
        hint=f"see {directory / LOG}",
    )


def _last_line(directory: Path) -> str:
    """Return what the log says last."""
    try:
        text = (directory / LOG).read_text(errors="replace").strip()
    except OSError:
        text = ""
    return text.rpartition("\n")[2] or "it says nothing"
