"""Hydration: brings a whole snapshot onto this machine, to stay, so that it mounts without a store.

Files are made a batch at a time, in the order in which their frames lie in the store, each frame
being fetched once, in large requests. What a killed run has made is found by the next.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from envstore.errors import (
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from envstore.fuse.content import content_from_image
from envstore.fuse.erofs import ensure_image
from envstore.fuse.hydrated import Hydrated, Record, claim, save, save_record
from envstore.fuse.image import make_image
from envstore.fuse.local import LocalFiles, NewFile
from envstore.fuse.pace import Pace
from envstore.fuse.tree import ROOT, Tree
from envstore.store.cache import BlobCache
from envstore.store.cachespace import CacheFullError
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.leases import leased
from envstore.store.locations import NOWHERE, FrameRef, Located
from envstore.store.manifest import Part
from envstore.store.repository import Repository
from envstore.store.source import Kind
from envstore.store.whereabouts import ATTEMPTS, Whereabouts

_PARALLEL = 4
_MAX_REQUEST = 8 << 20
_BATCH_FILES, _BATCH_BYTES = 512, 32 << 20
_HELD_BYTES = 32 << 20
_ATTEMPTS = 3

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_BEST_EFFORT_LAST = 2 << 13 | 7  # not idle, which on a busy disk may mean never

Progress = Callable[[int, int], None]
"""Told how many of how many missing bytes are written."""


@dataclass(frozen=True, slots=True)
class HydrateResult:
    """What a hydration did: distinct contents that were missing and their bytes; the traffic."""

    hydrated: Hydrated
    missing_files: int
    missing_bytes: int
    fetched_bytes: int
    requests: int


def hydrate(
    repository: Repository,
    snapshot: bytes,
    *,
    ref: str = "",
    rate: int | None = None,
    progress: Progress = lambda done, total: None,
) -> HydrateResult:
    """Make ``snapshot`` whole in the cache of ``repository``, and keep it there.

    ``rate`` bounds what is fetched in bytes a second. Whatever ends this early, what was made is
    sound, and the next run goes on from there. A lease of the snapshot is held meanwhile, where
    that may be.

    Raises ``UsageError`` (no cache), ``NoSpaceError`` (the cap or the disk is too small),
    ``ConflictError`` (another process is at it), ``CorruptError``, ``UnavailableError``.
    """
    cache = repository.cache
    if cache is None:
        raise UsageError("hydrating needs a cache")
    traffic = repository.objects.traffic
    requests, received = traffic.requests, traffic.bytes_in
    held = leased(repository, snapshot, "hydrate")
    with claim(cache, snapshot) as directory, cache.errors(), held:
        description = repository.snapshot(snapshot)
        manifest = description.manifest
        root, locations = repository.located(manifest)
        relocates: list[bool] = []
        parts = _noting(repository.parts(root, locations), relocates)
        fd = make_image(manifest, root, parts, locations)
        content = content_from_image(fd, ref, snapshot)
        os.close(fd)
        save(directory / "snapshot", description.encode())
        save(directory / "manifest", root.seal())
        save(directory / "locations", locations.seal())
        # Fetched a moment ago, and in the cache.
        save(directory / "parts", b"".join(repository.stored_parts(root, locations)))
        if not any(relocates):
            ensure_image(content.tree, manifest, directory / "image")
        nodes = _contents(content.tree)
        whereabouts = repository.whereabouts(root, locations)
        work = _Work(repository, cache, content.tree, whereabouts, directory / "pins", rate)
        missing = work.run(nodes, progress)
        size = sum(content.tree.size(node) for node in nodes)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(
            snapshot.hex(), manifest.hex(), content.name, len(nodes), size, at, any(relocates)
        )
        save_record(directory, record)
    return HydrateResult(
        Hydrated(record, directory, cache.files),
        len(missing),
        sum(content.tree.size(node) for node in missing),
        traffic.bytes_in - received,
        traffic.requests - requests,
    )


def _noting(parts: Iterable[Part], relocates: list[bool]) -> Iterator[Part]:
    """Yield ``parts``, noting of each whether it holds something to relocate."""
    for part in parts:
        relocates.append(bool(part.relocations))
        yield part


def step_back() -> None:
    """Let this process, and what it starts, wait for others that want the processor or disk."""
    with suppress(OSError):
        os.nice(_NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _BEST_EFFORT_LAST)


def _contents(tree: Tree) -> list[int]:
    """Return one file of each content that is not empty."""
    return [
        node
        for node in range(ROOT, len(tree) + 1)
        if tree.kind(node) is Kind.FILE
        and tree.size(node)
        and tree.find_content(tree.content_key(node)) == node
    ]


@dataclass(slots=True)
class _Batch:
    """Files that are made together, and by frame the chunks of theirs that it holds."""

    nodes: list[int] = field(default_factory=list)
    frames: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    stored: int = 0


class _Work:
    """Makes the missing files of one snapshot."""

    def __init__(
        self,
        repository: Repository,
        cache: BlobCache,
        tree: Tree,
        whereabouts: Whereabouts,
        pins: Path,
        rate: int | None,
    ) -> None:
        self._cache = cache
        self._local = LocalFiles(cache)
        # What becomes a file is not kept as blobs too.
        self._fetcher = FrameFetcher(repository.objects, None)
        self._tree = tree
        self._whereabouts = whereabouts
        self._locations = whereabouts.locations
        self._pins = pins
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pace = Pace(rate, sleep=self._stop.wait) if rate else None
        self._last: dict[int, int] = {}
        # Frames on the border of two batches, by number.
        self._held: dict[int, bytes] = {}
        self._holding: dict[int, bytes] = {}

    def run(self, nodes: Sequence[int], progress: Progress) -> list[int]:
        """Make and pin the files of ``nodes``; returns those that were missing at first."""
        first = missing = self._pin(nodes)
        total = sum(map(self._tree.size, missing))
        self._check_space(missing)
        done = 0
        progress(done, total)
        # A file may be evicted in the moment between getting its name and its pin.
        for _ in range(_ATTEMPTS):
            with ThreadPoolExecutor(_PARALLEL) as pool:
                try:
                    for number, batch in enumerate(self._batches(missing)):
                        for written in self._fill(pool, number, batch):
                            done += written
                            progress(min(done, total), total)
                finally:
                    self._stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
            missing = self._pin(missing)
            if not missing:
                return first
            self._stop.clear()
        raise NoSpaceError(
            f"the cache {self._cache.root} is too full to keep all files",
            hint="raise ENVSTORE_CACHE_SIZE",
        )

    def _pin(self, nodes: Sequence[int]) -> list[int]:
        """Pin what is there of ``nodes``; returns the others."""
        missing = []
        for start in range(0, len(nodes), _BATCH_FILES):
            some = nodes[start : start + _BATCH_FILES]
            wanted = [(self._tree.content_key(node), self._tree.size(node)) for node in some]
            absent = set(self._local.pin(wanted, self._pins))
            missing += [node for node, (key, _) in zip(some, wanted, strict=True) if key in absent]
        return missing

    def _check_space(self, missing: Iterable[int]) -> None:
        need = sum(-(-self._tree.size(node) // 4096) * 4096 for node in missing)
        usage = self._cache.usage()
        if need + usage.pinned > usage.capacity:
            raise NoSpaceError(
                f"the cache {self._cache.root} is capped at {usage.capacity} bytes; this takes "
                f"{need}, and {usage.pinned} are hydrated already",
                hint="raise ENVSTORE_CACHE_SIZE, or envstore hydrate --drop what is not needed",
            )

    def _batches(self, missing: Sequence[int]) -> list[_Batch]:
        tree, frames = self._tree, self._locations.ref_frames

        def place(node: int) -> int:
            return min((frames[ref] for ref in tree.file_refs(node)), default=NOWHERE)

        batches = [_Batch()]
        for node in sorted(missing, key=place):
            batch = batches[-1]
            if len(batch.nodes) >= _BATCH_FILES or batch.stored >= _BATCH_BYTES:
                batch = _Batch()
                batches.append(batch)
            batch.nodes.append(node)
            for ref in tree.file_refs(node):
                if tree.is_hole(ref):
                    continue
                if not 0 <= frames[ref] < len(self._locations.frames):
                    raise CorruptError(f"chunk {tree.chunk_digest(ref).hex()} is located nowhere")
                batch.frames[frames[ref]].append((node, ref))
                batch.stored += tree.chunk_size(ref)
        self._last = {
            frame: number for number, batch in enumerate(batches) for frame in batch.frames
        }
        return batches

    def _fill(self, pool: ThreadPoolExecutor, number: int, batch: _Batch) -> Iterator[int]:
        """Make the files of one batch and pin them; yields the bytes written meanwhile."""
        files: dict[int, NewFile] = {}
        running: list[Future[int]] = []
        self._held, self._holding = self._holding, {}
        try:
            for node in batch.nodes:
                files[node] = self._local.begin(self._tree, node)
            here: list[int] = []
            elsewhere: list[int] = []
            for at in batch.frames:
                frame = self._locations.frames[at]
                known = at in self._held or self._cache.contains(frame.digest)
                (here if known else elsewhere).append(at)
            running += [pool.submit(self._from_cache, batch, files, at) for at in here]
            places: dict[tuple[bytes, int], list[int]] = defaultdict(list)
            for at in elsewhere:
                frame = self._locations.frames[at]
                places[frame.pack, frame.offset].append(at)
            wanted = [self._locations.frames[at] for at in elsewhere]
            for group in self._fetcher.plan(wanted, max_request=_MAX_REQUEST):
                numbers = [places[frame.pack, frame.offset] for frame in group]
                running.append(pool.submit(self._from_store, number, batch, files, group, numbers))
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            # Nobody may write any more to what is closed here.
            self._stop.set()
            for future in running:
                future.cancel()
            wait(running)
            self._local.abandon(files.values())
            raise
        self._local.keep(list(files.values()))
        self._pin(batch.nodes)

    def _from_cache(self, batch: _Batch, files: dict[int, NewFile], number: int) -> int:
        frame = self._locations.frames[number]
        raw = self._held.get(number) or self._cache.read(frame.digest, 0, frame.raw)
        if raw is None or digest(raw) != frame.digest:
            return self._from_store(-1, batch, files, (frame,), [[number]])
        return self._write(batch, files, number, raw)

    def _from_store(
        self,
        turn: int,
        batch: _Batch,
        files: dict[int, NewFile],
        group: Sequence[FrameRef],
        numbers: Sequence[Sequence[int]],
    ) -> int:
        """Fetch some frames; ``numbers`` are those by which each is known."""
        if self._pace is not None:
            self._pace.wait(group[-1].offset + group[-1].stored - group[0].offset)
        if self._stop.is_set():
            return 0
        written = 0
        for frame, known, raw in zip(group, numbers, self._fetcher.fetch(group), strict=True):
            try:
                if isinstance(raw, EnvstoreError):
                    raise raw
                written += sum(self._write(batch, files, number, raw) for number in known)
            except (CorruptError, NotFoundError) as error:
                chunks = [chunk for number in known for chunk in batch.frames[number]]
                written += self._fetch_elsewhere(files, chunks, error)
            else:
                self._keep_for_later(turn, frame, known, raw)
        return written

    def _fetch_elsewhere(
        self, files: dict[int, NewFile], chunks: Sequence[tuple[int, int]], error: EnvstoreError
    ) -> int:
        """Write chunks that are not where they should be, from where they have moved.

        Raises ``error`` if they have not.
        """
        locations = self._locations
        for _ in range(ATTEMPTS):
            moved = self._whereabouts.again(locations)
            if moved is None:
                raise error
            locations = moved
            try:
                return self._write_from(files, chunks, moved)
            except (CorruptError, NotFoundError) as failure:
                error = failure
        raise error

    def _write_from(
        self, files: dict[int, NewFile], chunks: Sequence[tuple[int, int]], locations: Located
    ) -> int:
        """Fetch chunks by other locations than those of the batches, and write them."""
        wanted: dict[FrameRef, list[tuple[int, int]]] = defaultdict(list)
        for node, ref in chunks:
            number = locations.ref_frames[ref]
            if number == NOWHERE:
                raise CorruptError(f"chunk {self._tree.chunk_digest(ref).hex()} is located nowhere")
            wanted[locations.frames[number]].append((node, ref))
        written = 0
        for group in self._fetcher.plan(wanted, max_request=_MAX_REQUEST):
            if self._pace is not None:
                self._pace.wait(group[-1].offset + group[-1].stored - group[0].offset)
            if self._stop.is_set():
                return written
            for frame, raw in zip(group, self._fetcher.fetch(group), strict=True):
                if isinstance(raw, EnvstoreError):
                    raise raw
                written += self._place(files, wanted[frame], locations, raw)
        return written

    def _keep_for_later(self, turn: int, frame: FrameRef, known: Sequence[int], raw: bytes) -> None:
        """Keep a frame that a later batch has chunks in too."""
        last = max(self._last[number] for number in known)
        if last <= turn:
            return
        with self._lock:
            room = sum(map(len, self._holding.values())) < _HELD_BYTES
            if last == turn + 1 and room:
                self._holding |= dict.fromkeys(known, raw)
                return
        with suppress(CacheFullError):
            self._cache.put(frame.digest, raw)

    def _write(self, batch: _Batch, files: dict[int, NewFile], number: int, raw: bytes) -> int:
        return self._place(files, batch.frames[number], self._locations, raw)

    def _place(
        self,
        files: dict[int, NewFile],
        chunks: Iterable[tuple[int, int]],
        locations: Located,
        raw: bytes,
    ) -> int:
        written = 0
        view = memoryview(raw)
        for node, ref in chunks:
            start, size = locations.ref_offsets[ref], self._tree.chunk_size(ref)
            files[node].write(ref, view[start : start + size])
            written += size
        return written
