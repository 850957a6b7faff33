"""Unpacks wheels as the PyPA's binary distribution format says, with the choices that uv makes.

Every file is checked against RECORD while it is written. The prefix is that of an interpreter, not
of a virtual environment: headers go below ``include/pythonX.Y``. What depends on who asked for the
wheel and not on the wheel (``REQUESTED``, ``direct_url.json``) is for ``generated`` to add.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.resolver.lock import PypiPackage, PythonFacts
from envstore.resolver.packages.entry_points import parse_groups, scripts
from envstore.resolver.packages.extract import PackageError, Tree, unpacking
from envstore.resolver.packages.generated import stdlib
from envstore.resolver.packages.identity import is_called
from envstore.resolver.packages.metadata import MAX_METADATA, first, headers
from envstore.resolver.packages.records import Row, read_record, write_record
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.packages.zipreader import ZipMember, ZipReader
from envstore.store.relocation import PLACEHOLDER, Mode, plan
from envstore.store.source import Kind

INSTALLER = b"envstore\n"

_SCHEMES = ("purelib", "platlib", "scripts", "data", "headers")
_UNSIGNED = ("RECORD", "RECORD.jws", "RECORD.p7s")
_REPLACED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
_PYTHON = b"#!python"
_FORMAT, _FILE, _DIRECTORY = 0o170000, 0o100000, 0o040000


def unpack_wheel(archive: Path, into: Path, package: PypiPackage, python: PythonFacts) -> Unpacked:
    """Unpack ``archive`` into the empty directory ``into``; ``python`` is the lock's interpreter.

    The facts: ``name``, ``version``, ``dist_info`` (path in the prefix), ``requires_dist``,
    ``requires_python``, ``extras``, ``entry_points`` (by group), ``top_level``, ``tags``,
    ``distributions``. Raises ``PackageError`` naming the wheel and the file, ``NoSpaceError``,
    ``AccessDeniedError``.
    """
    with unpacking(package.filename or archive.name), ZipReader(archive) as reader:
        tree = Tree(into, reader.size)
        return _Wheel(reader, tree, package, python).unpack()


@dataclass(slots=True)
class _Wheel:
    reader: ZipReader
    tree: Tree
    package: PypiPackage
    python: PythonFacts
    members: dict[str, ZipMember] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    record: dict[str, Row] = field(default_factory=dict)
    relocations: dict[bytes, bytes] = field(default_factory=dict)
    stem: str = ""

    def unpack(self) -> Unpacked:
        """Do all of it."""
        self._list()
        self.rows = read_record(self._metadata("RECORD"))
        self._check_listed()
        wheel = headers(self._metadata("WHEEL"))
        if first(wheel, "wheel-version").partition(".")[0] != "1":
            version = first(wheel, "wheel-version") or "unknown"
            raise ValueError(f"its format has version {version}, and only 1 is supported")
        about = headers(self._metadata("METADATA"))
        self._check_identity(about)
        groups: dict[str, dict[str, str]] = {}
        if f"{self.stem}.dist-info/entry_points.txt" in self.members:
            groups = parse_groups(self._metadata("entry_points.txt").decode("utf-8", "replace"))
        points = scripts(groups, self.python.minor)
        commands = {point.command for point in points}
        for name, member in self.members.items():
            self._place(name, member, commands)
        for point in points:
            path = self.tree.path(b"bin/" + point.command.encode())
            self._add(path, point.pypa_script(), executable=True)
        dist_info = f"{self.python.site_packages}/{self.stem}.dist-info"
        self._add(f"{dist_info}/INSTALLER".encode(), INSTALLER)
        record = f"{dist_info}/RECORD"
        rows = [*self.record.values(), Row(self._relative(record))]
        self._write(record.encode(), write_record(rows))
        facts = self._facts(about, wheel, groups, dist_info)
        return Unpacked(self.tree.root, self.tree.finish(self.relocations), facts)

    def _list(self) -> None:
        """Check all names, find the directory with the metadata, and count what is to come."""
        for member in self.reader.members:
            name = os.fsdecode(self.tree.path(member.name.encode()))
            self.tree.expect(member.size, name)
            format_ = member.mode & _FORMAT
            if format_ not in (0, _FILE, _DIRECTORY if member.is_directory else _FILE):
                raise ValueError(f"{name} is neither a file nor a directory")
            if self.members.setdefault(name, member) is not member:
                raise ValueError(f"{name} is there twice")
        found = {name.partition("/")[0] for name in self.members if "/" in name}
        stems = [name[: -len(".dist-info")] for name in found if name.endswith(".dist-info")]
        if len(stems) != 1:
            raise ValueError("it has no .dist-info directory, or several")
        self.stem = stems[0]

    def _metadata(self, name: str) -> bytes:
        member = self.members.get(f"{self.stem}.dist-info/{name}")
        if member is None or member.is_directory or member.size > MAX_METADATA:
            raise ValueError(f"it has no {name}, or one of more than {MAX_METADATA} bytes")
        return self.reader.read(member)

    def _check_listed(self) -> None:
        unsigned = {f"{self.stem}.dist-info/{name}" for name in _UNSIGNED}
        files = {name for name, member in self.members.items() if not member.is_directory}
        for name in sorted(files - unsigned):
            row = self.rows.get(name)
            if row is None or not row.algorithm:
                raise ValueError(f"its RECORD has no digest of {name}")
        for name in sorted(self.rows.keys() - files - unsigned):
            if not name.endswith("/"):
                raise ValueError(f"{name} is in its RECORD, but not in it")

    def _check_identity(self, about: dict[str, list[str]]) -> None:
        """See that file name, directory, metadata and lock mean the same distribution."""
        stem_name, _, stem_version = self.stem.partition("-")
        for what, name, version in (
            ("METADATA", first(about, "name"), first(about, "version")),
            ("its .dist-info", stem_name, stem_version),
        ):
            if not is_called(self.package, name, version):
                raise PackageError(
                    f"{self.package.filename}: {what} says {name} {version} "
                    f"instead of {self.package.name} {self.package.version}"
                )

    def _place(self, name: str, member: ZipMember, commands: set[str]) -> None:
        """Put one member where its scheme says."""
        data = f"{self.stem}.data"
        scheme, rest = "purelib", name
        if name == data and member.is_directory:
            return
        if name.startswith(data + "/"):
            scheme, _, rest = name[len(data) + 1 :].partition("/")
            if scheme not in _SCHEMES:
                raise ValueError(f"{name} is of an unknown kind")
            if not rest and not member.is_directory:
                raise ValueError(f"{name} is not a directory")
        elif name in (f"{self.stem}.dist-info/{replaced}" for replaced in _REPLACED):
            return
        if scheme == "scripts":
            self._place_script(name, rest, member, commands)
            return
        home = self._home(scheme)
        path = f"{home}/{rest}".strip("/").encode()
        if member.is_directory:
            if path:
                self.tree.add_directory(path)
            return
        self._verified(path, name, member, bool(member.mode & 0o111))
        self._record(path, self.rows.get(name))

    def _place_script(self, name: str, rest: str, member: ZipMember, commands: set[str]) -> None:
        """Put a script among the programs; ``#!python...`` becomes the prefix's interpreter.

        As in uv, an entry point of the same name wins, and options of the interpreter are lost.
        """
        if "/" in rest or (rest and member.is_directory):
            raise ValueError(f"{name} is a directory among scripts")
        if not rest or rest.removesuffix("-script.py").removesuffix(".exe") in commands:
            return
        path = f"bin/{rest}".encode()
        self._verified(path, name, member, True)
        with open(self.tree.on_disk(path), "rb") as file:
            python = file.read(len(_PYTHON)) == _PYTHON
        if not python:
            self._record(path, self.rows[name])
            return
        body = self.tree.read(path).partition(b"\n")[2]
        self.tree.remove(path)
        self._add(path, b"#!" + PLACEHOLDER + b"/bin/python\n" + body, executable=True)

    def _home(self, scheme: str) -> str:
        if scheme == "data":
            return ""
        if scheme == "headers":
            return f"include/{posixpath.basename(stdlib(self.python))}/{self.package.name}"
        return self.python.site_packages

    def _verified(self, path: bytes, name: str, member: ZipMember, executable: bool) -> None:
        row = self.rows.get(name, Row(name))
        pieces = self.reader.pieces(member)
        algorithm = row.algorithm or "sha256"
        found = self.tree.add_file(path, pieces, executable, algorithm=algorithm)
        if row.algorithm and (found.digest != row.digest or row.size not in (-1, found.size)):
            raise ValueError(f"{name} is not the file that its RECORD says")

    def _record(self, path: bytes, row: Row | None) -> None:
        where = self._relative(path.decode())
        size = self.tree.found[path].size
        if row is None or not row.algorithm:
            self.record[where] = Row(where)
        else:
            self.record[where] = Row(where, row.algorithm, row.digest, size)

    def _add(self, path: bytes, data: bytes, *, executable: bool = False) -> None:
        """Add a file that is made here, with its relocation and its row."""
        self._write(path, data, executable=executable)
        where = self._relative(path.decode())
        about = f"{self.package.name}-{self.package.version}"
        found = plan(data, PLACEHOLDER, Mode.TEXT, about) if PLACEHOLDER in data else None
        if found is None:
            self.record[where] = Row.of(where, data)
        else:
            self.relocations[path] = found.encode()
            self.record[where] = Row(where)

    def _write(self, path: bytes, data: bytes, *, executable: bool = False) -> None:
        self.tree.add_file(path, (data,), executable)

    def _relative(self, path: str) -> str:
        home = self.python.site_packages + "/"
        if path.startswith(home):
            return path[len(home) :]
        return posixpath.relpath(path, home)

    def _facts(
        self,
        about: dict[str, list[str]],
        wheel: dict[str, list[str]],
        groups: dict[str, dict[str, str]],
        dist_info: str,
    ) -> dict[str, Any]:
        name, version = first(about, "name"), first(about, "version")
        home = self.python.site_packages.encode() + b"/"
        top = {
            path[len(home) :].partition(b"/")[0].decode()
            for path, there in self.tree.found.items()
            if path.startswith(home) and there.kind is Kind.FILE
        }
        return {
            "kind": "wheel",
            "name": name,
            "version": version,
            "dist_info": dist_info,
            "requires_dist": about.get("requires-dist", []),
            "requires_python": first(about, "requires-python"),
            "extras": about.get("provides-extra", []),
            "entry_points": groups,
            "top_level": sorted(top - {f"{self.stem}.dist-info"}),
            "tags": wheel.get("tag", []),
            "distributions": [{"name": name, "version": version, "path": dist_info}],
        }
