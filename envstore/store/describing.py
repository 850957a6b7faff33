"""Describes a stored tree: the manifest of its entries, and where their chunks lie."""

from __future__ import annotations

from collections.abc import Sequence

from envstore.errors import ConflictError, EnvstoreError, NotFoundError, UnavailableError
from envstore.store.chunking import Chunk
from envstore.store.dedup import MAX_PART_RANGES, places_to_reuse
from envstore.store.filing import Progress, silent
from envstore.store.index import DedupIndex, LocationsBuilder
from envstore.store.known import KnownChunks
from envstore.store.locations import locations_key
from envstore.store.manifest import HOLE, Entry, Root, build_parts, manifest_key
from envstore.store.objects.base import ObjectStore
from envstore.store.packing import PackWriter
from envstore.store.repository import Repository
from envstore.store.source import Kind

_ATTEMPTS = 5


def store_manifest(
    repository: Repository,
    entries: Sequence[Entry],
    known: KnownChunks,
    writer: PackWriter,
    *,
    root_attributes: tuple[int, int] = (0, 0),
    progress: Progress = silent,
) -> Root:
    """Store parts, root and locations, after everything they lead to.

    ``entries`` are in ``sort_key`` order, their chunks in the index of ``known``.
    """
    index = known.index
    progress("store", 0, 0)
    writer.end_frame()
    parts = []
    chunks = []
    for info, data in build_parts(entries):
        parts.append(info)
        chunks.append(Chunk(info.digest, data))
    # Other packs than the files' may hold parts. Those of files were found there a moment ago.
    known.forget_lost(info.digest for info in parts)
    places = places_to_reuse(index, chunks, max_ranges=MAX_PART_RANGES, min_window=0)
    for chunk, place in zip(chunks, places, strict=True):
        if place is None:
            writer.add(chunk.digest, chunk.data)
    writer.flush()
    progress("commit", 0, 0)
    builder = LocationsBuilder(index.frames)
    for info in parts:
        builder.part(place_of(index, info.digest))
    for entry in entries:
        for name, _ in entry.refs:
            if name == HOLE:
                builder.hole()
            else:
                builder.ref(place_of(index, name))
    root = Root(
        tuple(parts),
        len(entries),
        sum(1 for entry in entries if entry.kind is Kind.FILE),
        sum(entry.size for entry in entries),
        *root_attributes,
    )
    objects = repository.objects
    _store_locations(objects, locations_key(root.digest), builder.result.seal())
    objects.put(manifest_key(root.digest), root.seal())
    return root


def _store_locations(objects: ObjectStore, key: str, sealed: bytes) -> None:
    """Store locations, over those that are there only by compare-and-swap.

    The tree may be reachable: a write without a condition that arrives late would undo what others
    have made of its locations since, and lead readers to packs that are gone by then.
    """
    version: str | None = None
    for attempt in range(_ATTEMPTS):
        try:
            objects.put_if(key, sealed, version)
        except (ConflictError, UnavailableError) as error:
            last = attempt + 1 == _ATTEMPTS
            try:
                found, version = objects.get_versioned(key)
            except NotFoundError:
                version = None
            else:
                if found == sealed:
                    return
            if last:
                raise error from None
        else:
            return


def place_of(index: DedupIndex, name: bytes) -> tuple[int, int]:
    """Return where a chunk lies that must be known by now."""
    place = index.find(name)
    if place is None:
        raise EnvstoreError(f"chunk {name.hex()} was lost on the way; this is a bug")
    return place
