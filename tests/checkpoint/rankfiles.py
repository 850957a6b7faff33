"""Parts of checkpoints as the persister stores them, made of a few small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from envstore.checkpoint.layout import CheckpointId, RunName, part_prefix
from envstore.checkpoint.records import Part
from envstore.store.describing import store_manifest
from envstore.store.digest import digest
from envstore.store.entries import composed_entry
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.manifest import Entry, sort_key
from envstore.store.packing import PackWriter
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind

SAVED = "2026-01-02T03:04:05+00:00"
RUN = RunName("team", "llm")


def state_json(rank: int, world_size: int, items: Sequence[object] = (), **facts: str) -> bytes:
    """Return the table of a rank."""
    body = {"format": 1, "rank": rank, "world_size": world_size, "facts": facts, "items": items}
    return json.dumps(body).encode()


def store_tree(
    repository: Repository, files: Mapping[str, bytes | Sequence[bytes]], **attributes: str
) -> bytes:
    """Store files, each cut into the given pieces, and return the digest of their snapshot."""
    index = DedupIndex()
    known = KnownChunks(repository, index)
    writer = PackWriter(repository.objects, index)
    entries: dict[bytes, Entry] = {}
    try:
        for path, content in files.items():
            name = path.encode()
            pieces = [content] if isinstance(content, bytes) else content
            pieces = [piece for piece in pieces if piece]
            for piece in pieces:
                if index.find(digest(piece)) is None:
                    writer.add(digest(piece), piece)
            entries[name] = composed_entry(name, [(digest(p), len(p)) for p in pieces])
            while b"/" in name:
                name = name.rpartition(b"/")[0]
                entries[name] = Entry(name, Kind.DIRECTORY)
        root = store_manifest(
            repository, sorted(entries.values(), key=lambda e: sort_key(e.path)), known, writer
        )
    finally:
        writer.close()
    facts = {"run": str(RUN), **attributes}
    snapshot = Snapshot(
        "checkpoint", root.digest, root.files, root.logical, SAVED, attributes=facts
    )
    return save_snapshot(repository.objects, snapshot)


def make_part(
    repository: Repository,
    checkpoint: CheckpointId,
    rank: int = 0,
    world_size: int = 1,
    *,
    content: str = "",
    saved: str = SAVED,
    metrics: Mapping[str, float] | None = None,
) -> Part:
    """Store what one rank saves, and return the part that says so."""
    state = state_json(rank, world_size, id=str(checkpoint), content=content)
    files = {f"{part_prefix(rank, world_size)}state.json": state}
    snapshot = store_tree(repository, files, step=str(checkpoint.step))
    return Part(
        checkpoint,
        rank,
        world_size,
        snapshot,
        saved,
        size=len(state),
        metrics={} if metrics is None else metrics,
    )
