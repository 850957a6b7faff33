"""From a range of a file to its bytes: chunks, frames, the cache, and proof that all is right.

What the cache holds is read at once where the disk need not be waited for, everything else in
threads. A chunk's BLAKE3 is compared with the manifest before the first byte of it is handed
out, because the locations that led to it are not trusted, and a disk can rot.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.fuse.complaints import Complaints
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.moved import Moved
from envstore.fuse.neighbourhood import Neighbourhood
from envstore.fuse.readahead import Readahead
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.locations import NOWHERE, FrameRef, Located
from envstore.store.whereabouts import ATTEMPTS

_INLINE = 1 << 20
"""Unproven bytes that may be hashed between two requests: a fraction of a millisecond."""
_READERS = 16

_Data = bytes | memoryview | None

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """Bytes ``start`` to ``end`` of a frame, of which ``skip`` and what follows ``length`` more
    are only there to prove the chunks at the edges.

    ``unproven`` are the references to check with their chunks' offset in the run. Of a hole
    there is no ``frame``.
    """

    frame: FrameRef | None
    start: int
    end: int
    skip: int
    length: int
    unproven: list[tuple[int, int]] = field(default_factory=list)

    def cut(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return the asked part of the run's bytes, without a copy where it is all of them."""
        if len(data) == self.length:
            return data
        return memoryview(data)[self.skip : self.skip + self.length]


class _MisplacedError(Exception):
    """Something is not in the pack where its locations say: lost, or it has moved."""

    def __init__(self, pack: bytes, error: EnvstoreError) -> None:
        super().__init__(str(error))
        self.pack = pack
        self.error = error


class Reader:
    """Reads files of one snapshot; see ``Content``. Belongs to one trio run.

    Readers of several snapshots of a store share one ``FrameLoader``. ``watch``, if there is one,
    is told the node, offset and size of every read. ``moved``, if there is one, is asked for newer
    locations when something is not where it should be, before that is taken for damage.
    """

    def __init__(
        self,
        tree: Tree,
        locations: Located,
        loader: FrameLoader,
        cache: BlobCache,
        metrics: Metrics,
        complaints: Complaints,
        watch: Callable[[int, int, int], None] | None = None,
        moved: Moved | None = None,
    ) -> None:
        self._tree = tree
        self._locations = locations
        self._loader = loader
        self._cache = cache
        self._metrics = metrics
        self._complaints = complaints
        self._watch = watch
        self._moved = moved
        self._proven = bytearray(tree.refs)
        self._readahead = Readahead(tree, locations.ref_frames)
        self._neighbourhood = Neighbourhood(tree, locations.ref_frames, locations.frames)
        self._threads = trio.CapacityLimiter(_READERS)

    def read_now(self, node: int, offset: int, size: int) -> bytes | None:
        """Return a range of file ``node``, clipped to its end; ``None`` if that takes waiting.

        Raises ``OSError`` as ``read`` does.
        """
        try:
            runs = self._runs(node, offset, size)
            found = []
            for run in runs:
                data = self._now(run)
                if data is None:
                    return None
                found.append(data)
            self._metrics.inline += len(runs)
            self._count_use(runs)
            if self._watch is not None:
                self._watch(node, offset, size)
            ahead = self._expect(node, offset, runs, missed=False)
            if ahead:
                self._loader.prefetch(self._frames(ahead), self._metrics)
            return self._joined(found)
        except Exception as error:
            raise self._failed(node, error) from error

    async def read(self, node: int, offset: int, size: int) -> bytes:
        """Return a range of file ``node``, clipped to its end.

        Raises ``OSError`` with ``EIO`` when the store or the cache fails or is damaged, and logs
        which object and why: anything else raised here would end the whole mount.
        """
        try:
            if self._watch is not None:
                self._watch(node, offset, size)
            for _ in range(ATTEMPTS):
                locations = self._locations
                try:
                    return await self._read(node, offset, size)
                except _MisplacedError as misplaced:
                    if not await self._has_moved(locations, misplaced.pack):
                        raise misplaced.error from None
            return await self._read(node, offset, size)
        except _MisplacedError as misplaced:
            raise self._failed(node, misplaced.error) from misplaced
        except Exception as error:
            raise self._failed(node, error) from error

    async def _read(self, node: int, offset: int, size: int) -> bytes:
        """Read a range by the locations that are known now."""
        runs = self._runs(node, offset, size)
        found = await trio.to_thread.run_sync(self._wait, runs, limiter=self._threads)
        missing = await self._still_missing(runs, found)
        self._metrics.waited += len(runs) - len(missing)
        self._metrics.missed += len(missing)
        self._count_use(runs)
        surprised = bool(missing) and not self._loader.certain
        ahead = self._expect(node, offset, runs, missed=surprised)
        needed = [frame for at in missing if (frame := runs[at].frame) is not None]
        if surprised:
            ahead += self._neighbourhood.plan(node, needed[-1])
        self._metrics.missed_bytes += sum(frame.stored for frame in {*needed})
        loaded = await self._loader.load(needed, self._frames(ahead), self._metrics)
        for at, frame in zip(missing, needed, strict=True):
            try:
                found[at] = self._accept(runs[at], frame, loaded[frame.digest])
            except (CorruptError, NotFoundError) as error:
                raise _MisplacedError(frame.pack, error) from None
        return self._joined(found)

    async def _has_moved(self, stale: Located, pack: bytes) -> bool:
        """Whether what is not in ``pack`` may be elsewhere, by newer locations than ``stale``."""
        if self._locations is not stale:
            return True
        found = await self._moved.again(stale, pack) if self._moved is not None else None
        if found is None:
            return False
        if self._locations is not found:
            self._locations = found
            self._readahead.move(found.ref_frames)
            self._neighbourhood = Neighbourhood(self._tree, found.ref_frames, found.frames)
        return True

    def expect(self, nodes: Iterable[int]) -> None:
        """Know that what will be read of these files is being fetched."""
        self._readahead.known.update(nodes)

    def used(self) -> tuple[int, int]:
        """Return the raw bytes of all chunks read so far, and their share of stored bytes."""
        seen: set[tuple[int, int]] = set()
        raw = stored = 0
        locations = self._locations
        ref = self._proven.find(1)
        while ref >= 0:
            frame, at = locations.ref_frames[ref], locations.ref_offsets[ref]
            if (frame, at) not in seen:
                seen.add((frame, at))
                size = self._tree.chunk_size(ref)
                raw += size
                stored += size * locations.frames[frame].stored // locations.frames[frame].raw
            ref = self._proven.find(1, ref + 1)
        return raw, stored

    def _failed(self, node: int, error: Exception) -> OSError:
        """Log why a read failed; returns what the application is told."""
        self._metrics.errors += 1
        name = os.fsdecode(self._tree.path(node))
        if isinstance(error, EnvstoreError):
            self._complaints.say(str(error), f"cannot read {name}")
        else:
            _log.error("reading %s failed", name, exc_info=error)
        return OSError(errno.EIO, os.strerror(errno.EIO))

    def _joined(self, found: Sequence[_Data]) -> bytes:
        if len(found) == 1 and isinstance(found[0], bytes):
            data = found[0]
        else:
            data = b"".join(piece for piece in found if piece is not None)
        self._metrics.bytes_read += len(data)
        return data

    def _expect(self, node: int, offset: int, runs: list[_Run], *, missed: bool) -> list[int]:
        length = sum(run.length for run in runs)
        return self._readahead.plan(node, offset, length, missed=missed)

    def _count_use(self, runs: list[_Run]) -> None:
        for run in runs:
            if run.frame is not None:
                self._loader.used(run.frame.digest)

    def _frames(self, numbers: Iterable[int]) -> list[FrameRef]:
        frames = self._locations.frames
        return [frames[number] for number in numbers]

    def _runs(self, node: int, offset: int, size: int) -> list[_Run]:
        """Join the pieces of a range that lie side by side in a frame."""
        frames, offsets = self._locations.ref_frames, self._locations.ref_offsets
        tree, proven = self._tree, self._proven
        runs: list[_Run] = []
        run = _Run(None, 0, -1, 0, 0)
        before = NOWHERE
        for ref, start, length in tree.pieces(node, offset, size):
            if tree.is_hole(ref):
                before, run = NOWHERE, _Run(None, 0, -1, 0, length)
                runs.append(run)
                continue
            number, base = frames[ref], offsets[ref]
            whole = tree.chunk_size(ref)
            if number == NOWHERE or base + whole > self._locations.frames[number].raw:
                raise CorruptError(f"chunk {tree.chunk_digest(ref).hex()} is located nowhere")
            if proven[ref]:
                low, high = base + start, base + start + length
            else:
                low, high = base, base + whole
            if before != number or run.end != low:
                run = _Run(self._locations.frames[number], low, high, base + start - low, length)
                runs.append(run)
            else:
                run.end = high
                run.length += length
            if not proven[ref]:
                run.unproven.append((ref, low - run.start))
            before = number
        return runs

    def _now(self, run: _Run) -> bytes | memoryview | None:
        """Return a run's bytes if they can be had and proven at once."""
        if run.frame is None:
            return bytes(run.length)
        if run.unproven and run.end - run.start > _INLINE:
            return None
        try:
            return self._from_cache(run, run.frame, nowait=True)
        except BlockingIOError:
            return None

    def _wait(self, runs: list[_Run]) -> list[_Data]:
        """Return for each run its bytes from the cache, if it has them."""
        return [
            bytes(run.length)
            if run.frame is None
            else self._from_cache(run, run.frame, nowait=False)
            for run in runs
        ]

    def _from_cache(self, run: _Run, frame: FrameRef, *, nowait: bool) -> bytes | memoryview | None:
        """Return a run's bytes, ``None`` if they are not cached or not what they should be."""
        name = frame.digest
        try:
            data = self._cache.read(name, run.start, run.end - run.start, nowait=nowait)
        except EnvstoreError as error:
            # A cache that cannot be read makes reading slow, not impossible.
            self._complaints.say(str(error))
            return None
        if data is None or self._wrong(run, data) is not None:
            return None
        return run.cut(data)

    async def _still_missing(self, runs: list[_Run], found: list[_Data]) -> list[int]:
        """Return which runs the cache cannot give, after removing what is damaged there."""
        missing = []
        for at, run in enumerate(runs):
            frame = run.frame
            if found[at] is None and frame is not None:
                raw = None
                if self._cache.contains(frame.digest):
                    raw = await self._loader.recheck(frame)
                if raw is None:
                    missing.append(at)
                else:
                    found[at] = self._accept(run, frame, raw)
        return missing

    def _wrong(self, run: _Run, data: bytes | memoryview) -> int | None:
        """Prove a run's chunks; returns the first reference whose chunk is another."""
        view = memoryview(data)
        for ref, at in run.unproven:
            if digest(view[at : at + self._tree.chunk_size(ref)]) != self._tree.chunk_digest(ref):
                return ref
            self._proven[ref] = 1
        return None

    def _accept(self, run: _Run, frame: FrameRef, raw: bytes | EnvstoreError) -> bytes | memoryview:
        """Return a run's bytes from a frame whose own digest was checked."""
        if isinstance(raw, EnvstoreError):
            raise raw
        data = memoryview(raw)[run.start : run.end]
        wrong = self._wrong(run, data)
        if wrong is not None:
            raise CorruptError(
                f"chunk {self._tree.chunk_digest(wrong).hex()} is not in frame "
                f"{frame.digest.hex()} of pack {frame.pack.hex()}, where it should be"
            )
        return run.cut(data)
