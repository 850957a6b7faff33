"""Packages: zip and tar archives as they are, and packages made of hostile members."""

from __future__ import annotations

import base64
import bz2
import hashlib
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import zstandard

from envstore.resolver.lock import CondaPackage, PypiPackage, PythonFacts
from envstore.resolver.packages.conda_archive import unpack_conda
from envstore.resolver.packages.entry_points import EntryPoint, parse_conda, parse_groups, scripts
from envstore.resolver.packages.extract import PackageError, unpacking
from envstore.resolver.packages.metadata import distribution, headers
from envstore.resolver.packages.records import read_record, write_record
from envstore.resolver.packages.tarstream import BLOCK, TarStream
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.packages.wheel import unpack_wheel
from envstore.resolver.packages.zipreader import ZipReader
from envstore.store.source import Kind
from tests.fuzz.harness import BrokenError, expect, target
from tests.fuzz.mutating import Plan

_PYTHON = PythonFacts("3.11.7", "lib/python3.11/site-packages")
_NAMES = (
    b"lib/a", b"lib/../../outside", b"/etc/outside", b"../outside", b"lib/link/x", b"lib/link",
    b"bin/tool", b"BIN/TOOL", b"\xc3\xa9", b"e\xcc\x81", b"x" * 300, b"a/" * 600 + b"b", b"./a",
    b"site-packages/m/__init__.py", b"python-scripts/s", b"info/paths.json", b"a\\b", b"C:\\x",
    b"\x1b[2J", b"dir/", b"", b".", b"a\nb", b"conda-meta/history", b"x\0y",
)  # fmt: skip
_TARGETS = (b"a", b"../outside", b"/etc/passwd", b"../../../outside", b".", b"link", b"lib/a", b"")
_PLACEHOLDER = b"/opt/placeholder"
_PYPA_LINES, _CONDA_LINES = (
    script.count(b"\n")
    for script in (
        EntryPoint("a", "b", "c").pypa_script(),
        EntryPoint("a", "b", "c").conda_script(""),
    )
)


def _zip_seeds() -> list[bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.txt", b"hello" * 20)
        archive.writestr(zipfile.ZipInfo("stored"), b"as it is")
        archive.writestr("dir/", b"")
    return [out.getvalue()]


@target(
    "zip", _zip_seeds, words=(b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\1\0\x18\0")
)
def zip_archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zip"
        path.write_bytes(data)
        with unpacking("a.zip"), ZipReader(path) as reader:
            expect(len(reader.members) <= len(data), "more members than bytes")
            left = 32 << 20
            for member in reader.members:
                for piece in reader.pieces(member):
                    expect(len(piece) <= 1 << 20, "a piece that is too large")
                    left -= len(piece)
                    if left < 0:
                        return


def _tar(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        fill(archive)
    return out.getvalue()[: 20 * BLOCK]


def _tar_seeds() -> list[bytes]:
    def fill(archive: tarfile.TarFile) -> None:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("d/l", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
        ):
            item = tarfile.TarInfo(name)
            item.type, item.linkname = kind, "x"
            archive.addfile(item)
        item = tarfile.TarInfo("f" * 150)
        item.size, item.mtime = 5, 1.5
        archive.addfile(item, io.BytesIO(b"hello"))

    return [_tar(fill)]


@target(
    "tar", _tar_seeds, words=(b"ustar\0", b"30 mtime=1.5\n", b"GNU.sparse.map=", b"\x80", b"\xff")
)
def tar_archive(data: bytes) -> None:
    """Checksums of headers are made right."""
    blocks = [bytearray(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    for block in blocks:
        if len(block) == BLOCK and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    stream = io.BytesIO(b"".join(blocks))
    with unpacking("a.tar"):
        tar = TarStream(stream.read)
        for member in tar:
            expect(member.size >= 0, "a negative size")
            expect(sum(map(len, tar.pieces())) == (member.size if member.size else 0), "a size")


# --- packages -----------------------------------------------------------------------------------


def _name(plan: Plan) -> bytes:
    number = plan.number()
    return _NAMES[number] if number < len(_NAMES) else plan.text()[:2000]


def _safely(unpack: Callable[[Path, Path], Unpacked], data: bytes, filename: str) -> None:
    """Unpack, and see that nothing is anywhere but where it should be."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        archive = top / filename
        archive.write_bytes(data)
        (top / "outside").write_bytes(b"untouched")
        found = unpack(archive, top / "out")
        _check(found, top)


def _check(found: Unpacked, top: Path) -> None:
    expect(
        {one.name for one in top.iterdir()} == {found.root.name, "outside", *_archive(top)},
        "beside",
    )
    expect((top / "outside").read_bytes() == b"untouched", "a file outside was changed")
    paths = [entry.path for entry in found.entries]
    expect(len(paths) == len(set(paths)), "a path twice")
    for entry in found.entries:
        parts = entry.path.split(b"/")
        expect(not {b"", b".", b".."} & set(parts), f"a path that escapes: {entry.path!r}")
        there = os.path.join(os.fsencode(found.root), entry.path)
        expect(os.path.realpath(os.path.dirname(there)) == os.path.dirname(there), "through a link")
        if entry.kind is Kind.FILE:
            status = os.lstat(there)
            expect(status.st_mode & 0o7000 == 0, "a set-uid bit")
            expect(status.st_size == entry.size, "a size")
    try:
        json.dumps(found.facts).encode()
    except ValueError as error:
        raise BrokenError(f"facts that cannot be written: {error}") from error


def _archive(top: Path) -> set[str]:
    return {one.name for one in top.iterdir() if one.suffix in (".conda", ".bz2", ".whl")}


_KINDS = (
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
    tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"V", tarfile.REGTYPE,
)  # fmt: skip


def _conda_seeds() -> list[bytes]:
    file = bytes((0, 0, 0x40)) + b"hello " + _PLACEHOLDER + b"/lib\n"
    link = bytes((2, 5, 0)) + bytes((0,))
    return [
        b"\0" + file + bytes((4, 19, 0)),
        b"\1" + file + link,
        b"\2" + bytes((0, 13, 0)) + b"x\n",
    ]


@target("conda-package", _conda_seeds, words=(*_NAMES, _PLACEHOLDER, b'{"_path":'))
def conda_package(data: bytes) -> None:
    """Members that the bytes describe; ``paths.json`` says the same of most of them."""
    plan = Plan(data)
    flags = plan.number()
    index: dict[str, object] = {"name": "x", "version": "1", "build": "0", "build_number": 0}
    index["subdir"] = "noarch" if flags & 2 else "linux-64"
    if flags & 2:
        index["noarch"] = "python"
    points = ["tool = m:main", plan.text().decode("latin-1")] if flags & 4 else []
    link = {"noarch": {"type": "python", "entry_points": points}}
    listed: list[dict[str, object]] = []
    out, info = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        while plan and len(listed) < 30:
            _add_member(archive, plan, listed)
        paths = {"paths": listed, "paths_version": 1}
        infos = {"index.json": index, "paths.json": paths, "link.json": link}
        if flags & 1:
            _add_infos(archive, infos)
    with tarfile.open(fileobj=info, mode="w") as archive:
        _add_infos(archive, infos)
    suffix, packed = ".tar.bz2", b""
    if flags & 1:
        packed = bz2.compress(out.getvalue(), 1)
    else:
        suffix, packed = ".conda", _conda(info.getvalue(), out.getvalue())
    subdir = str(index["subdir"])
    url = f"https://channel.example/{subdir}/x-1-0{suffix}"
    package = CondaPackage("x", "1", "0", subdir, url, "0" * 64, len(packed))
    _safely(lambda path, into: unpack_conda(path, into, package, _PYTHON), packed, f"x-1-0{suffix}")


def _add_infos(archive: tarfile.TarFile, infos: dict[str, dict[str, object]]) -> None:
    for name, value in infos.items():
        body = json.dumps(value).encode()
        item = tarfile.TarInfo(f"info/{name}")
        item.size = len(body)
        archive.addfile(item, io.BytesIO(body))


def _add_member(archive: tarfile.TarFile, plan: Plan, listed: list[dict[str, object]]) -> None:
    kind, name, how = _KINDS[plan.number() % len(_KINDS)], _name(plan), plan.number()
    item = tarfile.TarInfo(os.fsdecode(name.replace(b"\0", b"\1")))
    item.type = kind
    item.mode = 0o6755 if how & 1 else 0o644
    body = b""
    if kind == tarfile.REGTYPE:
        body = plan.text()
        item.size = len(body)
    elif kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        item.linkname = os.fsdecode(_TARGETS[plan.number() % len(_TARGETS)])
    archive.addfile(item, io.BytesIO(body))
    if how & 2:
        return
    said = {tarfile.SYMTYPE: "softlink", tarfile.DIRTYPE: "directory"}.get(kind, "hardlink")
    row: dict[str, object] = {"_path": name.decode("utf-8", "replace"), "path_type": said}
    if said == "hardlink":
        row |= {"sha256": hashlib.sha256(body).hexdigest(), "size_in_bytes": len(body)}
    if how & 0x40:
        row |= {
            "prefix_placeholder": _PLACEHOLDER.decode(),
            "file_mode": "binary" if how & 4 else "text",
        }
    if how & 8:
        row["size_in_bytes"] = plan.number(8) - (1 << 63)
    listed.append(row)


def _conda(info: bytes, content: bytes) -> bytes:
    out = io.BytesIO()
    compress = zstandard.ZstdCompressor(level=1).compress
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("metadata.json", b'{"conda_pkg_format_version":2}')
        archive.writestr("info-x-1-0.tar.zst", compress(info))
        archive.writestr("pkg-x-1-0.tar.zst", compress(content))
    return out.getvalue()


def _wheel_seeds() -> list[bytes]:
    body = b"\0m/__init__.py\nprint(1)\n\0thing-1.0.data/scripts/run\n#!python\n"
    return [
        b"[console_scripts]\rtool = m:main\n" + body,
        b"\n\1thing-1.0.data/data/share/x\nhello\n",
    ]


@target("wheel", _wheel_seeds, words=(b"thing-1.0.data/data/", b"thing-1.0.data/scripts/", b"../"))
def wheel(data: bytes) -> None:
    """A wheel of members that the bytes describe, with a RECORD that is true of them."""
    plan = Plan(data)
    points = plan.text().replace(b"\r", b"\n")
    files: list[tuple[str, bytes, int]] = []
    while plan and len(files) < 30:
        mode = plan.number()
        name = plan.text()[:2000].decode("utf-8", "replace").replace("\0", "?")
        files.append((name, plan.text(), mode))
    info = "thing-1.0.dist-info"
    files += [
        (f"{info}/METADATA", b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n", 0),
        (f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", 0),
        (f"{info}/entry_points.txt", points, 0),
    ]
    rows = [
        f'"{name.replace(chr(34), chr(34) * 2)}",{_digest(body)},{len(body)}'
        for name, body, _ in files
    ]
    rows.append(f"{info}/RECORD,,")
    files.append((f"{info}/RECORD", "\n".join(rows).encode("utf-8", "replace"), 0))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        seen: set[str] = set()
        for name, body, mode in files:
            item = zipfile.ZipInfo(name)
            if item.filename in seen:
                continue
            seen.add(item.filename)
            item.external_attr = (
                ((0o120777, 0o100644, 0o104755, 0o40755, 0)[mode % 5 if mode else 1]) << 16
            )
            archive.writestr(item, body)
    package = PypiPackage("thing", "1.0", "thing-1.0-py3-none-any.whl", "", "0" * 64)
    _safely(
        lambda path, into: unpack_wheel(path, into, package, _PYTHON),
        out.getvalue(),
        "thing-1.0-py3-none-any.whl",
    )


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _said_seeds() -> list[bytes]:
    return [
        b"a/b.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\nc,,\n",
        b"[console_scripts]\ntool = m:main\n[g]\nx = y\n",
        b"Metadata-Version: 2.1\nName: x\nVersion: 1\nRequires-Dist: y\n\nbody\n",
    ]


@target("package-texts", _said_seeds, words=(b"sha256=", b"[console_scripts]\n", b"Name: ", b'"'))
def package_texts(data: bytes) -> None:
    """RECORD, entry points and metadata, all of the same bytes."""
    with unpacking("a package"):
        fields = headers(data)
        expect(all(isinstance(name, str) for name in fields), "fields")
        distribution(data, "x")
    for read in (_record, _points, _line):
        try:
            with unpacking("a package"):
                read(data)
        except PackageError:
            continue


def _record(data: bytes) -> None:
    rows = read_record(data)
    expect(read_record(write_record(rows.values())) == rows, "a RECORD is not read as written")


def _points(data: bytes) -> None:
    for point in scripts(parse_groups(data.decode("utf-8", "replace")), "3.11"):
        expect("/" not in point.command and "\n" not in point.command, "a command's name")
        expect(point.pypa_script().count(b"\n") == _PYPA_LINES, "a script of other lines")


def _line(data: bytes) -> None:
    script = parse_conda(data.decode("utf-8", "replace")).conda_script("3.11")
    expect(script.count(b"\n") == _CONDA_LINES, "a script of other lines")
