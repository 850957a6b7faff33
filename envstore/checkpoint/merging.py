"""One tree out of the parts of all ranks.

It holds the ranks' files as they are, and at the top a safetensors file for each item of the state
whose tensors are all whole, or cut along their first dimension: a new header and then the chunks
that the ranks have stored. No tensor is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from envstore.checkpoint.consolidating import consolidate
from envstore.checkpoint.encoding import MAX_JSON
from envstore.checkpoint.errors import RanksDisagreeError
from envstore.checkpoint.layout import STATE_FILE, CheckpointId, RunName, part_prefix
from envstore.checkpoint.records import Part, commit_of
from envstore.checkpoint.table import StateTable, assemble, parse_table
from envstore.errors import CorruptError
from envstore.store.chunking import TENSOR_PIECE
from envstore.store.describing import place_of, store_manifest
from envstore.store.digest import digest
from envstore.store.entries import HOLE, composed_entry
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.manifest import Entry, sort_key
from envstore.store.packing import PackWriter
from envstore.store.repository import PARALLEL, Repository
from envstore.store.sessions import claim_bases
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind


def merge(
    repository: Repository, run: RunName, checkpoint: CheckpointId, parts: Sequence[Part]
) -> bytes:
    """Return the snapshot that holds the trees of ``parts``, one of each rank in order.

    Of one rank it is that of its part, otherwise it is stored: the same by whoever does it. Costs
    the metadata of each part and of the whole. Raises ``RanksDisagreeError`` if the parts do not
    make up one state, ``CorruptError``, ``NotFoundError``.
    """
    if len(parts) == 1:
        return parts[0].snapshot
    claim_bases(repository, (part.snapshot for part in parts))
    index = DedupIndex()
    known = KnownChunks(repository, index)
    known.learn_snapshots(part.snapshot for part in parts)
    if known.warnings:
        raise CorruptError(known.warnings[0], hint="run `envstore verify`, and save again")
    with ThreadPoolExecutor(PARALLEL) as pool:
        trees = list(pool.map(lambda part: _entries(repository, part), parts))
    entries = {path: entry for tree in trees for path, entry in tree.items()}
    writer = PackWriter(repository.objects, index)
    try:
        for path, head, refs in consolidate(
            assemble(_tables(repository, index, parts, entries)), entries
        ):
            pieces = [head[at : at + TENSOR_PIECE] for at in range(0, len(head), TENSOR_PIECE)]
            named = [(digest(piece), piece) for piece in pieces]
            for name, piece in named:
                if index.find(name) is None:
                    writer.add(name, piece)
            whole = [*((name, len(piece)) for name, piece in named), *refs]
            entries[path] = composed_entry(path, whole)
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


def _entries(repository: Repository, part: Part) -> dict[bytes, Entry]:
    """Return the tree of a part by path; it must lie below its own directory."""
    top = part_prefix(part.rank, part.world_size).encode()
    found = {}
    for entry in repository.entries(repository.snapshot(part.snapshot).manifest):
        above = entry.kind is Kind.DIRECTORY and top.startswith(entry.path + b"/")
        if not above and not entry.path.startswith(top):
            name = entry.path.decode(errors="backslashreplace")
            raise RanksDisagreeError(
                f"rank {part.rank} of step {part.checkpoint.step} has saved {name!r}, "
                "which is not its own",
                hint="save with the envstore of the other ranks",
            )
        found[entry.path] = entry
    return found


def _tables(
    repository: Repository,
    index: DedupIndex,
    parts: Sequence[Part],
    entries: Mapping[bytes, Entry],
) -> list[StateTable]:
    """Return what each rank says of its state; nothing if these are trees of another kind."""
    states = [
        (part, entries.get(f"{part_prefix(part.rank, part.world_size)}{STATE_FILE}".encode()))
        for part in parts
    ]
    if all(entry is None for _, entry in states):
        return []
    found = []
    for part, entry in states:
        what = f"{STATE_FILE} of rank {part.rank} of step {part.checkpoint.step}"
        if entry is None:
            raise RanksDisagreeError(
                f"{what} is missing, and others have one", hint="save alike on all ranks"
            )
        table = parse_table(_content(repository, index, entry, what), what)
        if (table.rank, table.world_size) != (part.rank, part.world_size):
            raise RanksDisagreeError(
                f"{what} is that of rank {table.rank} of {table.world_size}",
                hint="give each process its own rank",
            )
        found.append(table)
    return found


def _content(repository: Repository, index: DedupIndex, entry: Entry, what: str) -> bytes:
    if entry.size > MAX_JSON or any(name == HOLE for name, _ in entry.refs):
        raise CorruptError(f"{what} is too large or has holes")
    places = [place_of(index, name) for name, _ in entry.refs]
    frames = [index.frames[number] for number, _ in places]
    raw = repository.load_frames(frames)
    pieces = []
    for (name, size), frame, (_, start) in zip(entry.refs, frames, places, strict=True):
        piece = raw[frame.digest][start : start + size]
        if digest(piece) != name:
            raise CorruptError(f"{what}: chunk {name.hex()} is not where its locations say")
        pieces.append(piece)
    return b"".join(pieces)
