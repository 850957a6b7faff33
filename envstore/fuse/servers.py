"""The servers of a mount: the one that serves and the standby, always one ahead of need.

Each is forked from the holder and says that it lives once a second. When the one that serves dies
or hangs, the kernel is told to send again what it had taken (FUSE_NOTIFY_RESEND, Linux 6.9), and
the next goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from envstore.fuse import session as sessions
from envstore.fuse import understudy
from envstore.fuse.channel import Message
from envstore.fuse.keeping import LEASE, Keepsake, Kept
from envstore.fuse.keepsakes import Keepsakes
from envstore.fuse.processes import ServerProcess, bound_log, load_server_code, start_server
from envstore.fuse.protocol import Flag
from envstore.fuse.sense import makes_sense

BEAT = 1.0
"""Seconds between two signs of life of a server."""
_LOAD_WITHIN = 120.0

_STANDBY_AFTER = 1.0
_QUICK, _QUICK_DEATHS = 0.1, 3
_MAX_DELAY = 10.0
_END_WITHIN = 5.0
_FLUSH_EVERY = 0.05

_log = logging.getLogger(__name__)


class Events(Protocol):
    """What the holder does when something happens to its servers."""

    def loaded(self, facts: dict[str, Any]) -> bool:
        """Make the mount, now that there is something to serve; returns whether it is made."""

    def failed(self, error: dict[str, Any]) -> None:
        """See to a server that cannot load what it is to serve."""

    def serving(self, server: ServerProcess) -> None:
        """See to what waits for a server that answers."""

    def standby_ready(self) -> None:
        """See to what waits for a server that could be the next."""

    def standby_failed(self) -> None:
        """See to what waits for a server that could be the next, as there is none."""

    def ended(self, how: str) -> bool:
        """Return whether another server is to follow the one that served."""

    def gave_up(self) -> None:
        """End: no other server could go on."""

    def changed(self, key: str) -> None:
        """See to a keepsake that has changed, or without a key to what is none."""


class Servers:
    """Those of one mount. For the holder's loop."""

    def __init__(self, kept: Kept, events: Events) -> None:
        """Have ``kept`` served, and tell ``events``.

        ``active`` is who serves, ``standby`` who only waits, ``failure`` how the last one died.
        """
        self._kept = kept
        self._events = events
        self.active: ServerProcess | None = None
        self.standby: ServerProcess | None = None
        self.failure = ""
        self._standby_at: float | None = None
        self._standby_wanted = True
        self._standby_failures = 0
        self._restart_at: float | None = None
        self._quick_deaths = 0
        self.keepsakes = Keepsakes(kept, events.changed, lambda: self.standby)

    # --- beginning and ending -------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first server of a mount that is still to be made. Raises ``OSError``."""
        self.active = self._start_server()
        self.keepsakes.serve(self.active)
        self.active.channel.send("load")

    def adopt(self, server: ServerProcess | None, failure: str) -> None:
        """Go on with what another holder has left: a server, or none, and the last failure."""
        self.failure = failure
        now = time.monotonic()
        self.active = server
        if server is not None:
            self.keepsakes.serve(server)
        else:
            self.go_on()
        self._standby_at = now

    def go_on(self) -> None:
        """Let the next server serve, and begin with what the last one had taken.

        Call while none serves: each request that one is at would be answered twice.
        """
        with contextlib.suppress(OSError):
            sessions.resend(self._kept.fuse)
        self._take_over()

    def retire(self) -> None:
        """Let the server that knows the old code end, now that the next one is ready."""
        if self.active is not None:
            self.active.retired = True
            try:
                self.active.channel.send("retire")
            except OSError:
                self.active.kill()

    def end_standby(self) -> None:
        """Do without a standby until ``prepare_soon``."""
        if self.standby is not None:
            self.standby.kill()
            self.standby.reap()
            self.standby = None

    def prepare_soon(self) -> None:
        """Have a standby at the next turn of the loop."""
        self._standby_at = time.monotonic()

    def tell_of_understudy(self, fd: int) -> None:
        """Have servers know another understudy, by their end of its channel."""
        for server in filter(None, (self.active, self.standby)):
            try:
                server.channel.post(understudy.NAME, (fd,))
            except OSError as error:  # it hangs, or has ended, and the next one is told anyway
                _log.warning("server %d knows no understudy: %s", server.pid, error)

    def want_no_standby(self) -> None:
        """Prepare none from here on: the mount ends, and only the one that serves is of use."""
        self._standby_wanted = False

    def end(self) -> None:
        """End all servers, after they have said everything."""
        for server in filter(None, (self.active, self.standby)):
            with contextlib.suppress(OSError):
                server.channel.send("retire" if server is self.active else "end")
            self._hear_out(server, time.monotonic() + _END_WITHIN)
            server.kill()
            server.reap()
        self.active = self.standby = None

    def end_at_once(self, *, unmounted: bool) -> None:
        """End all servers, without hearing them; if it is ``unmounted``, they end by themselves."""
        servers = [server for server in (self.active, self.standby) if server is not None]
        deadline = time.monotonic() + _END_WITHIN
        for server in servers:
            with contextlib.suppress(OSError):
                server.channel.send("end")
            if not unmounted or not server.ended(deadline):
                server.kill()
            server.reap()

    # --- the loop -------------------------------------------------------------------------------

    def watch(self, poller: select.poll, handlers: dict[int, Callable[[], None]]) -> None:
        """Add what is to be waited for."""
        for server in filter(None, (self.active, self.standby)):
            # Whatever a server has said comes before that it has died.
            poller.register(server.channel, select.POLLIN)
            handlers[server.channel.fileno()] = partial(self._on_message, server)
            poller.register(server.pidfd, select.POLLIN)
            handlers[server.pidfd] = partial(self._on_death, server)

    def deadline(self) -> float | None:
        """Return when the clock alone gives something to do."""
        times = [at for at in (self._standby_at, self._restart_at) if at is not None]
        if self.keepsakes.behind:
            times.append(time.monotonic() + _FLUSH_EVERY)
        if self.active is not None:
            times.append(self._deadline(self.active))
        if self.standby is not None and not self.standby.ready:
            times.append(self._deadline(self.standby))
        return min(times, default=None)

    def on_time(self, now: float) -> None:
        """See to what is due at ``now`` (monotonic seconds)."""
        self.keepsakes.flush()
        if self._restart_at is not None and now >= self._restart_at:
            self._restart_at = None
            self._take_over()
        if self._standby_at is not None and now >= self._standby_at:
            self._standby_at = None
            self._prepare_standby()
        for server in filter(None, (self.active, self.standby)):
            waits = server is self.standby and server.ready  # and says nothing meanwhile
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

    def describe(self) -> dict[str, Any]:
        """Return how they are."""
        if self._failing():
            state = "failing"
        elif self.active is not None and self.active.serving:
            state = "serving"
        else:
            state = "starting"
        return {
            "state": state,
            "server_pid": self.active.pid if self.active else None,
            "standby_pid": self.standby.pid if self.standby and self.standby.ready else None,
            "restarts": self._kept.restarts,
            "last_failure": self.failure,
        }

    def _failing(self) -> bool:
        """Whether servers keep dying, and none has lived for long since."""
        began = self.active.serving if self.active else 0.0
        lives = began and time.monotonic() - began >= _QUICK
        return self._restart_at is not None or (self._quick_deaths >= _QUICK_DEATHS and not lives)

    # --- starting -------------------------------------------------------------------------------

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
        if self.standby is None and self._kept.fuse >= 0 and self._standby_wanted:
            try:
                load_server_code()
                self.standby = self._start_server()
                self.standby.channel.send("prepare")
            except (OSError, ImportError) as error:  # no file can be opened, code among them
                self._standby_failed(f"no standby server: {error}")

    def _standby_failed(self, reason: str) -> None:
        """Try again to have a standby, later and later."""
        self._standby_failures += 1
        delay = min(_MAX_DELAY, _STANDBY_AFTER * 2 ** (self._standby_failures - 1))
        _log.warning("%s: the next one starts in %.0f s", reason, delay)
        self._standby_at = time.monotonic() + delay
        self._events.standby_failed()

    def _take_over(self) -> None:
        """Let the next server serve."""
        try:
            server, self.standby = self.standby or self._start_server(), None
        except OSError as error:
            self.failure = f"no server can be started: {error.strerror}"
            self._quick_deaths += 1
            self._restart_later()
            return
        server.beat = time.monotonic()
        self.active = server
        self.keepsakes.serve(server)
        self._kept.restarts += 1
        self._events.changed("")
        self._go(server)

    def _go(self, server: ServerProcess) -> None:
        try:
            # The device, too, which a server that was forked ahead of the mount has not seen.
            self._kept.send(server.channel)
            server.channel.send("go")
        except OSError as error:
            _log.warning("server %d cannot be told to serve: %s", server.pid, error)

    # --- what they say --------------------------------------------------------------------------

    def _on_message(self, server: ServerProcess) -> None:
        message = server.channel.receive()
        if message is not None:
            self._heard(server, message)
        elif not server.ended():
            server.kill()  # it hung up: its end will be seen next

    def _heard(self, server: ServerProcess, message: Message) -> None:
        if not makes_sense(message):
            _log.error("server %d says what cannot be, and is ended", server.pid)
            for fd in message.files:
                os.close(fd)
            server.kill()
            return
        body = message.body
        server.beat = time.monotonic()
        match message.kind:
            case "keep":
                self.keepsakes.keep(server, body["key"], Keepsake(body["body"], message.files))
            case "drop":
                self.keepsakes.drop(server, body["key"])
            case "ready":
                server.ready = True
                self._standby_failures = 0
                self._events.standby_ready()
            case "loaded":
                if self._events.loaded(body):
                    self._go(server)
            case "failed":
                self._events.failed(body["error"])
            case "serving":
                self._on_serving(server)
            case "renew":
                self.end_standby()
                self.prepare_soon()
            case "look":
                self._look(server)

    def _on_serving(self, server: ServerProcess) -> None:
        server.serving = server.beat
        if self.standby is None and self._standby_at is None:
            first = not self._kept.restarts
            self._standby_at = server.serving + (_STANDBY_AFTER if first else 0.0)
        self._events.serving(server)

    def _look(self, server: ServerProcess) -> None:
        """Tell a node server which of its mounts are nowhere to be seen."""
        from envstore.fuse.lease import missing

        leases = {
            key.removeprefix(LEASE): keepsake.body
            for key, keepsake in self._kept.keepsakes.items()
            if key.startswith(LEASE)
        }
        with contextlib.suppress(OSError):  # it asks again
            server.channel.post("missing", leases=missing(leases))

    def catch_up(self) -> None:
        """Hear what the server has said: that it gave a lease comes before anyone can use it."""
        server = self.active
        while server is not None and server is self.active and server.speaks():
            message = server.channel.receive()
            if message is None:
                return
            self._heard(server, message)

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

    # --- death ----------------------------------------------------------------------------------

    def _on_death(self, server: ServerProcess) -> None:
        while server.speaks():
            message = server.channel.receive()
            if message is None:
                break
            self._heard(server, message)
        how = server.reap()
        if server is self.standby:
            self.standby = None
            self._standby_failed(f"the standby server {server.pid} {how}")
            return
        if server is not self.active:
            return
        self.active = None
        if self._events.ended(how):
            self._replace(server, how)

    def _replace(self, server: ServerProcess, how: str) -> None:
        if not server.retired:
            self.failure = f"server {server.pid} {how}"
            lived = time.monotonic() - server.serving if server.serving else 0.0
            bound_log()
            self._quick_deaths = self._quick_deaths + 1 if lived < _QUICK else 0
            _log.error("%s after %.1f s of serving", self.failure, lived)
        if not self._kept.flags & Flag.HAS_RESEND:
            _log.error(
                "this kernel cannot send requests again (Linux 6.9 can): giving up the mount"
            )
            self._events.gave_up()
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
        _log.error("%s: the next one starts in %.1f s", self.failure, delay)
        self._restart_at = time.monotonic() + delay
