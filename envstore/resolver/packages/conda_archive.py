"""Unpacks conda packages, ``.conda`` and ``.tar.bz2``, as conda's installers lay them out.

What is installed is what ``info/paths.json`` lists (CEP 27; in old packages ``info/files`` and
``info/has_prefix``), each file checked against its digest there. ``noarch: python`` packages are
mapped to the environment's interpreter, their entry points become scripts. Files that hold the
prefix they were built for keep it, and get a relocation.
"""

from __future__ import annotations

import bz2
import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from envstore.resolver.lock import CondaPackage, PythonFacts
from envstore.resolver.packages.entry_points import parse_conda
from envstore.resolver.packages.extract import Found, PackageError, Tree, unpacking
from envstore.resolver.packages.metadata import MAX_METADATA, distribution
from envstore.resolver.packages.tarstream import Member, TarStream, Type
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.packages.zipreader import ZipError, ZipReader
from envstore.store.relocation import PLACEHOLDER, Mode, link_relocation, plan
from envstore.store.source import Kind

_INDEX, _PATHS, _LINK = b"info/index.json", b"info/paths.json", b"info/link.json"
_FILES, _HAS_PREFIX = b"info/files", b"info/has_prefix"
_WANTED = (_INDEX, _PATHS, _LINK, _FILES, _HAS_PREFIX)
_OLD_PLACEHOLDER = "/opt/anaconda1anaconda2anaconda3"
_READ = 1 << 20
_LINK_SCRIPTS = ("pre-link", "post-link", "pre-unlink")
_ACTIVATION = (b"etc/conda/activate.d/", b"etc/conda/deactivate.d/", b"etc/conda/env_vars.d/")


@dataclass(frozen=True, slots=True)
class _Listed:
    """A path that the package lists: ``kind`` is its ``path_type``; empty is what is not said."""

    kind: str
    sha256: str = ""
    size: int = -1
    placeholder: str = ""
    mode: str = ""


_KINDS = {"hardlink": Kind.FILE, "softlink": Kind.SYMLINK, "directory": Kind.DIRECTORY}


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
        index = _json(info, _INDEX)
        _check_identity(index, package)
        noarch = index.get("noarch") == "python"
        listed = _listed(info, tree)
        _verify(tree, listed)
        entry_points = []
        if noarch:
            if python is None:
                raise ValueError("it is for any Python, and the environment has none")
            listed = _map(tree, listed, python)
            entry_points = _entry_points(tree, _link(info), python)
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


# What the package says of itself.


def _json(info: dict[bytes, bytes], path: bytes) -> dict[str, Any]:
    name = path.decode()
    if path not in info:
        raise ValueError(f"it has no {name}")
    try:
        value = json.loads(info[path])
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def _check_identity(index: dict[str, Any], package: CondaPackage) -> None:
    for key, wanted in (
        ("name", package.name),
        ("version", package.version),
        ("build", package.build),
    ):
        # What other tools' locks leave out cannot be compared.
        if wanted and index.get(key) != wanted:
            raise PackageError(
                f"{package.filename} holds {key} {index.get(key)!r} instead of {wanted!r}"
            )


def _listed(info: dict[bytes, bytes], tree: Tree) -> dict[bytes, _Listed]:
    """Return what is to be installed, by path."""
    if _PATHS not in info:
        return _listed_before_paths_json(info, tree)
    entries = _json(info, _PATHS).get("paths")
    if not isinstance(entries, list):
        raise ValueError("info/paths.json has no paths")
    listed: dict[bytes, _Listed] = {}
    for entry in entries:
        path, one = _entry(entry, tree)
        if path in listed:
            raise ValueError(f"info/paths.json lists {os.fsdecode(path)} twice")
        listed[path] = one
    return listed


def _entry(entry: Any, tree: Tree) -> tuple[bytes, _Listed]:
    """Return the path and the meaning of one entry of paths.json."""
    if not isinstance(entry, dict):
        raise ValueError("info/paths.json has an entry that is not an object")
    names = ("_path", "path_type", "sha256", "prefix_placeholder", "file_mode")
    texts = [entry.get(name) or "" for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("info/paths.json has an entry that is not valid")
    name, kind, sha256, placeholder, mode = texts
    size = entry.get("size_in_bytes")
    size = -1 if size is None else size
    if kind not in _KINDS or mode not in ("", "text", "binary") or not isinstance(size, int):
        raise ValueError(f"info/paths.json says nothing valid of {name}")
    return tree.path(name.encode()), _Listed(kind, sha256, size, placeholder, mode)


def _listed_before_paths_json(info: dict[bytes, bytes], tree: Tree) -> dict[bytes, _Listed]:
    """Return what old packages say in ``files`` and ``has_prefix``."""
    if _FILES not in info:
        raise ValueError("it has neither info/paths.json nor info/files")
    prefixes = dict(_prefix_lines(info.get(_HAS_PREFIX, b"").decode("utf-8", "replace")))
    listed = {}
    for line in info[_FILES].decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        path = tree.path(line.encode())
        there = tree.found.get(path)
        kind = "softlink" if there and there.kind is Kind.SYMLINK else "hardlink"
        placeholder, mode = prefixes.get(line, ("", ""))
        listed[path] = _Listed(kind, placeholder=placeholder, mode=mode)
    return listed


def _prefix_lines(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield path, placeholder and mode of each line of ``has_prefix``."""
    for line in text.splitlines():
        try:
            fields = [field.strip("\"'") for field in shlex.split(line, posix=False)]
        except ValueError:
            raise ValueError(f"info/has_prefix has a line that is not valid: {line}") from None
        if len(fields) == 3:
            yield fields[2], (fields[0], fields[1])
        elif len(fields) == 1:
            yield fields[0], (_OLD_PLACEHOLDER, "text")
        elif fields:
            raise ValueError(f"info/has_prefix has a line that is not valid: {line}")


def _verify(tree: Tree, listed: dict[bytes, _Listed]) -> None:
    """See that everything listed is there and as it should be; drop what is not listed."""
    for path, one in listed.items():
        name = os.fsdecode(path)
        if one.kind == "directory" and path not in tree.found:
            tree.add_directory(path)
        there = tree.found.get(path)
        if there is None:
            raise ValueError(f"{name} is listed, but not in it")
        if there.kind is not _KINDS[one.kind]:
            raise ValueError(f"{name} is not the {one.kind} that info/paths.json says")
        if there.kind is Kind.FILE:
            _verify_file(name, there, one)
    for path in [path for path in tree.found if path not in listed]:
        if tree.found[path].kind is not Kind.DIRECTORY:
            tree.remove(path)


def _verify_file(name: str, there: Found, one: _Listed) -> None:
    if one.size not in (-1, there.size):
        raise ValueError(f"{name} has {there.size} bytes instead of {one.size}")
    if one.sha256 and one.sha256.lower() != there.digest.hex():
        raise ValueError(f"{name} does not have the SHA-256 that info/paths.json says")


# Laying it out.


def _map(tree: Tree, listed: dict[bytes, _Listed], python: PythonFacts) -> dict[bytes, _Listed]:
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


def _link(info: dict[bytes, bytes]) -> list[str]:
    """Return the lines of ``link.json`` that say entry points."""
    if _LINK not in info:
        return []
    noarch = _json(info, _LINK).get("noarch")
    lines = noarch.get("entry_points", []) if isinstance(noarch, dict) else []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("info/link.json has entry points that are not valid")
    return lines


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
    tree: Tree, listed: dict[bytes, _Listed], scripts: list[bytes], package: str
) -> dict[bytes, bytes]:
    """Return the encoded relocation of every file and link that has one."""
    relocations = {}
    made = {path: _Listed("hardlink", placeholder=PLACEHOLDER.decode()) for path in scripts}
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
            found = plan(tree.read(path), one.placeholder.encode(), mode, package)
            if found is not None:
                relocations[path] = found.encode()
    return relocations


def _facts(
    tree: Tree,
    index: dict[str, Any],
    listed: dict[bytes, _Listed],
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
    tree: Tree, listed: dict[bytes, _Listed], scripts: list[bytes]
) -> Iterator[dict[str, Any]]:
    """Yield what ``conda-meta`` says of each path, sorted, without what is empty."""
    for path in sorted({*listed, *scripts}):
        there = tree.found[path]
        one = listed.get(path, _Listed("hardlink"))
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
