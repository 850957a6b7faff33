"""The names, attributes and chunk lists of one snapshot, in columns instead of objects.

A node is a number: 1 is the root, and entry ``i`` of the manifest is node ``i + 2``. Everything
asked of a node is a pure function of the manifest, so any server of the same snapshot gives the
same answers. About 110 bytes a file, whatever the tree's size.
"""

from __future__ import annotations

import stat
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple

from envstore.fuse.keys import list_key, place
from envstore.fuse.sections import RELOCATED
from envstore.store.digest import DIGEST_SIZE, EMPTY
from envstore.store.entries import HOLE, NORMAL_MTIME_NS
from envstore.store.relocated import Relocated
from envstore.store.relocation import Relocation
from envstore.store.source import Kind

ROOT = 1
"""The root's node; the number is the kernel's."""

_KIND = 3
_KINDS = tuple(Kind)
_DIRECTORY, _SYMLINK = int(Kind.DIRECTORY), int(Kind.SYMLINK)
_NORMAL_MODES = (
    stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0,
    stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0,
) * 2  # fmt: skip
"""Type and permission bits by kind, then the same with the executable bit; and if relocated."""


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
    """Sizes of the whole tree: entries without the root, and the sum of all sizes as stored."""

    entries: int
    logical: int


@dataclass(frozen=True, slots=True)
class Columns:
    """What a tree is made of: views of an image (``image.open_image``), all of them read-only.

    ``text`` is sliced for bytes: names, link targets and digests lie in it. By node index
    (node - 1): ``kinds`` (kind and executable bit), ``name_starts`` into ``text`` (one longer),
    ``parents`` (directory slot), ``slots`` (number among the entries of its kind), ``inodes``
    (node index that stands for this content) and, unless the tree is normalised, ``modes`` and
    ``mtimes``. By directory slot: ``directories`` (node index) and ``child_starts`` (one longer)
    into ``children`` (node indexes by name). By file slot: ``file_starts`` (one longer), the first
    chunk reference. By reference: ``ends`` (one longer), a running sum of chunk sizes, and from
    ``digests_at`` in ``text`` the digests. By link slot: ``target_starts`` into ``text`` (one
    longer).

    For the few that have them, in ascending order: ``linked`` are the inodes of hard-linked files
    (node indexes) and ``link_counts`` their names; ``holed`` the file slots with holes and
    ``hole_bytes`` what of them is not stored; ``long`` the file slots whose content is not one
    stored chunk, and from ``long_keys_at`` in ``text`` their content keys. ``table`` finds a
    content's first node index by the first 64 bits of its key times ``multiplier``, with linear
    probing; zero is an empty place.

    Unless the tree is the same everywhere, it is that at ``prefix``: ``relocated`` are the file
    slots that are shown otherwise than stored, ``relocated_sizes`` their sizes, and
    ``plan_starts`` (one longer), from ``plans_at`` in ``text``, their encoded relocations. Their
    content keys are in ``long``, and their kinds have ``sections.RELOCATED``.
    """

    text: bytes | mmap
    kinds: Sequence[int]
    name_starts: Sequence[int]
    parents: Sequence[int]
    slots: Sequence[int]
    inodes: Sequence[int]
    modes: Sequence[int]
    mtimes: Sequence[int]
    directories: Sequence[int]
    child_starts: Sequence[int]
    children: Sequence[int]
    file_starts: Sequence[int]
    digests_at: int
    ends: Sequence[int]
    target_starts: Sequence[int]
    linked: Sequence[int]
    link_counts: Sequence[int]
    holed: Sequence[int]
    hole_bytes: Sequence[int]
    long: Sequence[int]
    long_keys_at: int
    table: Sequence[int]
    multiplier: int
    prefix: bytes
    plans_at: int
    plan_starts: Sequence[int]
    relocated: Sequence[int]
    relocated_sizes: Sequence[int]


class Tree:
    """A read-only name space. Nodes given to its methods must come from it."""

    def __init__(self, columns: Columns) -> None:
        self._c = columns
        self._kept = bool(columns.modes)
        self._links = bool(columns.linked)
        self._holes = bool(columns.holed)
        self.totals = Totals(len(columns.kinds) - 1, columns.ends[-1])
        self.refs = len(columns.ends) - 1
        self.prefix = columns.prefix

    def __len__(self) -> int:
        """Return the number of nodes, the root included."""
        return len(self._c.kinds)

    def __contains__(self, node: int) -> bool:
        """Whether ``node`` is a node of this tree."""
        return 0 < node <= len(self._c.kinds)

    def kind(self, node: int) -> Kind:
        """Return what the node is."""
        return _KINDS[self._c.kinds[node - 1] & _KIND]

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
            size = stored = c.ends[c.file_starts[slot + 1]] - c.ends[c.file_starts[slot]]
            if flags & RELOCATED:
                size = stored = c.relocated_sizes[bisect_left(c.relocated, slot)]
            elif self._holes:
                stored -= _value(c.holed, c.hole_bytes, slot, 0)
        elif flags & _KIND == _SYMLINK:
            size = stored = c.target_starts[slot + 1] - c.target_starts[slot]
        mode, mtime_ns = _NORMAL_MODES[flags], NORMAL_MTIME_NS
        if self._kept:
            mode = stat.S_IFMT(mode) | stat.S_IMODE(c.modes[index])
            mtime_ns = c.mtimes[index]
        links = _value(c.linked, c.link_counts, inode, 1) if self._links else 1
        return Attributes(inode + 1, mode, links, size, stored, mtime_ns)

    def size(self, node: int) -> int:
        """Return the length of a file's content in bytes."""
        c = self._c
        if c.kinds[node - 1] & RELOCATED:
            return c.relocated_sizes[bisect_left(c.relocated, c.slots[node - 1])]
        return self.stored_size(node)

    def stored_size(self, node: int) -> int:
        """Return the length of a file as it is stored: where its pieces end."""
        c = self._c
        slot = c.slots[node - 1]
        return c.ends[c.file_starts[slot + 1]] - c.ends[c.file_starts[slot]]

    def is_relocated(self, node: int) -> bool:
        """Whether a file is shown otherwise than it is stored."""
        return bool(self._c.kinds[node - 1] & RELOCATED)

    def relocated(self, node: int) -> Relocated:
        """Return how a relocated file is made of what is stored."""
        c = self._c
        at = bisect_left(c.relocated, c.slots[node - 1])
        start, end = c.plans_at + c.plan_starts[at], c.plans_at + c.plan_starts[at + 1]
        return Relocated(Relocation.decode(c.text[start:end]), c.prefix)

    @property
    def relocates(self) -> bool:
        """Whether any file is shown otherwise than it is stored."""
        return len(self._c.relocated) > 0

    def relocated_nodes(self) -> list[int]:
        """Return all files that are shown otherwise than they are stored."""
        return [index + 1 for index, flags in enumerate(self._c.kinds) if flags & RELOCATED]

    def inode(self, node: int) -> int:
        """Return the node that stands for all nodes of the same content and attributes."""
        return self._c.inodes[node - 1] + 1

    def name(self, node: int) -> bytes:
        """Return the last component of the node's path; empty for the root."""
        c = self._c
        return c.text[c.name_starts[node - 1] : c.name_starts[node]]

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
        c = self._c
        slot = c.slots[node - 1]
        return c.text[c.target_starts[slot] : c.target_starts[slot + 1]]

    def lookup(self, parent: int, name: bytes) -> int | None:
        """Return the node called ``name`` in directory ``parent``, else ``None``."""
        c = self._c
        if c.kinds[parent - 1] & _KIND != _DIRECTORY:
            return None
        slot = c.slots[parent - 1]
        low, high = c.child_starts[slot], c.child_starts[slot + 1]
        children, text, starts = c.children, c.text, c.name_starts
        while low < high:
            middle = (low + high) >> 1
            index = children[middle]
            found = text[starts[index] : starts[index + 1]]
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
        at = self._c.digests_at + ref * DIGEST_SIZE
        return self._c.text[at : at + DIGEST_SIZE]

    def chunk_size(self, ref: int) -> int:
        """Return the raw bytes of the chunk that reference ``ref`` names."""
        return self._c.ends[ref + 1] - self._c.ends[ref]

    def is_hole(self, ref: int) -> bool:
        """Whether reference ``ref`` stands for zeros that are not stored."""
        return self._holes and self.chunk_digest(ref) == HOLE

    def pieces(self, node: int, offset: int, size: int) -> list[Piece]:
        """Return the pieces of chunks of a range of a file as it is stored, clipped to its end."""
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

    def content_key(self, node: int) -> bytes:
        """Return the name of a file's content, whatever its mode and time: 32 bytes.

        The digest of its chunk if it is one stored chunk, ``EMPTY`` of an empty file, else what
        ``keys.list_key`` makes of its chunk list; if it is relocated what ``keys.relocated_key``
        makes of these. Two files with one key have the same bytes.
        """
        c = self._c
        slot = c.slots[node - 1]
        first = c.file_starts[slot]
        count = c.file_starts[slot + 1] - first
        if not count:
            return EMPTY
        if count > 1 or self._holes or c.kinds[node - 1] & RELOCATED:
            at = bisect_left(c.long, slot)
            if at < len(c.long) and c.long[at] == slot:
                at = c.long_keys_at + at * DIGEST_SIZE
                return c.text[at : at + DIGEST_SIZE]
        return self.chunk_digest(first)

    def stored_key(self, node: int) -> bytes:
        """Return the content key of a file as it is stored."""
        if not self.is_relocated(node):
            return self.content_key(node)
        refs = self.file_refs(node)
        if len(refs) == 1 and not self.is_hole(refs[0]):
            return self.chunk_digest(refs[0])
        digests = b"".join(map(self.chunk_digest, refs))
        return list_key(digests, array("Q", map(self.chunk_size, refs)))

    def find_content(self, key: bytes) -> int | None:
        """Return the first file whose content key is ``key``, else ``None``."""
        c = self._c
        if len(key) != DIGEST_SIZE:
            return None
        mask = len(c.table) - 1
        word = int.from_bytes(key[:8], sys.byteorder)
        start = place(word, c.multiplier, mask.bit_length())
        for at in range(start, start + mask):
            index = c.table[at & mask]
            if not index:
                break
            if self.content_key(index + 1) == key:
                return index + 1
        return None

    def memory(self) -> int:
        """Return the bytes that the tree's image takes."""
        return len(self._c.text)


def _value(keys: Sequence[int], values: Sequence[int], key: int, default: int) -> int:
    at = bisect_left(keys, key)
    return values[at] if at < len(keys) and keys[at] == key else default
