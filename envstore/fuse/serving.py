"""One server process: prepares, waits for its turn, and answers a live mount until it is gone.

Nothing here knows how the mount was made, and nothing that a server knows is lost with it: the
holder keeps all that the next one needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import math
import os
import signal
import socket
from dataclasses import dataclass, field
from functools import partial

import pyfuse3
import trio

from envstore.errors import EnvstoreError
from envstore.fuse import stats, understudy
from envstore.fuse.channel import Channel, Message
from envstore.fuse.keeping import LEASE, Keepsake, Kept
from envstore.fuse.node import Node
from envstore.fuse.operations import SnapshotOperations
from envstore.fuse.privileges import ServerConfinement
from envstore.fuse.prometheus import render
from envstore.fuse.protocol import Flag
from envstore.fuse.scraping import serve_metrics
from envstore.fuse.servers import BEAT
from envstore.fuse.session import Session
from envstore.fuse.sockets import told
from envstore.fuse.volumes import Volumes

_TASKS = 4096
"""Requests handled at once. More than may wait for the store, or nothing else would be answered."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_MAX_DELAY, _LONG = 10.0, 60.0

_log = logging.getLogger(__name__)


def run_server(channel: Channel) -> int:
    """Do what the holder at the other end of ``channel`` says; returns an exit status.

    Call from the main thread of a fresh process.
    """
    return _Server(channel).run()


@dataclass(slots=True, eq=False)
class _Server:
    """What the holder has said so far."""

    channel: Channel
    kept: Kept = field(init=False)
    volumes: Volumes = field(init=False)
    confined: ServerConfinement = field(init=False)
    holder_began: float = -math.inf
    holders_lost: int = 0
    node: Node | None = None
    renewing: bool = False

    def run(self) -> int:
        message = self.channel.receive()
        if message is None or message.kind != "kept":
            return 0
        self.kept = Kept.received(message.body, message.files)
        self.volumes = Volumes(self.kept.request, self._keep, self._drop)
        # Before anything that somebody else has written is looked at.
        self.confined = ServerConfinement(self.kept.request, self.volumes.cache.root)
        while (message := self.channel.receive()) is not None:
            match message.kind:
                case "keep" | "drop":
                    self._told(message)
                case "kept":
                    self._told_again(message)
                case understudy.NAME:
                    self._told_of_understudy(message)
                case "load":
                    if not self._load():
                        return 1
                case "prepare":
                    self.volumes.prepare()
                    _hold_little_memory()
                    self._say("ready")
                case "go":
                    return self._serve()
                case "end":
                    return 0
        return 0  # the holder is gone, and somebody else is serving

    def _keep(self, key: str, keepsake: Keepsake) -> None:
        """Keep something, and have the holder keep it; one that comes later gets it anyway."""
        self.kept.keepsakes[key] = keepsake
        with contextlib.suppress(ConnectionError):
            self.channel.send("keep", keepsake.files, key=key, body=keepsake.body)

    def _drop(self, key: str) -> None:
        self.kept.keepsakes.pop(key, None)
        with contextlib.suppress(ConnectionError):
            self.channel.send("drop", key=key)

    def _told(self, message: Message) -> None:
        key = message.body["key"]
        if message.kind == "drop":
            self.kept.keepsakes.pop(key, None)
            return
        keepsake = Keepsake(message.body["body"], message.files)
        self.kept.keepsakes[key] = keepsake
        self.volumes.restore(key, keepsake)

    def _told_again(self, message: Message) -> None:
        keepsakes = self.kept.keepsakes
        for fd in (*self.kept.files.values(), self.kept.fuse):
            if fd >= 0:
                os.close(fd)
        self.kept = Kept.received(message.body, message.files)
        self.kept.keepsakes = keepsakes

    def _told_of_understudy(self, message: Message) -> None:
        """Learn of another understudy than the one before."""
        before = self.kept.files.get(understudy.NAME)
        (self.kept.files[understudy.NAME],) = message.files
        if before is not None:
            os.close(before)

    def _load(self) -> bool:
        """Load what the mount is made for; says how that went."""
        try:
            loaded = self.volumes.load()
        except EnvstoreError as error:
            self._say("failed", error=told(error))
            return False
        except Exception as error:  # noqa: BLE001 - the log is the only place for a traceback
            _log.exception("the server failed")
            failure = EnvstoreError(f"the mount server failed: {error!r}", hint="see the log")
            self._say("failed", error=told(failure))
            return False
        self._say("loaded", **loaded)
        return True

    def _say(self, kind: str, **body: object) -> None:
        """Tell the holder; that it is gone is seen when it is listened to next."""
        with contextlib.suppress(ConnectionError):
            self.channel.send(kind, (), **body)

    def _serve(self) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.chdir("/")  # as the first server, too, which began where the mount was asked for
        _hold_little_memory()
        trio.run(self._main)
        return 0

    async def _main(self) -> None:
        volumes, kept = self.volumes, self.kept
        volumes.resume(kept.files["counters"])
        async with trio.open_nursery() as nursery:
            await volumes.start(nursery)
            listener = _listener(kept.files["stats"])
            await nursery.start(stats.answer, listener, self._report)
            if kept.request.node:
                request = kept.request
                node = Node(
                    volumes,
                    request.mountpoint,
                    self._keep,
                    self._drop,
                    request.lease_grace,
                    lambda: self.kept.restarts,
                    self._look,
                    request.no_fast_path,
                )
                for key, keepsake in kept.keepsakes.items():
                    if key.startswith(LEASE):
                        node.restore(key, keepsake)
                nursery.start_soon(node.run, _listener(kept.files["node"]))
                self.node = node
            if kept.request.metrics:
                await nursery.start(serve_metrics, kept.request.metrics, self._page)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._obey)
            _attach(kept.session(), SnapshotOperations(volumes.forest, volumes, volumes.metrics))
            try:
                await self._send("serving")
                await pyfuse3.main(max_tasks=_TASKS)
            finally:
                pyfuse3.close(unmount=False)
                self._save()
            await volumes.holds.end()
            nursery.cancel_scope.cancel()
        report = self._report()
        del report["latency"]  # long, and there for whoever asks while it lives
        _log.info("%s is unmounted: %s", kept.request.mountpoint, json.dumps(report))

    def _report(self) -> dict[str, object]:
        return {**self.volumes.report(), "restarts": self.kept.restarts}

    def _page(self) -> str:
        """Return the counts in Prometheus' text format."""
        report = self._report()
        if self.node is not None:
            mounts = self.node.describe()["mounts"]
        else:
            mounts = [{**report, **self.volumes.identity()}]
        return render({**report, "mounts": mounts})

    def _save(self) -> None:
        self.volumes.save(self.kept.files["counters"])

    async def _beat(self) -> None:
        """Show the holder that the loop turns, and leave the counts where the next server looks."""
        while True:
            await self._send("beat")
            self._save()
            await self._see_to_the_cache()
            await trio.sleep(BEAT)

    async def _send(self, kind: str) -> None:
        try:
            self.channel.post(kind)
        except OSError as error:
            _log.debug("the holder does not hear: %s", error)

    async def _see_to_the_cache(self) -> None:
        """Make way for another server if the cache was replaced, which this one cannot use."""
        if not self.confined.cache_gone or not self.kept.flags & Flag.HAS_RESEND:
            self.renewing = False
        elif not self.renewing:
            self.renewing = True
            await self._send("renew")  # the next server makes the directory, if need be
        elif self.confined.cache_replaced:
            _log.warning("the cache was replaced: making way for a server that may use it")
            os._exit(0)

    def _look(self) -> None:
        """Have the holder look which of the node's mounts are there."""
        with contextlib.suppress(OSError):  # it is gone, or busy: another time
            self.channel.post("look")

    async def _obey(self) -> None:
        """Do what the holder says while serving; take its place when it is no more."""
        while True:
            await trio.lowlevel.wait_readable(self.channel.socket)
            message = self.channel.receive()
            if message is None:
                await self._replace_holder()
                continue
            match message.kind:
                case "retire":
                    self._save()
                    _log.info("making way for the next server")
                    os._exit(0)
                case "keep" | "drop":
                    self._noted(message)
                case understudy.NAME:
                    self._told_of_understudy(message)
                case "missing" if self.node is not None:
                    self.node.missing(frozenset(message.body["leases"]))
                case "end":
                    return

    def _noted(self, message: Message) -> None:
        """Learn what the holder itself keeps, for one that may have to follow it."""
        key = message.body["key"]
        self.kept.keepsakes.pop(key, None)
        if message.kind == "keep":
            self.kept.keepsakes[key] = Keepsake(message.body["body"], message.files)

    async def _replace_holder(self) -> None:
        """Start another holder for this mount; if they keep ending, later and later."""
        if trio.current_time() - self.holder_began > _LONG:
            self.holders_lost = 0
        delay = min(_MAX_DELAY, 0.05 * 2**self.holders_lost) if self.holders_lost else 0.0
        self.holders_lost = min(10, self.holders_lost + 1)
        _log.error("the holder is gone: starting another in %.1f s", delay)
        await trio.sleep(delay)
        self.holder_began = trio.current_time()
        self._start_holder()

    def _start_holder(self) -> None:
        """Have another holder started, with this server as its server.

        Without leaving the loop: what is kept while the state is handed over would be lost.
        """
        with contextlib.ExitStack() as passed:
            try:
                ours, theirs = Channel.pair()
                passed.callback(theirs.close)
                pidfd = os.pidfd_open(os.getpid())
                passed.callback(os.close, pidfd)
                understudy.call(self.kept, pidfd, theirs)
            except OSError as error:
                _log.error("no other holder can be started: %s", error)
                return
        self.channel.close()
        self.channel = ours


def _listener(fd: int) -> trio.SocketListener:
    """Return a listening socket that others have open, too."""
    listener = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(fd)))
    return trio.SocketListener(listener)


def _attach(session: Session, operations: SnapshotOperations) -> None:
    """Have libfuse serve a device whose INIT was answered already.

    libfuse insists on an INIT of its own, so it is given a pipe that holds the kernel's; while it
    handles that, the device takes the pipe's place. Its answer reaches the kernel as one to a
    request that is long done, and is ignored.
    """
    inlet, outlet = os.pipe()
    os.write(outlet, session.init)
    os.close(outlet)
    operations.on_init = partial(os.dup2, session.fd, inlet, inheritable=False)
    pyfuse3.init(operations, f"/dev/fd/{inlet}", set(pyfuse3.default_options))


def _hold_little_memory() -> None:
    """Give freed frames back to the system, and leave start-up's objects out of collections.

    glibc would raise its threshold to the largest block it has seen and keep megabytes in every
    thread's arena.
    """
    gc.collect()
    gc.freeze()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 32 << 20)
        library.mallopt(_M_ARENA_MAX, 2)
