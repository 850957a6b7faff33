"""Reads files that are shown otherwise than they are stored: verified first, then relocated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from envstore.fuse.reader import Reader
from envstore.fuse.tree import Tree
from envstore.store.relocated import Relocated

_HELD = 1 << 20
"""Segments of files read lately that are kept in memory, at about 20 bytes each."""


class RelocatingReader:
    """A ``Reader`` of a tree of which some files are relocated. Belongs to one trio run.

    What it asks ``stored`` for, and what that is told of in turn (profiles, guesses), are ranges
    of files as they are stored, the same at any prefix.
    """

    def __init__(self, stored: Reader, tree: Tree) -> None:
        self._stored = stored
        self._tree = tree
        self._held: OrderedDict[int, Relocated] = OrderedDict()
        self._segments = 0

    def read_now(self, node: int, offset: int, size: int) -> bytes | None:
        """See ``Reader.read_now``."""
        if not self._tree.is_relocated(node):
            return self._stored.read_now(node, offset, size)
        cut = self._relocated(node).cut(offset, size)
        data = self._stored.read_now(node, cut.start, cut.size) if cut.size else b""
        return None if data is None else cut.join(data)

    async def read(self, node: int, offset: int, size: int) -> bytes:
        """See ``Reader.read``."""
        if not self._tree.is_relocated(node):
            return await self._stored.read(node, offset, size)
        cut = self._relocated(node).cut(offset, size)
        return cut.join(await self._stored.read(node, cut.start, cut.size) if cut.size else b"")

    def expect(self, nodes: Iterable[int]) -> None:
        """See ``Reader.expect``."""
        self._stored.expect(nodes)

    def used(self) -> tuple[int, int]:
        """See ``Reader.used``."""
        return self._stored.used()

    def _relocated(self, node: int) -> Relocated:
        found = self._held.get(node)
        if found is None:
            found = self._held[node] = self._tree.relocated(node)
            self._segments += found.segments
            while self._segments > _HELD and len(self._held) > 1:
                self._segments -= self._held.popitem(last=False)[1].segments
        else:
            self._held.move_to_end(node)
        return found
