"""Lets locations lead to where frames lie now, without reading the manifests they belong to.

In the columns of a manifest's locations each moved frame is replaced where it stands, so numbers
stay. A frame of which somebody else has come to need more than was moved stays as it is, and with
it the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from envstore.errors import NotFoundError
from envstore.store.binary import pack_array, unpack_array
from envstore.store.digest import DIGEST_SIZE
from envstore.store.gc.ahead import read_ahead
from envstore.store.gc.columns import Columns, open_columns
from envstore.store.gc.marking import Progress
from envstore.store.gc.moves import Move
from envstore.store.locations import NOWHERE, locations_key, packs_named, replace_locations
from envstore.store.objects.base import ObjectStore

Moves = Mapping[tuple[bytes, int], Move]
"""By the pack and the offset where a frame was."""


def by_place(moves: Iterable[Move]) -> dict[tuple[bytes, int], Move]:
    """Return ``moves`` by where the frames were."""
    return {(move.old.pack, move.old.offset): move for move in moves}


def relink(
    objects: ObjectStore,
    manifests: Collection[tuple[bytes, int]],
    moves: Moves,
    progress: Progress,
) -> set[bytes]:
    """Change the locations of ``manifests``, given with their sizes, by compare-and-swap.

    Returns the packs that some of them still need although frames of theirs were moved. Reads all
    of them, and writes those that change. Raises ``ConflictError`` if one is changed all the time,
    ``CorruptError``, and the errors of the store.
    """
    packs = {pack for pack, _ in moves}
    return change_all(
        objects, manifests, packs, lambda columns: move_columns(columns, moves), progress
    )


def change_all(
    objects: ObjectStore,
    manifests: Collection[tuple[bytes, int]],
    packs: set[bytes],
    edit: Callable[[Columns], bool],
    progress: Progress,
) -> set[bytes]:
    """``edit`` those locations that name one of ``packs``; returns which are named afterwards.

    ``edit`` says whether it has changed its argument; it is called from several threads, and once
    more where somebody else was faster. Raises as ``relink``.
    """
    stuck: set[bytes] = set()

    def change(item: tuple[bytes, int]) -> set[bytes]:
        return _change(objects, item[0], packs, edit)

    # Unpacked they take several times their size.
    for at, (_, left) in enumerate(read_ahead(manifests, change, weigh=lambda item: 8 * item[1])):
        progress("changing locations", at, len(manifests))
        stuck |= left
    return stuck


def _change(
    objects: ObjectStore, manifest: bytes, packs: set[bytes], edit: Callable[[Columns], bool]
) -> set[bytes]:
    def rewrite(data: bytes) -> tuple[bytes | None, set[bytes]]:
        if packs.isdisjoint(packs_named(data, locations_key(manifest))):
            return None, set()
        columns = open_columns(data, manifest)
        changed = edit(columns)
        left = packs.intersection(columns.packs)
        return (columns.seal() if changed else None), left

    try:
        return replace_locations(objects, manifest, rewrite)
    except NotFoundError:
        return set()


def move_columns(columns: Columns, moves: Moves) -> bool:
    """Replace in ``columns`` what ``moves`` says; returns whether that was anything."""
    found: dict[int, Move] = {}
    for at, (number, offset) in enumerate(zip(columns.numbers, columns.offsets, strict=True)):
        move = moves.get((columns.packs[number], offset))
        if move is not None and _is(columns, at, move):
            found[at] = move
    for at in columns.anchors():
        found.pop(at, None)
    _leave_out(columns, found)
    if not found:
        return False
    packs = list(columns.packs)
    known = {name: number for number, name in enumerate(packs)}
    for at, move in found.items():
        new = move.new
        if new.pack not in known:
            known[new.pack] = len(packs)
            packs.append(new.pack)
        columns.numbers[at] = known[new.pack]
        columns.offsets[at], columns.stored[at], columns.raw[at] = new.offset, new.stored, new.raw
        columns.codecs[at] = new.codec
        columns.names[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE] = new.digest
    cut = {at: move.places for at, move in found.items() if move.places is not None}
    if cut:
        columns.parts = _moved(columns.parts, cut)
        columns.refs = _moved(columns.refs, cut)
    _drop_unused(columns, packs)
    return True


def _is(columns: Columns, at: int, move: Move) -> bool:
    """Whether a frame of the columns is the one that was moved, in every respect."""
    old = move.old
    facts = columns.stored[at], columns.raw[at], columns.codecs[at]
    name = columns.names[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]
    return facts == (old.stored, old.raw, old.codec) and name == old.digest


def _leave_out(columns: Columns, found: dict[int, Move]) -> None:
    """Drop the moves of frames of which more is needed than was taken over."""
    cut = {at: move.places for at, move in found.items() if move.places is not None}
    if not cut:
        return
    for frames, places in columns.blocks():
        for frame, place in zip(frames, places, strict=True):
            taken = cut.get(frame)
            if taken is not None and place not in taken:
                found.pop(frame, None)


def _moved(
    pair: tuple[memoryview, memoryview], cut: Mapping[int, Mapping[int, int]]
) -> tuple[memoryview, memoryview]:
    frames = unpack_array(pair[0], 4)
    places = unpack_array(pair[1], 4)
    for at, frame in enumerate(frames):
        if frame != NOWHERE and frame in cut:
            places[at] = cut[frame][places[at]]
    return pair[0], memoryview(pack_array(places))


def _drop_unused(columns: Columns, packs: list[bytes]) -> None:
    """Number the packs anew, by first use, without those that no frame is in any more."""
    order: dict[int, int] = {}
    for at, number in enumerate(columns.numbers):
        columns.numbers[at] = order.setdefault(number, len(order))
    columns.packs = [packs[number] for number in order]
