"""What byte ranges of a tree's files ask of the frames of its packs."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from envstore.errors import CorruptError, EnvstoreError
from envstore.store.entries import HOLE
from envstore.store.fetch import MAX_GAP
from envstore.store.frames import Codec
from envstore.store.locations import FrameRef, Located

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
class Piece:
    """Where one chunk goes. It is ``size`` bytes from ``start`` in its raw frame.

    Of it the bytes from ``low`` on are wanted, as many as ``view`` has. ``ref`` is the number of
    the reference in its manifest.
    """

    path: str
    ref: int
    digest: bytes
    start: int
    size: int
    low: int
    view: memoryview


@dataclass(slots=True)
class Job:
    """One frame, and where its chunks go: nowhere if it is only to be cached."""

    frame: FrameRef
    path: str
    pieces: list[Piece] = field(default_factory=list)
    keep: bool = False

    def direct(self) -> memoryview | None:
        """Return the view that takes the raw frame as it is, if there is one."""
        for piece in self.pieces:
            if len(piece.view) == self.frame.raw:
                return piece.view
        return None


class _Jobs:
    """Jobs by frame, in the order in which the frames were first met."""

    def __init__(self, locations: Located) -> None:
        self._locations = locations
        self._found: dict[tuple[bytes, int, bytes], Job] = {}

    def of(self, path: str, ref: int) -> Job:
        """Return the job of the frame in which a reference lies, which is no hole."""
        at = self._locations.ref_frames[ref]
        if at >= len(self._locations.frames):
            raise CorruptError(f"locations: a chunk of {path} is nowhere")
        frame = self._locations.frames[at]
        key = frame.pack, frame.offset, frame.digest
        job = self._found.get(key)
        if job is None:
            if frame.codec == Codec.RAW and frame.stored != frame.raw:
                raise placed(CorruptError("a raw frame of two lengths"), frame, path)
            job = self._found[key] = Job(frame, path)
        return job

    def add(self, piece: Piece) -> None:
        """Have a chunk go where ``piece`` says, from wherever it lies."""
        job = self.of(piece.path, piece.ref)
        start = self._locations.ref_offsets[piece.ref]
        if start + piece.size > job.frame.raw:
            raise CorruptError(f"locations: a chunk of {piece.path} ends behind its frame")
        job.pieces.append(piece if piece.start == start else replace(piece, start=start))

    def all(self) -> list[Job]:
        """Return them."""
        return list(self._found.values())


def plan(ranges: Iterable[Range], locations: Located) -> list[Job]:
    """Return what ``ranges`` want of which frames; what is a hole is filled on the way.

    Raises ``CorruptError``, ``ValueError`` for a range that leaves its file.
    """
    jobs = _Jobs(locations)
    for wanted in ranges:
        content, view = wanted.content, wanted.view
        for number, low, length, at in _overlaps(content, wanted.start, len(view)):
            name, size = content.refs[number]
            place = view[at : at + length]
            if name == HOLE:
                _clear(place)
                continue
            ref = content.first + number
            start = locations.ref_offsets[ref]
            jobs.add(Piece(content.path, ref, name, start, size, low, place))
    return jobs.all()


def plan_again(jobs: Sequence[Job], locations: Located) -> list[Job]:
    """Return what ``jobs`` bring by other locations of the same manifest. Raises as ``plan``."""
    found = _Jobs(locations)
    for job in jobs:
        for piece in job.pieces:
            found.add(piece)
    again = found.all()
    keep = any(job.keep for job in jobs)
    for job in again:
        job.keep = keep
    return again


def plan_frames(ranges: Iterable[tuple[Content, int, int]], locations: Located) -> list[Job]:
    """Return the frames of ``(content, start, length)``, wanted nowhere; raises as ``plan``."""
    jobs = _Jobs(locations)
    for content, start, length in ranges:
        for number, _, _, _ in _overlaps(content, start, length):
            if content.refs[number][0] != HOLE:
                jobs.of(content.path, content.first + number)
    return jobs.all()


def _overlaps(content: Content, start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(reference, first byte of it, bytes, where in the range)``."""
    if start < 0 or length < 0 or start + length > content.size:
        raise ValueError(f"bytes {start}+{length} of {content.path}, which has {content.size}")
    number = bisect_right(content.starts, start) - 1
    at = start
    while at < start + length:
        end = min(content.starts[number + 1], start + length)
        if end > at:
            yield number, at - content.starts[number], end - at, at - start
        at = end
        number += 1


def _clear(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


def affordable_gap(frames: Sequence[FrameRef]) -> int:
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
    for gap, times in sorted(Counter(gaps).items()):
        # Gaps of one length are fetched all or none: a length is all that the caller is told.
        budget -= gap * times
        if budget < 0:
            break
        affordable = gap
    return affordable


def placed(error: EnvstoreError, frame: FrameRef, path: str) -> EnvstoreError:
    """Say of an error which file it concerns, and in which pack it was met."""
    error.message = f"{path}: {error.message} (pack {frame.pack.hex()}, byte {frame.offset})"
    if isinstance(error, CorruptError) and error.hint is None:
        error.hint = "run `envstore verify`"
    return error
