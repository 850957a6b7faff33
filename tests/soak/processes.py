"""Finds the processes of a run of the rig, whoever started them, by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.soak import world


@dataclass(frozen=True, slots=True)
class Marked:
    """One process: what it is, and for which operation it was started."""

    pid: int
    what: str
    op: str


def marked(token: str) -> list[Marked]:
    """Return the living processes that bear the mark."""
    mark = f"{world.MARK}={token}:".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if not command:
            continue  # a zombie
        for variable in variables:
            if variable.startswith(mark):
                op = variable.removeprefix(mark).decode()
                found.append(Marked(int(name), _what(command), op))
    return found


def _what(command: str) -> str:
    if "persister.py" in command:
        return "persister"
    if "fuse/background.py" in command or "fuse/holder" in command or "fuse/processes" in command:
        return "mount server"
    if "tests.soak.template" in command:
        return "program"
    return "helper"


def peak(pid: int) -> int:
    """Return the most memory in bytes that a process had at once."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def bury() -> None:
    """Collect what became our child when its parent ended, if this is the first process here."""
    if os.getpid() != 1:
        return
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ChildProcessError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and fields[1] == "1":
                os.waitpid(int(name), os.WNOHANG)


def end_all(token: str) -> int:
    """Kill all that bear the mark, and wait until they are gone; returns how many there were."""
    count = 0
    end = time.monotonic() + 30
    while found := marked(token):
        for one in found:
            count += 1
            for number in (signal.SIGCONT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, number)
        bury()
        if time.monotonic() > end:
            raise RuntimeError(f"processes do not end: {found}")
        time.sleep(0.05)
    bury()
    return count
