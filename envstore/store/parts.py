"""Manifest parts: some hundred consecutive entries as columns, complete in themselves.

A part starts at a path whose CRC-32 ends in nine zero bits, so that a change in one directory
leaves the other parts, and their digests, as they were.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from operator import add, gt

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store.binary import U32, Cursor, pack_array, unpack_array
from envstore.store.digest import DIGEST_SIZE, EMPTY, digest
from envstore.store.entries import Entry, composed_digest, named_by_chunk, sort_key
from envstore.store.relocation import Relocation, link_relocation
from envstore.store.source import Kind

MAX_PART_REFS = 16_384
_MIN_ENTRIES, _MAX_ENTRIES, _CUT_MASK = 128, 4096, 0x1FF
_MAX_TEXT = 1 << 20
MAX_PATHS = 64 << 20
"""Bytes of all paths of a part that a reader takes; writers stop soon after ``_MAX_TEXT``."""
MODE_BITS = 0o7777
_MAX_FILE = (1 << 63) - 1
_MAX_SHOWN = 300

_EXECUTABLE, _CONTINUED, COMPOSED = 4, 8, 16
_KNOWN = frozenset(flags for flags in range(32) if flags & 3 == Kind.FILE or flags < COMPOSED)
_IS_CONTINUED = bytes(flags & _CONTINUED for flags in range(256))
_KINDS = bytes(flags & 3 for flags in range(256))
_IS_DIRECTORY = bytes(flags & 3 == Kind.DIRECTORY for flags in range(256))


class _Column:
    """Column ids. Ids from 0x8000 up may be skipped by a reader that does not know them."""

    KIND = 1
    DEPTH = 2
    NAMES = 3
    BASE = 4
    SIZE = 5
    COUNT = 6
    REF_DIGEST = 7
    REF_SIZE = 8
    FILE_DIGEST = 9
    TARGET = 10
    MODE = 11
    MTIME = 12
    LINK = 13
    RELOCATION = 14
    OPTIONAL = 0x8000


@dataclass(slots=True)
class Part:
    """Decoded columns of one part; ``files`` columns hold one item for each file entry.

    ``links`` and ``relocations`` are by entry number; ``plans`` are the relocations of files.
    """

    base: bytes
    kinds: bytes
    depths: array[int]
    names: list[bytes]
    sizes: array[int]
    counts: array[int]
    ref_digests: bytes
    ref_sizes: array[int]
    file_digests: bytes
    targets: list[bytes]
    modes: array[int] | None = None
    mtimes: array[int] | None = None
    links: dict[int, bytes] = field(default_factory=dict)
    relocations: dict[int, bytes] = field(default_factory=dict)
    plans: dict[int, Relocation] = field(default_factory=dict)

    @property
    def continued(self) -> bool:
        """Whether the first entry goes on with the last file of the part before."""
        return bool(self.kinds) and bool(self.kinds[0] & _CONTINUED)


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What the root says of one part."""

    digest: bytes
    size: int
    entries: int
    refs: int


def build_parts(entries: Iterable[Entry]) -> Iterator[tuple[PartInfo, bytes]]:
    """Encode sorted ``entries`` into parts; yields each part's row in the root and its bytes.

    ``entries`` must be in ``sort_key`` order with every parent directory present.
    """
    batch: list[tuple[Entry, int]] = []
    refs = text = 0
    for entry in entries:
        cut = len(batch) >= _MIN_ENTRIES and not zlib.crc32(entry.path) & _CUT_MASK
        full = len(batch) >= _MAX_ENTRIES or refs >= MAX_PART_REFS or text >= _MAX_TEXT
        if batch and (cut or full):
            yield _encode_part(batch)
            batch, refs, text = [], 0, 0
        text += len(entry.path) + len(entry.target) + len(entry.link) + len(entry.relocation)
        start = 0
        while True:
            batch.append((entry, start))
            room = MAX_PART_REFS - refs
            refs += min(room, len(entry.refs) - start)
            if len(entry.refs) - start <= room:
                break
            start += room
            yield _encode_part(batch)
            batch, refs, text = [], 0, 0
    if batch:
        yield _encode_part(batch)


def _encode_part(batch: list[tuple[Entry, int]]) -> tuple[PartInfo, bytes]:
    kinds = bytearray()
    depths, sizes, counts, ref_sizes = array("H"), array("Q"), array("I"), array("I")
    names: list[bytes] = []
    digests: list[bytes] = []
    file_digests: list[bytes] = []
    targets: list[bytes] = []
    links, relocations = bytearray(), bytearray()
    modes, mtimes = array("H"), array("q")
    room = MAX_PART_REFS
    for number, (entry, start) in enumerate(batch):
        flags = _EXECUTABLE if entry.executable else 0
        if entry.composed:
            flags |= COMPOSED
        kinds.append(entry.kind | flags | (_CONTINUED if start else 0))
        depths.append(entry.path.count(b"/"))
        names.append(entry.path.rpartition(b"/")[2])
        if entry.mode is not None and entry.mtime_ns is not None:
            modes.append(entry.mode)
            mtimes.append(entry.mtime_ns)
        if entry.relocation and not start:
            relocations += _record(number, entry.relocation)
        if entry.kind is Kind.SYMLINK:
            targets.append(entry.target)
        elif entry.kind is Kind.FILE:
            part = entry.refs[start : start + room]
            room -= len(part)
            sizes.append(entry.size)
            counts.append(len(part))
            for name, size in part:
                digests.append(name)
                ref_sizes.append(size)
            if not start:
                if not entry.composed and not named_by_chunk(entry.size, part):
                    file_digests.append(entry.digest)
                if entry.link:
                    links += _record(number, entry.link)
    base = batch[0][0].path.rpartition(b"/")[0]
    columns = {
        _Column.KIND: bytes(kinds),
        _Column.DEPTH: pack_array(depths),
        _Column.NAMES: b"\0".join(names),
        _Column.BASE: base,
        _Column.SIZE: pack_array(sizes),
        _Column.COUNT: pack_array(counts),
        _Column.REF_DIGEST: b"".join(digests),
        _Column.REF_SIZE: pack_array(ref_sizes),
        _Column.FILE_DIGEST: b"".join(file_digests),
        _Column.TARGET: b"\0".join(targets),
        _Column.MODE: pack_array(modes),
        _Column.MTIME: pack_array(mtimes),
        _Column.LINK: bytes(links),
        _Column.RELOCATION: bytes(relocations),
    }
    body = [U32.pack(sum(1 for value in columns.values() if value))]
    for column, value in columns.items():
        if value:
            body += (U32.pack(column), U32.pack(len(value)), value)
    raw = b"".join(body)
    return PartInfo(digest(raw), len(raw), len(batch), len(digests)), raw


def _record(number: int, value: bytes) -> bytes:
    return U32.pack(number) + U32.pack(len(value)) + value


def decode_part(raw: bytes | memoryview) -> Part:
    """Decode and check one part. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    cursor = Cursor(raw)
    columns: dict[int, bytes] = {}
    for _ in range(cursor.u32()):
        column, length = cursor.u32(), cursor.u32()
        value = bytes(cursor.take(length))
        if column in columns:
            raise CorruptError(f"manifest part: column {column} twice")
        if not 1 <= column <= _Column.RELOCATION and column < _Column.OPTIONAL:
            raise UnsupportedFormatError(
                f"manifest part holds column {column}, unknown here", hint="upgrade envstore"
            )
        columns[column] = value
    cursor.finish()
    kinds = columns.get(_Column.KIND, b"")
    names = columns.get(_Column.NAMES, b"").split(b"\0") if kinds else []
    target_blob = columns.get(_Column.TARGET)
    part = Part(
        base=columns.get(_Column.BASE, b""),
        kinds=kinds,
        depths=unpack_array(columns.get(_Column.DEPTH, b""), 2),
        names=names,
        sizes=unpack_array(columns.get(_Column.SIZE, b""), 8),
        counts=unpack_array(columns.get(_Column.COUNT, b""), 4),
        ref_digests=columns.get(_Column.REF_DIGEST, b""),
        ref_sizes=unpack_array(columns.get(_Column.REF_SIZE, b""), 4),
        file_digests=columns.get(_Column.FILE_DIGEST, b""),
        targets=target_blob.split(b"\0") if target_blob is not None else [],
        links=_decode_records(columns.get(_Column.LINK, b"")),
        relocations=_decode_records(columns.get(_Column.RELOCATION, b"")),
    )
    if _Column.MODE in columns:
        part.modes = unpack_array(columns[_Column.MODE], 2)
        part.mtimes = unpack_array(columns.get(_Column.MTIME, b""), 8, signed=True)
    _check_part(part)
    return part


def _decode_records(data: bytes) -> dict[int, bytes]:
    found = {}
    cursor = Cursor(data)
    left = len(data)
    last = -1
    while left:
        number = cursor.u32()
        value = bytes(cursor.take(cursor.u32()))
        if number <= last:
            raise CorruptError("manifest part: links or relocations are not in order")
        found[number] = value
        last = number
        left -= 8 + len(value)
    return found


def _check_part(part: Part) -> None:
    """Refuse what would lead a reader astray: escapes, gaps, sums that do not add up."""
    count = len(part.kinds)
    what = part.kinds.translate(_KINDS)
    files, links = what.count(Kind.FILE), what.count(Kind.SYMLINK)
    if len(part.names) != count or len(part.depths) != count:
        raise CorruptError("manifest part: columns of different length")
    if (
        files + links + what.count(Kind.DIRECTORY) != count
        or (part.continued and what[0] != Kind.FILE)
        or max(part.kinds[1:].translate(_IS_CONTINUED), default=0)
        or not _KNOWN.issuperset(part.kinds)
    ):
        raise CorruptError("manifest part: unknown entry kind")
    above = part.base.split(b"/") if part.base else []
    if (
        not {b"", b".", b".."}.isdisjoint((*part.names, *above))
        or b"/" in b"".join(part.names)
        or b"\0" in part.base
    ):
        raise CorruptError("manifest part: a name that would escape its directory")
    if b"" in part.targets:
        raise CorruptError("manifest part: a symbolic link to nothing")
    if len(part.sizes) != files or len(part.counts) != files or len(part.targets) != links:
        raise CorruptError("manifest part: file or link columns of different length")
    if max(part.sizes, default=0) > _MAX_FILE:
        raise CorruptError("manifest part: a file that is longer than any file can be")
    if any(number >= count or what[number] != Kind.FILE for number in part.links):
        raise CorruptError("manifest part: a hard link that is no file")
    _check_relocations(part, what)
    refs = sum(part.counts)
    if len(part.ref_sizes) != refs or len(part.ref_digests) != refs * DIGEST_SIZE:
        raise CorruptError("manifest part: chunk columns of different length")
    _check_composed(part)
    if part.modes is not None and not (
        part.mtimes is not None and len(part.modes) == len(part.mtimes) == count
    ):
        raise CorruptError("manifest part: mode columns of different length")
    if max(part.modes or (), default=0) > MODE_BITS:
        raise CorruptError("manifest part: a mode that holds more than permission bits")
    depth = part.base.count(b"/") + 1 if part.base else 0
    if count and part.depths[0] != depth:
        raise CorruptError("manifest part: the first entry is not below the part's base")
    deepest = map(add, part.depths, what.translate(_IS_DIRECTORY))
    if any(map(gt, islice(part.depths, 1, None), deepest)):
        raise CorruptError("manifest part: an entry without its directory")


def _check_composed(part: Part) -> None:
    if max(part.kinds, default=0) < COMPOSED:
        return
    files = [flags for flags in part.kinds if flags & 3 == Kind.FILE]
    first = 0
    for flags, size, count in zip(files, part.sizes, part.counts, strict=True):
        if flags & COMPOSED and not flags & _CONTINUED:
            names, sizes = part.ref_digests, part.ref_sizes
            name = names[first * DIGEST_SIZE : (first + 1) * DIGEST_SIZE]
            if named_by_chunk(size, ((name, sizes[first]),) if count == 1 else ()):
                raise CorruptError("manifest part: a file that is one chunk is said to be composed")
        first += count


def _check_relocations(part: Part, what: bytes) -> None:
    """Fill in ``part.plans``, refusing what does not fit the entry that it is of."""
    if not part.relocations:
        return
    files = list(accumulate((kind == Kind.FILE for kind in what), initial=0))
    links = list(accumulate((kind == Kind.SYMLINK for kind in what), initial=0))
    for number, value in part.relocations.items():
        if number >= len(what) or (part.continued and not number):
            raise CorruptError("manifest part: a relocation of no entry")
        if what[number] == Kind.FILE:
            plan = part.plans[number] = Relocation.decode(value)
            fits = plan.size == part.sizes[files[number]]
        else:
            link = what[number] == Kind.SYMLINK
            fits = link and bool(link_relocation(part.targets[links[number]], value))
        if not fits:
            raise CorruptError("manifest part: a relocation that does not fit its entry")


def read_entries(parts: Iterable[Part]) -> Iterator[Entry]:
    """Yield the entries of consecutive parts; a file spread over several parts comes once.

    Raises ``CorruptError`` unless paths ascend and every entry comes after, and below, a
    directory of the same manifest: nobody who writes these entries can be led elsewhere.
    """
    held: Entry | None = None
    refs: list[tuple[bytes, int]] = []
    directories = [b""]
    previous = b""
    for part in parts:
        for entry, continued in _part_entries(part):
            if continued:
                if held is None or held.path != entry.path:
                    raise CorruptError("manifest: a part continues a file that is not there")
                refs = refs or [*held.refs]
                refs += entry.refs
                continue
            if held is not None:
                yield _whole(held, refs)
                refs = []
            key = sort_key(entry.path)
            if key <= previous:
                raise CorruptError(f"manifest: {_shown(entry.path)} is out of order")
            previous = key
            parent = entry.path.rpartition(b"/")[0]
            while directories and directories[-1] != parent:
                directories.pop()
            if not directories:
                raise CorruptError(f"manifest: {_shown(entry.path)} is not in a directory")
            if entry.kind is Kind.DIRECTORY:
                directories.append(entry.path)
            held = entry
    if held is not None:
        yield _whole(held, refs)


def _shown(path: bytes) -> str:
    return repr(path if len(path) <= _MAX_SHOWN else path[:_MAX_SHOWN] + b"...")


def _whole(first: Entry, refs: list[tuple[bytes, int]]) -> Entry:
    """Return the checked entry that begins with ``first`` and has all of ``refs``, if any."""
    return checked(replace(first, refs=tuple(refs)) if refs else first)


def checked(entry: Entry) -> Entry:
    """Return ``entry``, with its digest if that follows from its references.

    Raises ``CorruptError`` unless its chunks add up to its size.
    """
    if entry.kind is Kind.FILE and sum(size for _, size in entry.refs) != entry.size:
        raise CorruptError(f"manifest: {_shown(entry.path)} does not add up to its size")
    return replace(entry, digest=composed_digest(entry.refs)) if entry.composed else entry


def _part_entries(part: Part) -> Iterator[tuple[Entry, bool]]:
    stack = part.base.split(b"/") if part.base else []
    starts = list(accumulate(part.counts, initial=0))
    file_no = link_no = long_no = text = 0
    for i, flags in enumerate(part.kinds):
        kind = Kind(flags & 3)
        del stack[part.depths[i] :]
        stack.append(part.names[i])
        path = b"/".join(stack)
        text += len(path)
        if text > MAX_PATHS:
            raise CorruptError(f"manifest part: paths of more than {MAX_PATHS} bytes")
        mode = part.modes[i] if part.modes is not None else None
        mtime = part.mtimes[i] if part.mtimes is not None else None
        relocation = part.relocations.get(i, b"")
        if kind is Kind.FILE:
            first, end = starts[file_no], starts[file_no + 1]
            names, sizes = part.ref_digests, part.ref_sizes
            refs = tuple(
                (names[k * DIGEST_SIZE : (k + 1) * DIGEST_SIZE], sizes[k])
                for k in range(first, end)
            )
            continued = bool(flags & _CONTINUED)
            composed = bool(flags & COMPOSED)
            whole = refs[0][0] if refs else EMPTY
            if not (continued or composed or named_by_chunk(part.sizes[file_no], refs)):
                whole = part.file_digests[long_no * DIGEST_SIZE : (long_no + 1) * DIGEST_SIZE]
                if len(whole) != DIGEST_SIZE:
                    raise CorruptError("manifest part: a file digest is missing")
                long_no += 1
            executable = bool(flags & _EXECUTABLE)
            link = part.links.get(i, b"")
            entry = Entry(
                path, kind, executable, part.sizes[file_no], whole, refs,
                b"", mode, mtime, link, relocation, composed,
            )  # fmt: skip
            file_no += 1
            yield entry, continued
        elif kind is Kind.SYMLINK:
            target = part.targets[link_no]
            link_no += 1
            yield (
                Entry(path, kind, target=target, mode=mode, mtime_ns=mtime, relocation=relocation),
                False,
            )
        else:
            yield Entry(path, kind, mode=mode, mtime_ns=mtime), False
