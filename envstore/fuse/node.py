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
from typing import Any

import trio

import envstore
from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.content import load_content
from envstore.fuse.fast import prepare_fast_path
from envstore.fuse.keeping import Keepsake
from envstore.fuse.mountinfo import mountpoints_in
from envstore.fuse.overlay import probe
from envstore.fuse.sockets import MAX_LINE, told
from envstore.fuse.volumes import Volume, Volumes, subtree

LEASE = "lease/"
"""What the keepsakes of mounts are called, before their ids."""

CHECK_SECONDS = 10.0
_GRACE_SECONDS = 60.0
_ASK_WITHIN = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """One mount: of what, where, in which mount name space (an inode), since when (RFC 3339)."""

    slot: int
    target: str
    name: str
    namespace: int
    started: str


class Node:
    """Answers at the control socket. Belongs to one trio run."""

    def __init__(
        self,
        volumes: Volumes,
        root: str,
        keep: Callable[[str, Keepsake], None],
        drop: Callable[[str], None],
    ) -> None:
        """Serve ``volumes``, whose file system is mounted on ``root``."""
        self._volumes = volumes
        self._root = root
        self._keep = keep
        self._drop = drop
        self._leases: dict[str, Lease] = {}
        self._seen: dict[str, float] = {}
        self._loading = trio.Lock()
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
                except (ValueError, KeyError, TypeError) as error:
                    answer = {"error": told(UsageError(f"not a question: {error!r}"))}
                except OSError as error:
                    answer = {"error": told(EnvstoreError(str(error)))}
                await stream.send_all(json.dumps(answer).encode())

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question["ask"]:
            case "mount":
                return await self._mount(question)
            case "unmounted":
                self._end(str(question["id"]), lazy=bool(question.get("lazy")))
                return {}
            case "status":
                return self.describe()
            case asked:
                raise UsageError(f"{asked!r} is not known here")

    async def _mount(self, question: dict[str, Any]) -> dict[str, Any]:
        url, ref = str(question["store"]), str(question["ref"])
        lease = Lease(
            0,
            str(question["target"]),
            ref,
            int(question["namespace"]),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # One at a time: two that want the same snapshot must not both load it.
        async with self._loading:
            volume = await self._load(url, ref, str(question.get("profile", "")))
            # Taken before the answer, so that nobody drops it in between.
            identity = secrets.token_hex(8)
            lease = Lease(volume.slot, lease.target, ref, lease.namespace, lease.started)
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
                if question["fast_path"] == "on":
                    self._end(identity)
                    raise
                _log.warning("no fast path for %s: %s", ref, error)
        return found

    async def _load(self, url: str, ref: str, profile: str) -> Volume:
        volumes = self._volumes
        repository = await trio.to_thread.run_sync(volumes.repository, url)
        snapshot = await trio.to_thread.run_sync(repository.resolve, ref)
        manifest = (await trio.to_thread.run_sync(repository.snapshot, snapshot)).manifest
        slot = volumes.find(repository.config.id, manifest)
        volume = volumes.volume(slot)
        if volume is None:
            content = await trio.to_thread.run_sync(load_content, repository, snapshot, ref)
            volume = volumes.add(slot, repository, content)
            await volumes.run_supplies()
            volumes.follow_profile(volume, repository, profile)
        return volume

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

    def describe(self) -> dict[str, Any]:
        """Return every mount and what was counted of its snapshot, as JSON."""
        mounts = []
        for identity, lease in self._leases.items():
            volume = self._volumes.volume(lease.slot)
            if volume is not None:
                counted = volume.metrics.report(volume.reader.used())
                mounts.append(
                    {
                        "id": identity,
                        "mountpoint": lease.target,
                        "ref": lease.name,
                        "digest": volume.content.snapshot.hex(),
                        "manifest": volume.content.manifest.hex(),
                        "started": lease.started,
                        **counted,
                    }
                )
        return {
            "state": "serving",
            "server_pid": os.getpid(),
            "version": envstore.__version__,
            "mounts": mounts,
            "snapshots": len({one.slot for one in self._leases.values()}),
        }

    async def _check_leases(self) -> None:
        """Take leases back whose mounts have gone without a word."""
        while True:
            await trio.sleep(CHECK_SECONDS)
            spaces = {lease.namespace for lease in self._leases.values()}
            with suppress(OSError):
                mounted = await trio.to_thread.run_sync(mountpoints_in, spaces)
                now = time.monotonic()
                for identity, lease in list(self._leases.items()):
                    if lease.target in mounted.get(lease.namespace, ()):
                        self._seen[identity] = now
                    elif now - self._seen[identity] > _GRACE_SECONDS:
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
