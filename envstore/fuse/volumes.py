"""The snapshots a server answers for: where each comes from, and how its files are read.

What is needed to go on after a restart is kept by the holder (see ``Keepsake``): a snapshot's
image, and the memory of which ids the kernel was told. The store itself is opened when a file is
read that the cache does not hold.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import trio

from envstore.errors import CorruptError, EnvstoreError, UnsupportedFormatError
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content, content_from_image, load_content
from envstore.fuse.fast import wanted_fast_path
from envstore.fuse.forest import SECRET_SIZE, Forest, Plot
from envstore.fuse.holds import HOLD, Holds
from envstore.fuse.keeping import Keepsake, MountRequest
from envstore.fuse.ledger import read_counts, write_counts
from envstore.fuse.metrics import Metrics
from envstore.fuse.prefetch import ProfileSearch, follow
from envstore.fuse.promote import Promoter
from envstore.fuse.recorder import Recorder
from envstore.fuse.supplies import KEYS, Source, Supplies, prefix_of
from envstore.fuse.turns import Turns
from envstore.fuse.volume import Volume, make_volume, subtree, told_memory
from envstore.store.cache import BlobCache, default_cache
from envstore.store.leases import here
from envstore.store.repository import Repository

FAST = "fast"
"""The keepsake that says what the fast path is laid of."""

SLOT = "slot/"
"""What the keepsakes of snapshots are called, before their slot's number."""

_KEY = "key"

_log = logging.getLogger(__name__)


class Volumes:
    """All snapshots of one server. The blocking methods are for before ``start``."""

    def __init__(
        self,
        request: MountRequest,
        keep: Callable[[str, Keepsake], None],
        drop: Callable[[str], None],
    ) -> None:
        """Serve what ``request`` asks for.

        ``keep`` is told what must outlive this server, and ``drop`` what of that need not any more.
        """
        self.metrics = Metrics()
        self.cache: BlobCache = default_cache()
        self._request = request
        self._keep = keep
        self._complaints = Complaints(_log)
        self.supplies = Supplies(self.cache, self.metrics, self._complaints, request.patience, keep)
        what = "node server" if request.node else f"mount {request.mountpoint}"
        self.holds = Holds(here(what), keep, drop, self._complaints)
        """The leases of what is served, in the stores."""
        self._volumes: dict[int, Volume] = {}
        self._nursery: trio.Nursery | None = None
        self._search: ProfileSearch | None = None
        self._recorder: Recorder | None = None
        self._promoter: Promoter | None = None
        self._laid = False
        self._dormant: dict[int, Keepsake] = {}
        self._outdated: dict[int, Keepsake] = {}
        self._reviving = Turns()
        self.loading = trio.Lock()
        """For whoever adds a snapshot while others are served."""
        self._secret = b""
        self.forest = Forest(b"")

    # --- before serving -------------------------------------------------------------------------

    def load(self) -> dict[str, Any]:
        """Load what the request names; returns what the mount's record should say of it.

        Raises ``NotFoundError``, ``CorruptError``, ``UnavailableError``.
        """
        self._secret = secrets.token_bytes(SECRET_SIZE)
        self._keep(_KEY, Keepsake({"key": self._secret.hex()}))
        self.forest = Forest(self._secret)
        request = self._request
        if request.node:
            return {"name": "node", "snapshot": "", "manifest": "", "store": "", "fast": False}
        repository = Repository.open(request.store, self.cache)
        snapshot = repository.resolve(request.ref)
        repository.snapshot(snapshot)  # two will want it now, and find it in the cache
        self._search = ProfileSearch(repository, snapshot, request.profile)
        content = load_content(repository, snapshot, request.ref, os.fsencode(request.prefix))
        parts = wanted_fast_path(request, content, self.cache)
        source = Source(repository.objects.url)
        self.add(0 if parts is None else 1, source, repository, content)
        if parts is not None:
            parts["subtree"] = subtree(1, content).decode()
            self._keep(FAST, Keepsake(parts))
            self._laid = True
        return {
            "name": content.name,
            "snapshot": content.snapshot.hex(),
            "manifest": content.manifest.hex(),
            "store": repository.objects.url,
            "fast": parts is not None,
        }

    def add(
        self,
        slot: int,
        source: Source,
        repository: Repository,
        content: Content,
        told: int | None = None,
    ) -> Volume:
        """Serve a snapshot that was loaded, in a slot; ``told`` is the memory of a former time."""
        self._dormant.pop(slot, None)
        body = {
            "store": source.url,
            "given": source.given,
            "domain": repository.config.id,
            "name": content.name,
            "snapshot": content.snapshot.hex(),
            "manifest": content.manifest.hex(),
            "prefix": os.fsdecode(content.prefix),
        }
        files = [content.fd]
        if slot:
            files.append(told_memory(content.tree) if told is None else told)
        keepsake = Keepsake(body, tuple(files))
        self.supplies.supply(source, repository)
        volume = self._volume(slot, content, keepsake)
        self._keep(f"{SLOT}{slot}", keepsake)
        return volume

    def restore(self, key: str, keepsake: Keepsake) -> None:
        """Take over what another server had kept."""
        if key == _KEY:
            self._secret = bytes.fromhex(keepsake.body["key"])
            self.forest = Forest(self._secret)
        elif key == FAST:
            self._laid = True
        elif key.startswith(KEYS):
            self.supplies.restore(keepsake)
        elif key.startswith(HOLD):
            self.holds.restore(key, keepsake)
        elif key.startswith(SLOT):
            slot = int(key.removeprefix(SLOT))
            body = keepsake.body
            self._close(slot)
            self._dormant.pop(slot, None)
            outdated = self._outdated.pop(slot, None)
            for fd in outdated.files if outdated else ():
                os.close(fd)
            if not keepsake.files:
                self._dormant[slot] = keepsake
                return
            snapshot = bytes.fromhex(body["snapshot"])
            try:
                content = content_from_image(keepsake.files[0], body["name"], snapshot)
            except (CorruptError, UnsupportedFormatError) as error:
                _log.warning("building the tree anew: %s", error)
                self._outdated[slot] = keepsake
            else:
                self._volume(slot, content, keepsake)

    def _rebuild(self) -> None:
        """Load snapshots again whose images another version of this code has made.

        One among others that cannot be had now comes back when somebody wants it.
        """
        while self._outdated:
            slot, keepsake = self._outdated.popitem()
            body = keepsake.body
            try:
                content = self._reload(Source.kept(body), body)[1]
            except EnvstoreError as error:
                if not self._request.node:
                    raise
                _log.error("cannot build the tree of %s: %s", body["name"], error)
                self._dormant[slot] = Keepsake(body)
            else:
                fresh = Keepsake(body, (content.fd, *keepsake.files[1:]))
                self._volume(slot, content, fresh)
                self._keep(f"{SLOT}{slot}", fresh)
                os.close(keepsake.files[0])

    def prepare(self) -> None:
        """Do ahead what takes time: get ready to ask the stores."""
        self.supplies.prepare()
        self._rebuild()

    # --- while serving --------------------------------------------------------------------------

    async def start(self, nursery: trio.Nursery) -> None:
        """Begin to fetch for readers, with tasks in ``nursery``."""
        self._nursery = nursery
        self._rebuild()
        await self.run_supplies()
        self.holds.start(nursery)
        self._hold()
        if self._laid or self._request.node:
            self._promoter = Promoter(self.cache, self.metrics.requests.total)
            nursery.start_soon(self._promoter.run)
        if self._search is not None:
            volume = next(iter(self._volumes.values()))
            nursery.start_soon(self._follow, volume, self._search)

    async def _follow(self, volume: Volume, search: ProfileSearch) -> None:
        content = volume.content
        room = self.cache.capacity // 2
        loader, reader, account = volume.supply.loader, volume.reader, volume.metrics
        try:
            await follow(search, content.tree, volume.moved, loader, reader, room, account)
        except Exception:  # noqa: BLE001 - the mount must go on without this
            _log.exception("nothing more is fetched ahead of %s", content.name)

    def read_now(self, slot: int, node: int, offset: int, size: int) -> bytes | None:
        """Return a range of a file, clipped to its end; ``None`` if that takes waiting."""
        return self._volumes[slot].reader.read_now(node, offset, size)

    async def read(self, slot: int, node: int, offset: int, size: int) -> bytes:
        """Return a range of a file, clipped to its end. Raises ``OSError``."""
        return await self._volumes[slot].reader.read(node, offset, size)

    def opened(self, slot: int, node: int) -> None:
        """Learn that a file was opened, which makes it worth having as a whole on disk."""
        if slot and self._promoter is not None:
            content = self._volumes[slot].content
            self._promoter.opened(content.tree, content.locations, node)

    async def plant(
        self, slot: int, source: Source, repository: Repository, content: Content
    ) -> Volume:
        """Serve a snapshot that was loaded, while others are served; call with ``loading`` held.

        If it was here before, what the kernel still knows of it leads to it again.
        """
        told = None
        if slot in self._dormant:
            # In a thread: there may be a million files to be remembered.
            told = await trio.to_thread.run_sync(self._recalled, repository, content)
        volume = self.add(slot, source, repository, content, told)
        await self.run_supplies()
        self._hold()
        return volume

    def _hold(self) -> None:
        """Have leases of all that is served, and of nothing else."""
        self.holds.settle(
            {
                (Source.kept(volume.keepsake.body), volume.content.snapshot): volume.supply.objects
                for volume in self._volumes.values()
            }
        )

    def lease(self, slot: int) -> Mapping[str, Any]:
        """Return how the lease of what a slot serves is; see ``Holds.describe``."""
        volume = self._volumes.get(slot)
        if volume is None:
            return Holds.NONE
        return self.holds.describe(Source.kept(volume.keepsake.body), volume.content.snapshot)

    def _recalled(self, repository: Repository, content: Content) -> int:
        fd = told_memory(content.tree)
        with mmap.mmap(fd, 0) as memory, memoryview(memory).cast("I") as told:
            domain = repository.config.id.encode()
            self.forest.recall(Plot(b"", content.tree, domain, told))
        return fd

    async def revive(self, slot: int, known: Callable[[], bool]) -> None:
        """Bring back a snapshot that was dropped while the kernel still knew of it.

        Of an id that snapshots share it cannot be told which, so one after another comes back, the
        last that was dropped first, until what is looked for is ``known``.
        """
        for one in [slot] if slot in self._dormant else [*reversed(self._dormant)]:
            if known():
                return
            async with self._reviving.of(one):
                if one in self._dormant:
                    await self._revive(one, self._dormant[one].body)

    async def _revive(self, slot: int, body: dict[str, Any]) -> None:
        source = Source.kept(body)
        try:
            repository, content = await trio.to_thread.run_sync(self._reload, source, body)
        except EnvstoreError as error:
            self._complaints.say(str(error), f"cannot bring back {body['name']}")
            return
        async with self.loading:
            if slot in self._volumes:  # somebody has mounted it meanwhile
                os.close(content.fd)
                return
            _log.info("bringing back %s", body["name"])
            await self.plant(slot, source, repository, content)

    def _reload(self, source: Source, body: dict[str, Any]) -> tuple[Repository, Content]:
        repository = self.supplies.repository(source)
        snapshot = bytes.fromhex(body["snapshot"])
        return repository, load_content(repository, snapshot, body["name"], prefix_of(body))

    def served(self, source: Source, snapshot: bytes, prefix: bytes) -> Volume | None:
        """Return a snapshot if it is served from there, for that prefix. Asks nobody."""
        for volume in self._volumes.values():
            body = volume.keepsake.body
            if (
                volume.content.snapshot == snapshot
                and volume.content.prefix in (b"", prefix)
                and Source.kept(body) == source
            ):
                return volume
        return None

    def find(self, source: Source, domain: str, manifest: bytes, prefix: bytes) -> int:
        """Return the slot a snapshot has or had, or else a new one.

        What is the same at every prefix has one slot, else each prefix has one. ``domain`` is the
        store's id. Another URL may lie about that, so what is served from one is not to be had
        by asking for it at another.
        """
        bodies = {slot: volume.keepsake.body for slot, volume in self._volumes.items()}
        bodies |= {slot: keepsake.body for slot, keepsake in self._dormant.items()}
        wanted = source, domain, manifest.hex()
        for slot, body in bodies.items():
            found = Source.kept(body), body["domain"], body["manifest"]
            if found == wanted and prefix_of(body) in (b"", prefix):
                return slot
        return max(bodies, default=0) + 1

    def volume(self, slot: int) -> Volume | None:
        """Return the snapshot in a slot, if it is served."""
        return self._volumes.get(slot)

    def described(self, slot: int) -> tuple[bytes, bytes]:
        """Return the digests of the snapshot that a slot is or was for, and of its manifest."""
        volume = self._volumes.get(slot)
        body = (volume.keepsake if volume else self._dormant[slot]).body
        return bytes.fromhex(body["snapshot"]), bytes.fromhex(body["manifest"])

    def retire(self, slot: int) -> None:
        """Serve a snapshot no longer, but remember where it was."""
        volume = self._close(slot)
        if volume is not None:
            _log.info("dropping %s: its last mount is gone", volume.content.name)
            self._dormant[slot] = Keepsake(volume.keepsake.body)
            self._keep(f"{SLOT}{slot}", self._dormant[slot])
            self._hold()

    def _close(self, slot: int) -> Volume | None:
        volume = self._volumes.pop(slot, None)
        if volume is not None:
            if slot:  # one that is alone stays until it is replaced
                self.forest.fell(slot)
            if self._promoter is not None:
                self._promoter.forget(volume.content.tree)
            volume.close()
        return volume

    async def run_supplies(self) -> None:
        """Begin to fetch from stores that were added."""
        if self._nursery is not None:
            await self.supplies.run(self._nursery)

    def follow_profile(self, volume: Volume, repository: Repository, profile: str) -> None:
        """Begin to fetch ahead what a profile names."""
        if self._nursery is not None:
            search = ProfileSearch(repository, volume.content.snapshot, profile)
            self._nursery.start_soon(self._follow, volume, search)

    def save(self, fd: int) -> None:
        """Leave all counts in ``fd``, for the server that comes next."""
        volumes = {str(slot): one.metrics.state() for slot, one in self._volumes.items() if slot}
        total = self.metrics.state()
        try:
            write_counts(fd, {"server": total, "volumes": volumes})
        except ValueError:  # thousands of snapshots: the totals matter more than each
            write_counts(fd, {"server": total, "volumes": {}})

    def resume(self, fd: int) -> None:
        """Go on from the counts that an earlier server left in ``fd``, if one did."""
        state = read_counts(fd)
        if state is not None:
            self.metrics.resume(state["server"])
            for slot, volume in self._volumes.items():
                if slot and str(slot) in state["volumes"]:
                    volume.metrics.resume(state["volumes"][str(slot)])

    def identity(self) -> dict[str, str]:
        """Return mount point, ref and digest of what the request was for."""
        content = next(iter(self._volumes.values())).content
        return {
            "mountpoint": self._request.mountpoint,
            "ref": content.name,
            "digest": content.snapshot.hex(),
        }

    def report(self) -> dict[str, Any]:
        """Return everything counted as one JSON object."""
        used = [volume.reader.used() for volume in self._volumes.values()]
        total = (sum(raw for raw, _ in used), sum(stored for _, stored in used))
        apart = [volume.metrics for slot, volume in self._volumes.items() if slot]
        found = self.metrics.including(apart).report(total)
        if not self._request.node:
            found["store_lease"] = self.lease(next(iter(self._volumes)))
        return {**found, "recording": self._recorder.report()} if self._recorder else found

    # --- parts ----------------------------------------------------------------------------------

    def _volume(self, slot: int, content: Content, keepsake: Keepsake) -> Volume:
        body = keepsake.body
        if self._request.record:
            self._recorder = Recorder(content.tree, content.locations)
        volume = make_volume(
            slot,
            content,
            keepsake,
            self.supplies.supply(Source.kept(body)),
            Metrics() if slot else self.metrics,
            self.cache,
            self._complaints,
            self._request.patience,
            self._recorder.watch if self._recorder else None,
            self._moved,
        )
        if slot:
            memory = mmap.mmap(keepsake.files[1], 0)
            told = memoryview(memory).cast("I")
            domain = body["domain"].encode()
            self.forest.plant(slot, Plot(subtree(slot, content), content.tree, domain, told))
        else:
            self.forest = Forest(self._secret, content.tree)
        self._volumes[slot] = volume
        return volume

    def _moved(self, volume: Volume) -> None:
        """Let the next server know, too, where the chunks of a snapshot lie now."""
        self._keep(f"{SLOT}{volume.slot}", volume.keepsake)
