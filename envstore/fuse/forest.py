"""The name space of one server: one snapshot by itself, or any number of them side by side.

Alone, a snapshot's nodes are the file system's. Several stand below a root of their own, each
in a slot: the number in the upper half of a node id. Files of equal content and attributes have one
id whatever snapshot they are met in, so that the kernel caches them once: a keyed hash, which
nobody without the key can make collide, and which says nothing about where the file is. What the
kernel was told of is noted beside each snapshot, where the next server finds it again.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from envstore.fuse.tree import ROOT, Attributes, Tree
from envstore.store.entries import NORMAL_MTIME_NS
from envstore.store.source import Kind

SECRET_SIZE = 32
OBJECTS = b".objects"
"""What is added to a snapshot's name for the directory of its files by content key, for overlayfs.

Each has its own: only its own manifest says which file a key leads to."""

_SHELVES, _OBJECTS = (1 << 32) - 512, (1 << 32) - 1
"""In each slot: the first of 256 directories of objects, and the one above them. No tree has as
many nodes."""
_SLOT_SHIFT = 32
_NODE = (1 << _SLOT_SHIFT) - 1
_SHARED = 1 << 62
_ATTRIBUTES = struct.Struct("<IIQq")
_HEX = re.compile(rb"[0-9a-f]*")  # and not what else int() and fromhex() would take
_DIRECTORY = stat.S_IFDIR | 0o755


@dataclass(frozen=True, slots=True)
class Plot:
    """One snapshot in a forest.

    ``domain`` keeps apart what must not be shared: files of different stores. ``told`` is
    zeroed memory that outlives this server, four bytes for each of at least twice as many places
    as the tree has files (see ``told_size``).
    """

    name: bytes
    tree: Tree
    domain: bytes
    told: memoryview


def told_size(tree: Tree) -> int:
    """Return how many bytes of ``Plot.told`` a tree needs: a power of two."""
    return 4 << (2 * len(tree)).bit_length()


class Forest:
    """Node ids and what is behind them. Ids given to its methods must have come from it.

    Every method raises ``KeyError`` for an id whose snapshot is not (any more) here.
    """

    def __init__(self, secret: bytes, alone: Tree | None = None) -> None:
        """Begin with no snapshots, or with ``alone``, which will be the only one.

        ``secret`` must be the same in every server of one mount, and be known to no one else.
        """
        self._secret = secret
        self._plots: dict[int, Plot] = {}
        self._names: dict[bytes, int] = {}
        self._trees: dict[int, Tree] = {0: alone} if alone is not None else {}
        self._alone = alone is not None

    def plant(self, slot: int, plot: Plot) -> None:
        """Let a snapshot appear below the root; ``slot`` is 1 or more."""
        self._plots[slot] = plot
        self._trees[slot] = plot.tree
        self._names[plot.name] = slot

    def fell(self, slot: int) -> None:
        """Let a snapshot vanish."""
        plot = self._plots.pop(slot)
        del self._trees[slot], self._names[plot.name]

    @property
    def slots(self) -> list[int]:
        """The slots in use."""
        return list(self._trees)

    def place(self, node_id: int) -> tuple[int, int]:
        """Return the slot and the node that an id stands for. Not for the root and its like."""
        if node_id & _SHARED:
            return self._find_shared(node_id)
        slot, node = node_id >> _SLOT_SHIFT, node_id & _NODE
        if node not in self._trees[slot]:
            raise KeyError(node_id)
        return slot, node

    def knows(self, node_id: int) -> bool:
        """Return whether it can be told what is behind an id."""
        try:
            self.kind(node_id)
        except KeyError:
            return False
        return True

    def node(self, slot: int, node: int) -> int | None:
        """Return ``node`` if the slot has a file of that number."""
        tree = self._trees[slot]
        return node if node in tree and tree.kind(node) is Kind.FILE else None

    def tree(self, slot: int) -> Tree:
        """Return the snapshot in a slot."""
        return self._trees[slot]

    def kind(self, node_id: int) -> Kind:
        """Return what is behind an id."""
        if self._above(node_id):
            return Kind.DIRECTORY
        slot, node = self.place(node_id)
        return self._trees[slot].kind(node)

    def lookup(self, parent: int, name: bytes) -> int | None:
        """Return the id of ``name`` in a directory, ``None`` if there is none."""
        if self._above(parent):
            return self._lookup_above(parent, name)
        slot, node = self.place(parent)
        child = self._trees[slot].lookup(node, name)
        return None if child is None else self._id(slot, child)

    def lasting(self, parent: int) -> bool:
        """Whether what a directory does not hold now it will never hold."""
        return self._alone or parent != ROOT

    def attributes(self, node_id: int) -> Attributes:
        """Return everything about a node; ``inode`` is its id."""
        if self._above(node_id):
            return Attributes(node_id, _DIRECTORY, 2, 0, 0, NORMAL_MTIME_NS)
        slot, node = self.place(node_id)
        return self._trees[slot].attributes(node)._replace(inode=node_id)

    def target(self, node_id: int) -> bytes:
        """Return where a symbolic link points."""
        slot, node = self.place(node_id)
        return self._trees[slot].target(node)

    def listing(self, node_id: int, start: int) -> Iterator[tuple[bytes, int]]:
        """Yield the names and ids in a directory from a position on."""
        if not self._above(node_id):
            slot, node = self.place(node_id)
            tree = self._trees[slot]
            for position in range(start, tree.child_count(node)):
                child = tree.child(node, position)
                yield tree.name(child), self._id(slot, child)
        elif node_id == ROOT:
            above: list[tuple[bytes, int]] = []
            # In the order of slots, which only grow: who lists while one goes misses none.
            for slot in sorted(self._plots):
                name = self._plots[slot].name
                above += [(name, self._in(slot, ROOT)), (name + OBJECTS, self._in(slot, _OBJECTS))]
            yield from above[start:]
        elif node_id & _NODE == _OBJECTS:
            slot = node_id >> _SLOT_SHIFT
            for number in range(start, 256):
                yield b"%02x" % number, self._in(slot, _SHELVES + number)

    def recall(self, plot: Plot) -> None:
        """Note all ids that the kernel may have been told of a snapshot when it was here before.

        That takes time, and is for any thread before ``plant``.
        """
        tree = plot.tree
        for node in range(ROOT, len(tree) + 1):
            if tree.kind(node) is Kind.FILE and tree.inode(node) == node:
                shared = self._shared(plot, node)
                if shared is not None:
                    self._tell(plot, shared, node)

    def _above(self, node_id: int) -> bool:
        """Whether a directory is in no snapshot's tree."""
        if self._alone or node_id & _SHARED:
            return False
        if node_id >> _SLOT_SHIFT and node_id >> _SLOT_SHIFT not in self._trees:
            raise KeyError(node_id)
        return node_id == ROOT or node_id & _NODE >= _SHELVES

    def _lookup_above(self, parent: int, name: bytes) -> int | None:
        if parent == ROOT:
            tree = name.removesuffix(OBJECTS)
            slot = self._names.get(tree)
            return None if slot is None else self._in(slot, ROOT if tree == name else _OBJECTS)
        slot, node = parent >> _SLOT_SHIFT, parent & _NODE
        if node == _OBJECTS:
            shelf = _HEX.fullmatch(name)
            return self._in(slot, _SHELVES + int(name, 16)) if shelf and len(name) == 2 else None
        if not _HEX.fullmatch(name) or len(name) != 64:
            return None
        key = bytes.fromhex(name.decode())
        if key[0] != node - _SHELVES:
            return None
        found = self._trees[slot].find_content(key)
        return None if found is None else self._id(slot, found)

    def _in(self, slot: int, node: int) -> int:
        return slot << _SLOT_SHIFT | node

    def _id(self, slot: int, node: int) -> int:
        tree = self._trees[slot]
        node = tree.inode(node)
        plot = self._plots.get(slot)
        if plot is None or tree.kind(node) is not Kind.FILE:
            return self._in(slot, node)
        shared = self._shared(plot, node)
        if shared is None:
            return self._in(slot, node)
        self._tell(plot, shared, node)
        return shared

    def _shared(self, plot: Plot, node: int) -> int | None:
        """Return the id of a file that other snapshots may have, too.

        A file with several names has an id of its own: how many they are depends on the snapshot.
        """
        found = plot.tree.attributes(node)
        if found.links != 1:
            return None
        attributes = _ATTRIBUTES.pack(found.mode, 0, found.size, found.mtime_ns)
        content = plot.tree.content_key(node) + attributes + plot.domain
        hashed = blake3(content, key=self._secret).digest(length=8)
        return _SHARED | int.from_bytes(hashed, "little") >> 2

    def _tell(self, plot: Plot, shared: int, node: int) -> None:
        """Note in which node the id is found again; a plot's other equal nodes are not needed."""
        for at in _places(plot.told, shared):
            if plot.told[at] == node:
                return
            if not plot.told[at]:
                plot.told[at] = node
                return

    def _find_shared(self, node_id: int) -> tuple[int, int]:
        for slot, plot in self._plots.items():
            for at in _places(plot.told, node_id):
                node = plot.told[at]
                if not node:
                    break
                # Memory of a server that was killed: a number that makes no sense is skipped.
                if self.node(slot, node) is not None and self._shared(plot, node) == node_id:
                    return slot, node
        raise KeyError(node_id)


def _places(told: memoryview, shared: int) -> Iterator[int]:
    """Yield where an id may be noted, from the likeliest on; each place once."""
    mask = len(told) - 1
    for step in range(len(told)):
        yield (shared + step) & mask
