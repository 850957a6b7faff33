"""Lets the locations of a manifest lead elsewhere, by compare-and-swap.

Nothing is named anew: the manifest says which chunks a tree has, its locations only where they
lie. Whatever others make of the locations at the same time stays; what is replaced is what is
there now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from envstore.store.digest import DIGEST_SIZE
from envstore.store.harm import in_packs
from envstore.store.locations import (
    NOWHERE,
    FrameRef,
    Locations,
    open_locations,
    replace_locations,
)
from envstore.store.manifest import Root
from envstore.store.objects.base import ObjectStore

Find = Callable[[bytes], "tuple[FrameRef, int] | None"]
"""Returns where a chunk lies, in which frame and at which offset of it, or ``None``."""


@dataclass(frozen=True, slots=True)
class Redirected:
    """How many parts and references were led elsewhere, and how many still lead where they did."""

    moved: int
    left: int


def redirect(
    objects: ObjectStore,
    manifest: bytes,
    root: Root,
    leaving: Collection[bytes],
    find: Find,
    names: bytes | None = None,
) -> Redirected:
    """Lead what lies in the packs ``leaving`` to where ``find`` says that it lies as well.

    ``names`` are the digests of all references, one after the other; without them only the parts
    are led elsewhere. A difference leaves with its anchor. Raises ``NotFoundError`` and
    ``CorruptError`` for the locations, ``ConflictError``, and the errors of the store.
    """
    refs = sum(part.refs for part in root.parts)

    def change(data: bytes) -> tuple[bytes | None, Redirected]:
        old = open_locations(data, manifest, parts=len(root.parts), refs=refs)
        new, done = _redirected(old, root, leaving, find, names)
        return (new.seal() if done.moved else None), done

    return replace_locations(objects, manifest, change)


def _redirected(
    old: Locations, root: Root, leaving: Collection[bytes], find: Find, names: bytes | None
) -> tuple[Locations, Redirected]:
    new = Locations()
    numbers: dict[tuple[bytes, int], int] = {}
    moved = left = 0

    def number(frame: FrameRef) -> int:
        found = numbers.setdefault((frame.pack, frame.offset), len(new.frames))
        if found == len(new.frames):
            new.frames.append(frame)
            if frame.anchor is not None:
                new.frames.append(frame.anchor)
        return found

    def place(at: int, offset: int, name: bytes) -> tuple[int, int]:
        nonlocal moved, left
        frame = old.frames[at]
        if name and in_packs(frame, leaving):
            found = find(name)
            if found is not None:
                moved += 1
                return number(found[0]), found[1]
            left += 1
        return number(frame), offset

    for i, info in enumerate(root.parts):
        frame, offset = place(old.part_frames[i], old.part_offsets[i], info.digest)
        new.part_frames.append(frame)
        new.part_offsets.append(offset)
    for ref, (at, offset) in enumerate(zip(old.ref_frames, old.ref_offsets, strict=True)):
        if at != NOWHERE:
            name = b"" if names is None else names[ref * DIGEST_SIZE : (ref + 1) * DIGEST_SIZE]
            at, offset = place(at, offset, name)
        new.ref_frames.append(at)
        new.ref_offsets.append(offset)
    return new, Redirected(moved, left)
