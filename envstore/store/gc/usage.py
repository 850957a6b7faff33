"""How much of each live pack is live: by frames, and by chunks in frames that are live in part.

The tables of packs come from the index segments, one segment at a time; those of packs that no
segment lists from the packs' own ends. Cost: all segments are read, 36 bytes for each chunk.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.digest import parse_hex
from envstore.store.frames import Frame
from envstore.store.gc.ahead import read_ahead
from envstore.store.gc.marking import Marks, Progress, frame_of
from envstore.store.gc.survey import Survey
from envstore.store.index import open_segment, segment_key
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import Pack, pack_key, read_table
from envstore.store.verify import DAMAGE

_TAIL = 64 << 10


@dataclass(frozen=True, slots=True)
class Usage:
    """By pack number how many bytes of a live pack are needed, with its table.

    ``lost`` are packs that segments list and that are not in the store.
    """

    needed: array[int]
    lost: frozenset[bytes]


def measure_packs(objects: ObjectStore, found: Survey, marks: Marks, progress: Progress) -> Usage:
    """Look into all live packs. Of one whose table cannot be read all is needed."""
    packs = found.packs
    needed = array("Q", packs.sizes)
    seen = bytearray(len(needed))
    unlisted: set[bytes] = set()
    segments = segment_names(found)
    for at, pack in listed_packs(objects, found, segments):
        progress("looking into packs", at, len(segments))
        number = packs.number(pack.digest)
        if not number:
            unlisted.add(pack.digest)
        elif marks.why[number] and not seen[number]:
            seen[number] = 1
            needed[number] = needed_bytes(marks, number, pack)
    others = [number for number in range(1, len(needed)) if marks.why[number] and not seen[number]]

    def read(number: int) -> Pack | None:
        try:
            return read_pack_table(objects, packs.names[number], packs.sizes[number])
        except DAMAGE:
            return None

    for at, (number, pack_found) in enumerate(read_ahead(others, read, weigh=lambda _: _TAIL)):
        progress("looking into packs without a segment", at, len(others))
        if pack_found is not None:
            needed[number] = needed_bytes(marks, number, pack_found)
    # Some were stored since the listing.
    sizes = read_ahead(sorted(unlisted), lambda pack: objects.size(pack_key(pack)))
    return Usage(needed, frozenset(pack for pack, size in sizes if size is None))


def segment_names(found: Survey) -> list[bytes]:
    """Return the listed index segments."""
    names = (
        parse_hex(key.removeprefix("index/")) for key in found.caches if key.startswith("index/")
    )
    return sorted(name for name in names if name is not None)


def listed_packs(
    objects: ObjectStore, found: Survey, segments: list[bytes]
) -> Iterator[tuple[int, Pack]]:
    """Yield the packs of all segments, each with how many segments came before."""
    for at, _, packs in read_segments(objects, found, segments):
        for pack in packs:
            yield at, pack


def read_segments(
    objects: ObjectStore, found: Survey, names: Sequence[bytes]
) -> Iterator[tuple[int, bytes, Sequence[Pack]]]:
    """Yield those of the named segments that can be read, each with how many came before."""

    def read(name: bytes) -> bytes | None:
        try:
            return objects.get(segment_key(name))
        except DAMAGE:
            return None

    def weigh(name: bytes) -> int:
        return found.caches[segment_key(name)]

    for at, (name, data) in enumerate(read_ahead(names, read, weigh=weigh)):
        if data is None:
            continue
        try:
            packs = open_segment(data, name)
        except DAMAGE:
            continue  # `verify` tells of it
        yield at, name, packs


def needed_bytes(marks: Marks, number: int, pack: Pack) -> int:
    """Return how many bytes of a pack live chunks take: a frame's stored ones by their share."""
    live = marks.of_pack(number)
    if marks.whole[number] or len(live) >= sum(len(frame.sizes) for frame in pack.frames):
        return pack.size
    alive = set(live)
    counts = Counter(map(frame_of, live))
    dead = 0
    for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
        first = marks.frame(number, offset)
        count = counts.get(first, 0)
        if not count:
            dead += frame.stored
        elif count < len(frame.sizes):
            raw = sum(size for _, _, size in live_chunks(frame, first, alive))
            dead += frame.stored - frame.stored * raw // max(1, frame.raw)
    return pack.size - dead


def live_chunks(frame: Frame, first: int, live: set[int]) -> list[tuple[bytes, int, int]]:
    """Return the chunks of a frame, whose first place is ``first``, that are in ``live``."""
    return [chunk for chunk in frame.chunks() if first + chunk[1] in live]


def read_pack_table(objects: ObjectStore, name: bytes, size: int) -> Pack:
    """Return the frames of a stored pack. One request, two for a long table.

    Raises ``CorruptError``, ``NotFoundError``, ``UnsupportedFormatError``.
    """
    length = min(size, _TAIL)
    for _ in range(2):
        tail = objects.get_range(pack_key(name), size - length, length)
        found = read_table(tail, size, name)
        if not isinstance(found, int):
            return Pack(name, size, found)
        length = found
    raise CorruptError(f"pack {name.hex()} is not as long as its table says")
