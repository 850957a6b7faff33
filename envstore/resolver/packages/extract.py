"""Lays the members of archives out as a tree on disk, whatever an archive tries.

A name is a path below the root: nothing absolute, no ``..``, no second file of the same name, and
no way through a link or a file, for links are made last, when no file is written any more. What an
archive may become is bounded in bytes, in proportion to the archive, and in the number of members.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError
from envstore.resolver.packages.tarstream import TarError
from envstore.resolver.packages.unpacked import UnpackedEntry
from envstore.resolver.packages.zipreader import ZipError
from envstore.store.source import Kind

MAX_ENTRIES = 500_000
"""Members of one archive; the largest packages have some 50 000."""
MAX_TOTAL = 64 << 30
"""Bytes that one archive may become; the largest packages are of some 5 GiB."""
MAX_RATIO = 200
"""Times its own size that an archive may become, beyond ``FREE``. Program text makes 3 to 10."""
FREE = 512 << 20
"""Bytes that any archive may become, however small it is."""
MAX_NAME, MAX_PATH = 255, 1024
"""Bytes of one component and of a whole path."""

_DRIVE = re.compile(rb"[A-Za-z]:")


class PackageError(EnvstoreError):
    """An archive is not a well-formed package, or not the one it should be."""


@dataclass(slots=True)
class Found:
    """What lies at a path of the tree. ``digest`` is the SHA-256 of a file."""

    kind: Kind
    executable: bool = False
    size: int = 0
    digest: bytes = b""
    target: bytes = b""


def check_name(name: bytes) -> bytes:
    """Return ``name`` as a path below a root, without a slash at its end.

    Raises ``ValueError`` saying what is wrong with it.
    """
    path = name[:-1] if name.endswith(b"/") else name
    if path.startswith(b"/"):
        raise ValueError("is an absolute path")
    if b"\0" in path:
        raise ValueError("has a zero byte in its name")
    if b"\\" in path or _DRIVE.match(path):
        raise ValueError("is not a path of this system")
    if len(path) > MAX_PATH:
        raise ValueError(f"has a path of more than {MAX_PATH} bytes")
    for part in path.split(b"/"):
        if part == b"..":
            raise ValueError("leads out of the package")
        if part in (b"", b"."):
            raise ValueError("has an empty part in its path")
        if len(part) > MAX_NAME:
            raise ValueError(f"has a name of more than {MAX_NAME} bytes")
    return path


@contextmanager
def unpacking(archive: str) -> Iterator[None]:
    """Turn what goes wrong inside into errors that name ``archive``.

    Raises ``PackageError``, ``NoSpaceError``, ``AccessDeniedError``, ``EnvstoreError``.
    """
    try:
        yield
    except (TarError, ZipError, ValueError) as error:
        raise PackageError(f"{archive} is not a valid package: {error}") from error
    except OSError as error:
        message = f"cannot unpack {archive}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(message, hint="free space, or set ENVSTORE_CACHE_DIR") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessDeniedError(message, hint="check permissions") from error
        raise EnvstoreError(message) from error


class Tree:
    """A tree that grows below ``root``, an empty directory or none.

    ``packed`` is the size of the archive in bytes. Methods take paths that ``path`` returned and
    raise ``ValueError`` for what must not be, ``OSError``.
    """

    def __init__(self, root: Path, packed: int) -> None:
        self.root = root
        self.found: dict[bytes, Found] = {}
        self._top = os.fsencode(root)
        self._limit = min(MAX_TOTAL, max(FREE, packed * MAX_RATIO))
        self._total = self._entries = 0
        root.mkdir(parents=True, exist_ok=True)
        if os.listdir(root):
            raise FileExistsError(errno.EEXIST, "the directory is not empty", root)

    def expect(self, size: int, name: str) -> None:
        """Count a member of ``size`` bytes, before anything is made of it."""
        self._total += size
        self._entries += 1
        if self._total > self._limit:
            raise ValueError(f"with {name} it becomes more than {self._limit >> 20} MiB")
        if self._entries > MAX_ENTRIES:
            raise ValueError(f"it has more than {MAX_ENTRIES} members")

    def path(self, name: bytes) -> bytes:
        """Return ``name`` as a path of the tree."""
        try:
            return check_name(name)
        except ValueError as error:
            raise ValueError(f"{_text(name)} {error}") from None

    def add_directory(self, path: bytes) -> None:
        """Add a directory, which may be there already."""
        above = self.found.get(path)
        if above is None:
            self._make_parent(path)
            os.mkdir(self.on_disk(path), 0o755)
            self.found[path] = Found(Kind.DIRECTORY)
        elif above.kind is not Kind.DIRECTORY:
            raise ValueError(f"{_text(path)} is a directory and something else")

    def add_file(
        self,
        path: bytes,
        pieces: Iterable[bytes],
        executable: bool,
        mtime_ns: int | None = None,
        algorithm: str = "sha256",
    ) -> Found:
        """Add a file; its digest is by ``algorithm``, taken while it is written."""
        self._make_room(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.on_disk(path), flags, 0o755 if executable else 0o644)
        try:
            hasher = hashlib.new(algorithm, usedforsecurity=False)
            size = 0
            for piece in pieces:
                hasher.update(piece)
                size += len(piece)
                _write(fd, piece)
            if mtime_ns is not None:
                os.utime(fd, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(fd)
        found = self.found[path] = Found(Kind.FILE, executable, size, hasher.digest())
        return found

    def add_link(self, path: bytes, target: bytes) -> None:
        """Add a symbolic link, which is on disk only after ``make_links``."""
        self._make_room(path)
        if not target or b"\0" in target or len(target) > MAX_PATH:
            raise ValueError(f"{_text(path)} is a link to nowhere")
        if not target.startswith(b"/") and _climbs(path, target):
            raise ValueError(f"{_text(path)} is a link that leads out of the package")
        self.found[path] = Found(Kind.SYMLINK, target=target)

    def add_hard_link(self, path: bytes, name: bytes) -> None:
        """Add a second name of something that is there, a file or a link."""
        first = self.path(name)
        there = self.found.get(first)
        if there is None or there.kind is Kind.DIRECTORY:
            raise ValueError(f"{_text(path)} is a hard link to {_text(name)}, which is no file")
        if there.kind is Kind.SYMLINK:
            self.add_link(path, there.target)
            return
        self._make_room(path)
        os.link(self.on_disk(first), self.on_disk(path), follow_symlinks=False)
        self.found[path] = there

    def move(self, path: bytes, to: bytes) -> None:
        """Give a file or link another path."""
        there = self.found.pop(path)
        self._make_room(to)
        if there.kind is Kind.FILE:
            os.rename(self.on_disk(path), self.on_disk(to))
        self.found[to] = there

    def remove(self, path: bytes) -> None:
        """Take away a file or link."""
        if self.found.pop(path).kind is Kind.FILE:
            os.unlink(self.on_disk(path))

    def prune(self, keep: Iterable[bytes]) -> None:
        """Take away the directories that hold nothing and are not in ``keep``."""
        wanted = set(keep)
        for path, there in self.found.items():
            if there.kind is not Kind.DIRECTORY or path in wanted:
                while (path := path.rpartition(b"/")[0]) and path not in wanted:
                    wanted.add(path)
        for path in sorted(self.found, reverse=True):
            if self.found[path].kind is Kind.DIRECTORY and path not in wanted:
                os.rmdir(self.on_disk(path))
                del self.found[path]

    def read(self, path: bytes) -> bytes:
        """Return the content of a file."""
        with open(self.on_disk(path), "rb") as file:
            return file.read()

    def on_disk(self, path: bytes) -> bytes:
        """Return where a path lies."""
        return self._top + b"/" + path

    def finish(self, relocations: dict[bytes, bytes]) -> tuple[UnpackedEntry, ...]:
        """Make the links, after which nothing may be added, and return all entries, sorted."""
        entries = []
        for path, there in sorted(self.found.items()):
            if there.kind is Kind.SYMLINK:
                os.symlink(there.target, self.on_disk(path))
            entries.append(
                UnpackedEntry(
                    path, there.kind, there.executable, there.size, there.target,
                    relocations.get(path, b""),
                )
            )  # fmt: skip
        return tuple(entries)

    def _make_room(self, path: bytes) -> None:
        if path in self.found:
            raise ValueError(f"{_text(path)} is there twice")
        self._make_parent(path)

    def _make_parent(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        if not parent:
            return
        above = self.found.get(parent)
        if above is None:
            self.add_directory(parent)
        elif above.kind is not Kind.DIRECTORY:
            raise ValueError(f"{_text(path)} is below {_text(parent)}, which is no directory")


def _climbs(path: bytes, target: bytes) -> bool:
    """Whether a relative target has more ``..`` than there are directories to leave."""
    depth = path.count(b"/")
    for part in target.split(b"/"):
        if part == b"..":
            depth -= 1
            if depth < 0:
                return True
        elif part not in (b"", b"."):
            depth += 1
    return False


def _write(fd: int, data: bytes) -> None:
    done = os.write(fd, data)
    while done < len(data):
        done += os.write(fd, memoryview(data)[done:])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
