"""The node server's control: which snapshots it serves, for which mounts.

Each mount is a lease: kept by the holder, given back by whoever unmounts, and taken back when the
mount is found gone. The server itself mounts nothing and looks at no mount but in the kernel's
tables, so that it never waits for itself.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import trio

import envstore
from envstore.errors import EnvstoreError, UnavailableError, UsageError
from envstore.fuse.content import load_content
from envstore.fuse.fast import prepare_fast_path
from envstore.fuse.keeping import LEASE, Keepsake
from envstore.fuse.mountinfo import find_mount, mountpoints_in
from envstore.fuse.overlay import probe
from envstore.fuse.sockets import MAX_LINE, told
from envstore.fuse.volumes import Volume, Volumes, subtree

_CHECK_SECONDS = 10.0
_ASK_WITHIN = 10.0
_LONGEST = 4096
_THREADS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """One mount: of what, where, in which mount name space (an inode), since when (RFC 3339).

    ``prefix`` is the path that it is made for.
    """

    slot: int
    target: str
    name: str
    namespace: int
    started: str
    prefix: str = ""


class Node:
    """Answers at the control socket. Belongs to one trio run."""

    def __init__(
        self,
        volumes: Volumes,
        root: str,
        keep: Callable[[str, Keepsake], None],
        drop: Callable[[str], None],
        grace: float,
    ) -> None:
        """Serve ``volumes``, whose file system is mounted on ``root``.

        A mount that is seen nowhere for ``grace`` seconds is gone.
        """
        self._volumes = volumes
        self._root = root
        self._keep = keep
        self._drop = drop
        self._grace = grace
        self._leases: dict[str, Lease] = {}
        self._seen: dict[str, float] = {}
        # Apart from the threads of readers, whom no store that somebody wants to mount may delay.
        self._threads = trio.CapacityLimiter(_THREADS)
        self._fast: str | None = "not tried"

    def restore(self, key: str, keepsake: Keepsake) -> None:
        """Take over a lease that another server has given."""
        identity = key.removeprefix(LEASE)
        self._leases[identity] = Lease(**keepsake.body)
        self._seen[identity] = time.monotonic()

    async def run(self, listener: trio.SocketListener) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check_leases)
            await trio.serve_listeners(self._converse, [listener], handler_nursery=nursery)

    async def _converse(self, stream: trio.SocketStream) -> None:
        """Answer one question. Nothing that goes wrong may end the server."""
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                try:
                    answer = await self._answer(await _question(stream))
                except EnvstoreError as error:
                    answer = {"error": told(error)}
                except OSError as error:
                    answer = {"error": told(EnvstoreError(str(error)))}
                except Exception as error:  # noqa: BLE001 - whatever was asked, others go on
                    answer = {"error": told(UsageError(f"not a question: {error!r}"))}
                await stream.send_all(json.dumps(answer).encode())

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question["ask"]:
            case "mount":
                return await self._mount(question)
            case "unmounted":
                self._end(str(question["id"]), lazy=bool(question.get("lazy")))
                return {}
            case "state":
                return {"state": self._state()}
            case "status":
                return self.describe()
            case asked:
                raise UsageError(f"{asked!r} is not known here")

    async def _mount(self, question: dict[str, Any]) -> dict[str, Any]:
        words = {name: str(question[name]) for name in ("store", "ref", "target")}
        words["profile"] = str(question.get("profile", ""))
        words["prefix"] = str(question.get("prefix") or words["target"])
        for name, word in words.items():
            if len(word) > _LONGEST:
                raise UsageError(f"{name} is longer than {_LONGEST}")
        ref, namespace = words["ref"], int(question["namespace"])
        if find_mount(self._root) is None:
            raise UnavailableError("the node server is ending", hint="mount without it: --node off")
        prefix = os.fsencode(words["prefix"])
        volume = await self._load(words["store"], ref, prefix, words["profile"])
        # Taken in the same step, so that nobody drops it in between.
        started = datetime.now(UTC).isoformat(timespec="seconds")
        lease = Lease(volume.slot, words["target"], ref, namespace, started, words["prefix"])
        identity = secrets.token_hex(8)
        self._leases[identity] = lease
        self._seen[identity] = time.monotonic()
        self._keep(LEASE + identity, Keepsake(_encoded(lease)))
        content = volume.content
        found = {
            "id": identity,
            "root": self._root,
            "subtree": os.fsdecode(subtree(volume.slot, content)),
            "snapshot": content.snapshot.hex(),
            "manifest": content.manifest.hex(),
            "store": volume.keepsake.body["store"],
            "fast": None,
        }
        if question.get("fast_path", "auto") != "off":
            try:
                found["fast"] = await self._prepare_fast(volume)
            except EnvstoreError as error:
                if question.get("fast_path") == "on":
                    self._end(identity)
                    raise
                _log.warning("no fast path for %s: %s", ref, error)
        return found

    async def _load(self, url: str, ref: str, prefix: bytes, profile: str) -> Volume:
        volumes, run = self._volumes, partial(trio.to_thread.run_sync, limiter=self._threads)
        repository = await run(volumes.repository, url)
        snapshot = await run(repository.resolve, ref)
        manifest = (await run(repository.snapshot, snapshot)).manifest
        domain = repository.config.id
        served = volumes.volume(volumes.find(domain, manifest, prefix))
        if served is not None:
            return served
        async with volumes.loading:
            slot = volumes.find(domain, manifest, prefix)
            served = volumes.volume(slot)
            if served is None:
                content = await run(load_content, repository, snapshot, ref, prefix)
                served = await volumes.plant(slot, repository, content)
                volumes.follow_profile(served, repository, profile)
        return served

    async def _prepare_fast(self, volume: Volume) -> dict[str, Any]:
        cache = self._volumes.cache
        if self._fast is not None:
            self._fast = await trio.to_thread.run_sync(probe, cache.root)
            if self._fast is not None:
                raise EnvstoreError(self._fast)
        return await trio.to_thread.run_sync(prepare_fast_path, volume.content, cache)

    def _end(self, identity: str, *, lazy: bool = False) -> None:
        """Take a lease back; a snapshot without any goes, unless somebody may still be using it."""
        lease = self._leases.pop(identity, None)
        self._seen.pop(identity, None)
        if lease is None:
            return
        self._drop(LEASE + identity)
        if not lazy and all(other.slot != lease.slot for other in self._leases.values()):
            self._volumes.retire(lease.slot)

    def _state(self) -> str:
        return "serving" if find_mount(self._root) else "ending"

    def describe(self) -> dict[str, Any]:
        """Return every mount and what was counted of its snapshot, as JSON."""
        mounts = []
        counts: dict[int, dict[str, Any]] = {}
        for identity, lease in self._leases.items():
            volume = self._volumes.volume(lease.slot)
            if volume is not None:
                counted = counts.get(lease.slot)
                if counted is None:
                    # Takes milliseconds, and many mounts may be of one snapshot.
                    counted = volume.metrics.report(volume.reader.used())
                    counts[lease.slot] = counted
                mounts.append(
                    {
                        "id": identity,
                        "mountpoint": lease.target,
                        "ref": lease.name,
                        "digest": volume.content.snapshot.hex(),
                        "manifest": volume.content.manifest.hex(),
                        "started": lease.started,
                        "prefix": lease.prefix,
                        **counted,
                    }
                )
        cache, totals = self._volumes.cache, self._volumes.report()
        del totals["latency"]  # long, and there for whoever asks for metrics
        return {
            "state": self._state(),
            "root": self._root,
            "server_pid": os.getpid(),
            "version": envstore.__version__,
            "mounts": mounts,
            "snapshots": len({one.slot for one in self._leases.values()}),
            "cache": {"bytes": cache.filled(), "capacity": cache.capacity},
            "totals": totals,
        }

    async def _check_leases(self) -> None:
        """Take leases back whose mounts have gone without a word."""
        while True:
            await trio.sleep(min(_CHECK_SECONDS, self._grace / 4))
            spaces = {lease.namespace for lease in self._leases.values()}
            with suppress(OSError):
                mounted = await trio.to_thread.run_sync(mountpoints_in, spaces)
                now = time.monotonic()
                for identity, lease in list(self._leases.items()):
                    if lease.target in mounted.get(lease.namespace, ()):
                        self._seen[identity] = now
                    elif now - self._seen[identity] > self._grace:
                        _log.info("the mount on %s has gone", lease.target)
                        self._end(identity)


def _encoded(lease: Lease) -> dict[str, Any]:
    return {name: getattr(lease, name) for name in Lease.__slots__}


async def _question(stream: trio.SocketStream) -> dict[str, Any]:
    """Return the one line of JSON that was sent."""
    data = bytearray()
    with trio.fail_after(_ASK_WITHIN):
        while not data.endswith(b"\n"):
            piece = await stream.receive_some(1 << 16)
            if not piece or len(data) > MAX_LINE:
                raise UsageError("the question was cut off")
            data += piece
    question = json.loads(data)
    if not isinstance(question, dict):
        raise UsageError("a question is a JSON object")
    return question
