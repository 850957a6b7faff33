"""Which process somebody is, told so that others on the same machine can see when it is gone."""

from __future__ import annotations

import os
import re
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HOST = re.compile(r"([0-9a-f-]{1,64})/([0-9]{1,20})/([0-9]{1,20})/([0-9]{1,20})/([0-9]{1,20})")


def here() -> str:
    """Return who this process is, or ``""`` where the system does not tell.

    That is the machine's start, the name spaces of processes and of time, the process id and when
    the process began: no two processes have all of them in common.
    """
    place = _place()
    pid = os.getpid()
    began = None if place is None else _began(pid)
    return "" if began is None else f"{place}/{pid}/{began}"


def describe(host: str) -> str:
    """Return for people which process ``here`` told of; what has another form as it is."""
    match, place = _HOST.fullmatch(host), _place()
    if match is None:
        return host or "a process that cannot be told"
    same = place is not None and host.startswith(f"{place}/")
    return f"process {match[4]} of {'this machine' if same else 'another machine or container'}"


def is_gone(host: str) -> bool:
    """Return whether the process that ``here`` told of has certainly ended.

    Only that of the same machine and name space can be known to have; every doubt, such as another
    machine, is ``False``.
    """
    match = _HOST.fullmatch(host)
    place = _place()
    if match is None or place is None or not host.startswith(f"{place}/"):
        return False
    pid, began = int(match[4]), match[5]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # somebody else's, which may still be seen
    # Where /proc hides the processes of others, nothing is known.
    found = _began(pid)
    return found is not None and (found != began or _is_zombie(pid))


def _place() -> str | None:
    try:
        boot = _BOOT_ID.read_text().strip()
        spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "time")]
        # Another name space's /proc would tell of other processes.
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
    except OSError:
        return None
    return f"{boot}/{spaces[0]}/{spaces[1]}"


def _began(pid: int) -> str | None:
    fields = _status(pid)
    return fields[19] if len(fields) > 19 else None


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and is only waited for by its parent."""
    fields = _status(pid)
    try:
        # The first thread of a process may end before the others.
        return fields[:1] in (["Z"], ["X"]) and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return False


def _status(pid: int) -> list[str]:
    """Return the fields of the process's ``stat`` behind its name; none if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
