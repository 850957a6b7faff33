"""Keeps a mount for as long as it is mounted, whatever happens to the servers that answer it.

The holder has the mount's device open, so that the kernel keeps every request while no server
lives. It forks each server from itself, always one ahead of need; when the one that serves dies
or hangs, the kernel is told to send again what it had taken (FUSE_NOTIFY_RESEND, Linux 6.9), and
the next goes on. The holder runs one loop in one thread and never touches its own mount: what
would wait for an answer of the server (mounting an overlay, unmounting) is done by a child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import envstore
from envstore.errors import EnvstoreError, UnsupportedFormatError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse import succession
from envstore.fuse.channel import Channel, Message
from envstore.fuse.control import Connection, Control
from envstore.fuse.keeping import LEASE, Keepsake, Kept
from envstore.fuse.limits import allow_many_files
from envstore.fuse.mirror import Mirror
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.processes import (
    SIGNALS,
    ServerProcess,
    bound_log,
    fork,
    load_server_code,
    start_server,
)
from envstore.fuse.protocol import Flag
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.sockets import told

if TYPE_CHECKING:
    from envstore.fuse.deposit import Deposit
    from envstore.fuse.showing import Shows

BEAT = 1.0
"""Seconds between two signs of life of a server."""
_LOAD_WITHIN = 120.0

_STANDBY_AFTER = 1.0
_QUICK, _QUICK_DEATHS = 0.1, 3
_MAX_DELAY = 10.0
_END_WITHIN = 5.0
_FLUSH_EVERY = 0.05
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
        self._active: ServerProcess | None = None
        self._standby: ServerProcess | None = None
        self._standby_at: float | None = None
        self._restart_at: float | None = None
        self._quick_deaths = 0
        self._standby_failures = 0
        self._failure = ""
        self._error: dict[str, Any] | None = None
        self._helpers: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._control = Control(kept.files["control"], self._asked)
        self._shows: Shows | None = None
        if kept.request.targets:
            from envstore.fuse.showing import Shows

            self._shows = Shows(kept, self._help, self._note)
        self._notes: Mirror | None = None
        self._deposit: Deposit | None = None
        if kept.request.fdstore:
            from envstore.fuse.deposit import Deposit

            self._deposit = Deposit(kept, fdstore)
        self._leaving = self._left = False
        self._inherited: _Say | None = None
        self._checking = False
        self._upgrading: Connection | None = None
        self._unmounting = False
        self._status: int | None = None
        self._wake = -1

    # --- the loop -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first server of a mount that is still to be made. Raises ``OSError``."""
        try:
            self._active = self._start_server()
            self._notes = Mirror(self._active.channel, self._kept.keepsakes)
            self._active.channel.send("load")
        except OSError:
            self._end()
            raise

    def run(self) -> int:
        """Go on until the mount is gone; returns an exit status."""
        with self._signals():
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
        for server in filter(None, (self._active, self._standby)):
            # Whatever a server has said comes before that it has died.
            poller.register(server.channel, select.POLLIN)
            handlers[server.channel.fileno()] = partial(self._on_message, server)
            poller.register(server.pidfd, select.POLLIN)
            handlers[server.pidfd] = partial(self._on_death, server)
        for pidfd in self._helpers:
            poller.register(pidfd, select.POLLIN)
            handlers[pidfd] = partial(self._on_helper, pidfd)
        self._control.watch(poller, handlers)
        if self._deposit is not None:
            self._deposit.watch(poller, handlers)
        for fd, _ in poller.poll(self._patience()):
            if self._status is None:
                handlers[fd]()
        self._on_time()

    def _patience(self) -> float:
        """Return the milliseconds until the clock alone gives something to do."""
        parts = [part.deadline() for part in (self._shows, self._deposit) if part is not None]
        times = [at for at in (self._standby_at, self._restart_at, *parts) if at is not None]
        if self._notes is not None and self._notes.behind:
            times.append(time.monotonic() + _FLUSH_EVERY)
        if self._active is not None:
            times.append(self._deadline(self._active))
        if self._standby is not None and not self._standby.ready:
            times.append(self._deadline(self._standby))
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
        self._flush_notes()
        if self._restart_at is not None and now >= self._restart_at:
            self._restart_at = None
            self._take_over()
        if self._standby_at is not None and now >= self._standby_at:
            self._standby_at = None
            self._prepare_standby()
        for server in filter(None, (self._active, self._standby)):
            waits = server is self._standby and server.ready  # and says nothing meanwhile
            if not waits and now >= self._deadline(server):
                _log.error("server %d gives no sign of life: killing it", server.pid)
                server.beat = now
                server.kill()

    def _deadline(self, server: ServerProcess) -> float:
        """Return when a server that has said nothing since is taken to hang."""
        patience = self._kept.request.hung_after
        if self._kept.fuse < 0:
            patience = _LOAD_WITHIN
        elif not server.serving and not server.ready:
            patience *= 2
        return server.beat + patience

    # --- servers --------------------------------------------------------------------------------

    def _start_server(self) -> ServerProcess:
        """Start a server that knows all there is to know. Raises ``OSError`` if none can be."""
        server = start_server()
        try:
            self._kept.send(server.channel)
            for key, keepsake in self._kept.keepsakes.items():
                server.channel.send("keep", keepsake.files, key=key, body=keepsake.body)
        except OSError as error:
            # Killed or stopped already. Its end is seen to like that of any other.
            _log.warning("server %d cannot be told what to serve: %s", server.pid, error)
            server.kill()
        return server

    def _prepare_standby(self) -> None:
        """Have a server that only waits for its turn."""
        if self._standby is None and self._kept.fuse >= 0 and not self._unmounting:
            try:
                load_server_code()
                self._standby = self._start_server()
                self._standby.channel.send("prepare")
            except (OSError, ImportError) as error:  # no file can be opened, code among them
                self._standby_failed(f"no standby server: {error}")

    def _standby_failed(self, reason: str) -> None:
        """Try again to have a standby, later and later; an upgrade cannot do without."""
        self._standby_failures += 1
        delay = min(_MAX_DELAY, _STANDBY_AFTER * 2 ** (self._standby_failures - 1))
        _log.warning("%s: the next one starts in %.0f s", reason, delay)
        self._standby_at = time.monotonic() + delay
        if self._upgrading is not None:
            connection, self._upgrading = self._upgrading, None
            refused = EnvstoreError(
                "the new server does not start; the old one goes on", hint="see the mount's log"
            )
            connection.answer(error=told(refused))

    def _take_over(self) -> None:
        """Let the next server serve."""
        try:
            server, self._standby = self._standby or self._start_server(), None
        except OSError as error:
            self._failure = f"no server can be started: {error.strerror}"
            self._quick_deaths += 1
            self._restart_later()
            return
        server.beat = time.monotonic()
        self._active = server
        self._notes = Mirror(server.channel, self._kept.keepsakes)
        self._kept.restarts += 1
        self._changed()
        self._go(server)

    def _go(self, server: ServerProcess) -> None:
        try:
            # The device, too, which a server that was forked ahead of the mount has not seen.
            self._kept.send(server.channel)
            server.channel.send("go")
        except OSError as error:
            _log.warning("server %d cannot be told to serve: %s", server.pid, error)

    def _on_message(self, server: ServerProcess) -> None:
        message = server.channel.receive()
        if message is not None:
            self._heard(server, message)
        elif not server.ended():
            server.kill()  # it hung up: its end will be seen next

    def _heard(self, server: ServerProcess, message: Message) -> None:
        body = message.body
        server.beat = time.monotonic()
        match message.kind:
            case "keep":
                self._keep(server, body["key"], Keepsake(body["body"], message.files))
            case "drop":
                self._drop(server, body["key"])
            case "ready":
                server.ready = True
                self._standby_failures = 0
                if self._upgrading is not None:
                    self._retire()
            case "loaded":
                self._mount(server, body)
            case "failed":
                self._fail(body["error"])
            case "serving":
                self._on_serving(server)

    def _keep(self, server: ServerProcess, key: str, keepsake: Keepsake) -> None:
        self._forget(key)
        self._kept.keepsakes[key] = keepsake
        self._changed(key)
        self._forward(server, "keep", keepsake.files, key=key, body=keepsake.body)

    def _drop(self, server: ServerProcess, key: str) -> None:
        self._forget(key)
        self._changed(key)
        self._forward(server, "drop", key=key)

    def _changed(self, key: str = "") -> None:
        if self._deposit is not None:
            self._deposit.changed(key)

    def _forward(
        self, server: ServerProcess | None, kind: str, files: tuple[int, ...] = (), **body: object
    ) -> None:
        """Tell the standby what another server, or none, has said."""
        if self._standby is not None and server is not self._standby:
            try:
                self._standby.channel.send(kind, files, **body)
            except OSError:
                self._standby.kill()  # it would not know what it has to

    def _forget(self, key: str) -> None:
        before = self._kept.keepsakes.pop(key, None)
        for fd in before.files if before else ():
            os.close(fd)

    def _note(self, key: str, keepsake: Keepsake | None) -> None:
        """Keep or drop something of the holder's own; servers know it for the next holder."""
        self._forget(key)
        self._changed(key)
        if keepsake is not None:
            self._kept.keepsakes[key] = keepsake
            self._forward(None, "keep", key=key, body=keepsake.body)
        else:
            self._forward(None, "drop", key=key)
        if self._notes is not None:
            self._notes.changed(key)
            self._flush_notes()

    def _flush_notes(self) -> None:
        if self._notes is not None:
            try:
                self._notes.flush()
            except OSError:
                self._notes = None  # that server has ended, and the next one knows it all

    def _on_serving(self, server: ServerProcess) -> None:
        server.serving = server.beat
        if self._standby is None and self._standby_at is None:
            first = not self._kept.restarts
            self._standby_at = server.serving + (_STANDBY_AFTER if first else 0.0)
        if self._upgrading is not None:
            connection, self._upgrading = self._upgrading, None
            connection.answer(server_pid=server.pid, version=envstore.__version__)
        if self._say is not None and self._record is not None:
            self._finish_mount(self._record)
        elif self._inherited is not None and self._record is not None:
            say, self._inherited = self._inherited, None
            say({"mounted": self._record.encode()})

    def _on_death(self, server: ServerProcess) -> None:
        while server.speaks():
            message = server.channel.receive()
            if message is None:
                break
            self._heard(server, message)
        how = server.reap()
        if server is self._standby:
            self._standby = None
            self._standby_failed(f"the standby server {server.pid} {how}")
            return
        if server is not self._active:
            return
        self._active = None
        if self._status is not None:
            return
        if self._say is not None:
            # Nobody has got this mount yet, so nobody has to be kept waiting for it.
            self._fail(told(EnvstoreError(f"the mount server {how}", hint="see its log")))
        elif sessions.is_gone(self._kept.fuse):
            self._status = 0
        else:
            self._replace(server, how)

    def _replace(self, server: ServerProcess, how: str) -> None:
        if not server.retired:
            self._failure = f"server {server.pid} {how}"
            lived = time.monotonic() - server.serving if server.serving else 0.0
            bound_log()
            self._quick_deaths = self._quick_deaths + 1 if lived < _QUICK else 0
            _log.error("%s after %.1f s of serving", self._failure, lived)
        if not self._kept.flags & Flag.HAS_RESEND:
            _log.error(
                "this kernel cannot send requests again (Linux 6.9 can): giving up the mount"
            )
            self._status = 1
            return
        # Now, while nobody reads: with a server at work each request would be answered twice.
        with contextlib.suppress(OSError):
            sessions.resend(self._kept.fuse)
        if self._quick_deaths < _QUICK_DEATHS:
            self._take_over()
        else:
            self._restart_later()

    def _restart_later(self) -> None:
        """Give whatever keeps servers from living time to pass."""
        delay = min(_MAX_DELAY, 0.05 * 2 ** min(20, max(0, self._quick_deaths - _QUICK_DEATHS)))
        _log.error("%s: the next one starts in %.1f s", self._failure, delay)
        self._restart_at = time.monotonic() + delay

    def _failing(self) -> bool:
        """Whether servers keep dying, and none has lived for long since."""
        began = self._active.serving if self._active else 0.0
        lives = began and time.monotonic() - began >= _QUICK
        return self._restart_at is not None or (self._quick_deaths >= _QUICK_DEATHS and not lives)

    # --- the mount ------------------------------------------------------------------------------

    def _mount(self, server: ServerProcess, loaded: dict[str, Any]) -> None:
        """Make the mount now that there is something to serve."""
        kept, request = self._kept, self._kept.request
        target = request.mountpoint
        if loaded["fast"]:
            kept.target = target = self._files.make_private()
        try:
            session = sessions.open_session(
                target, source=f"envstore:{loaded['name']}", allow_other=request.allow_other
            )
        except EnvstoreError as error:
            self._fail(told(error))
            return
        kept.fuse, kept.init, kept.flags = session.fd, session.init, session.flags
        kept.target = target
        mounted = find_mount(target)
        kept.device = mounted.device if mounted is not None else ""
        self._changed()
        sessions.raise_readahead(target)
        self._record = self._describe_mount(loaded)
        self._go(server)

    def _describe_mount(self, loaded: dict[str, Any]) -> MountRecord:
        request = self._kept.request
        return MountRecord(
            mountpoint=request.mountpoint,
            name=loaded["name"],
            snapshot=loaded["snapshot"],
            manifest=loaded["manifest"],
            holder_pid=os.getpid(),
            store=loaded["store"],
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            log=str(self._files.log),
            stats=str(self._files.stats),
            control=str(self._files.control),
            fast_path=loaded["fast"],
            prefix=request.prefix,
        )

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
                self._fail(told(EnvstoreError("the fast path cannot be laid", hint="see the log")))
                return
            self._record = replace(record, fast_path=not status)
            self._announce(self._record)

        self._help(lay, laid)

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

    def _fail(self, error: dict[str, Any]) -> None:
        """End; whoever waits for the mount is told why when nothing of it is left."""
        _log.log(logging.ERROR if self._say is None else logging.DEBUG, "%s", error["message"])
        self._error = error
        self._status = 1

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
        mountpoint = self._kept.request.mountpoint
        _log.info("unmounting %s", mountpoint)
        self._help(partial(sessions.detach, mountpoint), lambda status: None)

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
            self._end_servers()
            if deposit.finish():
                self._left, self._status = True, 0
                return
            with contextlib.suppress(OSError):
                sessions.resend(self._kept.fuse)
            self._take_over()
        _log.warning(_WAITING)
        if self._shows is not None:
            self._shows.pause(on=False)

    def _end_servers(self) -> None:
        """End all servers, after they have said everything."""
        for server in filter(None, (self._active, self._standby)):
            with contextlib.suppress(OSError):
                server.channel.send("retire" if server is self._active else "end")
            self._hear_out(server, time.monotonic() + _END_WITHIN)
            server.kill()
            server.reap()
        self._active = self._standby = None

    def _hear_out(self, server: ServerProcess, deadline: float) -> None:
        """Hear everything that a server still has to say before it ends."""
        while server.speaks() or not server.ended():
            if not server.speaks():
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)
                continue
            message = server.channel.receive()
            if message is None:
                server.ended(deadline)
                return
            self._heard(server, message)

    def _end(self) -> None:
        """Leave nothing behind: no process, no mount that nobody answers, no record."""
        if self._left:
            self._control.close()
            return
        if self._deposit is not None:
            self._deposit.forget()
        servers = [server for server in (self._active, self._standby) if server is not None]
        gone = self._kept.fuse >= 0 and sessions.is_gone(self._kept.fuse)
        deadline = time.monotonic() + _END_WITHIN
        for server in servers:
            with contextlib.suppress(OSError):
                server.channel.send("end")
            if not gone or not server.ended(deadline):
                server.kill()
            server.reap()
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
                self._upgrade(connection, [str(word) for word in [*question["program"]]])
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
                    self._catch_up()
                    self._shows.show(connection, question)
                case "hide":
                    self._shows.hide(connection, question)
                case _:
                    connection.answer(mounts=self._shows.look())
        except EnvstoreError as error:
            connection.answer(error=told(error))

    def _catch_up(self) -> None:
        """Hear what the server has said: that it gave a lease comes before anyone can use it."""
        server = self._active
        while server is not None and server is self._active and server.speaks():
            message = server.channel.receive()
            if message is None:
                return
            self._heard(server, message)

    def _describe(self) -> dict[str, Any]:
        if self._failing():
            state = "failing"
        elif self._active is not None and self._active.serving:
            state = "serving"
        else:
            state = "starting"
        return {
            "state": state,
            "holder_pid": os.getpid(),
            "server_pid": self._active.pid if self._active else None,
            "standby_pid": self._standby.pid if self._standby and self._standby.ready else None,
            "restarts": self._kept.restarts,
            "leases": self._lent,
            "last_failure": self._failure,
            "deposited": self._deposit is not None and self._deposit.complete,
            "version": envstore.__version__,
        }

    # --- upgrade --------------------------------------------------------------------------------

    def _upgrade(self, connection: Connection, program: Sequence[str]) -> None:
        """Become the holder that ``program`` is, once it has shown that it can start."""
        if not program:
            connection.answer(error=told(UsageError("there is no program to upgrade to")))
            return
        if self._checking or self._upgrading is not None:
            connection.answer(error=told(UsageError("an upgrade is under way")))
            return
        if self._say is not None or self._unmounting or self._leaving:
            connection.answer(error=told(UsageError("the mount is being made or unmade")))
            return
        if not self._kept.flags & Flag.HAS_RESEND:
            refused = UnsupportedFormatError(
                "a mount cannot be upgraded in place on this kernel", hint="Linux 6.9 can"
            )
            connection.answer(error=told(refused))
            return

        def check() -> int:
            return succession.try_program(program)

        def checked(status: int) -> None:
            if status:
                self._checking = False
                refused = EnvstoreError(
                    f"{program[-1]} does not start, or cannot go on with this mount",
                    hint="see the mount's log",
                )
                connection.answer(error=told(refused))
            elif self._shows is None:
                become()
            else:
                # A child of this code could tell the next nothing of what it has done.
                self._shows.when_idle(become)

        def become() -> None:
            self._checking = False
            try:
                self._become(program, connection)
            except OSError as error:
                refused = EnvstoreError(f"cannot execute {program[0]}: {error.strerror}")
                connection.answer(error=told(refused))
            self._standby_at = time.monotonic()

        self._help(check, checked)
        self._checking = True

    def _become(self, program: Sequence[str], asking: Connection) -> NoReturn:
        """Replace this process's code. Raises ``OSError`` if that cannot be done."""
        # It knows neither the new code nor the new holder; the one that serves goes on meanwhile.
        if self._standby is not None:
            self._standby.kill()
            self._standby.reap()
            self._standby = None
        succession.become(program, self._kept, self._active, asking, self._failure)

    def inherit(self) -> None:
        """Go on with a node server's mount when none of its processes is left."""
        self._inherited, self._say = self._say, None
        record = self._record
        if record is None:  # they were in a container that is no more
            record = self._describe_mount(
                {"name": "node", "snapshot": "", "manifest": "", "store": "", "fast": False}
            )
        self._record = record.with_holder(os.getpid())
        self._files.save(self._record)
        with contextlib.suppress(OSError):
            sessions.resend(self._kept.fuse)
        self._take_over()

    def adopt(self, state: dict[str, Any]) -> None:
        """Go on with the server that another holder has left; see ``write_state``."""
        self._say = None
        self._failure = state.get("failure", "")
        if self._record is not None:
            self._record = self._record.with_holder(os.getpid())
            try:
                self._files.save(self._record)
            except EnvstoreError as error:
                _log.warning("the record names another holder: %s", error)
        now = time.monotonic()
        self._active = succession.server_left(state)
        if self._active is not None:
            self._notes = Mirror(self._active.channel, self._kept.keepsakes)
        else:
            with contextlib.suppress(OSError):
                sessions.resend(self._kept.fuse)
            self._take_over()
        if "upgrading" in state:
            self._upgrading = self._control.adopt(state["upgrading"])
        self._standby_at = now

    def _retire(self) -> None:
        """Let the server that knows the old code end, now that the next one is ready."""
        if self._active is not None:
            self._active.retired = True
            try:
                self._active.channel.send("retire")
            except OSError:
                self._active.kill()

    # --- helpers --------------------------------------------------------------------------------

    def _help(
        self, work: Callable[[], int], done: Callable[[int], None], keep: tuple[int, ...] = ()
    ) -> int:
        """Run ``work`` in a child, and ``done`` with its exit status when it has ended.

        The child has the descriptors ``keep``; returns its own, which is the loop's to close.
        """
        pid, pidfd = fork(work, keep)
        self._helpers[pidfd] = (pid, done)
        return pidfd

    def _on_helper(self, pidfd: int) -> None:
        pid, done = self._helpers.pop(pidfd)
        os.close(pidfd)
        done(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        self._wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)
            os.close(self._wake)


def _ignore(number: int, frame: object) -> None:
    """Be there, so that the signal only wakes the loop."""
