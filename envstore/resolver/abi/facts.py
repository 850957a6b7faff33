"""Facts: what one ELF file wants of others and offers to them, small enough to be kept."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.errors import CorruptError, EnvstoreError
from envstore.resolver.abi import elf
from envstore.resolver.abi.names import PROMISED

_MAX_SHIFT = 63

VERSION = 1
"""Of the facts' meaning and form; what was stored under another one is to be made again."""


@dataclass(frozen=True, slots=True)
class ElfFacts:
    """A dynamically linked program or library as the loader sees it.

    ``machine`` is the header's ``e_machine``. ``program`` says that it can be started.
    ``verneed`` holds (library, version, weak). ``undefined`` are the strong symbols it needs,
    without those whose version is one of a promised library's: the version says it all.
    ``defined`` are the symbols others can bind to, by hash (see ``symbol_hash``), encoded.
    """

    machine: int
    bits: int
    big_endian: bool = False
    program: bool = False
    interpreter: str = ""
    soname: str = ""
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    verneed: tuple[tuple[str, str, bool], ...] = ()
    verdef: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    defined: bytes = b""

    def offers(self) -> frozenset[int]:
        """Return the hashes of all symbols that others can bind to."""
        return frozenset(_decode(self.defined))


def symbol_hash(name: bytes) -> int:
    """Return what stands for a symbol in ``ElfFacts.defined``: 28 bits of its CRC-32.

    Among 300,000 symbols, one that is missing passes for one that is there in 1 of 900 cases.
    """
    return zlib.crc32(name) & 0x0FFF_FFFF


def elf_facts(file: Path | bytes | elf.Source) -> ElfFacts | None:
    """Return the facts of a file, by its path or its bytes, or read by pieces.

    ``None`` for what no loader would touch: other files, objects, statically linked programs,
    and what only pretends to be ELF. Memory: the file's dynamic string and symbol tables.
    Raises ``OSError`` where the file cannot be read.
    """
    if isinstance(file, bytes):
        return _facts(_Bytes(file)) if file[:4] == elf.MAGIC else None
    if not isinstance(file, Path):
        return _facts(file)
    # What is not a plain file, a FIFO say, must not be waited for.
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _facts(_File(fd)) if os.pread(fd, 4, 0) == elf.MAGIC else None
    finally:
        os.close(fd)


def _facts(source: elf.Source) -> ElfFacts | None:
    try:
        found = elf.read_dynamic(source)
    except elf.MalformedError:
        return None
    if found is None:
        return None
    text = _text
    covered = {index for index, (lib, _, _) in found.verneed.items() if text(lib) in PROMISED}
    wanted = {text(name) for name, version in found.undefined if version not in covered}
    return ElfFacts(
        machine=found.machine,
        bits=found.bits,
        big_endian=found.big_endian,
        program=found.program,
        interpreter=text(found.interpreter),
        soname=text(found.soname),
        needed=tuple(map(text, found.needed)),
        rpath=_paths(found.rpath),
        runpath=_paths(found.runpath),
        verneed=tuple(
            sorted({(text(lib), text(name), weak) for lib, name, weak in found.verneed.values()})
        ),
        verdef=tuple(sorted(set(map(text, found.verdef)))),
        undefined=tuple(sorted(wanted)),
        defined=_encode(map(symbol_hash, found.defined)),
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _paths(value: bytes) -> tuple[str, ...]:
    return tuple(_text(value).split(":")) if value else ()


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        while len(data) < size:
            # One call reads 2 GiB at most, and a network file system less.
            more = os.pread(self._fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def _encode(numbers: Iterable[int]) -> bytes:
    """Return ascending numbers as the differences between them, seven bits to a byte."""
    out = bytearray()
    last = 0
    for number in sorted(set(numbers)):
        step, last = number - last, number
        while step > 127:
            out.append(step & 127 | 128)
            step >>= 7
        out.append(step)
    return bytes(out)


def _decode(data: bytes) -> list[int]:
    numbers = []
    number = step = shift = 0
    for byte in data:
        step |= (byte & 127) << shift
        if byte & 128:
            shift += 7
            if shift > _MAX_SHIFT:
                raise ValueError("a number without an end")
            continue
        number += step
        numbers.append(number)
        step = shift = 0
    return numbers


def to_json(files: Mapping[str, ElfFacts]) -> dict[str, Any]:
    """Return the facts of a package's files, by path, as a JSON value.

    Deterministic. Most files of a package want the same symbols, so these are listed once:
    ``names`` holds them, ``undefined`` of a file the differences between their positions.
    """
    names = sorted({name for facts in files.values() for name in facts.undefined})
    place = {name: i for i, name in enumerate(names)}
    return {
        "version": VERSION,
        "names": names,
        "files": {path: _to_json(files[path], place) for path in sorted(files)},
    }


def _to_json(facts: ElfFacts, place: Mapping[str, int]) -> dict[str, Any]:
    value: dict[str, Any] = {"machine": facts.machine, "bits": facts.bits}
    for name in ("big_endian", "program", "interpreter", "soname"):
        if getattr(facts, name):
            value[name] = getattr(facts, name)
    for name in ("needed", "rpath", "runpath", "verdef"):
        if getattr(facts, name):
            value[name] = list(getattr(facts, name))
    if facts.verneed:
        value["verneed"] = _by_library(facts.verneed)
    if facts.undefined:
        value["undefined"] = _armour(_encode(place[name] for name in facts.undefined))
    if facts.defined:
        value["defined"] = _armour(facts.defined)
    return value


def _by_library(verneed: Iterable[tuple[str, str, bool]]) -> dict[str, list[Any]]:
    """Group versions by library; a weak one is a list of its own."""
    grouped: dict[str, list[Any]] = {}
    for library, version, weak in verneed:
        grouped.setdefault(library, []).append([version] if weak else version)
    return grouped


def _armour(data: bytes) -> str:
    return base64.b85encode(data).decode()


def from_json(value: Any) -> dict[str, ElfFacts]:
    """Return what ``to_json`` was given. Raises ``CorruptError`` for anything else."""
    try:
        if value["version"] != VERSION:
            raise EnvstoreError(f"ABI facts of version {value['version']} are not understood")
        names = [str(name) for name in value["names"]]
        return {str(path): _from_json(item, names) for path, item in value["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CorruptError(f"ABI facts are malformed: {error}") from error


def _from_json(value: dict[str, Any], names: list[str]) -> ElfFacts:
    verneed = [
        (str(library), str(version[0] if isinstance(version, list) else version), weak)
        for library, versions in value.get("verneed", {}).items()
        for version in versions
        for weak in (isinstance(version, list),)
    ]
    return ElfFacts(
        machine=int(value["machine"]),
        bits=int(value["bits"]),
        big_endian=bool(value.get("big_endian")),
        program=bool(value.get("program")),
        interpreter=str(value.get("interpreter", "")),
        soname=str(value.get("soname", "")),
        needed=_strings(value, "needed"),
        rpath=_strings(value, "rpath"),
        runpath=_strings(value, "runpath"),
        verneed=tuple(sorted(verneed)),
        verdef=_strings(value, "verdef"),
        undefined=tuple(names[at] for at in _decode(base64.b85decode(value.get("undefined", "")))),
        defined=base64.b85decode(value.get("defined", "")),
    )


def _strings(value: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(map(str, value.get(name, ())))
