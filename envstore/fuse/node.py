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
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from traceback import extract_tb
from typing import Any

import trio

import envstore
from envstore.errors import ConflictError, EnvstoreError, UnavailableError, UsageError
from envstore.fuse.bringing import Bringer
from envstore.fuse.keeping import LEASE, Keepsake
from envstore.fuse.lease import KEPT, Asked, Lease
from envstore.fuse.metrics import Metrics
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.peers import is_ours
from envstore.fuse.records import RecordFiles
from envstore.fuse.sockets import MAX_LINE, told
from envstore.fuse.turns import Turns
from envstore.fuse.volume import Volume, subtree
from envstore.fuse.volumes import Volumes

_CHECK_SECONDS = 10.0
_ASK_WITHIN = 10.0

_log = logging.getLogger(__name__)


class Node:
    """Answers at the control socket. Belongs to one trio run."""

    def __init__(
        self,
        volumes: Volumes,
        root: str,
        keep: Callable[[str, Keepsake], None],
        drop: Callable[[str], None],
        grace: float,
        restarts: Callable[[], int],
        look: Callable[[], None],
        no_fast_path: str = "",
    ) -> None:
        """Serve ``volumes``, whose file system is mounted on ``root``.

        A mount that is seen nowhere for ``grace`` seconds is gone. ``restarts`` tells how many
        servers have died before. ``look`` has the holder look, who then tells what is ``missing``.
        """
        self._volumes = volumes
        self._root = root
        self._keep = keep
        self._drop = drop
        self._grace = grace
        self._leases: dict[str, Lease] = {}
        self._seen: dict[str, float] = {}
        self._restarts = restarts
        self._control = str(RecordFiles(root).control)
        self._look = look
        self._bringer = Bringer(volumes, no_fast_path)
        self._turns = Turns()

    def restore(self, key: str, keepsake: Keepsake) -> None:
        """Take over a lease that another server has given."""
        identity = key.removeprefix(LEASE)
        self._leases[identity] = Lease.kept(keepsake.body)
        self._seen[identity] = time.monotonic()

    async def run(self, listener: trio.SocketListener) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check_leases)
            await trio.serve_listeners(self._let_in, [listener], handler_nursery=nursery)

    async def _let_in(self, stream: trio.SocketStream) -> None:
        """Answer one question of this user's or of root's."""
        if is_ours(stream.socket):
            await self._converse(stream)
        else:
            await stream.aclose()

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
                except KeyError as error:
                    answer = {"error": told(UsageError(f"not a question: {error} is missing"))}
                except Exception as error:  # noqa: BLE001 - whatever was asked, others go on
                    # Only its kind: some tell what they were about, and that may be a secret.
                    kind, place = type(error).__name__, extract_tb(error.__traceback__)[-1]
                    _log.warning("no answer: %s in %s:%s", kind, place.name, place.lineno)
                    answer = {"error": told(UsageError(f"not a question: {kind}"))}
                await stream.send_all(json.dumps(answer).encode())

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question["ask"]:
            case "mount":
                return await self._mount(Asked.parse(question))
            case "unmounted":
                identity = str(question["id"])
                async with self._turns.of(identity):
                    self._end(identity, lazy=bool(question.get("lazy")))
                return {}
            case "state":
                return {"state": self._state(), "control": self._control}
            case "status":
                return self.describe()
            case asked:
                raise UsageError(f"{asked!r} is not known here")

    async def _mount(self, asked: Asked) -> dict[str, Any]:
        if find_mount(self._root) is None:
            raise UnavailableError("the node server is ending", hint="mount without it: --node off")
        identity = asked.identity or secrets.token_hex(8)
        async with self._turns.of(identity):
            lease = self._leases.get(identity)
            if lease is None:
                volume = await self._bringer.volume(asked, await self._bringer.prove(asked))
                # Taken in the same step, so that nobody drops it in between.
                self._give(identity, asked.lease, volume)
            elif not lease.same_words(asked.lease):
                raise ConflictError(f"the lease {identity} was given for something else")
            else:
                snapshot = self._volumes.described(lease.slot)[0]
                await self._bringer.prove_again(asked, snapshot)
                volume = await self._bringer.volume(asked, snapshot)
            try:
                return await self._parts(identity, asked.lease, volume)
            except EnvstoreError:
                if lease is None:
                    self._end(identity)
                raise

    def _give(self, identity: str, words: Lease, volume: Volume) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        lease = replace(words, slot=volume.slot, started=started)
        self._leases[identity] = lease
        self._seen[identity] = time.monotonic()
        self._keep(LEASE + identity, Keepsake(lease.encode()))

    async def _parts(self, identity: str, lease: Lease, volume: Volume) -> dict[str, Any]:
        """Return all that it takes to show what is served under a lease."""
        content = volume.content
        totals = content.tree.totals
        found = {
            "id": identity,
            "root": self._root,
            "subtree": os.fsdecode(subtree(volume.slot, content)),
            "snapshot": content.snapshot.hex(),
            "manifest": content.manifest.hex(),
            "store": volume.keepsake.body["store"],
            "entries": totals.entries,
            "bytes": totals.logical,
            "control": self._control,
            "fast": None,
        }
        if lease.fast_path != "off":
            try:
                found["fast"] = await self._bringer.fast_parts.of(content)
            except EnvstoreError as error:
                if lease.fast_path == "on":
                    raise
                _log.warning("no fast path for %s: %s", lease.name, error)
        return found

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
        counts: dict[int, dict[str, Any]] = {}
        for slot in {lease.slot for lease in self._leases.values()}:
            # Takes milliseconds, and many mounts may be of one snapshot.
            counts[slot] = self._counted(slot)
        mounts = [
            {
                "id": identity,
                "owner": lease.owner,
                "mountpoint": lease.target,
                "ref": lease.name,
                "url": lease.store,
                "started": lease.started,
                "prefix": lease.prefix,
                **counts[lease.slot],
            }
            for identity, lease in self._leases.items()
        ]
        cache, totals = self._volumes.cache, self._volumes.report()
        del totals["latency"]  # long, and there for whoever asks for metrics
        return {
            "state": self._state(),
            "root": self._root,
            "server_pid": os.getpid(),
            "version": envstore.__version__,
            "control": self._control,
            "restarts": self._restarts(),
            "mounts": mounts,
            "snapshots": len(counts),
            "cache": {"bytes": cache.filled(), "capacity": cache.capacity},
            "totals": totals,
        }

    def _counted(self, slot: int) -> dict[str, Any]:
        """Return what a snapshot is, and what was counted of it.

        ``bytes_fetched`` are the stored bytes that came in ``fetch_requests`` requests of its own.
        """
        volume = self._volumes.volume(slot)
        snapshot, manifest = self._volumes.described(slot)
        metrics = volume.metrics if volume else Metrics()
        return {
            "digest": snapshot.hex(),
            "manifest": manifest.hex(),
            "bytes_fetched": metrics.brought_bytes,
            "fetch_requests": metrics.brought_requests,
            "store_lease": self._volumes.lease(slot),
            **metrics.report(volume.reader.used() if volume else (0, 0)),
        }

    async def _check_leases(self) -> None:
        """Take leases back whose mounts have gone without a word."""
        while True:
            await trio.sleep(min(_CHECK_SECONDS, self._grace / 4))
            if any(lease.namespace != KEPT for lease in self._leases.values()):
                self._look()

    def missing(self, leases: Collection[str]) -> None:
        """Learn whose mounts were seen nowhere just now: the others' are there."""
        now = time.monotonic()
        for identity, lease in list(self._leases.items()):
            if identity not in leases:
                self._seen[identity] = now
            elif now - self._seen[identity] > self._grace:
                _log.info("the mount on %s has gone", lease.target)
                self._end(identity)


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
