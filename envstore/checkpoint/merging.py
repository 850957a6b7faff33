"""One tree out of the parts of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from envstore.checkpoint.errors import RanksDisagreeError
from envstore.checkpoint.layout import CheckpointId, RunName, part_prefix
from envstore.checkpoint.records import Part, commit_of
from envstore.errors import CorruptError
from envstore.store.describing import store_manifest
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.manifest import Entry, sort_key
from envstore.store.packing import PackWriter
from envstore.store.repository import PARALLEL, Repository
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind


def merge(
    repository: Repository, run: RunName, checkpoint: CheckpointId, parts: Sequence[Part]
) -> bytes:
    """Return the snapshot that holds the trees of ``parts``, one of each rank in order.

    Of one rank it is that of its part, otherwise it is stored: the same by whoever does it. Costs
    the metadata of each part and of the whole. Raises ``RanksDisagreeError``.
    """
    if len(parts) == 1:
        return parts[0].snapshot
    with ThreadPoolExecutor(PARALLEL) as pool:
        trees = list(pool.map(lambda part: _entries(repository, part), parts))
    entries: dict[bytes, Entry] = {}
    for tree in trees:
        entries.update((entry.path, entry) for entry in tree)
    index = DedupIndex()
    known = KnownChunks(repository, index)
    known.learn_snapshots(part.snapshot for part in parts)
    if known.warnings:
        raise CorruptError(known.warnings[0], hint="run `envstore verify`, and save again")
    writer = PackWriter(repository.objects, index)
    try:
        root = store_manifest(
            repository, sorted(entries.values(), key=lambda e: sort_key(e.path)), known, writer
        )
    finally:
        writer.close()
    commit = commit_of(checkpoint, parts[0].snapshot, parts)
    snapshot = Snapshot(
        "checkpoint",
        root.digest,
        root.files,
        root.logical,
        commit.created,
        attributes=attributes_of(run, checkpoint, len(parts), commit.lineage, commit.metrics),
    )
    return save_snapshot(repository.objects, snapshot)


def attributes_of(
    run: RunName,
    checkpoint: CheckpointId,
    world_size: int,
    lineage: Mapping[str, str],
    metrics: Mapping[str, float],
) -> dict[str, str]:
    """Return what the snapshot of a merged checkpoint says of it."""
    return {
        **lineage,
        **{f"metric.{name}": repr(float(value)) for name, value in metrics.items()},
        "run": str(run),
        "step": str(checkpoint.step),
        "epoch": str(checkpoint.epoch),
        "attempt": str(checkpoint.attempt),
        "world_size": str(world_size),
    }


def _entries(repository: Repository, part: Part) -> list[Entry]:
    """Return the tree of a part, which must lie below its own directory."""
    top = part_prefix(part.rank, part.world_size).encode()
    found = list(repository.entries(repository.snapshot(part.snapshot).manifest))
    for entry in found:
        inside = entry.path.startswith(top) or top.startswith(entry.path + b"/")
        if not inside or (entry.kind is not Kind.DIRECTORY and not entry.path.startswith(top)):
            name = entry.path.decode(errors="backslashreplace")
            raise RanksDisagreeError(
                f"rank {part.rank} of step {part.checkpoint.step} has saved {name!r}, "
                "which is not its own",
                hint="save with the envstore of the other ranks",
            )
    return found
