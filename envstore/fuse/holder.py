"""Keeps a mount for as long as it is mounted, whatever happens to the servers that answer it.

The holder has the mount's device open, so that the kernel keeps every request while no server
lives, and has servers that follow each other answer it (see ``Servers``). The holder runs one loop
in one thread and never touches its own mount: what would wait for an answer of the server (mounting
an overlay, unmounting) is done by a child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import envstore
from envstore.errors import EnvstoreError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse import succession
from envstore.fuse.channel import Channel
from envstore.fuse.control import Connection, Control
from envstore.fuse.keeping import LEASE, Kept
from envstore.fuse.limits import allow_many_files
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.privileges import describe
from envstore.fuse.processes import Helpers, ServerProcess, wakened_by_signals
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.servers import Servers
from envstore.fuse.sockets import told
from envstore.fuse.understudy import Understudy

if TYPE_CHECKING:
    from envstore.fuse.deposit import Deposit
    from envstore.fuse.showing import Shows

_WAITING = "waiting for an fdstore to have it all; a second signal unmounts"
_SLOW = 3  # exit status of who could lay no fast path, but showed the snapshot without

_log = logging.getLogger(__name__)

_Say = Callable[[dict[str, Any]], None]


class Holder:
    """The loop of one mount. Call ``run`` from the main thread of a process with no other."""

    def __init__(
        self, kept: Kept, files: RecordFiles, say: _Say, fdstore: Channel | None = None
    ) -> None:
        """Keep ``kept``. ``say`` is called once: with ``mounted`` (a record) or ``error``.

        ``fdstore`` is a channel to that of the request, if there is one already.
        """
        allow_many_files()
        self._kept = kept
        self._files = files
        self._say: _Say | None = say
        self._record: MountRecord | None = files.load()
        self._servers = Servers(kept, self)
        self._understudy = Understudy(kept, self._servers.tell_of_understudy)
        self._helpers = Helpers()
        self._error: dict[str, Any] | None = None
        self._control = Control(kept.files["control"], self._asked)
        self._shows: Shows | None = None
        if kept.request.targets:
            from envstore.fuse.showing import Shows

            self._shows = Shows(kept, self._helpers.start, self._servers.keepsakes.note)
        self._upgrade = succession.Upgrade(
            kept, self._servers, self._helpers, self._shows, self._understudy
        )
        self._deposit: Deposit | None = None
        if kept.request.fdstore:
            from envstore.fuse.deposit import Deposit

            self._deposit = Deposit(kept, fdstore)
        self._leaving = self._left = False
        self._inherited: _Say | None = None
        self._unmounting = False
        self._status: int | None = None
        self._wake = -1

    # --- the beginning --------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first server of a mount that is still to be made. Raises ``OSError``."""
        try:
            self._understudy.start()
            self._servers.begin()
        except OSError:
            self._end()
            raise

    def inherit(self) -> None:
        """Go on with a node server's mount when none of its processes is left."""
        self._inherited, self._say = self._say, None
        record = self._record
        if record is None:  # they were in a container that is no more
            record = self._files.describe(
                {"name": "node", "snapshot": "", "manifest": "", "store": "", "fast": False},
                self._kept.request.prefix,
            )
        self._record = record.with_holder(os.getpid())
        self._files.save(self._record)
        self._understudy.start()
        self._servers.go_on()

    def adopt(self, state: dict[str, Any]) -> None:
        """Go on with the server that another holder has left; see ``write_state``."""
        self._say = None
        if self._record is not None:
            self._record = self._record.with_holder(os.getpid())
            try:
                self._files.save(self._record)
            except EnvstoreError as error:
                _log.warning("the record names another holder: %s", error)
        self._servers.adopt(succession.server_left(state), state.get("failure", ""))
        self._understudy.start_soon()
        self._understudy.on_time()
        if "upgrading" in state:
            self._upgrade.adopt(self._control.adopt(state["upgrading"]))

    # --- the loop -------------------------------------------------------------------------------

    def run(self) -> int:
        """Go on until the mount is gone; returns an exit status."""
        with wakened_by_signals() as self._wake:
            try:
                while self._status is None:
                    self._turn()
            finally:
                self._end()
        return self._status

    def _turn(self) -> None:
        """Wait for something to happen and see to it."""
        handlers: dict[int, Callable[[], None]] = {self._wake: self._on_signal}
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._kept.fuse >= 0:
            poller.register(self._kept.fuse, 0)
            handlers[self._kept.fuse] = self._on_unmounted
        self._servers.watch(poller, handlers)
        self._helpers.watch(poller, handlers)
        self._understudy.watch(poller, handlers)
        self._control.watch(poller, handlers)
        if self._deposit is not None:
            self._deposit.watch(poller, handlers)
        for fd, _ in poller.poll(self._patience()):
            if self._status is None:
                handlers[fd]()
        self._on_time()

    def _patience(self) -> float:
        """Return the milliseconds until the clock alone gives something to do."""
        parts = (self._servers, self._shows, self._deposit, self._understudy)
        deadlines = (part.deadline() for part in parts if part is not None)
        times = [at for at in deadlines if at is not None]
        return max(0.0, min(times, default=time.monotonic() + 60) - time.monotonic()) * 1000 + 1

    def _on_time(self) -> None:
        now = time.monotonic()
        if self._shows is not None:
            self._shows.on_time()
        if self._deposit is not None:
            self._deposit.on_time()
            if self._leaving and not self._unmounting and self._deposit.complete:
                self._leave(self._deposit)
                if self._status is not None:
                    return
        self._understudy.on_time()
        self._servers.on_time(now)

    # --- what happens to servers ----------------------------------------------------------------

    def loaded(self, facts: dict[str, Any]) -> bool:
        """Make the mount, now that there is something to serve; returns whether it is made."""
        kept, request = self._kept, self._kept.request
        target = request.mountpoint
        if facts["fast"]:
            kept.target = target = self._files.make_private()
        try:
            session = sessions.open_session(
                target, source=f"envstore:{facts['name']}", allow_other=request.allow_other
            )
        except EnvstoreError as error:
            self.failed(told(error))
            return False
        kept.fuse, kept.init, kept.flags = session.fd, session.init, session.flags
        kept.target = target
        mounted = find_mount(target)
        kept.device = mounted.device if mounted is not None else ""
        self.changed("")
        sessions.raise_readahead(target)
        self._record = self._files.describe(facts, request.prefix)
        return True

    def failed(self, error: dict[str, Any]) -> None:
        """End; whoever waits for the mount is told why when nothing of it is left."""
        _log.log(logging.ERROR if self._say is None else logging.DEBUG, "%s", error["message"])
        self._error = error
        self._status = 1

    def serving(self, server: ServerProcess) -> None:
        """Tell who waits for a server that answers; lay the fast path of a new mount before."""
        self._upgrade.serving(server)
        if self._say is not None and self._record is not None:
            self._finish_mount(self._record)
        elif self._inherited is not None and self._record is not None:
            say, self._inherited = self._inherited, None
            say({"mounted": self._record.encode()})

    def standby_ready(self) -> None:
        """Let an upgrade go on."""
        self._upgrade.standby_ready()

    def standby_failed(self) -> None:
        """Let no upgrade go on."""
        self._upgrade.standby_failed()

    def ended(self, how: str) -> bool:
        """Return whether another server is to follow the one that served; ends if none is."""
        if self._status is not None:
            return False
        if self._say is not None:
            # Nobody has got this mount yet, so nobody has to be kept waiting for it.
            self.failed(told(EnvstoreError(f"the mount server {how}", hint="see its log")))
            return False
        if sessions.is_gone(self._kept.fuse):
            self._status = 0
            return False
        return True

    def gave_up(self) -> None:
        """End: the mount cannot go on."""
        self._status = 1

    def changed(self, key: str) -> None:
        """Have the fdstore know it, too."""
        if self._deposit is not None:
            self._deposit.changed(key)

    # --- the making of the mount ----------------------------------------------------------------

    def _finish_mount(self, record: MountRecord) -> None:
        """Tell whoever asked for the mount that it answers; lay the fast path before, if any."""
        if not record.fast_path:
            self._announce(record)
            return
        server = self._kept.target
        parts = self._kept.keepsakes["fast"].body
        required = self._kept.request.fast_path == "on"

        def lay() -> int:
            from envstore.fuse.fast import hide, lay_fast_path

            source = f"envstore:{record.name}"
            where = (server, parts["subtree"], record.mountpoint, source)
            fast = lay_fast_path(parts, *where, required=required)
            hide(server)
            return 0 if fast else _SLOW

        def laid(status: int) -> None:
            if status not in (0, _SLOW):
                self.failed(told(EnvstoreError("the fast path cannot be laid", hint="see the log")))
                return
            self._record = replace(record, fast_path=not status)
            self._announce(self._record)

        self._helpers.start(lay, laid)

    def _announce(self, record: MountRecord) -> None:
        say, self._say = self._say, None
        if say is None:
            return
        try:
            self._files.save(record)
            say({"mounted": record.encode()})
        except (EnvstoreError, OSError) as error:
            # Nobody waits for the mount any more, or could find it.
            _log.error("unmounting: %s", error)
            self._status = 1

    # --- the end --------------------------------------------------------------------------------

    def _on_unmounted(self) -> None:
        self._status = 0

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 64)
        if self._kept.fuse < 0 or self._unmounting:
            self._status = 1
            return
        if (
            self._deposit is not None
            and self._deposit.possible
            and self._lent
            and not self._leaving
        ):
            self._leaving = True
            _log.info("leaving %s to the fdstore", self._kept.request.mountpoint)
            if not self._deposit.complete:
                _log.warning(_WAITING)
            return
        self._unmounting = True
        self._servers.want_no_standby()
        mountpoint = self._kept.request.mountpoint
        _log.info("unmounting %s", mountpoint)
        self._helpers.start(partial(sessions.detach, mountpoint), lambda status: None)

    @property
    def _lent(self) -> int:
        """How many mounts there are for which somebody has a lease."""
        return sum(key.startswith(LEASE) for key in self._kept.keepsakes)

    def _leave(self, deposit: Deposit) -> None:
        """End all servers, but not the mount: the fdstore has it for the next node server."""
        if self._shows is not None:
            self._shows.pause()
            if self._shows.busy:
                return  # the next one could be told nothing of what its children do
        # Once while they serve, because one that hangs is found out after seconds only.
        if deposit.finish():
            self._servers.end()
            if deposit.finish():
                self._left, self._status = True, 0
                return
            self._servers.go_on()
        _log.warning(_WAITING)
        if self._shows is not None:
            self._shows.pause(on=False)

    def _end(self) -> None:
        """Leave nothing behind: no process, no mount that nobody answers, no record."""
        if self._left:
            self._control.close()
            return
        if self._deposit is not None:
            self._deposit.forget()
        gone = self._kept.fuse >= 0 and sessions.is_gone(self._kept.fuse)
        self._servers.end_at_once(unmounted=gone)
        if self._kept.fuse >= 0:
            # First the device: with nobody to answer, an unmount might wait for ever.
            os.close(self._kept.fuse)
            for place in {self._kept.target, self._kept.request.mountpoint}:
                sessions.leave_no_mount(place)
        self._files.clear()
        if self._kept.request.node:
            with contextlib.suppress(OSError):
                os.unlink(self._kept.request.node)
        self._control.close()
        for fd in self._kept.files.values():
            os.close(fd)
        if self._say is not None:
            given_up = told(EnvstoreError("the mount was given up before it answered"))
            with contextlib.suppress(OSError):
                self._say({"error": self._error or given_up})

    # --- questions ------------------------------------------------------------------------------

    def _asked(self, connection: Connection, question: dict[str, Any]) -> None:
        match question["ask"]:
            case "status":
                connection.answer(**self._describe())
            case "upgrade":
                settled = self._say is None and not self._unmounting and not self._leaving
                program = [str(word) for word in [*question["program"]]]
                self._upgrade.start(connection, program, settled=settled)
            case "show" | "hide" | "look":
                self._asked_of_targets(connection, question)
            case asked:
                connection.answer(error=told(UsageError(f"{asked!r} is not known here")))

    def _asked_of_targets(self, connection: Connection, question: dict[str, Any]) -> None:
        try:
            if self._shows is None:
                raise UsageError(
                    "this node server makes no mounts for others",
                    hint="start it with: envstore node --targets DIR",
                )
            match question["ask"]:
                case "show":
                    self._servers.catch_up()
                    self._shows.show(connection, question)
                case "hide":
                    self._shows.hide(connection, question)
                case _:
                    connection.answer(mounts=self._shows.look())
        except EnvstoreError as error:
            connection.answer(error=told(error))

    def _describe(self) -> dict[str, Any]:
        return {
            **self._servers.describe(),
            "confined": describe(self._servers.active),
            "holder_pid": os.getpid(),
            "leases": self._lent,
            "deposited": self._deposit is not None and self._deposit.complete,
            "version": envstore.__version__,
        }
