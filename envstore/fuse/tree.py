"""The names, attributes and chunk lists of one snapshot, in columns instead of objects.

A node is a number: 1 is the root, and entry ``i`` of the manifest is node ``i + 2``. Everything
asked of a node is a pure function of the manifest, so any server of the same snapshot gives the
same answers. About 110 bytes a file, whatever the tree's size.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from envstore.store.digest import DIGEST_SIZE
from envstore.store.entries import HOLE, NORMAL_MTIME_NS
from envstore.store.source import Kind

ROOT = 1
"""The root's node; the number is the kernel's."""

_KIND = 3
_NORMAL_MODES = (
    stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0,
    stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0,
)  # fmt: skip
"""Type and permission bits by kind, then the same with the executable bit."""


class Piece(NamedTuple):
    """A run of bytes within one chunk: ``length`` bytes from ``offset`` of reference ``ref``."""

    ref: int
    offset: int
    length: int


class Attributes(NamedTuple):
    """What stat(2) tells of a node: ``mode`` with the type, ``stored`` bytes that are no hole."""

    inode: int
    mode: int
    links: int
    size: int
    stored: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sizes of the whole tree: entries without the root, and the sum of all file sizes."""

    entries: int
    logical: int


@dataclass(slots=True)
class Columns:
    """What a tree is made of; ``build`` fills it and nobody changes it afterwards.

    Columns by node index (node - 1): ``kinds`` (kind and executable bit), ``names`` with
    ``name_starts`` (one longer), ``parents`` (directory slot), ``slots`` (number among the
    entries of its kind), ``inodes`` (node index that stands for this content), and where the
    tree keeps them ``modes`` and ``mtimes``. By directory slot: ``directories`` (node index)
    and ``child_starts`` (one longer) into ``children`` (node indexes by name). By file slot:
    ``file_starts`` (one longer), the first chunk reference. By reference: ``digests``, and
    ``ends`` (one longer), a running sum of chunk sizes. By link slot: ``targets`` with
    ``target_starts``. ``links`` counts the names of hard-linked files and ``holes`` the bytes
    not stored, by node index and file slot, for the few that have them.
    """

    kinds: bytes
    names: bytes
    name_starts: array[int]
    parents: array[int]
    slots: array[int]
    inodes: array[int]
    modes: array[int] | None
    mtimes: array[int] | None
    directories: array[int]
    child_starts: array[int]
    children: array[int]
    file_starts: array[int]
    digests: bytes
    ends: array[int]
    targets: bytes
    target_starts: array[int]
    links: dict[int, int]
    holes: dict[int, int]


class Tree:
    """A read-only name space. Nodes given to its methods must come from it."""

    def __init__(self, columns: Columns) -> None:
        self._c = columns
        entries = len(columns.kinds) - 1
        self.totals = Totals(entries, columns.ends[-1])
        self.refs = len(columns.ends) - 1

    def __len__(self) -> int:
        """Return the number of nodes, the root included."""
        return len(self._c.kinds)

    def __contains__(self, node: int) -> bool:
        """Whether ``node`` is a node of this tree."""
        return 0 < node <= len(self._c.kinds)

    def kind(self, node: int) -> Kind:
        """Return what the node is."""
        return Kind(self._c.kinds[node - 1] & _KIND)

    def attributes(self, node: int) -> Attributes:
        """Return everything about a node at once.

        Permission bits and time are those stored; in a normalised tree 0755, 0644 or 0777 by
        kind, and ``NORMAL_MTIME_NS``.
        """
        c = self._c
        index = node - 1
        flags = c.kinds[index]
        slot = c.slots[index]
        inode = c.inodes[index]
        size = stored = 0
        if not flags & _KIND:
            start, end = c.file_starts[slot : slot + 2]
            size = stored = c.ends[end] - c.ends[start]
            if c.holes:
                stored -= c.holes.get(slot, 0)
        elif flags & _KIND == Kind.SYMLINK:
            size = stored = c.target_starts[slot + 1] - c.target_starts[slot]
        mode, mtime_ns = _NORMAL_MODES[flags], NORMAL_MTIME_NS
        if c.modes is not None and c.mtimes is not None:
            mode = stat.S_IFMT(mode) | stat.S_IMODE(c.modes[index])
            mtime_ns = c.mtimes[index]
        links = c.links.get(inode, 1) if c.links else 1
        return Attributes(inode + 1, mode, links, size, stored, mtime_ns)

    def size(self, node: int) -> int:
        """Return the length of a file's content in bytes."""
        c = self._c
        slot = c.slots[node - 1]
        return c.ends[c.file_starts[slot + 1]] - c.ends[c.file_starts[slot]]

    def inode(self, node: int) -> int:
        """Return the node that stands for all nodes of the same content and attributes."""
        return self._c.inodes[node - 1] + 1

    def name(self, node: int) -> bytes:
        """Return the last component of the node's path; empty for the root."""
        starts = self._c.name_starts
        return self._c.names[starts[node - 1] : starts[node]]

    def path(self, node: int) -> bytes:
        """Return the node's path from the root."""
        c = self._c
        parts = []
        index = node - 1
        while index:
            parts.append(self.name(index + 1))
            index = c.directories[c.parents[index]]
        return b"/".join(reversed(parts))

    def lineage(self, node: int) -> list[int]:
        """Return the directories that lead to a node, from the root to its parent."""
        c = self._c
        found = []
        index = node - 1
        while index:
            index = c.directories[c.parents[index]]
            found.append(index + 1)
        found.reverse()
        return found

    def target(self, node: int) -> bytes:
        """Return where a symbolic link points."""
        slot = self._c.slots[node - 1]
        starts = self._c.target_starts
        return self._c.targets[starts[slot] : starts[slot + 1]]

    def lookup(self, parent: int, name: bytes) -> int | None:
        """Return the node called ``name`` in directory ``parent``, else ``None``."""
        c = self._c
        if c.kinds[parent - 1] & _KIND != Kind.DIRECTORY:
            return None
        slot = c.slots[parent - 1]
        low, high = c.child_starts[slot], c.child_starts[slot + 1]
        children, names, starts = c.children, c.names, c.name_starts
        while low < high:
            middle = (low + high) >> 1
            index = children[middle]
            found = names[starts[index] : starts[index + 1]]
            if found < name:
                low = middle + 1
            elif found == name:
                return index + 1
            else:
                high = middle
        return None

    def child(self, node: int, position: int) -> int:
        """Return the entry at ``position`` (by name) of directory ``node``."""
        c = self._c
        return c.children[c.child_starts[c.slots[node - 1]] + position] + 1

    def child_count(self, node: int) -> int:
        """Return how many entries a directory has."""
        slot = self._c.slots[node - 1]
        return self._c.child_starts[slot + 1] - self._c.child_starts[slot]

    def file_refs(self, node: int) -> range:
        """Return the numbers of a file's chunk references, in order."""
        slot = self._c.slots[node - 1]
        return range(self._c.file_starts[slot], self._c.file_starts[slot + 1])

    def chunk_digest(self, ref: int) -> bytes:
        """Return the digest of the chunk that reference ``ref`` names."""
        return self._c.digests[ref * DIGEST_SIZE : (ref + 1) * DIGEST_SIZE]

    def chunk_size(self, ref: int) -> int:
        """Return the raw bytes of the chunk that reference ``ref`` names."""
        return self._c.ends[ref + 1] - self._c.ends[ref]

    def is_hole(self, ref: int) -> bool:
        """Whether reference ``ref`` stands for zeros that are not stored."""
        return bool(self._c.holes) and self.chunk_digest(ref) == HOLE

    def pieces(self, node: int, offset: int, size: int) -> list[Piece]:
        """Return the pieces of chunks that make up a range of a file, clipped to its end."""
        c = self._c
        slot = c.slots[node - 1]
        first, last = c.file_starts[slot], c.file_starts[slot + 1]
        ends = c.ends
        at = ends[first] + offset
        stop = min(at + size, ends[last])
        found = []
        # Chunks are never empty, so the one that holds `at` is the last that starts at or below.
        ref = first if last - first < 2 else bisect_right(ends, at, first, last) - 1
        while at < stop:
            end = min(ends[ref + 1], stop)
            found.append(Piece(ref, at - ends[ref], end - at))
            at = end
            ref += 1
        return found

    def memory(self) -> int:
        """Return the bytes that the columns take."""
        c = self._c
        columns = (getattr(c, name) for name in Columns.__slots__)
        arrays = [column for column in columns if isinstance(column, array)]
        blobs = len(c.kinds) + len(c.names) + len(c.digests) + len(c.targets)
        return blobs + sum(len(column) * column.itemsize for column in arrays)
