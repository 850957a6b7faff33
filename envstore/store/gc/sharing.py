"""Sharing: where a chunk is live in several places, all trees come to use it in one of them.

Writers at the same time, who cannot know of each other, each store what they have in common, and
so does a push beside a collector that moves things. Here locations are led to one of the copies,
whose bytes are checked before; the others are dead then, and go as anything else that is dead in a
pack. Chunks in differences, and trees with a profile, which may have been stored once more to lie
side by side, stay as they are.

Cost: all segments are read once more, and 300 bytes of memory for each chunk that is looked at: of
a store with more than ``AT_ONCE`` live ones only a part, by the digests, chosen at random. What is
shared is read once. The locations of all live manifests are read if there is anything to share.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from envstore.store.binary import pack_array, unpack_array
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.fetch import FrameFetcher
from envstore.store.frames import Codec
from envstore.store.gc.columns import Columns
from envstore.store.gc.marking import Marks, Progress
from envstore.store.gc.relinking import change_all
from envstore.store.gc.survey import PROFILES, Survey
from envstore.store.gc.usage import listed_packs, live_chunks, segment_names
from envstore.store.locations import NOWHERE, FrameRef, locations_key
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import Repository
from envstore.store.sessions import writing
from envstore.store.verify import DAMAGE

AT_ONCE = 500_000
"""Live chunks that are compared with each other at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk lies in a raw frame."""

    frame: FrameRef
    start: int
    size: int


Shared = Mapping[tuple[bytes, int], Mapping[int, tuple[Place, Place]]]
"""By pack and offset of a frame, and by place in it: that place, and the one to use instead."""


def share(
    repository: Repository,
    found: Survey,
    marks: Marks,
    progress: Progress,
    *,
    avoid: Collection[int] = (),
    part: int | None = None,
) -> int:
    """Have trees share what is live more than once; returns how many chunks had other copies.

    ``avoid`` are numbers of packs that are about to go. ``part`` chooses among the parts of a
    large store. May run beside anything. Raises ``SessionLostError``, ``ConflictError`` and the
    errors of the store.
    """
    parts = len(marks.chunks) // AT_ONCE + 1
    chosen = random.randrange(parts) if part is None else part % parts  # noqa: S311
    places = _several(repository.objects, found, marks, progress, avoid, parts, chosen)
    if not places:
        return 0
    with writing(repository, "gc") as (session, inside):
        unfit = session.doomed_packs | session.damaged_packs
        shared = _choose(inside.objects, found, places, unfit, progress)
        laid_out = {
            bytes.fromhex(key.split("/")[1]) for key in found.small if key.startswith(PROFILES)
        }
        manifests = [
            (manifest, found.small.get(locations_key(manifest), 0))
            for manifest in marks.manifests
            if manifest not in laid_out
        ]
        packs = {pack for pack, _ in shared}
        changed = False

        def edit(columns: Columns) -> bool:
            nonlocal changed
            done = share_columns(columns, shared)
            changed |= done
            return done

        if packs:
            change_all(inside.objects, manifests, packs, edit, progress)
    return len(places) if changed else 0


def _several(
    objects: ObjectStore,
    found: Survey,
    marks: Marks,
    progress: Progress,
    avoid: Collection[int],
    parts: int,
    chosen: int,
) -> dict[bytes, list[Place]]:
    """Return the live chunks that lie in more than one place, with all of them."""
    first: dict[bytes, Place] = {}
    several: dict[bytes, list[Place]] = {}
    seen = set(avoid)
    segments = segment_names(found)
    for at, pack in listed_packs(objects, found, segments):
        progress("looking for copies", at, len(segments))
        number = found.packs.number(pack.digest)
        if not number or not marks.why[number] or number in seen:
            continue
        seen.add(number)
        alive = set(marks.of_pack(number))
        for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
            if frame.codec == Codec.XOR:
                continue
            facts = frame.stored, frame.raw, frame.codec, frame.digest
            ref = FrameRef(pack.digest, offset, *facts)
            for name, start, size in live_chunks(frame, marks.frame(number, offset), alive):
                if parts > 1 and int.from_bytes(name[:8], "little") % parts != chosen:
                    continue
                place = Place(ref, start, size)
                if name in first:
                    several.setdefault(name, [first[name]]).append(place)
                else:
                    first[name] = place
    return several


def _choose(
    objects: ObjectStore,
    found: Survey,
    places: Mapping[bytes, list[Place]],
    unfit: Collection[bytes],
    progress: Progress,
) -> dict[tuple[bytes, int], dict[int, tuple[Place, Place]]]:
    """Choose the copy of each chunk that stays, in the largest pack, and check its bytes."""
    kept: dict[FrameRef, list[tuple[bytes, Place]]] = {}
    for name, copies in places.items():
        fit = [place for place in copies if place.frame.pack not in unfit]
        if fit:
            best = max(fit, key=lambda place: _rank(found, place))
            kept.setdefault(best.frame, []).append((name, best))
    fetcher = FrameFetcher(objects, None)
    shared: dict[tuple[bytes, int], dict[int, tuple[Place, Place]]] = {}
    for at, (frame, chunks) in enumerate(kept.items()):
        progress("checking copies", at, len(kept))
        try:
            raw = memoryview(fetcher.load(frame))
        except DAMAGE:
            continue  # `verify` tells of it
        for name, best in chunks:
            if digest(raw[best.start : best.start + best.size]) != name:
                continue
            for place in places[name]:
                if place != best and place.size == best.size:
                    key = place.frame.pack, place.frame.offset
                    shared.setdefault(key, {})[place.start] = place, best
    return shared


def _rank(found: Survey, place: Place) -> tuple[int, bytes, int, int]:
    pack = place.frame.pack
    return found.packs.sizes[found.packs.number(pack)], pack, place.frame.offset, place.start


def share_columns(columns: Columns, shared: Shared) -> bool:
    """Let ``columns`` use the copies that stay; returns whether that changed anything."""
    moves = _moves(columns, shared)
    if not moves:
        return False
    known = {
        (columns.packs[number], offset): at
        for at, (number, offset) in enumerate(zip(columns.numbers, columns.offsets, strict=True))
    }
    changed = False
    sides = []
    for side in (columns.parts, columns.refs):
        frames, starts = (unpack_array(column, 4) for column in side)
        for at, frame in enumerate(frames):
            move = moves.get(frame)
            if move is not None and starts[at] in move:
                _, best = move[starts[at]]
                frames[at], starts[at] = _number(columns, known, best.frame), best.start
                changed = True
        sides.append((frames, starts))
    if changed:
        _keep_used(columns, sides)
    return changed


def _moves(columns: Columns, shared: Shared) -> dict[int, Mapping[int, tuple[Place, Place]]]:
    """Return what is shared of the frames of ``columns``, by their number."""
    found: dict[int, Mapping[int, tuple[Place, Place]]] = {}
    for at, (number, offset) in enumerate(zip(columns.numbers, columns.offsets, strict=True)):
        places = shared.get((columns.packs[number], offset))
        if places is not None:
            frame = next(iter(places.values()))[0].frame
            facts = columns.stored[at], columns.raw[at], columns.codecs[at]
            name = columns.names[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]
            if facts == (frame.stored, frame.raw, frame.codec) and name == frame.digest:
                found[at] = places
    return found


def _number(columns: Columns, known: dict[tuple[bytes, int], int], frame: FrameRef) -> int:
    """Return the number of a frame in ``columns``, where it is added if it is not there."""
    at = known.get((frame.pack, frame.offset))
    if at is None:
        if frame.pack not in columns.packs:
            columns.packs.append(frame.pack)
        at = known[frame.pack, frame.offset] = len(columns.numbers)
        columns.numbers.append(columns.packs.index(frame.pack))
        columns.offsets.append(frame.offset)
        columns.stored.append(frame.stored)
        columns.raw.append(frame.raw)
        columns.codecs.append(frame.codec)
        columns.names += frame.digest
    return at


def _keep_used(columns: Columns, sides: list[tuple[array[int], array[int]]]) -> None:
    """Leave the frames out that nothing leads to any more, and their packs."""
    used = {frame for frames, _ in sides for frame in frames}
    used.discard(NOWHERE)
    # The anchor of a difference stays behind it, whether anything leads to it or not.
    used |= {at for at in columns.anchors() if at - 1 in used}
    keep = sorted(used)
    names = bytearray()
    for at in keep:
        names += columns.names[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]
    packs: dict[bytes, int] = {}
    columns.numbers = array(
        "I", (packs.setdefault(columns.packs[columns.numbers[at]], len(packs)) for at in keep)
    )
    columns.packs = list(packs)
    columns.offsets = array("I", (columns.offsets[at] for at in keep))
    columns.stored = array("I", (columns.stored[at] for at in keep))
    columns.raw = array("I", (columns.raw[at] for at in keep))
    columns.codecs = bytearray(columns.codecs[at] for at in keep)
    columns.names = names
    order = {at: new for new, at in enumerate(keep)}
    order[NOWHERE] = NOWHERE
    columns.parts, columns.refs = (
        (
            memoryview(pack_array(array("I", (order[frame] for frame in frames)))),
            memoryview(pack_array(starts)),
        )
        for frames, starts in sides
    )
