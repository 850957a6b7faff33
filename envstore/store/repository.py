"""An open store: objects, cache and the way from a name to a tree's entries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from envstore.errors import CorruptError, EnvstoreError, NoSpaceError, NotFoundError
from envstore.store import refs
from envstore.store.binary import unseal
from envstore.store.cache import BlobCache
from envstore.store.config import StoreConfig, load_config
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.index import MAGIC, MAX_BODY, parse_segment, segment_key
from envstore.store.locations import FrameRef, Locations, locations_key, open_locations
from envstore.store.manifest import (
    Entry,
    Part,
    Root,
    decode_part,
    manifest_key,
    open_root,
    read_entries,
)
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.credentials import KeyRing
from envstore.store.packs import Pack
from envstore.store.snapshots import Snapshot, parse_snapshot, snapshot_key
from envstore.store.whereabouts import ATTEMPTS, Whereabouts, look_up_of

if TYPE_CHECKING:
    from envstore.store.witness import Witness

PARALLEL = 8
"""Requests in flight at once when many objects or frames are wanted."""


class Repository:
    """One store and this node's cache of it. Blocking; safe to share between threads."""

    def __init__(self, objects: ObjectStore, config: StoreConfig, cache: BlobCache | None) -> None:
        self.objects = objects
        self.config = config
        self.cache = cache
        self.fetcher = FrameFetcher(objects, cache)
        self.witness: Witness | None = None
        """Remembers what this machine saw of refs, if that is wanted."""

    @classmethod
    def open(
        cls, url: str, cache: BlobCache | None = None, keys: KeyRing | None = None
    ) -> Repository:
        """Open the store at ``url``, with ``keys`` if there are any. One request.

        Raises ``UsageError`` (malformed URL), ``NotFoundError`` (not a store),
        ``UnsupportedFormatError``, ``UnavailableError``, ``AccessDeniedError``.
        """
        objects = open_objects(url, keys=keys)
        try:
            return cls(objects, load_config(objects), cache)
        except BaseException:
            objects.close()
            raise

    def close(self) -> None:
        """Release connections."""
        self.objects.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def resolve(self, text: str) -> bytes:
        """Return the snapshot digest that a REF or ``@digest-prefix`` stands for."""
        return refs.resolve(self.objects, text)

    def snapshot(self, name: bytes) -> Snapshot:
        """Return one snapshot. One request, none when cached. Raises ``NotFoundError``."""
        data = self._cached(name)
        if data is None:
            data = self._get(snapshot_key(name), f"snapshot {name.hex()}")
            snapshot = parse_snapshot(data, name)
            self._keep(name, data)
            return snapshot
        return parse_snapshot(data, name)

    def root(self, manifest: bytes) -> Root:
        """Return a manifest's root. One request. Raises ``NotFoundError``, ``CorruptError``."""
        data = self._get(manifest_key(manifest), f"manifest {manifest.hex()}")
        return open_root(data, manifest)

    def locations(self, manifest: bytes, root: Root) -> Locations:
        """Return where the chunks of a manifest lie. One request."""
        data = self._get(locations_key(manifest), f"locations of manifest {manifest.hex()}")
        refs = sum(part.refs for part in root.parts)
        return open_locations(data, manifest, parts=len(root.parts), refs=refs)

    def located(self, manifest: bytes) -> tuple[Root, Locations]:
        """Return root and locations, asked for at the same time: one round trip."""
        with ThreadPoolExecutor(1) as pool:
            key = locations_key(manifest)
            pending = pool.submit(self._get, key, f"locations of manifest {manifest.hex()}")
            root = self.root(manifest)
            data = pending.result()
        refs = sum(part.refs for part in root.parts)
        return root, open_locations(data, manifest, parts=len(root.parts), refs=refs)

    def parts(self, root: Root, locations: Locations) -> Iterator[Part]:
        """Yield the decoded parts in order, fetched with few large requests and verified.

        Where they have moved meanwhile, they are looked for once more. Raises ``CorruptError``
        naming the part, ``NotFoundError``.
        """
        stored = self.stored_parts(root, locations)
        for info, data in zip(root.parts, stored, strict=True):
            part = decode_part(data)
            # Locations are numbered by what the root says, so a reader must be able to rely on it.
            if (len(part.kinds), len(part.ref_sizes)) != (info.entries, info.refs):
                raise CorruptError(f"manifest part {info.digest.hex()} is not as its root says")
            yield part

    def stored_parts(self, root: Root, locations: Locations) -> Iterator[bytes]:
        """Yield the parts as they are stored, verified; see ``parts``."""
        raw, locations = self._part_frames(root, locations)
        for i, info in enumerate(root.parts):
            start = locations.part_offsets[i]
            data = raw[locations.frames[locations.part_frames[i]].digest]
            data = data[start : start + info.size]
            if len(data) != info.size or digest(data) != info.digest:
                raise CorruptError(f"manifest part {info.digest.hex()} does not match its digest")
            yield data

    def _part_frames(
        self, root: Root, locations: Locations
    ) -> tuple[dict[bytes, bytes], Locations]:
        """Return the raw frames of all parts, and the locations by which they were found."""
        for left in reversed(range(ATTEMPTS)):
            try:
                wanted = [locations.frames[number] for number in locations.part_frames]
                return self.load_frames(wanted), locations
            except (CorruptError, NotFoundError):
                moved = self._moved(root, locations) if left else None
                if moved is None:
                    raise
                locations = moved
        raise AssertionError("the last attempt either returns or raises")

    def _moved(self, root: Root, locations: Locations) -> Locations | None:
        """Return the locations that the store has now, if they are others."""
        with contextlib.suppress(CorruptError, NotFoundError):
            found = look_up_of(self.objects, root.digest, root)
            if found != locations:
                return found
        return None

    def whereabouts(self, root: Root, locations: Locations) -> Whereabouts:
        """Return what finds the chunks of a manifest again when they have moved."""
        manifest = root.digest
        return Whereabouts(locations, lambda: look_up_of(self.objects, manifest, root))

    def entries(self, manifest: bytes) -> Iterator[Entry]:
        """Yield every entry of a manifest in path order."""
        root, locations = self.located(manifest)
        return read_entries(self.parts(root, locations))

    def segment(self, name: bytes) -> list[Pack]:
        """Return the packs an index segment lists. One request."""
        raw = self._cached(name)
        if raw is None:
            what = f"index segment {name.hex()}"
            data = self._get(segment_key(name), what)
            raw, found = unseal(MAGIC, data, limit=MAX_BODY, what=what)
            if found != name:
                raise CorruptError(f"{what} does not match its name")
            self._keep(name, raw)
        return parse_segment(raw)

    def load_frames(self, frames: list[FrameRef]) -> dict[bytes, bytes]:
        """Return the raw bytes of ``frames`` by digest, all at once: ask for what fits in memory.

        Raises the first error that befell one of them.
        """
        raw: dict[bytes, bytes] = {}
        missing: list[FrameRef] = []
        for frame in frames:
            if frame.digest in raw:
                continue
            data = self.cache.read(frame.digest, 0, frame.raw) if self.cache else None
            if data is not None and digest(data) == frame.digest:
                raw[frame.digest] = data
                continue
            if data is not None and self.cache:
                self.cache.drop(frame.digest)
            missing.append(frame)
        groups = self.fetcher.plan(missing)
        with ThreadPoolExecutor(PARALLEL) as pool:
            for group, results in zip(groups, pool.map(self.fetcher.fetch, groups), strict=True):
                for frame, result in zip(group, results, strict=True):
                    if isinstance(result, EnvstoreError):
                        raise result
                    raw[frame.digest] = result
        return raw

    def _get(self, key: str, what: str) -> bytes:
        try:
            return self.objects.get(key)
        except NotFoundError as error:
            raise NotFoundError(f"{what} is not in {self.objects.url}", hint=error.hint) from None

    def _cached(self, name: bytes) -> bytes | None:
        data = self.cache.read(name) if self.cache else None
        if data is not None and self.cache and digest(data) != name:
            self.cache.drop(name)
            return None
        return data

    def _keep(self, name: bytes, data: bytes) -> None:
        if self.cache is not None:
            # These few small objects only save a request next time; a full disk must not make
            # anything fail that works without them.
            with contextlib.suppress(NoSpaceError):
                self.cache.put(name, data)

    def history(self, name: bytes, limit: int | None = None) -> Iterator[tuple[bytes, Snapshot]]:
        """Yield a snapshot and its ancestors, newest first along first parents.

        It ends where an ancestor has been collected as garbage: none is kept for its descendants.
        """
        return islice(self._walk(name), limit)

    def _walk(self, name: bytes) -> Iterator[tuple[bytes, Snapshot]]:
        next_name: bytes | None = name
        while next_name is not None:
            try:
                snapshot = self.snapshot(next_name)
            except NotFoundError:
                if next_name == name:
                    raise
                return
            yield next_name, snapshot
            next_name = snapshot.parents[0] if snapshot.parents else None
