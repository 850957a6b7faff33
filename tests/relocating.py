"""Trees that hold their own prefix, and what they must become at another: computed at one go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envstore.store.relocation import Mode, link_relocation, plan
from envstore.store.source import Kind, SourceEntry
from tests import trees

BUILD = ("/opt/envstore-tests/build_" + "placehold_" * 40)[:255].encode()
SHORT = b"/opt/short_" + b"p" * 69


@dataclass(frozen=True)
class Made:
    """A file (or a link to ``data``) that was made for ``placeholder``."""

    data: bytes
    mode: Mode | None = None
    placeholder: bytes = BUILD
    package: str = "sample-1.0"
    link: bool = False
    executable: bool = False

    def at(self, prefix: bytes) -> bytes:
        """Return what it is at ``prefix``."""
        if self.link:
            return self.data.replace(self.placeholder, prefix)
        return installed(self.data, self.placeholder, self.mode, prefix)


def sample() -> dict[bytes, Made]:
    """Files of every kind by path; some are equal, one has many chunks, one no relocation."""
    binary = trees.noise("binary", 300_000).replace(b"\0", b"1")
    strings = b"\0" + BUILD + b"/share\0\0x" + BUILD + b"/a:" + BUILD + b"/b\0"
    large = binary + strings + binary[::-1] + strings + binary + b"\0" + BUILD
    script = b"#!" + BUILD + b"/bin/python3.11 -s\nprint('" + BUILD + b"')\n"
    return {
        b"bin/tool": Made(script, Mode.TEXT, executable=True),
        b"bin/same": Made(script, Mode.TEXT, executable=True),
        b"bin/perl": Made(b"#! " + BUILD + b"/bin/perl -w\n1;\n", Mode.TEXT, executable=True),
        b"etc/many.conf": Made(
            b"".join(b"%d = %b/etc/%d\n" % (i, BUILD, i) for i in range(2000)), Mode.TEXT
        ),
        b"lib/libsample.so": Made(large, Mode.BINARY),
        b"lib/libshort.so": Made(
            binary[:70_000] + b"\0" + SHORT + b"/lib\0rest", Mode.BINARY, SHORT, "short-0.1"
        ),
        b"lib/plain.so": Made(binary),
        b"lib/copy.so": Made(binary),
        b"share/here": Made(BUILD + b"/share", link=True),
        b"share/relative": Made(b"../bin/tool", link=True),
        b"empty": Made(b""),
    }


def installed(data: bytes, placeholder: bytes, mode: Mode | None, prefix: bytes) -> bytes:
    """Return a file as an installer writes it, from all of its bytes at once."""
    if mode is None:
        return data
    if mode is Mode.BINARY:
        strings = re.split(rb"(\0)", data)
        return b"".join(
            one.replace(placeholder, prefix).ljust(len(one), b"\0") if one != b"\0" else one
            for one in strings
        )
    if not data.startswith(b"#!"):
        return data.replace(placeholder, prefix)
    line, newline, rest = data.partition(b"\n")
    return _shebang(line, placeholder, prefix) + newline + rest.replace(placeholder, prefix)


def _shebang(line: bytes, placeholder: bytes, prefix: bytes) -> bytes:
    if b" " in prefix:
        return _detour(line).replace(placeholder, prefix) if placeholder in line else line
    line = line.replace(placeholder, prefix)
    return line if len(line) <= 127 else _detour(line)


def _detour(line: bytes) -> bytes:
    found = re.fullmatch(rb"#! *(/(?:\\ |[^ \t\r])*)(.*)", line)
    if found is None:
        return line
    name = found[1].rpartition(b"/")[2]
    if re.fullmatch(rb"python(\d+(\.\d+)?)?", name):
        return b"#!/bin/sh\n'''exec' \"%b\"%b \"$0\" \"$@\" #'''" % found.groups()
    return b"#!/usr/bin/env " + name + found[2]


class RelocatingSource:
    """A normalised tree of such files, held in memory."""

    kind = "env"
    root = Path("/relocating")

    def __init__(self, files: Mapping[bytes, Made], identity: str = "relocating") -> None:
        self.files = files
        self.identity = identity
        self.warnings: list[str] = []

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``."""
        folders = {
            path[:at] for path in self.files for at in range(len(path)) if path[at : at + 1] == b"/"
        }
        return [
            *(SourceEntry(path, Kind.DIRECTORY, 0o755) for path in folders),
            *(self._entry(path, made) for path, made in self.files.items()),
        ]

    def _entry(self, path: bytes, made: Made) -> SourceEntry:
        if made.link:
            relocation = link_relocation(made.data, made.placeholder)
            return SourceEntry(path, Kind.SYMLINK, 0o777, target=made.data, relocation=relocation)
        found = plan(made.data, made.placeholder, made.mode, made.package) if made.mode else None
        return SourceEntry(
            path, Kind.FILE, 0o755 if made.executable else 0o644, size=len(made.data),
            settled=False, relocation=found.encode() if found else b"",
        )  # fmt: skip

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return 0, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        data = self.files[entry.path].data
        for at in range(0, len(data), 4 << 20):
            yield data[at : at + (4 << 20)]

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source.close``."""


def compare(files: Mapping[bytes, Made], top: Path, prefix: bytes) -> None:
    """See that the tree at ``top`` is ``files`` as they are at ``prefix``, sizes first."""
    for path, made in files.items():
        where, expected = top / path.decode(), made.at(prefix)
        assert where.lstat().st_size == len(expected), path
        if made.link:
            assert where.readlink().as_posix().encode() == expected
        else:
            assert where.read_bytes() == expected, path
