"""Push: source -> chunks -> frames -> packs -> manifest -> snapshot -> ref.

Cost: reading and hashing what changed (about 1 GB/s), compressing what is new (about 110 MB/s a
core), one PUT for each 32 MiB of it, and some twenty requests besides, seven of them for its
session; an unchanged tree costs one ``lstat`` a file and three requests. Nothing is visible before
the ref moves, and everything a ref leads to was stored before: a push that dies leaves at worst
packs that the next push reuses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnsupportedFormatError
from envstore.store.chunking import CHUNKER_ID
from envstore.store.damage import damaged_packs
from envstore.store.describing import store_manifest
from envstore.store.filing import FiledTree, Progress, entries_of, scan, silent, store_files
from envstore.store.healing import heal_after
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks, find_orphans
from envstore.store.manifest import Root
from envstore.store.packing import PackWriter
from envstore.store.profiles import file_ranks, find_profile
from envstore.store.refs import Ref, RefName, move_ref, try_read
from envstore.store.repository import Repository
from envstore.store.sessions import writing
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Source
from envstore.store.statcache import StatCache


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did. Sizes are bytes; ``seconds`` is wall time.

    ``new_chunk_bytes`` counts raw file content that was not in the store, ``stored_bytes`` what
    it takes there, ``uploaded_bytes`` and ``requests`` everything sent to the store.
    """

    ref: str
    snapshot: bytes
    manifest: bytes
    kind: str
    files: int
    logical_bytes: int
    read_bytes: int
    new_chunk_bytes: int
    stored_bytes: int
    uploaded_bytes: int
    requests: int
    seconds: float
    unchanged: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What the user may choose: a message, further parents to dedup against, the zstd level."""

    message: str = ""
    parents: tuple[bytes, ...] = ()
    level: int = 3


def push(
    repository: Repository,
    source: Source,
    ref: RefName,
    stat_cache: StatCache,
    *,
    state: Path | None = None,
    options: PushOptions | None = None,
    progress: Progress = silent,
) -> PushResult:
    """Store the tree of ``source`` and point ``ref`` at it.

    ``state`` is a directory for the lists of packs that an interrupted push leaves behind.
    Raises ``ChangedError`` (a file changed while read), ``ConflictError`` (the ref was moved by
    somebody else meanwhile: what was stored is reused by the next try), ``UsageError`` (sockets,
    devices), and the errors of the store. The ref is as before after any of them.
    """
    if repository.config.chunker != CHUNKER_ID:
        raise UnsupportedFormatError(
            f"{repository.objects.url} is cut by {repository.config.chunker}, unknown here",
            hint="upgrade envstore",
        )
    started = time.monotonic()
    options = options or PushOptions()
    traffic = repository.objects.traffic
    requests, sent = traffic.requests, traffic.bytes_out
    index = DedupIndex()
    known = KnownChunks(repository, index)
    expected = try_read(repository.objects, ref)
    before = known.base(expected[0].snapshot) if expected else None
    progress("scan", 0, 0)
    tree = scan(source)
    if before is not None and expected is not None and before.kind == source.kind:
        manifest = stat_cache.manifest(source.identity, tree.signature)
        # Of what is known to be damaged every byte may be wanted once more.
        if manifest == before.manifest and not damaged_packs(repository.objects):
            return PushResult(
                str(ref), expected[0].snapshot, manifest, source.kind, before.files,
                before.logical_bytes, 0, 0, 0, traffic.bytes_out - sent,
                traffic.requests - requests, time.monotonic() - started, True,
                (*source.warnings, *known.warnings),
            )  # fmt: skip
    with writing(repository, f"push {ref}") as (_, inside):
        known.use(inside)
        bases = [*((expected[0].snapshot,) if expected else ()), *options.parents]
        with ThreadPoolExecutor(1) as pool:
            ranks = pool.submit(_ranks, inside, bases, tree, known)
            known.learn_snapshots(bases)
            known.learn_segments()
            tree.ranks = ranks.result()
        orphans = find_orphans(inside, state)
        index.add_packs(orphans)
        writer = PackWriter(inside.objects, index, pending=state, level=options.level)
        try:
            writer.adopt(orphans)
            tree.old = stat_cache.recipes(source.identity)
            store_files(source, tree, known, writer, progress)
            while not known.forget_lost(tree.chunks()):
                store_files(source, tree, known, writer, progress)
            new_bytes = writer.new_bytes
            root = store_manifest(
                inside,
                entries_of(source, tree),
                known,
                writer,
                root_attributes=source.root_attributes(),
                progress=progress,
            )
        finally:
            writer.close()
        unchanged = before is not None and (before.manifest, before.kind) == (
            root.digest,
            source.kind,
        )
        if unchanged and expected is not None:
            name = expected[0].snapshot
        else:
            name = _commit(inside, source, ref, expected, root, options)
        known.warnings += heal_after(inside, index)
    try:
        _remember(stat_cache, source, tree, root.digest)
    except EnvstoreError as error:
        # The ref has moved: this only makes the next push read everything again.
        known.warnings.append(error.message)
    return PushResult(
        str(ref), name, root.digest, source.kind, root.files, root.logical, tree.read_bytes,
        new_bytes, writer.stored_bytes, traffic.bytes_out - sent, traffic.requests - requests,
        time.monotonic() - started, unchanged,
        (*source.warnings, *known.warnings),
    )  # fmt: skip


def _ranks(
    repository: Repository, bases: Sequence[bytes], tree: FiledTree, known: KnownChunks
) -> dict[bytes, int]:
    """Return in which order the files lie that a start of what this builds on reads."""
    for base in bases:
        try:
            found = find_profile(repository, base)
        except (CorruptError, NotFoundError, UnsupportedFormatError) as error:
            known.warnings.append(f"not laid out by a profile: {error.message}")
            continue
        if found is not None:
            return file_ranks(found.profile, {entry.path: entry.size for entry in tree.entries})
    return {}


def _commit(
    repository: Repository,
    source: Source,
    ref: RefName,
    expected: tuple[Ref, str] | None,
    root: Root,
    options: PushOptions,
) -> bytes:
    snapshot = Snapshot(
        source.kind,
        root.digest,
        root.files,
        root.logical,
        datetime.now(UTC).isoformat(timespec="seconds"),
        (expected[0].snapshot,) if expected else (),
        message=options.message,
        attributes=source.attributes(),
    )
    name = save_snapshot(repository.objects, snapshot)
    moved = move_ref(repository.objects, ref, name, expected)
    if repository.witness is not None:
        repository.witness.saw(ref, moved)
    return name


def _remember(stat_cache: StatCache, source: Source, tree: FiledTree, manifest: bytes) -> None:
    changed = []
    for entry in tree.entries:
        recipe = tree.recipes.get(entry.path)
        if recipe is None or not entry.settled or entry.path in tree.fleeting:
            continue
        if tree.old.get(entry.path) != (entry.signature, recipe):
            changed.append((entry.path, entry.signature, recipe))
    present = {entry.path for entry in tree.entries}
    gone = [path for path in tree.old if path not in present]
    signature = b"" if tree.fleeting else tree.signature
    stat_cache.save(source.identity, signature, manifest, changed, gone)
