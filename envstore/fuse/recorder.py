"""Notes what a mount is asked to read: the recording that a start profile is made of."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from envstore.fuse.prefetch import resolve
from envstore.fuse.tree import Tree
from envstore.store.locations import Located
from envstore.store.profiles import MAX_RANGES, Range

_NEAR = 64 << 10
"""Bytes between two reads that are not worth two ranges: less than most chunks have."""


class _Touched:
    """The ranges of one file that were read: starts, ends and turns, by start."""

    __slots__ = ("ends", "starts", "turns")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.turns: list[int] = []

    def add(self, start: int, end: int, turn: int) -> int:
        """Add a range; returns how many more there are now."""
        low = bisect_left(self.ends, start - _NEAR)
        high = low
        while high < len(self.starts) and self.starts[high] <= end + _NEAR:
            high += 1
        if high > low:
            start = min(start, self.starts[low])
            end = max(end, self.ends[high - 1])
            turn = min(self.turns[low:high])
        self.starts[low:high], self.ends[low:high], self.turns[low:high] = [start], [end], [turn]
        return 1 - (high - low)


class Recorder:
    """Collects the reads of one tree; give ``watch`` to its ``Reader``."""

    def __init__(self, tree: Tree, locations: Located, limit: int = MAX_RANGES) -> None:
        """Note at most ``limit`` ranges; of those read later none is kept."""
        self._tree = tree
        self._locations = locations
        self._limit = limit
        self._touched: dict[int, _Touched] = {}
        self._turn = self._count = 0

    def watch(self, node: int, offset: int, size: int) -> None:
        """Note that ``size`` bytes from ``offset`` of file ``node`` are read."""
        end = min(offset + size, self._tree.stored_size(node))
        if end <= offset:
            return
        touched = self._touched.get(node)
        if touched is None:
            touched = self._touched[node] = _Touched()
        elif touched.starts[0] <= offset and end <= touched.ends[0]:
            return
        if self._count < self._limit:
            self._turn += 1
            self._count += touched.add(offset, end, self._turn)

    def ranges(self) -> list[Range]:
        """Return what was read, in the order of first touch."""
        found = [
            (turn, node, start, end)
            for node, touched in self._touched.items()
            for start, end, turn in zip(touched.starts, touched.ends, touched.turns, strict=True)
        ]
        found.sort()
        paths = {node: self._tree.path(node) for node in self._touched}
        return [Range(paths[node], start, end - start) for _, node, start, end in found]

    def report(self) -> dict[str, Any]:
        """Return the recording as JSON can hold it; ``read_recording`` turns it back."""
        ranges = self.ranges()
        frames = resolve(ranges, self._tree, self._locations)
        return {
            "ranges": [
                [item.path.decode("utf-8", "surrogateescape"), item.offset, item.length]
                for item in ranges
            ],
            "frames": len(frames),
            "stored_bytes": sum(frame.stored for frame in frames),
            "complete": self._count < self._limit,
        }


def read_recording(report: dict[str, Any]) -> list[Range]:
    """Return the ranges in a ``Recorder``'s report."""
    rows: Sequence[tuple[str, int, int]] = report["ranges"]
    return [
        Range(path.encode("utf-8", "surrogateescape"), offset, length)
        for path, offset, length in rows
    ]
