"""Stores trees with composed files, as the writers of checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from envstore.store.describing import store_manifest
from envstore.store.digest import digest
from envstore.store.entries import Entry, composed_entry, sort_key
from envstore.store.frames import Codec
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.packing import PackWriter
from envstore.store.refs import RefName, move_ref
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind
from tests.stores import Store

CREATED = "2026-01-02T03:04:05+00:00"


def store_composed(
    store: Store,
    contents: Mapping[bytes, bytes],
    composed: Mapping[bytes, Sequence[bytes]],
    ref: str = "composed",
    *,
    codec: Codec = Codec.RAW,
    chunk: int = 1 << 20,
) -> bytes:
    """Store ``contents`` and files composed of them, by their paths; returns the snapshot.

    All files are cut every ``chunk`` bytes and the tree is flat.
    """
    repository = store.repository
    known = KnownChunks(repository, DedupIndex())
    writer = PackWriter(repository.objects, known.index, codec=codec)
    entries: dict[bytes, Entry] = {}
    try:
        for path, content in contents.items():
            refs = []
            for at in range(0, len(content), chunk):
                piece = memoryview(content)[at : at + chunk]
                refs.append((digest(piece), len(piece)))
                if known.index.find(refs[-1][0]) is None:
                    writer.add(refs[-1][0], piece)
            size = len(content)
            entries[path] = Entry(
                path, Kind.FILE, size=size, digest=digest(content), refs=tuple(refs)
            )
        for path, parts in composed.items():
            entries[path] = composed_entry(path, [r for part in parts for r in entries[part].refs])
        rows = sorted(entries.values(), key=lambda entry: sort_key(entry.path))
        root = store_manifest(repository, rows, known, writer)
    finally:
        writer.close()
    snapshot = Snapshot("checkpoint", root.digest, root.files, root.logical, CREATED, ())
    name = save_snapshot(repository.objects, snapshot)
    move_ref(repository.objects, RefName.parse(ref), name, None)
    return name
