"""What snapshots, segments and packages expect of packs, in few bytes, for ``verify`` to compare.

Every frame and chunk that is to be in a pack is kept as a number of 64 bits that stands for its
place and its digest: 8 bytes a chunk, whatever its name takes. Two that differ have the same
number once in 10^19, and a number tells nobody outside this process anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from envstore.errors import CorruptError
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry
from envstore.store.frames import Frame, encode_table
from envstore.store.locations import FrameRef, Locations
from envstore.store.manifest import Root
from envstore.store.packages import StoredPackage
from envstore.store.packs import Pack
from envstore.store.snapshots import Snapshot

_SLACK = 4096


def frame_mark(offset: int, frame: Frame | FrameRef) -> int:
    """Return what stands for a frame at ``offset``."""
    return hash((offset, frame.stored, frame.raw, frame.codec, frame.digest))


def chunk_mark(frame: int, offset: int, size: int, name: bytes) -> int:
    """Return what stands for a chunk at ``offset`` of the frame that starts at byte ``frame``."""
    return hash((frame, offset, size, name))


def anchor_mark(frame: int, anchor: FrameRef) -> int:
    """Return what stands for the anchor of the frame that starts at byte ``frame``."""
    return hash((frame, anchor))


class Marks:
    """A set of numbers of 64 bits that takes 8 to 16 bytes for each. Not thread-safe."""

    __slots__ = ("_all", "_limit")

    def __init__(self) -> None:
        self._all = array("q")
        self._limit = _SLACK

    def __len__(self) -> int:
        return len(set(self._all))

    def add(self, mark: int) -> None:
        """Take one up; it may be there already."""
        self._all.append(mark)
        if len(self._all) > self._limit:
            self._all = array("q", set(self._all))
            self._limit = 2 * len(self._all) + _SLACK

    def beyond(self, present: set[int]) -> int:
        """Return how many are not ``present``."""
        return len(set(self._all) - present)


@dataclass(slots=True)
class Expected:
    """What one pack is to hold. ``users`` has bit n set if the n-th target needs the pack.

    ``claims`` are segments that list it with a table whose digest is not its name: it is a pack
    of version 1, or they do not tell the truth. ``listed`` is whether any segment lists it.
    """

    frames: Marks = field(default_factory=Marks)
    chunks: Marks = field(default_factory=Marks)
    anchors: Marks = field(default_factory=Marks)
    users: int = 0
    claims: list[tuple[str, bytes]] = field(default_factory=list)
    listed: bool = False

    def need(self, frame: FrameRef) -> None:
        """Expect a frame, and the anchor that it is said to have."""
        self.frames.add(frame_mark(frame.offset, frame))
        if frame.anchor is not None:
            self.anchors.add(anchor_mark(frame.offset, frame.anchor))


class Plans(dict[bytes, Expected]):
    """What is expected of each pack, by its name."""

    def __missing__(self, pack: bytes) -> Expected:
        self[pack] = found = Expected()
        return found

    def expect_frames(self, user: int, frames: Iterable[FrameRef]) -> None:
        """Expect ``frames``, as the locations of what target ``user`` leads to list them."""
        for frame in frames:
            plan = self[frame.pack]
            plan.users |= 1 << user
            plan.need(frame)

    def expect_tree(
        self, root: Root, locations: Locations, entries: Iterable[Entry], snapshot: Snapshot
    ) -> None:
        """Expect every chunk of a tree. Raises ``CorruptError`` where its parts disagree."""
        frames = locations.frames

        def need(number: int, offset: int, size: int, name: bytes) -> None:
            if number >= len(frames):
                raise CorruptError(f"chunk {name.hex()} is nowhere")
            frame = frames[number]
            if offset + size > frame.raw:
                raise CorruptError(f"chunk {name.hex()} reaches beyond its frame")
            self[frame.pack].chunks.add(chunk_mark(frame.offset, offset, size, name))

        for i, info in enumerate(root.parts):
            need(locations.part_frames[i], locations.part_offsets[i], info.size, info.digest)
        number = count = files = logical = 0
        for entry in entries:
            count += 1
            files += entry.kind == 0
            logical += entry.size
            for name, size in entry.refs:
                if name != HOLE:
                    need(locations.ref_frames[number], locations.ref_offsets[number], size, name)
                number += 1
        if (count, files, logical) != (root.entries, root.files, root.logical):
            raise CorruptError("the entries do not add up to what the manifest's root says")
        if (files, logical) != (snapshot.files, snapshot.logical_bytes):
            raise CorruptError("the entries do not add up to what the snapshot says")

    def expect_listed(self, key: str, packs: Iterable[Pack]) -> None:
        """Expect the packs that the segment ``key`` lists."""
        for pack in packs:
            plan = self[pack.digest]
            plan.listed = True
            table = digest(encode_table(pack.frames))
            if table != pack.digest:
                plan.claims.append((key, table))

    def expect_package(self, package: StoredPackage) -> None:
        """Expect what a stored package leads to."""
        locations = package.locations
        for frame in locations.frames:
            self[frame.pack].need(frame)
        number = 0
        for entry in package.entries:
            for name, size in entry.refs:
                if name != HOLE:
                    frame = locations.frames[locations.ref_frames[number]]
                    mark = chunk_mark(frame.offset, locations.ref_offsets[number], size, name)
                    self[frame.pack].chunks.add(mark)
                number += 1
