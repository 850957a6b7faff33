"""What a push may dedup against: its parents, recent segments, and a sample of all the others.

Parents come through their locations, which name every chunk of theirs. Index segments that no
sample covers yet are read whole; when there are more than ``RECENT`` of them they are folded into
a sample, and when there are more than ``MERGE`` samples these are merged into one. So the cost of
knowing stays bounded however many pushes came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store.binary import unseal
from envstore.store.chunking import Chunk
from envstore.store.digest import DIGEST_SIZE, parse_hex
from envstore.store.guarded import GuardedStore
from envstore.store.index import MAGIC, MAX_BODY, DedupIndex, open_segment
from envstore.store.locations import NOWHERE, Locations
from envstore.store.manifest import Root
from envstore.store.packs import Pack, pack_key
from envstore.store.repository import PARALLEL, Repository
from envstore.store.samples import (
    Sample,
    build_sample,
    is_hook,
    merge_samples,
    open_sample,
    sample_key,
)
from envstore.store.snapshots import Snapshot

RECENT = 32
MERGE = 16
_FEW = 8
MAX_KNOWN = 2_000_000
"""Chunks after which no further segment is loaded (about 400 MB of memory)."""


class KnownChunks:
    """The dedup index of one push and where to look for more. Use from one thread."""

    def __init__(self, repository: Repository, index: DedupIndex) -> None:
        self._repository = repository
        self.index = index
        self.warnings: list[str] = []
        self.forget_unsafe()
        self._samples: list[Sample] = []
        self._loaded: set[bytes] = set()

    def use(self, repository: Repository) -> None:
        """Go on in another session, whose store ``repository`` has."""
        self._repository = repository
        self.forget_unsafe()

    def forget_unsafe(self) -> None:
        """Make unknown what this writer's session must not reuse: doomed and damaged packs."""
        objects = self._repository.objects
        if isinstance(objects, GuardedStore):
            session = objects.session
            unsafe = session.doomed_packs | session.damaged_packs
            if unsafe:
                self.index.forget_packs(unsafe)

    def base(self, name: bytes) -> Snapshot | None:
        """Return a snapshot to build on, or ``None`` with a warning if it is damaged."""
        try:
            return self._repository.snapshot(name)
        except (CorruptError, NotFoundError) as error:
            self._warn(name, error)
            return None

    def learn_snapshots(self, names: Iterable[bytes]) -> None:
        """Learn every chunk of the given snapshots, four round trips each.

        Of a damaged one nothing is reused, with a warning: all that its packs held is stored
        again, so that pushing a tree mends what refers to it.
        """
        for name in dict.fromkeys(names):
            try:
                _learn_snapshot(self._repository, self.index, name)
            except (CorruptError, NotFoundError) as error:
                self._warn(name, error)
                self.index.forget_packs(self._packs_of(name))

    def _packs_of(self, name: bytes) -> set[bytes]:
        try:
            _, locations = self._repository.located(self._repository.snapshot(name).manifest)
        except (CorruptError, NotFoundError):
            return set()  # nothing tells which they were
        return {frame.pack for frame in locations.frames}

    def _warn(self, name: bytes, error: EnvstoreError) -> None:
        line = f"snapshot {name.hex()[:12]} is damaged and not built on: {error.message}"
        if line not in self.warnings:
            self.warnings.append(line)

    def _warn_of(self, error: EnvstoreError) -> None:
        self.warnings.append(f"not deduplicated against what is damaged: {error.message}")

    def learn_segments(self) -> None:
        """Learn the segments that no sample covers, and the samples. Two listings.

        May write a sample; losing the race to do so, or dying in between, harms nothing. What is
        damaged is left out with a warning: it costs bytes, and must not keep anyone from pushing.
        """
        objects = self._repository.objects
        segments = _names(info.key for info in objects.list("index/"))
        samples = _names(info.key for info in objects.list("samples/"))
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = [item for item in pool.map(self._sample, samples) if item is not None]
            self._samples = [sample for _, sample in found]
            covered = {name for sample in self._samples for name in sample.segments}
            fresh = [name for name in segments if name not in covered]
            read = zip(fresh, pool.map(self._segment, fresh), strict=True)
            loaded = [(name, packs) for name, packs in read if packs is not None]
        for name, packs in loaded:
            self._loaded.add(name)
            if len(self.index) < MAX_KNOWN:
                self.index.add_packs(packs)
        if len(loaded) > RECENT:
            self._write(build_sample(loaded))
        if len(found) > MERGE:
            self._write(merge_samples(self._samples))
            for name, _ in found:
                objects.delete(sample_key(name))

    def consider(self, chunks: Sequence[Chunk]) -> None:
        """Load the segments that samples promise to hold some of ``chunks``."""
        if not self._samples or len(self.index) >= MAX_KNOWN:
            return
        for chunk in chunks:
            if not is_hook(chunk.digest) or self.index.find(chunk.digest) is not None:
                continue
            for sample in self._samples:
                name = sample.find(chunk.digest)
                if name is not None and name not in self._loaded:
                    self._loaded.add(name)
                    self._learn_segment(name)

    def forget_lost(self, chunks: Iterable[bytes]) -> bool:
        """Check that the packs to be reused for these chunks are there; returns whether all are.

        One request for each of a few packs, else one listing. The chunks of packs that are gone
        or cut short become unknown, with a warning, so that they are stored again.
        """
        needed = self.index.reused(chunks)
        objects = self._repository.objects
        if len(needed) <= _FEW:
            with ThreadPoolExecutor(PARALLEL) as pool:
                sizes = dict(
                    zip(needed, pool.map(objects.size, map(pack_key, needed)), strict=True)
                )
        else:
            listed = {info.key: info.size for info in objects.list("packs/")}
            sizes = {name: listed.get(pack_key(name)) for name in needed}
        lost = {name for name, end in needed.items() if (sizes[name] or 0) < end}
        if lost:
            self.index.forget_packs(lost)
            # A later push may have stored the same chunks elsewhere.
            for name in self._loaded:
                self._learn_segment(name)
            names = ", ".join(sorted(name.hex()[:12] for name in lost))
            self.warnings.append(f"packs that are missing or cut short are stored again: {names}")
        return not lost

    def _learn_segment(self, name: bytes) -> None:
        packs = self._segment(name)
        if packs is not None:
            self.index.add_packs(packs)

    def _segment(self, name: bytes) -> list[Pack] | None:
        try:
            return self._repository.segment(name)
        except NotFoundError:
            # Collected since it was listed or sampled; its chunks live elsewhere or nowhere.
            return None
        except CorruptError as error:
            self._warn_of(error)
            return None

    def _sample(self, name: bytes) -> tuple[bytes, Sample] | None:
        try:
            return name, open_sample(self._repository.objects.get(sample_key(name)), name)
        except NotFoundError:
            # Merged into another one since it was listed.
            return None
        except CorruptError as error:
            self._warn_of(error)
            return None

    def _write(self, sample: Sample) -> None:
        name, data = sample.encode()
        self._repository.objects.put(sample_key(name), data)


def _names(keys: Iterable[str]) -> list[bytes]:
    found = (parse_hex(key.rpartition("/")[2]) for key in keys)
    return sorted(name for name in found if name is not None)


def _learn_snapshot(repository: Repository, index: DedupIndex, name: bytes) -> None:
    root, locations = repository.located(repository.snapshot(name).manifest)
    try:
        _learn_parts(repository, index, root, locations)
    except (CorruptError, NotFoundError):
        # One of the packs that hold the manifest is damaged: nothing new may rely on it.
        index.forget_packs({locations.frames[number].pack for number in locations.part_frames})
        raise


def _learn_parts(
    repository: Repository, index: DedupIndex, root: Root, locations: Locations
) -> None:
    index.add_located(
        locations.frames,
        (
            (info.digest, locations.part_frames[i], locations.part_offsets[i])
            for i, info in enumerate(root.parts)
        ),
    )
    start = 0
    for part in repository.parts(root, locations):
        end = start + len(part.ref_sizes)
        digests = part.ref_digests
        rows = enumerate(
            zip(locations.ref_frames[start:end], locations.ref_offsets[start:end], strict=True)
        )
        index.add_located(
            locations.frames,
            (
                (digests[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE], frame, offset)
                for i, (frame, offset) in rows
                if frame != NOWHERE
            ),
        )
        start = end


def find_orphans(repository: Repository, pending: Path | None) -> list[Pack]:
    """Return the packs that an interrupted push of this machine stored but did not list.

    ``pending`` holds a one-pack segment for each; entries whose pack is gone are removed.
    """
    if pending is None or not pending.is_dir():
        return []
    found: list[Pack] = []
    for path in sorted(pending.iterdir()):
        if parse_hex(path.name) is None:
            continue
        try:
            data = path.read_bytes()
            _, name = unseal(MAGIC, data, limit=MAX_BODY, what=str(path))
            (pack,) = open_segment(data, name)
        except (OSError, EnvstoreError, ValueError):
            # Half-written when the machine went down: the pack is then stored once more.
            path.unlink(missing_ok=True)
            continue
        if repository.objects.size(pack_key(pack.digest)) == pack.size:
            found.append(pack)
        else:
            path.unlink(missing_ok=True)
    return found
