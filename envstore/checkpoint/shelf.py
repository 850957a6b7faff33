"""Where the parts and commits of a run lie in its store: their keys, listings and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from envstore.checkpoint.bodies import (
    create,
    parse_id,
    parse_rank,
    rank_name,
    run_prefix,
    try_get,
)
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.records import Commit, Part, parse_commit, parse_part
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import PARALLEL

PartNames = set[tuple[int, int]]
"""The ``(rank, world size)`` of some parts of one checkpoint."""


def is_complete(names: PartNames) -> bool:
    """Return whether these are all ranks of one world."""
    sizes = {world_size for _, world_size in names}
    return len(sizes) == 1 and len(names) == sizes.pop()


class Shelf:
    """The parts and commits of one run. Safe to share between threads; knows no rules."""

    def __init__(self, objects: ObjectStore, run: RunName) -> None:
        self._objects = objects
        self._parts = f"{run_prefix(run)}parts/"
        self._commits = f"{run_prefix(run)}commits/"

    def put_part(self, part: Part) -> Part:
        """Create a part; returns the one that is there. One request."""
        key = self._part_key(part.checkpoint, part.rank, part.world_size)
        data, _ = create(self._objects, key, part.encode())
        return parse_part(data, part.checkpoint, part.rank, part.world_size)

    def parts(self, checkpoint: CheckpointId) -> PartNames:
        """Return which parts of a checkpoint are there. One listing."""
        return self._list(f"{checkpoint}/").get(checkpoint, set())

    def all_parts(self) -> dict[CheckpointId, PartNames]:
        """Return which parts are there. One listing."""
        return self._list("")

    def read_parts(self, checkpoint: CheckpointId, names: Sequence[tuple[int, int]]) -> list[Part]:
        """Return these parts. One request each. Raises ``NotFoundError``, ``CorruptError``."""

        def read(name: tuple[int, int]) -> Part:
            return parse_part(
                self._objects.get(self._part_key(checkpoint, *name)), checkpoint, *name
            )

        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(read, names))

    def drop_parts(self, checkpoint: CheckpointId, names: Iterable[tuple[int, int]]) -> None:
        """Remove these parts. One request each."""
        keys = [self._part_key(checkpoint, *name) for name in names]
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(self._objects.delete, keys))

    def commits(self) -> set[CheckpointId]:
        """Return what is committed. One listing."""
        listed = self._objects.list(self._commits)
        found = (parse_id(info.key.removeprefix(self._commits)) for info in listed)
        return {checkpoint for checkpoint in found if checkpoint is not None}

    def create_commit(self, commit: Commit) -> tuple[Commit, bool]:
        """Create a COMMIT; returns the one that is there, and whether it came just now."""
        data, mine = create(self._objects, self._commit_key(commit.checkpoint), commit.encode())
        return parse_commit(data, commit.checkpoint), mine

    def read_commit(self, checkpoint: CheckpointId) -> Commit | None:
        """Return a COMMIT, ``None`` if there is none. One request. Raises ``CorruptError``."""
        data = try_get(self._objects, self._commit_key(checkpoint))
        return None if data is None else parse_commit(data, checkpoint)

    def has_commit(self, checkpoint: CheckpointId) -> bool:
        """Return whether there is a COMMIT. One request."""
        return self._objects.size(self._commit_key(checkpoint)) is not None

    def drop_commit(self, checkpoint: CheckpointId) -> None:
        """Remove a COMMIT. One request."""
        self._objects.delete(self._commit_key(checkpoint))

    def _list(self, below: str) -> dict[CheckpointId, PartNames]:
        found: dict[CheckpointId, PartNames] = {}
        for info in self._objects.list(self._parts + below):
            name, _, last = info.key.removeprefix(self._parts).partition("/")
            checkpoint, rank = parse_id(name), parse_rank(last)
            if checkpoint is not None and rank is not None:
                found.setdefault(checkpoint, set()).add(rank)
        return found

    def _part_key(self, checkpoint: CheckpointId, rank: int, world_size: int) -> str:
        return f"{self._parts}{checkpoint}/{rank_name(rank, world_size)}"

    def _commit_key(self, checkpoint: CheckpointId) -> str:
        return f"{self._commits}{checkpoint}"
