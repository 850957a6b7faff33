"""How one holder follows another: on purpose, when its code is replaced, or after a death."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from envstore.fuse.channel import Channel
from envstore.fuse.control import Connection
from envstore.fuse.keeping import STATE_FORMAT, Kept, write_state
from envstore.fuse.processes import ServerProcess

_TRY_WITHIN = 60.0


def try_program(program: Sequence[str]) -> int:
    """Return 0 if ``program`` starts and can go on with a mount that this code has made."""
    done = subprocess.run(
        [*program, "--check", str(STATE_FORMAT)],
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=_TRY_WITHIN,
    )
    return done.returncode


def become(
    program: Sequence[str],
    kept: Kept,
    server: ServerProcess | None,
    asking: Connection,
    failure: str,
) -> NoReturn:
    """Replace this process's code by that of ``program``, which goes on with ``kept``.

    ``asking`` is who waits for it to be done. Raises ``OSError`` if that cannot be done, and then
    all is as before.
    """
    state: dict[str, Any] = {"kept": kept.save(), "failure": failure}
    state["upgrading"] = asking.fileno()
    inherited = [*kept.descriptors(), asking.fileno()]
    if server is not None:
        found = {"pid": server.pid, "pidfd": server.pidfd, "channel": server.channel.fileno()}
        state["server"] = found
        inherited += [server.pidfd, server.channel.fileno()]
    memory = write_state(state)
    try:
        for fd in (memory, *inherited):
            os.set_inheritable(fd, True)
        os.execv(program[0], [*program, "--resume", str(memory)])  # noqa: S606 - no shell meant
    finally:
        for fd in inherited:
            os.set_inheritable(fd, False)
        os.close(memory)


def server_left(state: dict[str, Any]) -> ServerProcess | None:
    """Return the server that the holder before has left serving, if it left one."""
    found = state.get("server")
    if found is None:
        return None
    for name in ("pidfd", "channel"):
        os.set_inheritable(found[name], False)
    channel = Channel(socket.socket(fileno=found["channel"]))
    now = time.monotonic()
    return ServerProcess(found["pid"], found["pidfd"], channel, now, serving=now)
