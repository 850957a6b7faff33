"""Builds the columns of a ``Tree`` from a manifest, refusing what no file system could serve.

A million entries must not take a million turns of the interpreter: whatever is done for every
entry is one call for a whole part, and Python's own loops go over directories.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, compress, count, islice, repeat
from operator import ge, ne, sub
from typing import NoReturn

from envstore.errors import CorruptError
from envstore.fuse.joining import join_files
from envstore.fuse.sections import RELOCATED, TreeSections
from envstore.store.digest import DIGEST_SIZE
from envstore.store.entries import NORMAL_MTIME_NS
from envstore.store.manifest import HOLE, Part, Root
from envstore.store.parts import COMPOSED
from envstore.store.relocated import relocated_size
from envstore.store.relocation import (
    Relocation,
    check_prefix,
    check_room,
    relocated_target,
    tightest,
)
from envstore.store.source import Kind

NAME_MAX = 1024
"""Bytes of a name the kernel accepts from a FUSE server; one longer name would make its whole
directory unreadable."""

_KIND = 3
_KEPT = bytes(flags & 7 for flags in range(256))
_KINDS = bytes(flags & _KIND for flags in range(256))
_IS_FILE = bytes(flags & _KIND == Kind.FILE for flags in range(256))
_IS_DIRECTORY = bytes(flags & _KIND == Kind.DIRECTORY for flags in range(256))


def build_sections(
    root: Root, parts: Iterable[Part], text_at: int, prefix: bytes = b""
) -> TreeSections:
    """Return the columns of a tree as ``tree.Columns`` describes them.

    ``root`` and ``parts`` (in order) are those of its manifest; the text will lie at ``text_at``
    of its image. The tree is that at ``prefix``, or as it is stored if that is empty.

    Raises ``CorruptError`` when entries are doubled, out of order or without their directory, when
    sizes do not add up, or when a hard link leads nowhere; ``UsageError`` when ``prefix`` is too
    long for a file.
    """
    builder = _Builder(text_at, prefix)
    try:
        for part in parts:
            builder.add(part)
        sections = builder.finish(root)
        join_files(sections, builder.linked, builder.holes)
    except OverflowError:
        _refuse("more names, targets or references than a tree can have")
    return sections


class _Builder:
    """Appends part after part to the columns; see ``tree.Columns`` for what they hold."""

    def __init__(self, text_at: int, prefix: bytes) -> None:
        # The root is an entry like any other: a directory without a name, its own parent.
        self.text_at = text_at
        self.kinds = bytearray([Kind.DIRECTORY])
        self.names = bytearray()
        self.name_starts = array("I", [text_at, text_at])
        self.modes = array("H", [0])
        self.mtimes = array("q", [0])
        self.directories = array("I", [0])
        self.file_starts = array("I")
        self.digests = bytearray()
        self.ends = array("Q", [0])
        self.targets = bytearray()
        self.target_sizes = array("I")
        self.holes: dict[int, int] = {}
        self.linked: dict[int, bytes] = {}
        self.prefix = prefix
        self.plans: dict[int, Relocation] = {}
        self.moved = False
        # Runs of entries of one directory: its slot, and the node index of the first of them.
        self.run_slots = array("I")
        self.run_firsts = array("I")
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
        targets = part.targets
        if self.prefix and part.relocations:
            self.plans.update((first + number - skip, plan) for number, plan in part.plans.items())
            targets = self._relocated_targets(part)
        self.targets += b"".join(targets)
        self.target_sizes.extend(map(len, targets))
        if (part.modes is not None) != (len(self.modes) > 1) and first > 1:
            _refuse("some entries have modes and some have none")
        if part.modes is not None and part.mtimes is not None:
            self.modes.extend(part.modes[skip:])
            self.mtimes.extend(part.mtimes[skip:])

    def _relocated_targets(self, part: Part) -> list[bytes]:
        """Return where the links of a part lead at the prefix."""
        links = [number for number, flags in enumerate(part.kinds) if flags & _KIND == Kind.SYMLINK]
        targets = []
        for number, target in zip(links, part.targets, strict=True):
            relocation = part.relocations.get(number)
            if relocation is not None:
                self.moved = True
                target = relocated_target(target, relocation, self.prefix)
            targets.append(target)
        return targets

    def _name(self, index: int) -> bytes:
        start, end = self.name_starts[index : index + 2]
        return bytes(self.names[start - self.text_at : end - self.text_at])

    def _check_base(self, part: Part) -> None:
        """See that the part goes on where the one before stopped."""
        depth = part.depths[0] if part.depths else 0
        if depth >= len(self.open):
            _refuse("an entry without its directory")
        path = [self._name(self.directories[slot]) for slot in self.open[1 : depth + 1]]
        if b"/".join(path) != part.base:
            _refuse("a part starts in a directory that is not open")

    def _check_continuation(self, part: Part) -> None:
        index = len(self.kinds) - 1
        if (
            not index
            or self.kinds[index] & _KIND != Kind.FILE
            or part.kinds[0] & _KIND != Kind.FILE
            or self._name(index) != part.names[0]
            or part.depths[0] != len(self.open) - 1
            or part.sizes[0] != self.pending
        ):
            _refuse("a part continues a file that is not there")

    def _add_entries(self, part: Part, skip: int) -> None:
        names, depths = part.names[skip:], part.depths[skip:]
        total = len(names)
        if not total:
            return
        if max(map(len, names)) > NAME_MAX:
            _refuse("a name is longer than a file system can show")
        # A directory ends a run, and so does a change of depth: what is between has one parent.
        directory = part.kinds[skip:].translate(_IS_DIRECTORY)
        starts = {0}
        starts.update(compress(range(1, total), directory))
        starts.update(compress(range(1, total), map(ne, depths, islice(depths, 1, None))))
        disordered = compress(range(1, total), map(ge, names, islice(names, 1, None)))
        if not starts.issuperset(disordered):
            _refuse("an entry comes twice or out of order")
        opened, last, directories = self.open, self.last, self.directories
        node = len(self.kinds)
        run_starts = sorted(starts)
        for start, end in zip(run_starts, [*run_starts[1:], total], strict=True):
            depth = depths[start]
            if depth + 1 < len(opened):
                del opened[depth + 1 :], last[depth + 1 :]
            elif depth >= len(opened):
                _refuse("an entry without its directory")
            if names[start] <= last[depth]:
                _refuse(f"{names[start]!r} comes twice or out of order")
            last[depth] = names[end - 1]
            self.run_slots.append(opened[depth])
            self.run_firsts.append(node + start)
            if directory[end - 1]:
                opened.append(len(directories))
                last.append(b"")
                directories.append(node + end - 1)
        # Only the kind and the executable bit are kept, not how the manifest was cut.
        self.kinds += part.kinds[skip:].translate(_KEPT)
        ends = accumulate(map(len, names), initial=self.name_starts[-1])
        self.names += b"".join(names)
        self.name_starts.extend(islice(ends, 1, None))

    def _add_content(self, part: Part, skip: int) -> None:
        """Append chunk references and file starts, checking sizes as soon as files are whole."""
        base = len(self.ends) - 1
        self.digests += part.ref_digests
        if part.ref_sizes and not min(part.ref_sizes):
            _refuse("an empty chunk")
        sums = accumulate(part.ref_sizes, initial=self.ends[-1])
        self.ends.extend(islice(sums, 1, None))
        if not part.counts:
            return
        starts = array("I", accumulate(part.counts, initial=base))
        if not skip:
            self._check_pending(base)
        elif len(part.counts) > 1:
            self._check_pending(starts[1])
        # Whether the last file goes on in the next part is not known yet.
        last = len(part.sizes) - 1
        held = array("Q", map(self.ends.__getitem__, starts))
        sizes = map(sub, islice(held, 1, None), held)
        if any(islice(map(ne, sizes, part.sizes), skip, last)):
            _refuse("a file does not add up to its size")
        holes = [base + ref for ref in _find_holes(part.ref_digests)]
        if len(part.file_digests) < DIGEST_SIZE * self._count_digests(part, skip, starts, holes):
            _refuse("a file digest is missing")
        first_file = len(self.file_starts) - skip
        for ref in holes:
            slot = first_file + bisect_right(starts, ref) - 1
            self.holes[slot] = self.holes.get(slot, 0) + self.ends[ref + 1] - self.ends[ref]
        self.file_starts.extend(starts[skip:-1])
        if len(part.sizes) > skip:
            self.pending = part.sizes[-1]

    def _count_digests(self, part: Part, skip: int, starts: array[int], holes: list[int]) -> int:
        """Return how many files of a part are not named by their chunks, nor empty."""
        last = len(part.sizes) - 1
        several = compress(count(), map((1).__ne__, part.counts))
        found = {number for number in several if number >= skip and part.sizes[number]}
        found.update(bisect_right(starts, ref) - 1 for ref in holes)
        if part.counts[last] and self.ends[-1] - self.ends[starts[last]] != part.sizes[last]:
            found.add(last)
        if max(part.kinds) >= COMPOSED:
            files = compress(part.kinds, part.kinds.translate(_IS_FILE))
            found -= {number for number, flags in enumerate(files) if flags & COMPOSED}
        return len(found) - (skip and 0 in found)

    def _check_pending(self, end: int) -> None:
        """See that the last file of the part before is complete now that it is known to end."""
        if self.file_starts:
            held = self.ends[end] - self.ends[self.file_starts[-1]]
            if held != self.pending:
                _refuse("a file does not add up to its size")

    def finish(self, root: Root) -> TreeSections:
        """Return the columns; ``root`` tells how much there should be."""
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
        self.run_firsts.append(len(self.kinds))
        lengths = array("I", map(sub, islice(self.run_firsts, 1, None), self.run_firsts))
        parents = array("I", chain((0,), chain.from_iterable(map(repeat, self.run_slots, lengths))))
        child_starts, children = self._children(lengths)
        del lengths
        counters = [count(), count(), count()]
        numbers = map(counters.__getitem__, self.kinds.translate(_KINDS))
        slots = array("I", map(next, numbers))
        for index in self.plans:
            self.kinds[index] |= RELOCATED
        text_end = self.text_at + len(self.names)
        self.names += self.targets
        sections = TreeSections(
            text=self.names,
            kinds=self.kinds,
            name_starts=self.name_starts,
            parents=parents,
            slots=slots,
            modes=self.modes if kept else array("H"),
            mtimes=self.mtimes if kept else array("q"),
            directories=self.directories,
            child_starts=child_starts,
            children=children,
            file_starts=self.file_starts,
            digests=self.digests,
            ends=self.ends,
            target_starts=array("I", accumulate(self.target_sizes, initial=text_end)),
        )
        if self.plans or self.moved:
            self._relocate(sections)
        return sections

    def _relocate(self, sections: TreeSections) -> None:
        """Say which files are relocated and how, all of which must have room for the prefix."""
        check_prefix(self.prefix)
        index = tightest(self.plans)
        if index is not None:
            check_room(self.plans[index], self.prefix, self._path(sections, index))
        encoded = [plan.nameless() for plan in self.plans.values()]
        sizes = (relocated_size(plan, self.prefix) for plan in self.plans.values())
        sections.prefix = self.prefix
        sections.plans = b"".join(encoded)
        sections.plan_starts = array("I", accumulate(map(len, encoded), initial=0))
        sections.relocated = array("I", map(sections.slots.__getitem__, self.plans))
        sections.relocated_sizes = array("Q", sizes)

    def _path(self, sections: TreeSections, index: int) -> bytes:
        steps = []
        while index:
            steps.append(self._name(index))
            index = self.directories[sections.parents[index]]
        return b"/".join(reversed(steps))

    def _children(self, lengths: array[int]) -> tuple[array[int], array[int]]:
        """Gather the runs of each directory; those of one directory come by name already."""
        counts = array("I", bytes(4 * len(self.directories)))
        for slot, length in zip(self.run_slots, lengths, strict=True):
            counts[slot] += length
        starts = array("I", accumulate(counts, initial=0))
        children = array("I", bytes(4 * starts[-1]))
        free = starts[:]
        for slot, first, length in zip(self.run_slots, self.run_firsts, lengths, strict=False):
            at = free[slot]
            free[slot] = end = at + length
            children[at:end] = array("I", range(first, first + length))
        return starts, children


def _find_holes(digests: bytes) -> Iterator[int]:
    """Yield which of the digests stand for holes."""
    at = digests.find(HOLE)
    while at >= 0:
        if not at % DIGEST_SIZE:
            yield at // DIGEST_SIZE
        at = digests.find(HOLE, at - at % DIGEST_SIZE + DIGEST_SIZE)


def _refuse(reason: str) -> NoReturn:
    raise CorruptError(f"manifest: {reason}")
