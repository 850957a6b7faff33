"""Describes a stored tree: the manifest of its entries, and where their chunks lie."""

from __future__ import annotations

from collections.abc import Sequence

from envstore.errors import EnvstoreError
from envstore.store.chunking import Chunk
from envstore.store.dedup import MAX_PART_RANGES, places_to_reuse
from envstore.store.filing import Progress, silent
from envstore.store.index import DedupIndex, LocationsBuilder
from envstore.store.known import KnownChunks
from envstore.store.locations import locations_key
from envstore.store.manifest import HOLE, Entry, Root, build_parts, manifest_key
from envstore.store.packing import PackWriter
from envstore.store.repository import Repository
from envstore.store.source import Kind


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
    objects.put(locations_key(root.digest), builder.result.seal())
    objects.put(manifest_key(root.digest), root.seal())
    return root


def place_of(index: DedupIndex, name: bytes) -> tuple[int, int]:
    """Return where a chunk lies that must be known by now."""
    place = index.find(name)
    if place is None:
        raise EnvstoreError(f"chunk {name.hex()} was lost on the way; this is a bug")
    return place
