"""Decides which chunks are stored again: all that are unknown, and hits that would fragment.

A hit saves bytes but may send a later sequential read to one more place. Reading a window of a
file takes one request for each range of frames that lie close together; a hit is refused when it
would make that more than ``MAX_RANGES``, the ranges that serve the fewest bytes first. So reading
any such window costs at most that many requests, and what is stored again is bounded by the
smallest ranges of that window. The parts of a manifest are such a window too, of fewer ranges:
whoever mounts it waits for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from envstore.store.chunking import Chunk
from envstore.store.fetch import MAX_GAP
from envstore.store.index import DedupIndex

MAX_RANGES = 8
MAX_PART_RANGES = 3
MIN_WINDOW = 1 << 20
"""Bytes below which nothing is refused: a small file is one request anyway."""


def places_to_reuse(
    index: DedupIndex,
    chunks: Sequence[Chunk],
    *,
    max_ranges: int = MAX_RANGES,
    min_window: int = MIN_WINDOW,
) -> list[tuple[int, int] | None]:
    """Return for each chunk the place to reuse, or ``None`` where it is to be stored.

    ``chunks`` are consecutive in one file. The index's own frames are being written by this push,
    next to each other, and count as one range. Below ``min_window`` bytes nothing is refused.
    """
    places = [index.find(chunk.digest) for chunk in chunks]
    if sum(len(chunk.data) for chunk in chunks) < min_window:
        return places
    served: dict[int, int] = {}
    for chunk, place in zip(chunks, places, strict=True):
        if place is not None and place[0] not in index.own:
            served[place[0]] = served.get(place[0], 0) + len(chunk.data)
    ranges = _ranges(index, served)
    # What is new makes one more range, in the packs being written; so does what is refused.
    new = any(place is None or place[0] in index.own for place in places)
    if len(ranges) + new > max_ranges:
        excess = len(ranges) + 1 - max_ranges
        ranges.sort(key=lambda numbers: sum(served[number] for number in numbers))
        refused = {number for numbers in ranges[:excess] for number in numbers}
        places = [None if place and place[0] in refused else place for place in places]
    return places


def _ranges(index: DedupIndex, numbers: Iterable[int]) -> list[list[int]]:
    """Group frames that one request would fetch together."""
    groups: list[list[int]] = []
    frames = index.frames
    end = 0
    for number in sorted(numbers, key=lambda n: (frames[n].pack, frames[n].offset)):
        frame = frames[number]
        together = groups and frames[groups[-1][-1]].pack == frame.pack
        if together and frame.offset - end <= MAX_GAP:
            groups[-1].append(number)
        else:
            groups.append([number])
        end = frame.offset + frame.stored
    return groups
