"""Unpacks conda packages, ``.conda`` and ``.tar.bz2``, as conda's installers lay them out.

What is installed is what ``info/paths.json`` lists (CEP 27; in old packages ``info/files`` and
``info/has_prefix``), each file checked against its digest there. ``noarch: python`` packages are
mapped to the environment's interpreter, their entry points become scripts. Files that hold the
prefix they were built for keep it, and get a relocation.
"""

from __future__ import annotations

import bz2
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from envstore.resolver.lock import CondaPackage, PythonFacts
from envstore.resolver.packages.conda_info import (
    FILES,
    HAS_PREFIX,
    INDEX,
    KINDS,
    LINK,
    PATHS,
    Listed,
    entry_point_lines,
    listed_paths,
    read_json,
)
from envstore.resolver.packages.entry_points import parse_conda
from envstore.resolver.packages.extract import Found, PackageError, Tree, unpacking
from envstore.resolver.packages.identity import differs
from envstore.resolver.packages.metadata import MAX_METADATA, distribution
from envstore.resolver.packages.tarstream import Member, TarStream, Type
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.packages.zipreader import ZipError, ZipReader
from envstore.store.relocation import PLACEHOLDER, Mode, link_relocation, plan
from envstore.store.source import Kind

_WANTED = (INDEX, PATHS, LINK, FILES, HAS_PREFIX)
_READ = 1 << 20
_LINK_SCRIPTS = ("pre-link", "post-link", "pre-unlink")
_ACTIVATION = (b"etc/conda/activate.d/", b"etc/conda/deactivate.d/", b"etc/conda/env_vars.d/")


def unpack_conda(
    archive: Path, into: Path, package: CondaPackage, python: PythonFacts | None
) -> Unpacked:
    """Unpack ``archive`` into the empty directory ``into``; ``python`` is the lock's interpreter.

    The facts: ``index`` (index.json), ``paths`` (what was installed, for ``conda-meta``),
    ``link_scripts`` and ``activation`` (paths), ``distributions`` (name, version and path of each
    Python distribution), ``no_bytecode`` (sources that hold the prefix). Raises ``PackageError``
    naming the archive and the file, ``NoSpaceError``, ``AccessDeniedError``.
    """
    name = package.filename or archive.name
    with unpacking(name):
        tree = Tree(into, os.path.getsize(archive))
        info = _extract(archive, tree)
        index = read_json(info, INDEX)
        _check_identity(index, package)
        noarch = index.get("noarch") == "python"
        listed = listed_paths(info, tree)
        _verify(tree, listed)
        entry_points = []
        if noarch:
            if python is None:
                raise ValueError("it is for any Python, and the environment has none")
            listed = _map(tree, listed, python)
            entry_points = _entry_points(tree, entry_point_lines(info), python)
        tree.prune(path for path, one in listed.items() if one.kind == "directory")
        package_name = f"{package.name}-{package.version}"
        relocations = _relocations(tree, listed, entry_points, package_name)
        facts = _facts(tree, index, listed, entry_points, relocations)
        return Unpacked(into, tree.finish(relocations), facts)


# Reading the archive.


class _Pieces:
    """A file-like object over pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        data = self._rest or next(self._pieces, b"")
        self._rest = data[size:]
        return data[:size]


def _extract(archive: Path, tree: Tree) -> dict[bytes, bytes]:
    """Put the package's files into ``tree`` and return the files about it."""
    info: dict[bytes, bytes] = {}
    with open(archive, "rb") as file:
        magic = file.read(3)
    if magic == b"BZh":
        with bz2.open(archive) as decompressed, _damage(EOFError, OSError):
            _add(decompressed.read, tree, info)
        return info
    with ExitStack() as stack:
        reader = stack.enter_context(ZipReader(archive))
        for part in ("info-", "pkg-"):
            _add(_component(reader, part, stack), tree, info)
    return info


def _component(reader: ZipReader, part: str, stack: ExitStack) -> Callable[[int], bytes]:
    """Return what reads the tar archive inside a ``.conda`` file."""
    import zstandard

    found = [one for one in reader.members if one.name.startswith(part)]
    if len(found) != 1 or not found[0].name.endswith(".tar.zst"):
        raise ZipError(f"it has no {part}*.tar.zst, or several")
    stack.enter_context(_damage(zstandard.ZstdError))
    # The default limit on the window, 128 MiB, is the memory that decompressing takes.
    stream = stack.enter_context(
        zstandard.ZstdDecompressor().stream_reader(
            cast("IO[bytes]", _Pieces(reader.pieces(found[0]))),
            read_size=_READ,
            read_across_frames=True,
        )
    )
    read: Callable[[int], bytes] = stream.read
    return read


@contextmanager
def _damage(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        # Of bz2, OSError without a number is damage; with one, it is the disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"it cannot be decompressed: {error}") from error


def _add(read: Callable[[int], bytes], tree: Tree, info: dict[bytes, bytes]) -> None:
    stream = TarStream(read)
    for member in stream:
        name = member.name
        while name.startswith(b"./"):
            name = name[2:]
        if name in (b"", b"."):
            continue
        path = tree.path(name)
        tree.expect(member.size, os.fsdecode(path))
        if path == b"info" or path.startswith(b"info/"):
            _keep(path, member, stream, info)
        elif member.type is Type.FILE:
            tree.add_file(path, stream.pieces(), bool(member.mode & 0o111), member.mtime_ns)
        elif member.type is Type.DIRECTORY:
            tree.add_directory(path)
        elif member.type is Type.SYMLINK:
            tree.add_link(path, member.target)
        else:
            tree.add_hard_link(path, member.target)


def _keep(path: bytes, member: Member, stream: TarStream, info: dict[bytes, bytes]) -> None:
    if path not in _WANTED:
        return
    name = os.fsdecode(path)
    if path in info:
        raise ValueError(f"{name} is there twice")
    if member.type is not Type.FILE or member.size > MAX_METADATA:
        raise ValueError(f"{name} is no file, or has more than {MAX_METADATA} bytes")
    info[path] = b"".join(stream.pieces())


# Laying it out.


def _check_identity(index: dict[str, Any], package: CondaPackage) -> None:
    key = differs(package, index)
    if key:
        raise PackageError(
            f"{package.filename} holds {key} {index.get(key)!r} instead of "
            f"{getattr(package, key)!r}"
        )


def _verify(tree: Tree, listed: dict[bytes, Listed]) -> None:
    """See that everything listed is there and as it should be; drop what is not listed."""
    for path, one in listed.items():
        name = os.fsdecode(path)
        if one.kind == "directory" and path not in tree.found:
            tree.add_directory(path)
        there = tree.found.get(path)
        if there is None:
            raise ValueError(f"{name} is listed, but not in it")
        if there.kind is not KINDS[one.kind]:
            raise ValueError(f"{name} is not the {one.kind} that info/paths.json says")
        if there.kind is Kind.FILE:
            _verify_file(name, there, one)
    for path in [path for path in tree.found if path not in listed]:
        if tree.found[path].kind is not Kind.DIRECTORY:
            tree.remove(path)


def _verify_file(name: str, there: Found, one: Listed) -> None:
    if one.size not in (-1, there.size):
        raise ValueError(f"{name} has {there.size} bytes instead of {one.size}")
    if one.sha256 and one.sha256.lower() != there.digest.hex():
        raise ValueError(f"{name} does not have the SHA-256 that info/paths.json says")


def _map(tree: Tree, listed: dict[bytes, Listed], python: PythonFacts) -> dict[bytes, Listed]:
    """Move what belongs to Python where this environment's interpreter has it."""
    homes = {b"site-packages/": os.fsencode(python.site_packages), b"python-scripts/": b"bin"}
    mapped = {}
    for path, one in listed.items():
        to = path
        for home, real in homes.items():
            if path.startswith(home):
                to = real + b"/" + path[len(home) :]
        if to != path and one.kind == "directory":
            tree.add_directory(to)
        elif to != path:
            tree.move(path, to)
        mapped[to] = one
    return mapped


def _entry_points(tree: Tree, lines: list[str], python: PythonFacts) -> list[bytes]:
    """Write the scripts of entry points, over files of the same name, and return their paths."""
    paths = {}
    for line in lines:
        point = parse_conda(line)
        paths[tree.path(b"bin/" + point.command.encode())] = point.conda_script(python.minor)
    for path, script in paths.items():
        if path in tree.found:
            tree.remove(path)
        tree.add_file(path, (script,), executable=True)
    return list(paths)


def _relocations(
    tree: Tree, listed: dict[bytes, Listed], scripts: list[bytes], package: str
) -> dict[bytes, bytes]:
    """Return the encoded relocation of every file and link that has one."""
    relocations = {}
    made = {path: Listed("hardlink", placeholder=PLACEHOLDER.decode()) for path in scripts}
    # Nobody says of links that they lead into the prefix; what the files say holds for them too.
    placeholders = {one.placeholder.encode() for one in listed.values()} - {b""}
    for path, one in (listed | made).items():
        there = tree.found[path]
        if there.kind is Kind.SYMLINK:
            for placeholder in placeholders:
                if encoded := link_relocation(there.target, placeholder):
                    relocations[path] = encoded
        elif there.kind is Kind.FILE and one.placeholder:
            mode = Mode.BINARY if one.mode == "binary" else Mode.TEXT
            with _mapped(tree.on_disk(path)) as data:
                found = plan(data, one.placeholder.encode(), mode, package)
            if found is not None:
                relocations[path] = found.encode()
    return relocations


@contextmanager
def _mapped(path: bytes) -> Iterator[bytes | mmap.mmap]:
    """Yield the content of a file, which may be larger than memory."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _facts(
    tree: Tree,
    index: dict[str, Any],
    listed: dict[bytes, Listed],
    scripts: list[bytes],
    relocations: dict[bytes, bytes],
) -> dict[str, Any]:
    name = index["name"]
    link_scripts = [f"bin/.{name}-{kind}.sh" for kind in _LINK_SCRIPTS]
    return {
        "kind": "conda",
        "index": index,
        "paths": [*_path_facts(tree, listed, scripts)],
        "link_scripts": [path for path in link_scripts if path.encode() in tree.found],
        "activation": sorted(path.decode() for path in listed if path.startswith(_ACTIVATION)),
        "distributions": _distributions(tree),
        "no_bytecode": sorted(path.decode() for path in relocations if path.endswith(b".py")),
    }


def _path_facts(
    tree: Tree, listed: dict[bytes, Listed], scripts: list[bytes]
) -> Iterator[dict[str, Any]]:
    """Yield what ``conda-meta`` says of each path, sorted, without what is empty."""
    for path in sorted({*listed, *scripts}):
        there = tree.found[path]
        one = listed.get(path, Listed("hardlink"))
        kind = "unix_python_entry_point" if path in scripts else one.kind
        fact: dict[str, Any] = {"_path": path.decode(), "path_type": kind}
        if there.kind is Kind.FILE:
            fact |= {"sha256": there.digest.hex(), "size_in_bytes": there.size}
        if one.placeholder:
            fact |= {"prefix_placeholder": one.placeholder, "file_mode": one.mode or "text"}
        yield fact


def _distributions(tree: Tree) -> list[dict[str, Any]]:
    """Return the Python distributions that the package brings."""
    found = []
    for path, there in sorted(tree.found.items()):
        home, _, file = path.rpartition(b"/")
        if file.endswith(b".egg-info"):
            known = path
        elif (file == b"METADATA" and home.endswith(b".dist-info")) or (
            file == b"PKG-INFO" and home.endswith((b".egg-info", b"/EGG-INFO"))
        ):
            known = home
        else:
            continue
        if there.kind is Kind.FILE and there.size <= MAX_METADATA:
            one = distribution(tree.read(path), known.decode())
            if one is not None:
                found.append(one)
    return found
