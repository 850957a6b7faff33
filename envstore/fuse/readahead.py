"""Guesses which frames will be read soon, from what was read just now."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from envstore.fuse.tree import Tree
from envstore.store.locations import NOWHERE

FIRST_WINDOW = 1 << 20
MAX_WINDOW = 16 << 20
"""Raw bytes that are fetched ahead of a sequential reader."""

WHOLE = 1 << 20
"""A file up to this size is fetched whole when any of it is missing."""

_SLACK = 1 << 20
_STREAMS = 256


@dataclass(slots=True)
class _Stream:
    """A file being read: where the next read is expected and how far was fetched ahead."""

    expected: int = 0
    window: int = 0
    ahead: int = 0


class Readahead:
    """Follows the reads of many files; remembers the ones read last."""

    def __init__(self, tree: Tree, ref_frames: Sequence[int], limit: int = MAX_WINDOW) -> None:
        """Plan for ``tree``, never more than ``limit`` raw bytes ahead in one file."""
        self._tree = tree
        self._ref_frames = ref_frames
        self._limit = limit
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self.known: set[int] = set()
        """Files of which is known what will be read, so that nothing is guessed before a miss."""

    def move(self, ref_frames: Sequence[int]) -> None:
        """Plan with other frames from now on."""
        self._ref_frames = ref_frames

    def plan(self, node: int, offset: int, length: int, *, missed: bool) -> list[int]:
        """Return the frames worth fetching after a read, which ``missed`` the cache or not."""
        refs = self._tree.file_refs(node)
        if len(refs) < 2:
            return []
        size = self._tree.stored_size(node)
        if size <= WHOLE:
            return self.frames(node, 0, size) if missed else []
        if node in self.known:
            if not missed:
                return []
            self.known.discard(node)
        end = offset + length
        stream = self._streams.get(node)
        if stream is None:
            stream = self._streams[node] = _Stream()
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
        self._streams.move_to_end(node)
        # The kernel reads ahead with several requests at once, which may overtake each other.
        follows = stream.expected and -_SLACK <= offset - stream.expected <= _SLACK
        if not follows:
            stream.expected, stream.window, stream.ahead = end, 0, end
            return []
        stream.expected = max(stream.expected, end)
        if stream.ahead - stream.expected > stream.window // 2 or stream.expected >= size:
            return []
        stream.window = min(max(2 * stream.window, FIRST_WINDOW), self._limit)
        start = max(stream.ahead, stream.expected)
        stream.ahead = min(stream.expected + stream.window, size)
        return self.frames(node, start, stream.ahead - start)

    def frames(self, node: int, offset: int, length: int) -> list[int]:
        """Return the frames that hold a range of a file, in order, each once."""
        pieces = self._tree.pieces(node, offset, length)
        numbers = dict.fromkeys(self._ref_frames[piece.ref] for piece in pieces)
        numbers.pop(NOWHERE, None)
        return list(numbers)
