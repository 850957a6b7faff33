"""Finds which files of a tree are one, and makes the table that finds files by content."""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from itertools import compress, count, islice, repeat
from operator import eq, sub

from envstore.errors import CorruptError
from envstore.fuse.keys import list_key, relocated_key
from envstore.fuse.sections import TreeSections
from envstore.store.digest import DIGEST_SIZE, EMPTY
from envstore.store.source import Kind

_KIND = 3
_IS_FILE = bytes(flags & _KIND == Kind.FILE for flags in range(256))
_LOOKALIKES = 64
_WORDS, _ALL = DIGEST_SIZE // 8, (1 << 64) - 1


def join_files(tree: TreeSections, linked: dict[int, bytes], holes: dict[int, int]) -> None:
    """Fill in what ``tree`` does not have yet: inodes, links, holes, content keys and table.

    ``linked`` are the hard links by node index, each with the path of the file's first name;
    ``holes`` the bytes not stored by file slot. Raises ``CorruptError`` when a link leads nowhere
    or to another content, or when digests were made up.
    """
    tree.holed = array("I", sorted(holes))
    tree.hole_bytes = array("Q", map(holes.__getitem__, tree.holed))
    tree.inodes = array("I", range(len(tree.kinds)))
    joiner = _Joiner(tree)
    joiner.name_contents()
    joiner.join_links(linked)
    joiner.join_contents()


class _Joiner:
    def __init__(self, tree: TreeSections) -> None:
        self.tree = tree
        # The nodes of hard-linked files, which no other file may join.
        self.grouped: set[int] = set()
        self.lookalikes = 0
        self.holed = set(tree.holed)
        self.relocated = {slot: at for at, slot in enumerate(tree.relocated)}
        # Directories by path: many links lead to few of them.
        self._found: dict[bytes, int] = {b"": 0}

    def name_contents(self) -> None:
        """Name the contents that are neither empty nor one stored chunk as it is."""
        tree = self.tree
        starts = tree.file_starts
        sizes = map(sub, islice(starts, 1, None), starts)
        slots = {*compress(count(), map((1).__lt__, sizes)), *tree.holed, *self.relocated}
        tree.long = array("I", sorted(slots))
        tree.long_keys = b"".join(map(self._long_name, tree.long))

    def join_links(self, linked: dict[int, bytes]) -> None:
        """Give the names of each hard-linked file one inode."""
        counts: dict[int, int] = {}
        for index, path in linked.items():
            first = self._find(path)
            if (
                index in (first, 0)
                or first in linked
                or self._attributes(first) != self._attributes(index)
                or not self._is_file(first)
                or not self._same(first, index)
            ):
                raise CorruptError(f"manifest: a hard link and {path!r} differ")
            self.tree.inodes[index] = first
            counts[first] = counts.get(first, 1) + 1
            self.grouped.update((first, index))
        self.tree.linked = array("I", sorted(counts))
        self.tree.link_counts = array("I", map(counts.__getitem__, self.tree.linked))

    def join_contents(self) -> None:
        """Let the first of all files with equal content and attributes stand for the others.

        And put the first file of each content in the table. A dict of a million digests would
        take more memory than the whole tree. Which file stands for which depends on the manifest
        alone, but nobody can tell in advance which digests will collide.
        """
        tree = self.tree
        words = self._words()
        bits = max(4, (2 * len(words)).bit_length())
        mask, shift = (1 << bits) - 1, 64 - bits
        multiplier = int.from_bytes(os.urandom(8)) | 1
        table, slots, grouped = array("I", bytes(4 << bits)), tree.slots, self.grouped
        variants: dict[tuple[int, ...], int] = {}
        files = compress(count(), tree.kinds.translate(_IS_FILE))
        for index, word in zip(files, words, strict=True):
            at = (word * multiplier & _ALL) >> shift  # keys.place, called a million times
            while first := table[at]:
                if words[slots[first]] == word and self._meets(first, index):
                    break
                at = (at + 1) & mask
            else:
                table[at] = index
                continue
            if index in grouped:
                continue
            attributes = self._attributes(index)
            if first not in grouped and self._attributes(first) == attributes:
                tree.inodes[index] = first
            else:
                tree.inodes[index] = variants.setdefault((first, *attributes), index)
        tree.table, tree.multiplier = table, array("Q", [multiplier])

    def _meets(self, one: int, two: int) -> bool:
        """Whether two files have the same content, given that their keys begin alike.

        Of real digests no two do. Made-up ones could make every search as long as the table.
        """
        if self._same(one, two):
            return True
        self.lookalikes += 1
        if self.lookalikes > _LOOKALIKES:
            raise CorruptError("manifest: different contents whose digests begin alike")
        return False

    def _words(self) -> array[int]:
        """Return the first eight bytes of every file's content key."""
        tree = self.tree
        starts = tree.file_starts
        files = len(starts) - 1
        digests = memoryview(tree.digests).cast("Q")[::_WORDS]
        # Files that start behind the last chunk are empty, as others may be.
        some = bisect_left(starts, len(digests), 0, files)
        words = array("Q", map(digests.__getitem__, islice(starts, some)))
        words.extend(repeat(0, files - some))
        nothing = int.from_bytes(EMPTY[:8], sys.byteorder)
        for slot in compress(count(), map(eq, islice(starts, 1, None), starts)):
            words[slot] = nothing
        for slot, word in zip(
            tree.long, memoryview(tree.long_keys).cast("Q")[::_WORDS], strict=True
        ):
            words[slot] = word
        return words

    def _find(self, path: bytes) -> int:
        """Return the node index at a path."""
        above, _, name = path.rpartition(b"/")
        parent = self._found.get(above)
        if parent is None:
            parent = 0
            for step in above.split(b"/"):
                parent = self._child(parent, step, path)
            self._found[above] = parent
        return self._child(parent, name, path)

    def _child(self, parent: int, name: bytes, path: bytes) -> int:
        """Return the entry of a directory that is called so, on the way to ``path``."""
        tree = self.tree
        if tree.kinds[parent] & _KIND == Kind.DIRECTORY:
            slot = tree.slots[parent]
            end = tree.child_starts[slot + 1]
            at = bisect_left(tree.children, name, tree.child_starts[slot], end, key=self._name)
            if at < end and self._name(tree.children[at]) == name:
                return tree.children[at]
        raise CorruptError(f"manifest: a hard link leads to {path!r}, which is not there")

    def _name(self, index: int) -> bytes:
        starts, text = self.tree.name_starts, self.tree.text
        return bytes(text[starts[index] - starts[0] : starts[index + 1] - starts[0]])

    def _is_file(self, index: int) -> bool:
        return self.tree.kinds[index] & _KIND == Kind.FILE

    def _attributes(self, index: int) -> tuple[int, ...]:
        """Return what besides the content makes a file another."""
        tree = self.tree
        if not tree.modes:
            return (tree.kinds[index],)
        return tree.kinds[index], tree.modes[index], tree.mtimes[index]

    def _same(self, one: int, two: int) -> bool:
        """Whether two files have the same content."""
        starts, ends, digests = self.tree.file_starts, self.tree.ends, self.tree.digests
        a, b = self.tree.slots[one], self.tree.slots[two]
        if a in self.relocated or b in self.relocated:
            both = a in self.relocated and b in self.relocated
            return both and self._long_key(a) == self._long_key(b)
        first, other = starts[a], starts[b]
        count = starts[a + 1] - first
        # Chunks of one digest have one size, but a manifest may say otherwise.
        size = ends[first + count] - ends[first]
        if starts[b + 1] - other != count or ends[other + count] - ends[other] != size:
            return False
        if count > 1:
            return self._long_key(a) == self._long_key(b)
        at, its = first * DIGEST_SIZE, other * DIGEST_SIZE
        return not count or digests[at : at + DIGEST_SIZE] == digests[its : its + DIGEST_SIZE]

    def _long_key(self, slot: int) -> bytes:
        at = bisect_left(self.tree.long, slot) * DIGEST_SIZE
        return self.tree.long_keys[at : at + DIGEST_SIZE]

    def _long_name(self, slot: int) -> bytes:
        """Return the content key of a file that is not one chunk, or not shown as stored."""
        tree = self.tree
        first, last = tree.file_starts[slot : slot + 2]
        single = last - first == 1 and slot not in self.holed
        key = self._digests(first, last) if single else self._list_key(first, last)
        at = self.relocated.get(slot)
        if at is None:
            return key
        start, end = tree.plan_starts[at : at + 2]
        return relocated_key(key, tree.plans[start:end], tree.prefix)

    def _digests(self, first: int, last: int) -> bytes:
        return bytes(self.tree.digests[first * DIGEST_SIZE : last * DIGEST_SIZE])

    def _list_key(self, first: int, last: int) -> bytes:
        ends = self.tree.ends[first : last + 1]
        sizes = array("Q", map(sub, islice(ends, 1, None), ends))
        return list_key(self._digests(first, last), sizes)
