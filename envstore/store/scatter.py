"""Scatters byte ranges of a tree's files straight into buffers, verified and in parallel.

Whatever lies in the node cache is read from there; the rest comes in few large ranged requests. A
frame that is stored as it is and wholly wanted in one place is received there and hashed where it
lies; others pass through a scratch buffer of the thread that fetches them. Each frame is fetched
once, into however many places its chunks go, and no frame that nobody wants is.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store.anchors import decode
from envstore.store.cache import BlobCache, Held
from envstore.store.cachespace import CacheFullError
from envstore.store.digest import digest
from envstore.store.frames import Codec
from envstore.store.locations import FrameRef, Located
from envstore.store.objects import FileLocation, parse_url
from envstore.store.packs import pack_key
from envstore.store.ranges import (
    Content,
    Job,
    Range,
    affordable_gap,
    placed,
    plan,
    plan_again,
    plan_frames,
)
from envstore.store.repository import Repository
from envstore.store.whereabouts import ATTEMPTS, Whereabouts

REMOTE_THREADS = 12
"""Requests in flight at once to a server."""
LOCAL_THREADS = min(16, max(4, len(os.sched_getaffinity(0))))
"""Reads in flight at once when all lies on this machine."""
MAX_REQUEST = 16 << 20
MIN_REQUEST = 2 << 20

# What one call may claim of the cache: more would push out what it put there itself.
_SHARE = 0.9


class _StoppedError(Exception):
    """Another thread has failed, or nobody waits any more: what this one does is of no use."""


def scatter(
    repository: Repository,
    whereabouts: Whereabouts,
    ranges: Iterable[Range],
    *,
    threads: int | None = None,
) -> None:
    """Fill the views of all ``ranges``.

    Blocking; all its threads have ended when it returns or raises. Memory: at most ``threads``
    times ``MAX_REQUEST`` besides the views, and some 500 bytes for each chunk. Frames that come
    from a server are kept in the node cache, as far as it has room without giving up others of
    the same call. Raises ``CorruptError`` naming pack and file, ``NotFoundError`` for a pack that
    is not there, ``ValueError`` for a range that leaves its file, and the errors of the store;
    the views then hold anything.
    """
    locations = whereabouts.locations
    work = _Scatter(repository, threads)
    work.run(plan(ranges, locations), locations, whereabouts)


def prefetch(
    repository: Repository,
    locations: Located,
    ranges: Iterable[tuple[Content, int, int]],
    *,
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Have the node cache hold all frames of ``(content, start, length)``; returns bytes fetched.

    As far as it has room without giving up others of the same call, and until ``stop`` is set.
    Does nothing for a store on this machine, or without a cache. Raises as ``scatter``.
    """
    if repository.cache is None or is_local(repository):
        return 0
    jobs = plan_frames(ranges, locations)
    return _Scatter(repository, threads, stop).fill(jobs)


def is_local(repository: Repository) -> bool:
    """Return whether the store is on this machine, where caching its frames gains nothing."""
    return isinstance(parse_url(repository.objects.url), FileLocation)


class _Scatter:
    """One call of ``scatter``: its threads and what they share."""

    def __init__(
        self, repository: Repository, threads: int | None, stop: threading.Event | None = None
    ) -> None:
        self._objects = repository.objects
        self._fetcher = repository.fetcher
        self._local = is_local(repository)
        self._cache = None if self._local else repository.cache
        self._threads = threads or (LOCAL_THREADS if self._local else REMOTE_THREADS)
        self._stop = threading.Event()
        self._told = stop or self._stop
        self._ended = threading.Semaphore(0)
        self._failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._keeping = self._cache is not None
        self._filling = False
        self._kept = 0
        self._places: tuple[Located, Whereabouts] | None = None

    def run(self, jobs: Sequence[Job], locations: Located, whereabouts: Whereabouts) -> None:
        """Do all ``jobs``, which were planned by ``locations``."""
        self._places = locations, whereabouts
        cached, missing = self._sorted(jobs)
        self._do(self._grouped(missing), cached)

    def fill(self, jobs: Sequence[Job]) -> int:
        """Fetch those that are not in the cache, as many as it takes; returns their bytes."""
        kept = [job for job in self._sorted(jobs)[1] if job.keep]
        self._filling = True
        with contextlib.suppress(CacheFullError, _StoppedError):
            self._do(self._grouped(kept), [])
        return self._kept

    def _sorted(self, jobs: Sequence[Job]) -> tuple[list[list[Job]], list[Job]]:
        """Return what the cache has, one by one, and what it has not."""
        if self._cache is None:
            return [], list(jobs)
        held = [self._cache.contains(job.frame.digest) for job in jobs]
        cached = [job for job, there in zip(jobs, held, strict=True) if there]
        missing = [job for job, there in zip(jobs, held, strict=True) if not there]
        room = int(self._cache.capacity * _SHARE) - sum(job.frame.raw for job in cached)
        for job in missing:
            room -= job.frame.raw
            job.keep = room >= 0
        for job in cached:
            job.keep = True  # should it be gone, or damaged, by the time that it is read
        return [[job] for job in cached], missing

    def _grouped(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Return ``jobs`` in groups of one request each."""
        of_frame = {(job.frame.pack, job.frame.offset, job.frame.digest): job for job in jobs}
        frames = [job.frame for job in jobs]
        share = sum(frame.stored for frame in frames) // (2 * self._threads)
        groups = self._fetcher.plan(
            frames,
            max_gap=affordable_gap(frames),
            max_request=min(MAX_REQUEST, max(MIN_REQUEST, share)),
        )
        return [
            [of_frame[frame.pack, frame.offset, frame.digest] for frame in group]
            for group in groups
        ]

    def _do(self, remote: Sequence[list[Job]], cached: Sequence[list[Job]]) -> None:
        work = deque(remote)
        if self._cache is not None and work:
            # Ranks that restore the same at the same time begin at different places, and find in
            # the cache what the others have fetched when they come to it.
            work.rotate(random.randrange(len(work)))  # noqa: S311
        work.extend(cached)
        count = min(self._threads if remote else LOCAL_THREADS, len(work))
        if count < 2:
            self._work(work)
            return
        # No pool: interrupted as it starts a thread, that would not wait for it.
        workers = [
            threading.Thread(target=self._work_aside, args=(work,), name="scatter", daemon=True)
            for _ in range(count)
        ]
        try:
            for worker in workers:
                worker.start()
            for _ in workers:
                self._ended.acquire()
        except BaseException:
            self._stop.set()
            raise
        finally:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        if self._failures:
            raise self._failures[0]

    def _work_aside(self, work: deque[list[Job]]) -> None:
        try:
            self._work(work)
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            self._failures.append(error)
            self._stop.set()
        finally:
            self._ended.release()

    def _work(self, work: deque[list[Job]]) -> None:
        """Do what is left of ``work`` until there is none, or another thread has failed."""
        scratch = _Scratch()
        while not self._is_over():
            try:
                group = work.popleft()
            except IndexError:
                return
            # Another process may have fetched some of it since this was planned.
            rest = [job for job in group if not self._from_cache(job, scratch)]
            for part in [group] if len(rest) == len(group) else self._grouped(rest):
                try:
                    self._fetch(part, scratch)
                except (CorruptError, NotFoundError) as error:
                    self._fetch_elsewhere(part, scratch, error)

    def _is_over(self) -> bool:
        return self._stop.is_set() or self._told.is_set()

    def _arrived(self, _size: int) -> None:
        if self._is_over():
            raise _StoppedError

    def _from_cache(self, job: Job, scratch: _Scratch) -> bool:
        """Read a frame from the cache; whether it was there, and sound."""
        if self._cache is None:
            return False
        if not job.pieces:
            return self._cache.contains(job.frame.digest)
        scratch.begin(job.frame.raw)
        raw = job.direct()
        if raw is None:
            raw = scratch.take(job.frame.raw)
        # A cache that cannot be read is as good as one that has nothing.
        with contextlib.suppress(EnvstoreError):
            if _is_sound(self._cache, job.frame.digest, raw):
                _place(job, raw, job.frame.digest)
                return True
        return False

    def _fetch_elsewhere(
        self, group: Sequence[Job], scratch: _Scratch, error: EnvstoreError
    ) -> None:
        """Fetch what was not where it should be from where it has moved; raises if it has not."""
        if self._places is None:
            raise error
        locations, whereabouts = self._places
        for _ in range(ATTEMPTS):
            moved = whereabouts.again(locations)
            if moved is None:
                raise error
            locations = moved
            try:
                for part in self._grouped(plan_again(group, moved)):
                    self._fetch(part, scratch)
            except (CorruptError, NotFoundError) as failure:
                error = failure
            else:
                return
        raise error

    def _fetch(self, group: Sequence[Job], scratch: _Scratch) -> None:
        """Fetch what lies side by side with one request."""
        first, last = group[0].frame, group[-1].frame
        scratch.begin(last.offset + last.stored - first.offset)
        at = first.offset
        views: list[memoryview] = []
        stored: list[memoryview] = []
        for job in group:
            frame = job.frame
            if frame.offset > at:
                views.append(scratch.take(frame.offset - at))
            direct = job.direct() if frame.codec == Codec.RAW else None
            stored.append(scratch.take(frame.stored) if direct is None else direct)
            views.append(stored[-1])
            at = frame.offset + frame.stored
        try:
            self._objects.get_range_into(pack_key(first.pack), first.offset, views, self._arrived)
        except (CorruptError, NotFoundError) as error:
            raise placed(error, first, group[0].path) from None
        for job, data in zip(group, stored, strict=True):
            frame = job.frame
            raw, known = data, None
            if frame.codec != Codec.RAW:
                try:
                    raw = memoryview(decode(frame, data, self._fetcher.load))
                except EnvstoreError as error:
                    raise placed(error, frame, job.path) from None
                known = frame.digest
            _place(job, raw, known)
            if job.keep:
                self._keep(frame, raw)

    def _keep(self, frame: FrameRef, raw: memoryview) -> None:
        """Put a frame into the cache, as long as that takes any."""
        if self._cache is None or not self._keeping:
            return
        try:
            self._cache.put(frame.digest, raw)
        except EnvstoreError:
            # A full or broken cache makes the next restore slow, not this one impossible.
            self._keeping = False
            if self._filling:
                raise
            return
        with self._lock:
            self._kept += frame.stored


def _is_sound(cache: BlobCache, name: bytes, view: memoryview) -> bool:
    """Read a blob; whether it is there and as its name says."""
    held = cache.read_into(name, (view,))
    if held is Held.DOUBTFUL:
        if digest(view) != name:
            cache.drop(name)
            return False
        cache.seal(name)
    return held is not Held.NOT


def _place(job: Job, raw: memoryview, known: bytes | None) -> None:
    """Check a raw frame, whose digest may be ``known``, and copy its chunks to their places."""
    frame = job.frame
    if known is None and (job.keep or any(piece.size == frame.raw for piece in job.pieces)):
        known = digest(raw)
        if known != frame.digest:
            what = f"frame {frame.digest.hex()} does not match its digest"
            raise placed(CorruptError(what), frame, job.path)
    checked = {} if known is None else {(0, frame.raw): known}
    for piece in job.pieces:
        end = piece.start + piece.size
        name = checked.get((piece.start, end))
        if name is None:
            name = checked[piece.start, end] = digest(raw[piece.start : end])
        if name != piece.digest:
            what = f"chunk {piece.digest.hex()} is not where its locations say"
            raise placed(CorruptError(what), frame, piece.path)
    for piece in job.pieces:
        if piece.view is not raw:
            low = piece.start + piece.low
            piece.view[:] = raw[low : low + len(piece.view)]


class _Scratch:
    """A buffer that one thread uses again and again."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")
        self._used = 0

    def begin(self, size: int) -> None:
        """Take back what was given, and have room for ``size`` bytes."""
        self._used = 0
        if len(self._buffer) < size:
            self._buffer = memoryview(bytearray(size))

    def take(self, size: int) -> memoryview:
        """Return a view of ``size`` bytes, good until ``begin``."""
        start = self._used
        self._used += size
        return self._buffer[start : self._used]
