"""Promotion: files that a server handed out byte by byte become complete files on disk.

Once all frames of such a file are in the cache, it is copied out of them while nobody asks the
server for anything, so that the next mount's kernel reads it without the server. Nothing is
fetched for it and nothing evicted; what is not wholly cached soon is forgotten until opened again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from envstore.errors import EnvstoreError
from envstore.fuse.local import LocalFiles
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache
from envstore.store.cachespace import CacheFullError
from envstore.store.locations import Located

_QUEUED = 4096
_TRIES = 3
_QUIET_SECONDS = 0.5
_RETRY_SECONDS = 10.0
_FULL_SECONDS = 60.0
_STEP = 16 << 20
"""Bytes after which a copy looks whether the server is wanted."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Candidate:
    tree: Tree
    locations: Located
    node: int
    due: float
    tries: int = 0


class Promoter:
    """Promotes files of any number of snapshots. Belongs to one trio run."""

    def __init__(self, cache: BlobCache, activity: Callable[[], int]) -> None:
        """Copy within ``cache``; ``activity`` is a number that every request changes."""
        self._cache = cache
        self._local = LocalFiles(cache)
        self._activity = activity
        self._waiting: dict[bytes, _Candidate] = {}
        self._wake = trio.Event()
        self._stopped = False
        self._calm_at = -1
        self._thread = trio.CapacityLimiter(1)
        self.promoted = 0
        """Files that were made so far."""

    def opened(self, tree: Tree, locations: Located, node: int) -> None:
        """Note that the file ``node`` was opened through the directory of objects. Quick."""
        key = tree.content_key(node)
        if key in self._waiting or not tree.size(node):
            return
        if len(self._waiting) >= _QUEUED:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[key] = _Candidate(tree, locations, node, trio.current_time())
        self._wake.set()

    def forget(self, tree: Tree) -> None:
        """Let go of a snapshot that is not served any more."""
        self._waiting = {key: item for key, item in self._waiting.items() if item.tree is not tree}

    async def run(self) -> None:
        """Promote one file after the other until cancelled. Never raises anything else."""
        try:
            while True:
                await self._wake.wait()
                await self._quiet()
                key = min(self._waiting, key=lambda key: self._waiting[key].due, default=None)
                if key is None:
                    self._wake = trio.Event()
                    continue
                item = self._waiting.pop(key)
                if item.due > trio.current_time():
                    self._waiting[key] = item
                    await trio.sleep(min(item.due - trio.current_time(), _QUIET_SECONDS))
                    continue
                await self._try(key, item)
        finally:
            self._stopped = True

    async def _quiet(self) -> None:
        """Wait until nobody has asked for anything for a moment, unless nobody has since then."""
        while (now := self._activity()) != self._calm_at:
            await trio.sleep(_QUIET_SECONDS)
            if self._activity() == now:
                self._calm_at = now

    async def _try(self, key: bytes, item: _Candidate) -> None:
        try:
            done = await trio.to_thread.run_sync(
                self._promote, item, abandon_on_cancel=True, limiter=self._thread
            )
        except CacheFullError:
            _log.info("the cache is too full to keep files that were read")
            self._waiting.clear()
            await trio.sleep(_FULL_SECONDS)
            return
        except Exception as error:  # noqa: BLE001 - the mount must go on without this
            log = _log.info if isinstance(error, EnvstoreError) else _log.exception
            log("a file that was read is not kept whole: %s", error)
            return
        item.tries += 1
        if not done and item.tries < _TRIES:
            item.due = trio.current_time() + _RETRY_SECONDS
            self._waiting.setdefault(key, item)
            self._wake.set()

    def _promote(self, item: _Candidate) -> bool:
        """Make one file; ``False`` if something of it is not in the cache."""
        tree, node = item.tree, item.node
        if self._local.contains(tree.content_key(node), tree.size(node)):
            return True
        refs = [ref for ref in tree.file_refs(node) if not tree.is_hole(ref)]
        frames, numbers = item.locations.frames, item.locations.ref_frames
        names = {frames[number].digest for number in {numbers[ref] for ref in refs}}
        if not all(map(self._cache.contains, names)):
            return False
        file = self._local.begin(tree, node, evict=False)
        kept = False
        try:
            since = 0
            for ref in refs:
                start, size = item.locations.ref_offsets[ref], tree.chunk_size(ref)
                data = self._cache.read(frames[numbers[ref]].digest, start, size)
                if data is None or self._stopped:
                    return False
                file.write(ref, data)
                since += size
                if since >= _STEP:
                    since = 0
                    self._make_way()
            kept = True
        finally:
            if not kept:
                self._local.abandon([file])
        self._local.keep([file])
        self.promoted += 1
        return True

    def _make_way(self) -> None:
        """Let a server that is wanted have the processor and the disk, but not for ever."""
        before = self._activity()
        for _ in range(10):
            time.sleep(0.02)
            now = self._activity()
            if now == before:
                return
            before = now
