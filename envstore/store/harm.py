"""Which files of which trees cannot be read: damage, as the people see it who want their files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from envstore.errors import CorruptError
from envstore.store.entries import HOLE, Entry
from envstore.store.examining import Examiner, Place
from envstore.store.locations import FrameRef, Locations
from envstore.store.manifest import Root, read_entries
from envstore.store.problems import MAX_FILES, LostFile
from envstore.store.repository import Repository

_BATCH = 50_000


def in_packs(frame: FrameRef, packs: Collection[bytes]) -> list[bytes]:
    """Return which of ``packs`` it takes to read ``frame``: its own, and that of its anchor."""
    found = [frame.pack] if frame.pack in packs else []
    if frame.anchor is not None and frame.anchor.pack in packs:
        found.append(frame.anchor.pack)
    return found


def places_of_parts(root: Root, locations: Locations) -> Iterator[Place]:
    """Yield where the parts of a manifest are said to lie."""
    for i, info in enumerate(root.parts):
        frame = locations.frames[locations.part_frames[i]]
        yield frame, locations.part_offsets[i], info.size, info.digest


def places_of_files(
    locations: Locations, entries: Iterable[Entry]
) -> Iterator[tuple[bytes, Place]]:
    """Yield each chunk that a file refers to, with the file's path. Raises ``CorruptError``."""
    number = 0
    for entry in entries:
        for name, size in entry.refs:
            if name != HOLE:
                at = locations.ref_frames[number]
                if at >= len(locations.frames):
                    raise CorruptError(f"chunk {name.hex()} is nowhere")
                place = locations.frames[at], locations.ref_offsets[number], size, name
                yield entry.path, place
            number += 1


def examine_tree(
    repository: Repository, examiner: Examiner, manifest: bytes, suspects: Collection[bytes]
) -> Iterator[tuple[bytes, Place]]:
    """Yield the chunks of files of a tree that lie in ``suspects`` and cannot be read.

    ``examiner`` then knows why. The metadata is read twice; the frames of a few ten thousand chunks
    are looked at together. Raises ``CorruptError`` and ``NotFoundError`` if the metadata is gone.
    """
    root, locations = repository.located(manifest)

    def suspected() -> Iterator[tuple[bytes, Place]]:
        entries = read_entries(repository.parts(root, locations))
        for path, place in places_of_files(locations, entries):
            if in_packs(place[0], suspects):
                yield path, place

    batch: set[Place] = set()
    for _, place in suspected():
        batch.add(place)
        if len(batch) >= _BATCH:
            examiner.examine(batch)
            batch.clear()
    examiner.examine(batch)
    for path, place in suspected():
        if examiner.reason(place) is not None:
            yield path, place


@dataclass(slots=True)
class Losses:
    """Collects the files that one damaged object keeps from being read, and in which trees."""

    paths: dict[bytes, dict[str, None]] = field(default_factory=dict)
    _beyond: set[int] = field(default_factory=set)

    def add(self, path: bytes, users: Iterable[str]) -> None:
        """Take up that ``path`` is lost to ``users``."""
        if path not in self.paths and len(self.paths) >= MAX_FILES:
            self._beyond.add(hash(path))
            return
        self.paths.setdefault(path, {}).update(dict.fromkeys(users))

    @property
    def count(self) -> int:
        """How many files there are."""
        return len(self.paths) + len(self._beyond)

    def files(self) -> tuple[LostFile, ...]:
        """Return them in order of their paths, at most ``MAX_FILES``."""
        return tuple(
            LostFile(path, tuple(sorted(users))) for path, users in sorted(self.paths.items())
        )
