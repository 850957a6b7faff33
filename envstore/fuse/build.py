"""Builds a ``Tree`` from the parts of a manifest, refusing what a file system could not serve."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from itertools import accumulate
from typing import NoReturn

from envstore.errors import CorruptError
from envstore.fuse.tree import Columns, Tree
from envstore.store.digest import DIGEST_SIZE, EMPTY
from envstore.store.entries import NORMAL_MTIME_NS
from envstore.store.manifest import HOLE, Part, Root
from envstore.store.source import Kind

NAME_MAX = 1024
"""Bytes of a name the kernel accepts from a FUSE server; one longer name would make its whole
directory unreadable."""

_KIND, _FILE = 3, int(Kind.FILE)
_WORDS, _ALL = DIGEST_SIZE // 8, (1 << 64) - 1
_KEPT = bytes(flags & 7 for flags in range(256))


def build_tree(root: Root, parts: Iterable[Part]) -> Tree:
    """Return the tree of the manifest whose ``root`` and ``parts`` (in order) are given.

    Raises ``CorruptError`` when entries are doubled, out of order or without their directory,
    when sizes do not add up, or when a hard link leads nowhere.
    """
    builder = _Builder()
    for part in parts:
        builder.add(part)
    return builder.finish(root)


class _Builder:
    """Appends part after part to the columns; see ``Columns`` for what they hold."""

    def __init__(self) -> None:
        # The root is an entry like any other: a directory without a name, its own parent.
        self.kinds = bytearray([Kind.DIRECTORY])
        self.names = bytearray()
        self.name_starts = array("I", [0, 0])
        self.parents = array("I", [0])
        self.slots = array("I", [0])
        self.modes = array("H", [0])
        self.mtimes = array("q", [0])
        self.directories = array("I", [0])
        self.file_starts = array("I")
        self.digests = bytearray()
        self.ends = array("Q", [0])
        self.targets = bytearray()
        self.target_starts = array("I", [0])
        self.holes: dict[int, int] = {}
        self.linked: dict[int, bytes] = {}
        self.whole: dict[int, bytes] = {}
        # The directories from the root to the last entry (slots), and the last name in each.
        self.open: list[int] = [0]
        self.last: list[bytes] = [b""]
        self.pending = -1

    def add(self, part: Part) -> None:
        first = len(self.kinds)
        skip = 1 if part.continued else 0
        if skip:
            self._check_continuation(part)
        self._check_base(part)
        self.linked.update(
            (first + number - skip, path) for number, path in part.links.items() if number >= skip
        )
        self._add_entries(part, skip)
        self._add_content(part, skip)
        for target in part.targets:
            self.targets += target
            self.target_starts.append(len(self.targets))
        if (part.modes is not None) != (len(self.modes) > 1) and first > 1:
            _refuse("some entries have modes and some have none")
        if part.modes is not None and part.mtimes is not None:
            self.modes.extend(part.modes[skip:])
            self.mtimes.extend(part.mtimes[skip:])

    def _check_base(self, part: Part) -> None:
        """See that the part goes on where the one before stopped."""
        depth = part.depths[0] if part.depths else 0
        if depth >= len(self.open):
            _refuse("an entry without its directory")
        path = []
        for slot in self.open[1 : depth + 1]:
            index = self.directories[slot]
            path.append(self.names[self.name_starts[index] : self.name_starts[index + 1]])
        if b"/".join(path) != part.base:
            _refuse("a part starts in a directory that is not open")

    def _check_continuation(self, part: Part) -> None:
        index = len(self.kinds) - 1
        name = self.names[self.name_starts[index] : self.name_starts[index + 1]]
        depth = len(self.open) - 1
        if (
            not index
            or self.kinds[index] & _KIND != Kind.FILE
            or part.kinds[0] & _KIND != Kind.FILE
            or name != part.names[0]
            or part.depths[0] != depth
            or part.sizes[0] != self.pending
        ):
            _refuse("a part continues a file that is not there")

    def _add_entries(self, part: Part, skip: int) -> None:
        names = part.names[skip:]
        if names and max(map(len, names)) > NAME_MAX:
            _refuse("a name is longer than a file system can show")
        kinds, opened, last = part.kinds[skip:], self.open, self.last
        parents, slots, directories = self.parents, self.slots, self.directories
        node = len(self.kinds)
        files = len(self.file_starts)
        links = len(self.target_starts) - 1
        for flags, depth, name in zip(kinds, part.depths[skip:], names, strict=True):
            if depth + 1 < len(opened):
                del opened[depth + 1 :], last[depth + 1 :]
            elif depth >= len(opened):
                _refuse("an entry without its directory")
            if name <= last[depth]:
                _refuse(f"{name!r} comes twice or out of order")
            last[depth] = name
            parents.append(opened[depth])
            kind = flags & _KIND
            if kind == Kind.FILE:
                slots.append(files)
                files += 1
            elif kind == Kind.DIRECTORY:
                slot = len(directories)
                slots.append(slot)
                directories.append(node)
                opened.append(slot)
                last.append(b"")
            else:
                slots.append(links)
                links += 1
            node += 1
        # Only the kind and the executable bit are kept, not how the manifest was cut.
        self.kinds += kinds.translate(_KEPT)
        start = len(self.names)
        self.names += b"".join(names)
        ends = accumulate(map(len, names), initial=start)
        next(ends)
        self.name_starts.extend(ends)

    def _add_content(self, part: Part, skip: int) -> None:
        """Append chunk references and file starts, checking sizes as soon as files are whole."""
        base = len(self.ends) - 1
        self.digests += part.ref_digests
        sums = accumulate(part.ref_sizes, initial=self.ends[-1])
        next(sums)
        if part.ref_sizes and not min(part.ref_sizes):
            _refuse("an empty chunk")
        self.ends.extend(sums)
        if not part.counts:
            return
        starts = list(accumulate(part.counts, initial=base))
        sizes, ends = part.sizes, self.ends

        def hole(ref: int) -> bool:
            return part.ref_digests[ref * DIGEST_SIZE : (ref + 1) * DIGEST_SIZE] == HOLE

        if not skip:
            self._check_pending(base)
        elif len(part.counts) > 1:
            self._check_pending(starts[1])
        first_file = len(self.file_starts) - skip
        holes = HOLE in part.ref_digests
        last = len(sizes) - 1
        long = at = 0
        for number, (count, size) in enumerate(zip(part.counts, sizes, strict=True)):
            first, at = at, at + count
            if number < skip or not (count or size):
                continue
            if count == 1 and part.ref_sizes[first] == size and not (holes and hole(first)):
                continue  # named by its one chunk
            if number < last and ends[base + at] - ends[base + first] != size:
                _refuse("a file does not add up to its size")
            if size:
                name = part.file_digests[long * DIGEST_SIZE : (long + 1) * DIGEST_SIZE]
                if len(name) != DIGEST_SIZE:
                    _refuse("a file digest is missing")
                self.whole[first_file + number] = name
                long += 1
        self.file_starts.extend(starts[skip:-1])
        if len(sizes) > skip:
            self.pending = sizes[-1]
        if holes:
            self._add_holes(starts, first_file)

    def _check_pending(self, end: int) -> None:
        """See that the last file of the part before is complete now that it is known to end."""
        if self.file_starts:
            held = self.ends[end] - self.ends[self.file_starts[-1]]
            if held != self.pending:
                _refuse("a file does not add up to its size")

    def _digest(self, ref: int) -> bytearray:
        return self.digests[ref * DIGEST_SIZE : (ref + 1) * DIGEST_SIZE]

    def _add_holes(self, starts: list[int], first_file: int) -> None:
        for number in range(len(starts) - 1):
            for ref in range(starts[number], starts[number + 1]):
                if self._digest(ref) == HOLE:
                    slot = first_file + number
                    size = self.ends[ref + 1] - self.ends[ref]
                    self.holes[slot] = self.holes.get(slot, 0) + size

    def finish(self, root: Root) -> Tree:
        """Return the tree; ``root`` tells how much there should be."""
        self._check_pending(len(self.ends) - 1)
        if len(self.kinds) - 1 != root.entries or self.ends[-1] != root.logical:
            _refuse("entries or bytes are not as many as its root says")
        self.file_starts.append(len(self.ends) - 1)
        kept = len(self.modes) > 1 or (not root.entries and bool(root.mode or root.mtime_ns))
        if kept:
            if root.entries and not len(self.modes) == len(self.mtimes) == len(self.kinds):
                _refuse("modes or times are missing")
            if root.mode > 0o7777:
                _refuse("the root's mode holds more than permission bits")
            # A tree that was a single file has no directory whose mode could have been kept.
            self.modes[0] = root.mode or 0o755
            self.mtimes[0] = root.mtime_ns if root.mode else NORMAL_MTIME_NS
        child_starts, children = self._children()
        columns = Columns(
            kinds=bytes(self.kinds),
            names=bytes(self.names),
            name_starts=self.name_starts,
            parents=self.parents,
            slots=self.slots,
            inodes=array("I", range(len(self.kinds))),
            modes=self.modes if kept else None,
            mtimes=self.mtimes if kept else None,
            directories=self.directories,
            child_starts=child_starts,
            children=children,
            file_starts=self.file_starts,
            digests=bytes(self.digests),
            ends=self.ends,
            targets=bytes(self.targets),
            target_starts=self.target_starts,
            links={},
            holes=self.holes,
        )
        tree = Tree(columns)
        grouped = self._join_links(tree, columns)
        self._join_contents(columns, grouped)
        return tree

    def _children(self) -> tuple[array[int], array[int]]:
        """Sort all nodes by directory; entries come by name already, so counting is enough."""
        counts = array("I", bytes(4 * len(self.directories)))
        parents = iter(self.parents)
        next(parents)  # the root is nobody's child
        for slot in parents:
            counts[slot] += 1
        starts = array("I", accumulate(counts, initial=0))
        children = array("I", bytes(4 * (len(self.parents) - 1)))
        free = array("I", starts)
        for node in range(1, len(self.parents)):
            slot = self.parents[node]
            at = free[slot]
            children[at] = node
            free[slot] = at + 1
        return starts, children

    def _join_links(self, tree: Tree, columns: Columns) -> set[int]:
        """Give the names of each hard-linked file one inode; returns all these nodes."""
        grouped: set[int] = set()
        for index, path in self.linked.items():
            first = 0
            for name in path.split(b"/"):
                node = tree.lookup(first + 1, name)
                if node is None:
                    _refuse(f"a hard link leads to {path!r}, which is not there")
                first = node - 1
            if index in (first, 0) or first in self.linked or not self._same(columns, first, index):
                _refuse(f"a hard link and {path!r} differ")
            columns.inodes[index] = first
            columns.links[first] = columns.links.get(first, 1) + 1
            grouped.update((first, index))
        return grouped

    def _join_contents(self, columns: Columns, grouped: set[int]) -> None:
        """Let the first of all files with equal content and attributes stand for the others.

        An open-addressed table of node indexes: a dict of a million digests would take more
        memory than the whole tree, if only for a moment. Which file stands for which depends on
        the manifest alone, but nobody can tell in advance which digests will collide.
        """
        slots, starts, whole = self.slots, self.file_starts, self.whole
        words = memoryview(columns.digests).cast("Q")
        bits = max(4, (2 * len(starts)).bit_length())
        mask, shift = (1 << bits) - 1, 64 - bits
        factor = int.from_bytes(os.urandom(8)) | 1
        table, keys = array("I", bytes(4 << bits)), array("Q", bytes(8 << bits))
        for index, flags in enumerate(self.kinds):
            if flags & _KIND != _FILE or (grouped and index in grouped):
                continue
            slot = slots[index]
            start = starts[slot]
            if slot in whole:
                key = int.from_bytes(whole[slot][:8])
            else:
                key = words[start * _WORDS] if start < starts[slot + 1] else 0
            at = (key * factor & _ALL) >> shift
            while table[at] and (keys[at] != key or not self._same(columns, table[at], index)):
                at = (at + 1) & mask
            if table[at]:
                columns.inodes[index] = table[at]
            else:
                table[at], keys[at] = index, key

    def _content(self, index: int) -> bytes:
        """Return the digest of a file's content."""
        slot = self.slots[index]
        start = self.file_starts[slot]
        if start == self.file_starts[slot + 1]:
            return EMPTY
        return self.whole.get(slot) or bytes(self._digest(start))

    def _same(self, columns: Columns, one: int, two: int) -> bool:
        """Whether two nodes are files that no reader could tell apart.

        The chunk lists are compared too: a digest of a whole file is not checked when reading.
        """
        if self.kinds[one] != self.kinds[two] or self.kinds[one] & _KIND != Kind.FILE:
            return False
        if columns.modes is not None and columns.mtimes is not None:
            if columns.modes[one] != columns.modes[two]:
                return False
            if columns.mtimes[one] != columns.mtimes[two]:
                return False
        if self._content(one) != self._content(two):
            return False
        (a, a_end), (b, b_end) = (
            self.file_starts[self.slots[index] : self.slots[index] + 2] for index in (one, two)
        )
        size = DIGEST_SIZE
        return a_end - a == b_end - b and (
            self.digests[a * size : a_end * size] == self.digests[b * size : b_end * size]
        )


def _refuse(reason: str) -> NoReturn:
    raise CorruptError(f"manifest: {reason}")
