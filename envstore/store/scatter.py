"""Scatters byte ranges of a tree's files straight into buffers, verified and in parallel.

Whatever lies in the node cache is read from there; the rest comes in few large ranged requests. A
frame that is stored as it is and wholly wanted in one place is received there and hashed where it
lies; others pass through a scratch buffer of the thread that fetches them. Each frame is fetched
once, into however many places its chunks go, and no frame that nobody wants is.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from envstore.errors import CorruptError, EnvstoreError
from envstore.store.cache import Held
from envstore.store.digest import digest
from envstore.store.entries import HOLE
from envstore.store.fetch import MAX_GAP
from envstore.store.frames import Codec, decode_frame
from envstore.store.locations import FrameRef, Located
from envstore.store.objects import FileLocation, parse_url
from envstore.store.packs import pack_key
from envstore.store.repository import Repository

REMOTE_THREADS = 12
"""Requests in flight at once to a server."""
LOCAL_THREADS = 4
"""Reads in flight at once when all lies on this machine."""
MAX_REQUEST = 8 << 20
MIN_REQUEST = 2 << 20

_ZEROS = memoryview(bytes(1 << 20))
_WASTE = 0.01
_WASTE_FLOOR = 64 << 10


@dataclass(frozen=True, slots=True)
class Content:
    """A file as its manifest has it: its path, its references, and the number of the first."""

    path: str
    refs: Sequence[tuple[bytes, int]]
    first: int
    starts: Sequence[int]

    @classmethod
    def of(cls, path: str, refs: Sequence[tuple[bytes, int]], first: int) -> Content:
        """Return the content whose first reference is number ``first`` of its tree."""
        return cls(path, refs, first, list(accumulate((size for _, size in refs), initial=0)))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.starts[-1]


@dataclass(frozen=True, slots=True)
class Range:
    """What is wanted: the bytes of ``content`` from ``start`` on, in a writable ``view``.

    The view is C-contiguous, of format ``B``.
    """

    content: Content
    start: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where one chunk goes. It is ``size`` bytes from ``start`` in its raw frame.

    Of it the bytes from ``low`` on are wanted, as many as ``view`` has.
    """

    path: str
    digest: bytes
    start: int
    size: int
    low: int
    view: memoryview


@dataclass(slots=True)
class _Job:
    """One frame, and where its chunks go: nowhere if it is only to be cached."""

    frame: FrameRef
    path: str
    pieces: list[_Piece] = field(default_factory=list)
    keep: bool = False

    def direct(self) -> memoryview | None:
        """Return the view that takes the raw frame as it is, if there is one."""
        for piece in self.pieces:
            if len(piece.view) == self.frame.raw:
                return piece.view
        return None


class _StoppedError(Exception):
    """Another thread has failed: what this one does is of no use any more."""


def scatter(
    repository: Repository,
    locations: Located,
    ranges: Iterable[Range],
    *,
    threads: int | None = None,
) -> None:
    """Fill the views of all ``ranges``.

    Blocking; all its threads have ended when it returns or raises. Memory: ``threads`` times
    ``MAX_REQUEST`` at most, besides the views, and some 300 bytes for each chunk. Frames that come
    from a server are kept in the node cache, as far as it has room without giving up others of
    the same call. Raises ``CorruptError`` naming pack and file, ``NotFoundError`` for a pack that
    is not there, ``ValueError`` for a range that leaves its file, and the errors of the store;
    the views then hold anything.
    """
    _Scatter(repository, threads).run(list(_plan(ranges, locations).values()))


def prefetch(
    repository: Repository,
    locations: Located,
    ranges: Iterable[tuple[Content, int, int]],
    *,
    threads: int | None = None,
) -> int:
    """Have the node cache hold all frames of ``(content, start, length)``; returns bytes fetched.

    Does nothing for a store on this machine, or without a cache. Raises as ``scatter``.
    """
    if repository.cache is None or is_local(repository):
        return 0
    jobs: dict[tuple[bytes, int, bytes], _Job] = {}
    for content, start, length in ranges:
        for number, _, _, _ in _overlaps(content, start, length):
            if content.refs[number][0] != HOLE:
                _job(jobs, locations, content, number)
    missing = [job for job in jobs.values() if not repository.cache.contains(job.frame.digest)]
    _Scatter(repository, threads).run(missing)
    return sum(job.frame.stored for job in missing)


def is_local(repository: Repository) -> bool:
    """Return whether the store is on this machine, where caching its frames gains nothing."""
    return isinstance(parse_url(repository.objects.url), FileLocation)


def _overlaps(content: Content, start: int, length: int) -> Iterable[tuple[int, int, int, int]]:
    """Yield ``(reference, first byte of it, bytes, where in the range)``."""
    if start < 0 or length < 0 or start + length > content.size:
        raise ValueError(f"bytes {start}+{length} of {content.path}, which has {content.size}")
    if not length:
        return
    number = bisect_right(content.starts, start) - 1
    at = start
    while at < start + length:
        end = min(content.starts[number + 1], start + length)
        if end > at:
            yield number, at - content.starts[number], end - at, at - start
        at = end
        number += 1


def _plan(ranges: Iterable[Range], locations: Located) -> dict[tuple[bytes, int, bytes], _Job]:
    """Return by frame what is wanted of it; holes are filled on the way."""
    jobs: dict[tuple[bytes, int, bytes], _Job] = {}
    for wanted in ranges:
        content, view = wanted.content, wanted.view
        for number, low, length, at in _overlaps(content, wanted.start, len(view)):
            name, size = content.refs[number]
            place = view[at : at + length]
            if name == HOLE:
                for begin in range(0, length, len(_ZEROS)):
                    part = place[begin : begin + len(_ZEROS)]
                    part[:] = _ZEROS[: len(part)]
                continue
            job = _job(jobs, locations, content, number)
            start = locations.ref_offsets[content.first + number]
            if start + size > job.frame.raw:
                raise CorruptError(f"locations: a chunk of {content.path} ends behind its frame")
            job.pieces.append(_Piece(content.path, name, start, size, low, place))
    return jobs


def _job(
    jobs: dict[tuple[bytes, int, bytes], _Job], locations: Located, content: Content, number: int
) -> _Job:
    """Return the job of the frame in which a reference lies."""
    frame_number = locations.ref_frames[content.first + number]
    if frame_number >= len(locations.frames):
        raise CorruptError(f"locations: a chunk of {content.path} is nowhere")
    frame = locations.frames[frame_number]
    key = frame.pack, frame.offset, frame.digest
    job = jobs.get(key)
    if job is None:
        if frame.codec == Codec.RAW and frame.stored != frame.raw:
            raise _placed(CorruptError("a raw frame of two lengths"), frame, content.path)
        job = jobs[key] = _Job(frame, content.path)
    return job


class _Scatter:
    """One call of ``scatter``: its threads and what they share."""

    def __init__(self, repository: Repository, threads: int | None) -> None:
        self._objects = repository.objects
        self._fetcher = repository.fetcher
        self._local = is_local(repository)
        self._cache = None if self._local else repository.cache
        self._threads = threads
        self._stop = threading.Event()
        self._keeping = self._cache is not None

    def run(self, jobs: Sequence[_Job]) -> None:
        """Do all ``jobs``."""
        cached: list[list[_Job]] = []
        missing: list[_Job] = []
        room = int(self._cache.capacity * 0.9) if self._cache else 0
        for job in jobs:
            if self._cache is not None and self._cache.contains(job.frame.digest):
                cached.append([job])
                continue
            # What would only push out what was kept a moment ago is not kept.
            room -= job.frame.raw
            job.keep = room >= 0
            missing.append(job)
        threads = self._threads or (
            REMOTE_THREADS if missing and not self._local else LOCAL_THREADS
        )
        groups = self._grouped(missing, threads)
        work = deque([*groups, *cached])
        if len(work) < 2:
            self._work(work)
            return
        with ThreadPoolExecutor(min(threads, len(work)), "scatter") as pool:
            try:
                running = [pool.submit(self._work, work) for _ in range(min(threads, len(work)))]
                failures = [future.exception() for future in running]
            except BaseException:
                self._stop.set()
                raise
        for failure in failures:
            if failure is not None and not isinstance(failure, _StoppedError):
                raise failure

    def _grouped(self, jobs: Sequence[_Job], threads: int) -> list[list[_Job]]:
        """Return ``jobs`` in groups of one request each."""
        of_frame = {(job.frame.pack, job.frame.offset, job.frame.digest): job for job in jobs}
        frames = [job.frame for job in jobs]
        share = sum(frame.stored for frame in frames) // (2 * threads)
        plan = self._fetcher.plan(
            frames,
            max_gap=_affordable_gap(frames),
            max_request=min(MAX_REQUEST, max(MIN_REQUEST, share)),
        )
        return [
            [of_frame[frame.pack, frame.offset, frame.digest] for frame in group] for group in plan
        ]

    def _work(self, work: deque[list[_Job]]) -> None:
        """Do what is left of ``work`` until there is none, or another thread has failed."""
        scratch = _Scratch()
        try:
            while not self._stop.is_set():
                try:
                    group = work.popleft()
                except IndexError:
                    return
                if not self._from_cache(group, scratch):
                    self._fetch(group, scratch)
        except BaseException:
            self._stop.set()
            raise

    def _arrived(self, _size: int) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _from_cache(self, group: Sequence[_Job], scratch: _Scratch) -> bool:
        """Read a single frame from the cache; whether it was there, and sound."""
        if self._cache is None or len(group) > 1:
            return False
        (job,) = group
        scratch.clear()
        raw = job.direct()
        if raw is None:
            raw = scratch.take(job.frame.raw)
        job.keep = True
        held = self._cache.read_into(job.frame.digest, (raw,))
        if held is Held.NOT:
            return False
        if held is Held.DOUBTFUL:
            if digest(raw) != job.frame.digest:
                self._cache.drop(job.frame.digest)
                return False
            self._cache.seal(job.frame.digest)
        self._place(job, raw, job.frame.digest)
        return True

    def _fetch(self, group: Sequence[_Job], scratch: _Scratch) -> None:
        """Fetch what lies side by side with one request."""
        start = at = group[0].frame.offset
        views: list[memoryview] = []
        stored: list[memoryview] = []
        scratch.clear()
        for job in group:
            frame = job.frame
            if frame.offset > at:
                views.append(scratch.take(frame.offset - at))
            direct = job.direct() if frame.codec == Codec.RAW else None
            stored.append(scratch.take(frame.stored) if direct is None else direct)
            views.append(stored[-1])
            at = frame.offset + frame.stored
        self._objects.get_range_into(pack_key(group[0].frame.pack), start, views, self._arrived)
        for job, data in zip(group, stored, strict=True):
            frame = job.frame
            try:
                raw, known = data, None
                if frame.codec != Codec.RAW:
                    raw = memoryview(decode_frame(data, frame.codec, frame.raw, frame.digest))
                    known = frame.digest
                self._place(job, raw, known)
            except EnvstoreError as error:
                raise _placed(error, frame, job.path) from None
            if job.keep:
                self._keep(frame.digest, raw)

    def _place(self, job: _Job, raw: memoryview, known: bytes | None) -> None:
        """Check a raw frame, whose digest may be ``known``, and copy its chunks to their places."""
        frame = job.frame
        if known is None and (job.keep or any(piece.size == frame.raw for piece in job.pieces)):
            known = digest(raw)
            if known != frame.digest:
                raise CorruptError(f"frame {frame.digest.hex()} does not match its digest")
        checked = {} if known is None else {(0, frame.raw): known}
        for piece in job.pieces:
            end = piece.start + piece.size
            name = checked.get((piece.start, end))
            if name is None:
                name = checked[piece.start, end] = digest(raw[piece.start : end])
            if name != piece.digest:
                raise CorruptError(f"chunk {piece.digest.hex()} is not where its locations say")
        for piece in job.pieces:
            if piece.view is not raw:
                low = piece.start + piece.low
                piece.view[:] = raw[low : low + len(piece.view)]

    def _keep(self, name: bytes, raw: memoryview) -> None:
        """Put a frame into the cache, as long as that takes any."""
        if self._cache is None or not self._keeping:
            return
        try:
            self._cache.put(name, raw)
        except EnvstoreError:
            # A full or broken cache makes the next restore slow, not this one impossible.
            self._keeping = False


class _Scratch:
    """A buffer that one thread uses again and again."""

    def __init__(self) -> None:
        self._buffers: list[memoryview] = []
        self._used = 0

    def clear(self) -> None:
        """Take back what was given."""
        self._used = 0

    def take(self, size: int) -> memoryview:
        """Return a view of ``size`` bytes, good until ``clear``."""
        if self._used == len(self._buffers):
            self._buffers.append(memoryview(bytearray(size)))
        elif len(self._buffers[self._used]) < size:
            self._buffers[self._used] = memoryview(bytearray(size))
        view = self._buffers[self._used][:size]
        self._used += 1
        return view


def _affordable_gap(frames: Sequence[FrameRef]) -> int:
    """Return up to which length gaps between ``frames`` may be fetched to save requests.

    All of them together must not add more than a hundredth to what is wanted.
    """
    places = sorted((frame.pack, frame.offset, frame.stored) for frame in frames)
    gaps = []
    for (pack, offset, stored), (next_pack, next_offset, _) in pairwise(places):
        if pack == next_pack and 0 < next_offset - offset - stored <= MAX_GAP:
            gaps.append(next_offset - offset - stored)
    budget = max(_WASTE_FLOOR, int(_WASTE * sum(frame.stored for frame in frames)))
    affordable = 0
    for gap in sorted(gaps):
        budget -= gap
        if budget < 0:
            break
        affordable = gap
    return affordable


def _placed(error: EnvstoreError, frame: FrameRef, path: str) -> EnvstoreError:
    """Say of an error which file it concerns, and in which pack it was met."""
    error.message = f"{path}: {error.message} (pack {frame.pack.hex()}, byte {frame.offset})"
    if isinstance(error, CorruptError) and error.hint is None:
        error.hint = "run `envstore verify`"
    return error
