"""How one holder follows another: on purpose, when its code is replaced, or after a death."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import envstore
from envstore.errors import EnvstoreError, UnsupportedFormatError, UsageError
from envstore.fuse.channel import Channel
from envstore.fuse.control import Connection
from envstore.fuse.keeping import STATE_FORMAT, Kept, write_state
from envstore.fuse.processes import Helpers, ServerProcess
from envstore.fuse.protocol import Flag
from envstore.fuse.servers import Servers
from envstore.fuse.sockets import told
from envstore.fuse.understudy import Understudy

if TYPE_CHECKING:
    from envstore.fuse.showing import Shows

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


class Upgrade:
    """The replacement of a holder and its server by other code, one at a time. For the loop."""

    def __init__(
        self,
        kept: Kept,
        servers: Servers,
        helpers: Helpers,
        shows: Shows | None,
        understudy: Understudy,
    ) -> None:
        """Be ready for one of the holder that has all this."""
        self._kept = kept
        self._servers = servers
        self._helpers = helpers
        self._shows = shows
        self._understudy = understudy
        self._checking = False
        self._asking: Connection | None = None

    def start(self, connection: Connection, program: Sequence[str], *, settled: bool) -> None:
        """Become the holder that ``program`` is, once it has shown that it can start.

        ``settled`` is whether the mount is neither being made nor unmade. ``connection`` gets the
        answer, from the next holder if all goes well.
        """
        if not program:
            connection.answer(error=told(UsageError("there is no program to upgrade to")))
            return
        if self._checking or self._asking is not None:
            connection.answer(error=told(UsageError("an upgrade is under way")))
            return
        if not settled:
            connection.answer(error=told(UsageError("the mount is being made or unmade")))
            return
        if not self._kept.flags & Flag.HAS_RESEND:
            refused = UnsupportedFormatError(
                "a mount cannot be upgraded in place on this kernel", hint="Linux 6.9 can"
            )
            connection.answer(error=told(refused))
            return

        def check() -> int:
            return try_program(program)

        def checked(status: int) -> None:
            if status:
                self._checking = False
                refused = EnvstoreError(
                    f"{program[-1]} does not start, or cannot go on with this mount",
                    hint="see the mount's log",
                )
                connection.answer(error=told(refused))
            elif self._shows is None:
                change()
            else:
                # A child of this code could tell the next nothing of what it has done.
                self._shows.when_idle(change)

        def change() -> None:
            self._checking = False
            try:
                self._become(program, connection)
            except OSError as error:
                refused = EnvstoreError(f"cannot execute {program[0]}: {error.strerror}")
                connection.answer(error=told(refused))
            self._servers.prepare_soon()
            self._understudy.start_soon()

        self._helpers.start(check, checked)
        self._checking = True

    def _become(self, program: Sequence[str], asking: Connection) -> NoReturn:
        """Replace this process's code. Raises ``OSError`` if that cannot be done."""
        # It knows neither the new code nor the new holder; the one that serves goes on meanwhile.
        self._servers.end_standby()
        self._understudy.end()  # it would start a holder of this code
        become(program, self._kept, self._servers.active, asking, self._servers.failure)

    def adopt(self, connection: Connection) -> None:
        """Be the holder that was to be; ``connection`` waits for its first server to serve."""
        self._asking = connection

    def standby_ready(self) -> None:
        """Let the old server make way for the new one."""
        if self._asking is not None:
            self._servers.retire()

    def standby_failed(self) -> None:
        """Give up: an upgrade cannot do without a standby."""
        if self._asking is not None:
            connection, self._asking = self._asking, None
            refused = EnvstoreError(
                "the new server does not start; the old one goes on", hint="see the mount's log"
            )
            connection.answer(error=told(refused))

    def serving(self, server: ServerProcess) -> None:
        """Say that it is done."""
        if self._asking is not None:
            connection, self._asking = self._asking, None
            connection.answer(server_pid=server.pid, version=envstore.__version__)
