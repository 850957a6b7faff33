"""Turns what is staged into a stored snapshot: chunks, packs, manifest, in one pass over it.

Only chunks that the store is not known to have are sent, from where they lie in the slot and
without a copy. Hashing runs in threads ahead of the uploads, and both may begin before all of it
is staged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.hashing import Filling, HashPool, Span, spans
from envstore.checkpoint.layout import Orders, StagedFile
from envstore.checkpoint.recipes import Recipe, Ref, names
from envstore.errors import UsageError
from envstore.store.chunking import TENSOR_PIECE, Chunk
from envstore.store.dedup import places_to_reuse
from envstore.store.describing import store_manifest
from envstore.store.frames import Codec
from envstore.store.guarded import GuardedStore
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks, find_orphans
from envstore.store.manifest import Root
from envstore.store.packing import PackWriter
from envstore.store.packs import pack_key
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot, save_snapshot

LARGE = 1 << 20
"""A chunk of so many bytes is worth a request of its own: it is reused wherever it lies."""
MAX_INDEX = 500_000
"""Chunks after which what is known is forgotten and learned anew (100 MB of memory)."""

_WINDOW = 8 << 20
_CODECS = {"raw": Codec.RAW, "split": Codec.SPLIT, "xor": Codec.XOR}


class Knowledge:
    """What a store is known to hold, kept from one save to the next. Use from one thread.

    After a save that failed it knows of frames that never came to be: ``forget`` it then.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.index = DedupIndex()
        self.known = KnownChunks(self.repository, self.index)
        self.last: dict[str, list[list[Ref]]] = {}
        """By path what each segment was made of in the save before: what differences are taken to.

        A persister that begins anew knows of none, and stores numbers with their bytes apart."""
        self._learned: set[bytes] = set()
        self._segments = False

    def use(self, repository: Repository) -> None:
        """Go on in the session that ``repository`` is of: what that must not reuse is forgotten."""
        self.repository = repository
        self.known.use(repository)

    def learn(self, snapshots: Iterable[bytes]) -> None:
        """Learn the chunks of ``snapshots``, and of recent segments if that was not done yet.

        Raises the errors of the store; snapshots that are damaged or gone are passed over.
        """
        if len(self.index) > MAX_INDEX:
            self.forget()
        fresh = [name for name in dict.fromkeys(snapshots) if name not in self._learned]
        self.known.learn_snapshots(fresh)
        self._learned.update(fresh)
        if not self._segments:
            self.known.learn_segments()
            self._segments = True

    def settle(self) -> None:
        """Count what was written to what is there, so that the next save looks whether it is."""
        self.index.own.clear()


class PartUpload:
    """One part, or one wave of it, on its way into the store. Use from one thread, in a ``with``.

    If it ends with an error, ``forget`` the knowledge.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        hashes: HashPool,
        recipe: Recipe,
        *,
        codec: str = "raw",
        pending: Path | None = None,
    ) -> None:
        """Go on with ``recipe``.

        ``pending`` keeps lists of packs that an upload which was interrupted can take over.
        Raises ``UsageError`` for a codec that there is not.
        """
        if codec not in _CODECS:
            raise UsageError(f"{codec!r} is not a codec of checkpoints", hint="use 'raw'")
        self.recipe = recipe
        self._knowledge = knowledge
        self._hashes = hashes
        repository = knowledge.repository
        orphans = find_orphans(repository, pending)
        knowledge.index.add_packs(orphans)
        _claim_waves(repository, knowledge.index, recipe)
        recipe.teach(knowledge.index)
        self._writer = PackWriter(
            repository.objects,
            knowledge.index,
            pending=pending,
            codec=_CODECS[codec],
            fetcher=repository.fetcher,
        )
        self._writer.adopt(orphans)

    def __enter__(self) -> PartUpload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def add(self, files: Sequence[StagedFile], view: memoryview, filling: Filling) -> None:
        """Store what is new of the segments of ``files`` that lie in ``view``.

        They are taken as ``filling`` says that they are there. ``view`` must stay as it is until
        ``flush`` or ``finish``. Raises ``CheckpointError`` if these are not the files of the
        recipe, the errors of the store and those of ``filling``.
        """
        self.recipe.check(files)
        wanted = spans(files)
        refs = self.recipe.refs
        for span in wanted:
            refs[span.file][span.segment].clear()
        self._store(wanted, files, view, filling, note=True)
        found = [refs[span.file][span.segment][_place(files, span)][0] for span in wanted]
        while not self._knowledge.known.forget_lost(found):
            # The packs of some are gone: these are stored again, from where they still lie.
            index = self._knowledge.index
            lost = [
                span for span, name in zip(wanted, found, strict=True) if index.find(name) is None
            ]
            self._store(lost, files, view, filling, note=False)
        self.recipe.new_bytes += self._writer.new_bytes

    def _store(
        self,
        wanted: Sequence[Span],
        files: Sequence[StagedFile],
        view: memoryview,
        filling: Filling,
        *,
        note: bool,
    ) -> None:
        window: list[tuple[Chunk, bytes | None]] = []
        size = 0
        for batch in self._hashes.run(wanted, view, filling):
            for span, chunk in batch:
                if note:
                    self.recipe.refs[span.file][span.segment].append((chunk.digest, span.length))
                window.append((chunk, self._like(files, span)))
                size += span.length
            if size >= _WINDOW:
                self._file(window)
                window, size = [], 0
        self._file(window)

    def _like(self, files: Sequence[StagedFile], span: Span) -> bytes | None:
        """Return which chunk lay in the same place in the save before."""
        segments = self._knowledge.last.get(files[span.file].path, [])
        before = segments[span.segment] if span.segment < len(segments) else []
        place = _place(files, span)
        return before[place][0] if place < len(before) else None

    def _file(self, window: Sequence[tuple[Chunk, bytes | None]]) -> None:
        """Give the chunks to the writer that are not to be had from elsewhere, and what is like."""
        index = self._knowledge.index
        chunks = [chunk for chunk, _ in window]
        self._knowledge.known.consider(chunks)
        small = [chunk for chunk in chunks if len(chunk.data) < LARGE]
        places = iter(places_to_reuse(index, small))
        for chunk, like in window:
            large = len(chunk.data) >= LARGE
            place = index.find(chunk.digest) if large else next(places)
            # The same chunk may come twice in one window: the second time it is no longer new.
            if place is None and (index.find(chunk.digest) or (-1,))[0] not in index.own:
                self._writer.add(chunk.digest, chunk.data, like=like)

    def flush(self) -> None:
        """Return when all that was added is in the store. Raises any error of the uploads."""
        self._writer.flush()
        self.recipe.remember(self._knowledge.index)

    def finish(self) -> Root:
        """Store the manifest of all files, after all chunks.

        Raises ``CheckpointError`` if some of a file never came, or the store has lost chunks of an
        earlier wave, and the errors of the store.
        """
        entries = self.recipe.entries()
        index = self._knowledge.index
        self._knowledge.known.forget_lost(self.recipe.places)
        if any(index.find(name) is None for name in names(self.recipe)):
            raise CheckpointError(
                f"{self._knowledge.repository.objects.url} has lost earlier waves of this "
                "checkpoint, which are not in memory any more",
                hint="run `envstore verify`, and save again",
            )
        repository = self._knowledge.repository
        root = store_manifest(repository, entries, self._knowledge.known, self._writer)
        self._knowledge.last = dict(zip(self.recipe.paths, self.recipe.refs, strict=True))
        return root


def _claim_waves(repository: Repository, index: DedupIndex, recipe: Recipe) -> None:
    """See that what earlier waves stored is not collected, in another session than this one.

    Nothing leads to it yet. That it is there still is looked at before it is relied on.
    """
    frames = [frame for frame, _ in recipe.places.values()]
    packs = {one.pack for frame in frames for one in (frame, frame.anchor) if one is not None}
    if packs and isinstance(repository.objects, GuardedStore):
        repository.objects.session.claim({pack_key(pack) for pack in packs})
        index.trust_packs(packs)


def _place(files: Sequence[StagedFile], span: Span) -> int:
    """Return the how manieth chunk of its segment a span is."""
    return (span.start - files[span.file].segments[span.segment][0]) // TENSOR_PIECE


def save_part_snapshot(repository: Repository, root: Root, orders: Orders) -> bytes:
    """Store the snapshot of a part and return its digest; the same however often it is done."""
    snapshot = Snapshot(
        "checkpoint",
        root.digest,
        root.files,
        root.logical,
        orders.saved,
        attributes=_attributes(orders),
    )
    return save_snapshot(repository.objects, snapshot)


def _attributes(orders: Orders) -> dict[str, str]:
    """Return what a part's snapshot says of it: lineage under its own names, ``metric.<name>``."""
    id = orders.checkpoint
    return {
        **orders.lineage,
        **{f"metric.{name}": repr(float(value)) for name, value in orders.metrics.items()},
        "run": orders.run,
        "step": str(id.step),
        "epoch": str(id.epoch),
        "attempt": str(id.attempt),
        "rank": str(orders.rank),
        "world_size": str(orders.world_size),
        "saved": orders.saved,
    }
