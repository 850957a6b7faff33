"""Decides which chunks are stored again: all that are unknown, and hits that would fragment.

A hit saves bytes but may send a later sequential read to one more place. A hit is refused when
it would spread a window of a file over more than ``MAX_RUNS`` ranges of packs, shortest runs
first; so reading any such window costs at most that many requests, and the bytes stored again are
bounded by the shortest runs of that window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envstore.store.chunking import Chunk
from envstore.store.index import DedupIndex
from envstore.store.locations import FrameRef

MAX_RUNS = 8
MIN_WINDOW = 1 << 20
"""Shorter pieces are never refused: a small file is one request anyway."""


@dataclass(slots=True)
class _Run:
    start: int
    end: int
    size: int
    hit: bool


def places_to_reuse(
    index: DedupIndex, chunks: Sequence[Chunk], session_start: int
) -> list[tuple[int, int] | None]:
    """Return for each chunk the place to reuse, or ``None`` where it is to be stored.

    ``chunks`` are consecutive in one file. Frames numbered from ``session_start`` on are being
    written by this push and never fragment anything.
    """
    places = [index.find(chunk.digest) for chunk in chunks]
    if sum(len(chunk.data) for chunk in chunks) < MIN_WINDOW:
        return places
    runs = _runs(index.frames, chunks, places)
    excess = len(runs) - MAX_RUNS
    if excess <= 0:
        return places
    old = [run for run in runs if run.hit and (places[run.start] or (0, 0))[0] < session_start]
    for run in sorted(old, key=lambda run: run.size)[:excess]:
        for i in range(run.start, run.end):
            places[i] = None
    return places


def _runs(
    frames: Sequence[FrameRef], chunks: Sequence[Chunk], places: Sequence[tuple[int, int] | None]
) -> list[_Run]:
    """Group chunks that lie, or will lie, next to each other in one pack."""
    runs: list[_Run] = []
    previous: tuple[int, int] | None = None
    for i, (chunk, place) in enumerate(zip(chunks, places, strict=True)):
        size = len(chunk.data)
        if runs and _adjacent(frames, previous, place):
            runs[-1].end = i + 1
            runs[-1].size += size
        else:
            runs.append(_Run(i, i + 1, size, place is not None))
        previous = place
    return runs


def _adjacent(
    frames: Sequence[FrameRef], a: tuple[int, int] | None, b: tuple[int, int] | None
) -> bool:
    if a is None or b is None:
        return a is b
    if a[0] == b[0]:
        return True
    first, second = frames[a[0]], frames[b[0]]
    return first.pack == second.pack and first.offset + first.stored == second.offset
