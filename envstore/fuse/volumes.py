"""The snapshots a server answers for: where each comes from, and how its files are read.

What is needed to go on after a restart is kept by the holder (see ``Keepsake``): a snapshot's
image, and the memory of which ids the kernel was told. The store itself is opened when a file is
read that the cache does not hold.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from envstore.errors import CorruptError, EnvstoreError, UnsupportedFormatError
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content, content_from_image, load_content
from envstore.fuse.fast import prepare_fast_path
from envstore.fuse.forest import SECRET_SIZE, Forest, Plot, told_size
from envstore.fuse.keeping import Keepsake, MountRequest
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.overlay import probe
from envstore.fuse.prefetch import ProfileSearch, follow
from envstore.fuse.reader import Reader
from envstore.fuse.recorder import Recorder
from envstore.store.cache import BlobCache, default_cache
from envstore.store.fetch import FrameFetcher
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.deferred import DeferredObjects
from envstore.store.repository import Repository

FAST = "fast"
"""The keepsake that says what the fast path is laid of."""

_SECRET, _SLOT = "secret", "slot/"

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Supply:
    """One store, as a source of frames."""

    objects: ObjectStore
    fetcher: FrameFetcher
    loader: FrameLoader
    running: bool = False


@dataclass(slots=True, eq=False)
class Volume:
    """One snapshot being served, and what it needs again after a restart."""

    slot: int
    content: Content
    keepsake: Keepsake
    supply: _Supply
    reader: Reader
    metrics: Metrics


class Volumes:
    """All snapshots of one server. The blocking methods are for before ``start``."""

    def __init__(self, request: MountRequest, keep: Callable[[str, Keepsake], None]) -> None:
        """Serve what ``request`` asks for; ``keep`` is told what must outlive this server."""
        self.metrics = Metrics()
        self.cache: BlobCache = default_cache()
        self._request = request
        self._keep = keep
        self._complaints = Complaints(_log)
        self._supplies: dict[str, _Supply] = {}
        self._volumes: dict[int, Volume] = {}
        self._nursery: trio.Nursery | None = None
        self._search: ProfileSearch | None = None
        self._recorder: Recorder | None = None
        self._secret = b""
        self.forest = Forest(b"")

    # --- before serving -------------------------------------------------------------------------

    def load(self) -> dict[str, Any]:
        """Load what the request names; returns what the mount's record should say of it.

        Raises ``NotFoundError``, ``CorruptError``, ``UnavailableError``.
        """
        self._secret = secrets.token_bytes(SECRET_SIZE)
        self._keep(_SECRET, Keepsake({"secret": self._secret.hex()}))
        self.forest = Forest(self._secret)
        request = self._request
        if request.node:
            return {"name": "node", "snapshot": "", "manifest": "", "store": "", "fast": False}
        repository = Repository.open(request.store, self.cache)
        snapshot = repository.resolve(request.ref)
        repository.snapshot(snapshot)  # two will want it now, and find it in the cache
        self._search = ProfileSearch(repository, snapshot, request.profile)
        fast = self._wants_fast_path()
        content = self.add(1 if fast else 0, repository, snapshot, request.ref).content
        if fast:
            parts = {
                **prepare_fast_path(content, self.cache),
                "subtree": _name(1, content).decode(),
            }
            self._keep(FAST, Keepsake(parts))
        return {
            "name": content.name,
            "snapshot": content.snapshot.hex(),
            "manifest": content.manifest.hex(),
            "store": repository.objects.url,
            "fast": fast,
        }

    def add(self, slot: int, repository: Repository, snapshot: bytes, name: str) -> Volume:
        """Load a snapshot into a slot. Raises as ``load`` does."""
        content = load_content(repository, snapshot, name)
        body = {
            "store": repository.objects.url,
            "domain": repository.config.id,
            "name": content.name,
            "snapshot": content.snapshot.hex(),
        }
        files = [content.fd]
        if slot:
            told = os.memfd_create("envstore-told", os.MFD_CLOEXEC)
            os.ftruncate(told, told_size(content.tree))
            files.append(told)
        keepsake = Keepsake(body, tuple(files))
        if body["store"] not in self._supplies:
            self._supplies[body["store"]] = self._supply(repository.objects, repository.fetcher)
        volume = self._volume(slot, content, keepsake)
        self._keep(f"{_SLOT}{slot}", keepsake)
        return volume

    def restore(self, key: str, keepsake: Keepsake) -> None:
        """Take over what another server had kept."""
        if key == _SECRET:
            self._secret = bytes.fromhex(keepsake.body["secret"])
            self.forest = Forest(self._secret)
        elif key.startswith(_SLOT):
            slot = int(key.removeprefix(_SLOT))
            body = keepsake.body
            snapshot = bytes.fromhex(body["snapshot"])
            try:
                content = content_from_image(keepsake.files[0], body["name"], snapshot)
            except (CorruptError, UnsupportedFormatError) as error:
                _log.warning("building the tree anew: %s", error)
                self._rebuild(slot, keepsake, snapshot)
            else:
                self._volume(slot, content, keepsake)

    def _rebuild(self, slot: int, keepsake: Keepsake, snapshot: bytes) -> None:
        """Load a snapshot again whose image another version of this code has made."""
        body = keepsake.body
        repository = Repository.open(body["store"], self.cache)
        content = load_content(repository, snapshot, body["name"])
        fresh = Keepsake(body, (content.fd, *keepsake.files[1:]))
        self._volume(slot, content, fresh)
        self._keep(f"{_SLOT}{slot}", fresh)

    def drop(self, key: str) -> None:
        """Forget what is no longer kept."""
        if key.startswith(_SLOT):
            self.remove(int(key.removeprefix(_SLOT)))

    def prepare(self) -> None:
        """Do ahead what takes time: get ready to ask the stores."""
        for supply in self._supplies.values():
            with contextlib.suppress(EnvstoreError):
                supply.objects.size("config.json")

    # --- while serving --------------------------------------------------------------------------

    async def start(self, nursery: trio.Nursery) -> None:
        """Begin to fetch for readers, with tasks in ``nursery``."""
        self._nursery = nursery
        for supply in self._supplies.values():
            await self._run(supply)
        if self._search is not None:
            volume = next(iter(self._volumes.values()))
            nursery.start_soon(self._follow, volume, self._search)

    async def _follow(self, volume: Volume, search: ProfileSearch) -> None:
        content = volume.content
        room = self.cache.capacity // 2
        await follow(search, content.tree, content.locations, volume.supply.loader, room)

    def read_now(self, slot: int, node: int, offset: int, size: int) -> bytes | None:
        """Return a range of a file, clipped to its end; ``None`` if that takes waiting."""
        return self._volumes[slot].reader.read_now(node, offset, size)

    async def read(self, slot: int, node: int, offset: int, size: int) -> bytes:
        """Return a range of a file, clipped to its end. Raises ``OSError``."""
        return await self._volumes[slot].reader.read(node, offset, size)

    def opened(self, slot: int, node: int) -> None:
        """Learn that a file was opened."""

    async def revive(self, slot: int) -> bool:
        """Bring back a snapshot that was dropped. There is none before there is a node server."""
        return False

    def remove(self, slot: int) -> None:
        """Serve a snapshot no longer."""
        volume = self._volumes.pop(slot, None)
        if volume is not None:
            self.forest.fell(slot)
            for fd in volume.keepsake.files:
                os.close(fd)

    def report(self) -> dict[str, Any]:
        """Return everything counted as one JSON object."""
        fetched = [supply.fetcher for supply in self._supplies.values()]
        objects = [supply.objects for supply in self._supplies.values()]
        used = [volume.reader.used() for volume in self._volumes.values()]
        total = (sum(raw for raw, _ in used), sum(stored for _, stored in used))
        found = self.metrics.report(fetched[0], objects[0], total)
        return {**found, "recording": self._recorder.report()} if self._recorder else found

    def _wants_fast_path(self) -> bool:
        """Whether the mount is to be laid over an image; raises if it must be and cannot."""
        if self._request.fast_path == "off":
            return False
        reason = probe(self.cache.root)
        if reason is None:
            return True
        if self._request.fast_path == "on":
            raise UnsupportedFormatError(
                f"no fast path here: {reason}", hint="see: envstore doctor"
            )
        _log.info("no fast path here: %s", reason)
        return False

    # --- parts ----------------------------------------------------------------------------------

    def _volume(self, slot: int, content: Content, keepsake: Keepsake) -> Volume:
        body = keepsake.body
        supply = self._supplies.get(body["store"])
        if supply is None:
            objects = DeferredObjects(body["store"])
            supply = self._supply(objects, FrameFetcher(objects, self.cache))
            self._supplies[body["store"]] = supply
        if self._request.record:
            self._recorder = Recorder(content.tree, content.locations)
        reader = Reader(
            content.tree,
            content.locations,
            supply.loader,
            self.cache,
            self.metrics,
            self._complaints,
            self._recorder.watch if self._recorder else None,
        )
        if slot:
            memory = mmap.mmap(keepsake.files[1], 0)
            told = memoryview(memory).cast("I")
            domain = body["domain"].encode()
            self.forest.plant(slot, Plot(_name(slot, content), content.tree, domain, told))
        else:
            self.forest = Forest(self._secret, content.tree)
        volume = Volume(slot, content, keepsake, supply, reader, self.metrics)
        self._volumes[slot] = volume
        return volume

    def _supply(self, objects: ObjectStore, fetcher: FrameFetcher) -> _Supply:
        loader = FrameLoader(fetcher, self.cache, self.metrics, self._complaints)
        return _Supply(objects, fetcher, loader)

    async def _run(self, supply: _Supply) -> None:
        if not supply.running and self._nursery is not None:
            supply.running = True
            await self._nursery.start(supply.loader.run)


def _name(slot: int, content: Content) -> bytes:
    """Return the name of a snapshot's directory among others."""
    return b"%d-%s" % (slot, content.manifest.hex()[:16].encode())
