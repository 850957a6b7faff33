"""Finds where else in a store chunks lie, and whether they really do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from envstore.store.cache import BlobCache
from envstore.store.digest import digest, parse_hex
from envstore.store.examining import Examiner, Place
from envstore.store.frames import Codec
from envstore.store.locations import FrameRef
from envstore.store.packs import Pack
from envstore.store.problems import DAMAGE
from envstore.store.repository import PARALLEL, Repository

MAX_COPIES = 4
"""Places that are remembered, and tried one after the other, for each chunk."""


def listed_packs(repository: Repository) -> Iterator[Pack]:
    """Yield every pack that a segment lists, some more than once; damaged segments are skipped."""
    names = (parse_hex(info.key.rpartition("/")[2]) for info in repository.objects.list("index/"))

    def read(name: bytes) -> list[Pack]:
        try:
            return repository.segment(name)
        except DAMAGE:
            return []

    segments = [name for name in names if name is not None]
    with ThreadPoolExecutor(PARALLEL) as pool:
        # A few at a time: an answer that waits takes memory.
        for at in range(0, len(segments), PARALLEL):
            for packs in pool.map(read, segments[at : at + PARALLEL]):
                yield from packs


def find_copies(
    repository: Repository,
    examiner: Examiner,
    wanted: Collection[bytes],
    without: Collection[bytes],
) -> dict[bytes, tuple[FrameRef, int]]:
    """Return where the chunks ``wanted`` can be had from, but in the packs ``without``.

    All segments are read, and of what they name for these chunks so much that each is found whole
    or not at all. Differences do not count: what they take is named by locations only. Memory: in
    the number of ``wanted``. Raises the errors of the store.
    """
    found: dict[bytes, list[Place]] = {}
    if not wanted:
        return {}
    for pack in listed_packs(repository):
        if pack.digest in without:
            continue
        for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
            if frame.codec == Codec.XOR:
                continue
            ref = FrameRef(pack.digest, offset, frame.stored, frame.raw, frame.codec, frame.digest)
            for name, start, size in frame.chunks():
                if name in wanted:
                    places = found.setdefault(name, [])
                    place = ref, start, size, name
                    if len(places) < MAX_COPIES and place not in places:
                        places.append(place)
    good: dict[bytes, tuple[FrameRef, int]] = {}
    for turn in range(MAX_COPIES):
        tried = [
            places[turn]
            for name, places in found.items()
            if name not in good and len(places) > turn
        ]
        examiner.examine(tried)
        for place in tried:
            if examiner.reason(place) is None:
                good[place[3]] = place[0], place[1]
    return good


def cached_chunk(cache: BlobCache | None, place: Place) -> bytes | None:
    """Return a chunk from this machine's cache, if that has the frame in which it lay, whole."""
    frame, offset, size, name = place
    raw = cache.read(frame.digest) if cache is not None else None
    if raw is None or digest(raw) != frame.digest:
        return None
    data = raw[offset : offset + size]
    return data if digest(data) == name else None
