"""Reads what the dynamic loader would read of an ELF file, and nothing else of it.

Only program headers and the dynamic section are relied on, as in the loader (System V gABI,
chapters 4 and 5; the version tables are those of the LSB, chapter "Symbol Versioning"). Section
headers only tell how many symbols there are. Written in Python because files come from
strangers: whatever is wrong with one ends in ``MalformedError``, with bounded work and memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

MAGIC = b"\x7fELF"

_EXECUTABLE, _SHARED = 2, 3
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_SHT_DYNSYM = 11
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ = 1, 4, 5, 6, 10
_SONAME, _RPATH, _RUNPATH = 14, 15, 29
_VERSYM, _VERDEF, _VERDEFNUM, _VERNEED, _VERNEEDNUM = (
    0x6FFFFFF0,
    0x6FFFFFFC,
    0x6FFFFFFD,
    0x6FFFFFFE,
    0x6FFFFFFF,
)
_WEAK = 2
_EVERYWHERE = (1, 10)  # STB_GLOBAL, STB_GNU_UNIQUE
_NOT_FOR_OTHERS = (1, 2)  # STV_INTERNAL, STV_HIDDEN
_FLAG_BASE, _FLAG_WEAK = 1, 2

_MAX_HEADERS = 4 << 20
_MAX_DYNAMIC = 1 << 20
_MAX_VERSIONS = 1 << 20
_MAX_SYMBOLS = 4_000_000
_MAX_STRINGS = 256 << 20
_MAX_NAMES = 512 << 20
_MAX_NAME = 64 << 10
_MAX_VERSION_ENTRIES = 65_536
_MAX_NEEDED = 4096
_MAX_FOLDERS = 512


class MalformedError(Exception):
    """The file is not what its header says, or larger than any real one."""


class Source(Protocol):
    """Random access to the bytes of a file."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset``, fewer where the file ends."""
        ...


@dataclass(slots=True)
class Dynamic:
    """What a dynamically linked file says; names as they are in its string table.

    ``verneed`` maps the index of a version to its library, name and whether it is weak.
    ``undefined`` are strong undefined symbols with the index of their version (0 and 1: none),
    ``defined`` the names that other files can bind to.
    """

    machine: int
    bits: int
    big_endian: bool
    program: bool = False
    interpreter: bytes = b""
    soname: bytes = b""
    needed: list[bytes] = field(default_factory=list)
    rpath: bytes = b""
    runpath: bytes = b""
    verneed: dict[int, tuple[bytes, bytes, bool]] = field(default_factory=dict)
    verdef: list[bytes] = field(default_factory=list)
    undefined: list[tuple[bytes, int]] = field(default_factory=list)
    defined: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the fields of the structures are; they differ by class and byte order."""

    order: str
    bits: int

    @property
    def header(self) -> struct.Struct:
        word = "Q" if self.bits == 64 else "I"
        return struct.Struct(f"{self.order}HHI{word}{word}{word}IHHHHHH")

    @property
    def segment(self) -> struct.Struct:
        return struct.Struct(self.order + ("IIQQQQQQ" if self.bits == 64 else "IIIIIIII"))

    @property
    def section(self) -> struct.Struct:
        return struct.Struct(self.order + ("IIQQQQIIQQ" if self.bits == 64 else "IIIIIIIIII"))

    @property
    def tag(self) -> struct.Struct:
        return struct.Struct(self.order + ("QQ" if self.bits == 64 else "II"))

    @property
    def symbol(self) -> struct.Struct:
        # Name, info, other and section index; addresses and sizes are skipped.
        return struct.Struct(self.order + ("IBBH16x" if self.bits == 64 else "I8xBBH"))


def read_dynamic(source: Source) -> Dynamic | None:
    """Return what the loader would learn, ``None`` if the file has nothing for it.

    Objects, core dumps and statically linked programs have no dynamic section. Raises
    ``MalformedError``.
    """
    ident = source.read(0, 16)
    if ident[:4] != MAGIC:
        return None
    if len(ident) < 16 or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise MalformedError("unknown class or byte order")
    layout = _Layout("<>"[ident[5] - 1], 32 * ident[4])
    try:
        return _Reader(source, layout).read()
    except (struct.error, IndexError, OverflowError) as error:
        raise MalformedError(str(error)) from error


class _Reader:
    def __init__(self, source: Source, layout: _Layout) -> None:
        self._source = source
        self._layout = layout
        header = layout.header
        self._header = header.unpack(self._exactly(16, header.size))
        self._loads: list[tuple[int, int, int]] = []
        self._strings = b""

    def read(self) -> Dynamic | None:
        kind, machine = self._header[:2]
        if kind not in (_EXECUTABLE, _SHARED):
            return None
        found = Dynamic(machine, self._layout.bits, self._layout.order == ">")
        found.program = kind == _EXECUTABLE
        dynamic = None
        for type_, offset, address, size in self._segments():
            if type_ == _PT_LOAD:
                self._loads.append((address, address + size, offset))
            elif type_ == _PT_DYNAMIC:
                dynamic = offset, size
            elif type_ == _PT_INTERP:
                found.program = True
                found.interpreter = self._exactly(offset, min(size, 4096)).split(b"\0")[0]
        if dynamic is None:
            return None
        tags, needed = self._tags(*dynamic)
        if _STRTAB not in tags or _STRSZ not in tags:
            raise MalformedError("no string table")
        self._strings = self._at(tags[_STRTAB], tags[_STRSZ], _MAX_STRINGS)
        if len(needed) > _MAX_NEEDED:
            raise MalformedError(f"{len(needed)} libraries needed")
        found.needed = [self._name(at) for at in needed]
        found.soname = self._named(tags, _SONAME)
        found.rpath = self._named(tags, _RPATH)
        found.runpath = self._named(tags, _RUNPATH)
        if max(found.rpath.count(b":"), found.runpath.count(b":")) > _MAX_FOLDERS:
            raise MalformedError("a path of too many directories")
        found.verneed = self._verneed(tags)
        found.verdef = self._verdef(tags)
        if _SYMTAB in tags:
            self._read_symbols(found, tags)
        return found

    def _segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield type, offset, address and size in the file of each segment."""
        at, entry, count = self._header[4], self._header[8], self._header[9]
        shape = self._layout.segment
        if entry < shape.size:
            raise MalformedError("program headers of an unknown size")
        table = self._bounded(at, entry * count, _MAX_HEADERS)
        for i in range(count):
            row = shape.unpack_from(table, i * entry)
            if self._layout.bits == 64:
                yield row[0], row[2], row[3], row[5]
            else:
                yield row[0], row[1], row[2], row[4]

    def _tags(self, offset: int, size: int) -> tuple[dict[int, int], list[int]]:
        """Return the dynamic section: each tag's value, and those of ``DT_NEEDED`` in order."""
        shape = self._layout.tag
        table = self._bounded(offset, size - size % shape.size, _MAX_DYNAMIC)
        tags: dict[int, int] = {}
        needed = []
        for tag, value in shape.iter_unpack(table):
            if tag == 0:
                break
            if tag == _NEEDED:
                needed.append(value)
            else:
                tags[tag] = value
        return tags, needed

    def _verneed(self, tags: dict[int, int]) -> dict[int, tuple[bytes, bytes, bool]]:
        wanted: dict[int, tuple[bytes, bytes, bool]] = {}
        if _VERNEED not in tags:
            return wanted
        table = self._rest(tags[_VERNEED], _MAX_VERSIONS)
        record = struct.Struct(self._layout.order + "HHIII")
        version = struct.Struct(self._layout.order + "IHHII")
        at = 0
        for _ in range(min(tags.get(_VERNEEDNUM, 0), _MAX_VERSION_ENTRIES)):
            _, count, file, first, following = record.unpack_from(table, at)
            library, below = self._name(file), at + first
            for _ in range(count):
                _, flags, index, name, next_ = version.unpack_from(table, below)
                wanted[index & 0x7FFF] = library, self._name(name), bool(flags & _FLAG_WEAK)
                if len(wanted) > _MAX_VERSION_ENTRIES or not next_:
                    break
                below += next_
            if not following:
                break
            at += following
        return wanted

    def _verdef(self, tags: dict[int, int]) -> list[bytes]:
        offered: list[bytes] = []
        if _VERDEF not in tags:
            return offered
        table = self._rest(tags[_VERDEF], _MAX_VERSIONS)
        record = struct.Struct(self._layout.order + "HHHHIII")
        version = struct.Struct(self._layout.order + "II")
        at = 0
        for _ in range(min(tags.get(_VERDEFNUM, 0), _MAX_VERSION_ENTRIES)):
            _, flags, _, _, _, first, following = record.unpack_from(table, at)
            # The first is the name of the library itself.
            if not flags & _FLAG_BASE:
                offered.append(self._name(version.unpack_from(table, at + first)[0]))
            if not following:
                break
            at += following
        return offered

    def _read_symbols(self, found: Dynamic, tags: dict[int, int]) -> None:
        shape = self._layout.symbol
        count = self._symbol_count(tags)
        if count > _MAX_SYMBOLS:
            raise MalformedError(f"{count} symbols")
        table = self._at(tags[_SYMTAB], count * shape.size, count * shape.size)
        versions: tuple[int, ...] = ()
        if _VERSYM in tags:
            raw = self._at(tags[_VERSYM], count * 2, count * 2)
            versions = struct.unpack(f"{self._layout.order}{count}H", raw)
        strings, budget = self._strings, _MAX_NAMES
        for i, (at, info, other, section) in enumerate(shape.iter_unpack(table)):
            binding = info >> 4
            if not at or not (binding in _EVERYWHERE or (binding == _WEAK and section)):
                continue
            end = strings.find(b"\0", at, at + _MAX_NAME)
            # Names may lie in each other, so that a small file can have very many bytes of them.
            budget -= end - at
            if end < 0 or budget < 0:
                raise MalformedError("endless names")
            name = strings[at:end]
            if section == 0:
                found.undefined.append((name, versions[i] & 0x7FFF if versions else 0))
            elif other & 3 not in _NOT_FOR_OTHERS:
                found.defined.append(name)

    def _symbol_count(self, tags: dict[int, int]) -> int:
        """Return how many symbols there are, which nothing that is loaded says for certain.

        A ``DT_GNU_HASH`` does not count undefined symbols where nothing is defined.
        """
        size = self._layout.symbol.size
        at, entry, count = self._header[5], self._header[10], self._header[11]
        shape = self._layout.section
        if at and count and entry >= shape.size:
            table = self._bounded(at, entry * count, _MAX_HEADERS, short=True)
            for i in range(len(table) // entry):
                section = shape.unpack_from(table, i * entry)
                if section[1] == _SHT_DYNSYM and section[3] == tags[_SYMTAB]:
                    return int(section[5] // size)
        if _HASH in tags:
            return int(struct.unpack(f"{self._layout.order}4xI", self._at(tags[_HASH], 8, 8))[0])
        gap = tags[_STRTAB] - tags[_SYMTAB]
        if gap <= 0:
            raise MalformedError("nothing says how many symbols there are")
        return gap // size

    def _named(self, tags: dict[int, int], tag: int) -> bytes:
        return self._name(tags[tag]) if tag in tags else b""

    def _name(self, at: int) -> bytes:
        end = self._strings.find(b"\0", at, at + _MAX_NAME)
        if end < 0:
            raise MalformedError("a name without an end")
        return self._strings[at:end]

    def _offset(self, address: int) -> tuple[int, int]:
        """Return where an address lies in the file, and how many bytes are mapped from there."""
        for low, high, offset in self._loads:
            if low <= address < high:
                return offset + address - low, high - address
        raise MalformedError(f"address {address:#x} is not in the file")

    def _at(self, address: int, size: int, limit: int) -> bytes:
        if not size:
            return b""
        offset, mapped = self._offset(address)
        if size > mapped:
            raise MalformedError("a table is not whole")
        return self._bounded(offset, size, limit)

    def _rest(self, address: int, limit: int) -> bytes:
        """Return what is mapped from an address on, ``limit`` bytes at most."""
        offset, mapped = self._offset(address)
        return self._bounded(offset, min(mapped, limit), limit, short=True)

    def _bounded(self, offset: int, size: int, limit: int, *, short: bool = False) -> bytes:
        if size > limit:
            raise MalformedError(f"a table of {size} bytes")
        if not short:
            return self._exactly(offset, size)
        return self._source.read(offset, size) if offset < self._source.size else b""

    def _exactly(self, offset: int, size: int) -> bytes:
        if offset + size > self._source.size:
            raise MalformedError("file too short")
        data = self._source.read(offset, size)
        if len(data) != size:
            raise MalformedError("file too short")
        return data
