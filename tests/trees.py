"""Trees that are awkward to store, and a way to compare two trees in every respect.

    fill(root)                  # everything a tree on Linux may legally hold
    settle(root)                # from here on, every further change is certain to be noticed
    assert describe(copy) == describe(root)

Nothing here follows a symbolic link or relies on paths shorter than ``PATH_MAX``.
"""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

MIB = 1 << 20
LONG_NAME = b"n" * 255
HUGE_SIZE = (4 << 30) + 5 * MIB + 17
DEEP_LEVELS = 20
"""Directories of 250-byte names below each other: a path of over 5000 bytes."""

_WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 9)) for i in range(900)
]


def noise(seed: int | str, size: int) -> bytes:
    """Return ``size`` incompressible bytes, the same for the same seed on any machine."""
    return random.Random(seed).randbytes(size)


def prose(seed: int | str, size: int) -> bytes:
    """Return ``size`` bytes of words and lines, the same for the same seed on any machine."""
    rng = random.Random(seed)
    lines: list[str] = []
    got = 0
    while got < size:
        line = " ".join(rng.choices(_WORDS, k=rng.randrange(3, 14)))
        lines.append(line)
        got += len(line) + 1
    return "\n".join(lines).encode()[:size].ljust(size, b"\n")


@dataclass(frozen=True)
class Facts:
    """All that must survive. ``names`` are all names of a hard-linked file, else empty."""

    kind: str
    mode: int
    mtime_ns: int
    size: int = 0
    digest: str = ""
    target: bytes = b""
    names: tuple[bytes, ...] = ()


def fill(root: Path, *, huge: bool = False) -> None:
    """Make ``root`` a directory holding one of everything; with ``huge`` a file above 4 GiB."""
    root.mkdir()
    with _inside(root) as top:
        _plain_files(top)
        _names(top)
        _links(top)
        _directories(top)
        _sparse(top)
        _deep(top)
        if huge:
            _holed(top, b"huge", HUGE_SIZE, {0: b"start", (4 << 30) + 3: b"beyond", -7: b"the end"})
        # Last, for everything written above would move them again.
        _times(top)
    os.chmod(root, 0o751)
    os.utime(root, ns=(0, 1_234_567_890_987_654_321))


def plain(root: Path, seed: int | str, *, files: int = 40, size: int = 20_000) -> None:
    """Make ``root`` an everyday tree of text and noise, ``files`` files of ``size`` on average."""
    rng = random.Random(f"plain {seed}")
    for i in range(files):
        folder = root / f"folder {i % 7}" / "sub" if i % 3 else root
        folder.mkdir(parents=True, exist_ok=True)
        make = noise if i % 4 == 0 else prose
        (folder / f"file {i}").write_bytes(make(f"{seed} {i}", rng.randrange(2 * size)))


def settle(root: Path) -> None:
    """Return once the clock has left the ticks in which anything below ``root`` was changed.

    A change within the tick of the one before could leave all time stamps alike, so programs
    that compare time stamps distrust files that were changed a moment ago.
    """
    newest = max(
        os.stat(name, dir_fd=fd, follow_symlinks=False).st_ctime_ns
        for _, folders, files, fd in os.fwalk(root)
        for name in (".", *folders, *files)
    )
    while time.time_ns() - newest < 60_000_000:
        time.sleep(0.005)


def describe(root: Path, *, times: bool = True, modes: bool = True) -> dict[bytes, Facts]:
    """Return every path below ``root``, and ``b"."`` for itself, with the facts of it."""
    found: dict[bytes, Facts] = {}
    inodes: dict[tuple[int, int], list[bytes]] = {}
    with _inside(root) as top:
        for path, st, content in _walk(top, b""):
            mode = stat.S_IMODE(st.st_mode) if modes and not stat.S_ISLNK(st.st_mode) else 0
            mtime = st.st_mtime_ns if times else 0
            if stat.S_ISREG(st.st_mode):
                found[path] = Facts("file", mode, mtime, st.st_size, content.decode())
                inodes.setdefault((st.st_dev, st.st_ino), []).append(path)
            elif stat.S_ISLNK(st.st_mode):
                found[path] = Facts("symlink", mode, mtime, target=content)
            elif stat.S_ISDIR(st.st_mode):
                found[path] = Facts("directory", mode, mtime)
            else:
                raise AssertionError(f"unexpected kind of file: {path!r}")
    for names in inodes.values():
        if len(names) > 1:
            for path in names:
                old = found[path]
                found[path] = Facts(
                    old.kind,
                    old.mode,
                    old.mtime_ns,
                    old.size,
                    old.digest,
                    b"",
                    tuple(sorted(names)),
                )
    return found


def _plain_files(top: int) -> None:
    _write(top, b"empty", b"")
    _write(top, b"one byte", b"x")
    _write(top, b"text", prose("text", 50_000))
    _write(top, b"small noise", noise("small", 16 << 10))
    _write(top, b"large noise", noise("large", 3 * MIB + 5))
    _write(top, b"copy of large", noise("large", 3 * MIB + 5))
    _write(top, b"large text", prose("long", 5 * MIB + 1))
    _write(top, b"program", b"#!/bin/sh\nexit 0\n", 0o755)
    _write(top, b"private", b"secret", 0o600)
    _write(top, b"read only", b"r", 0o444)
    _write(top, b"setuid", b"u", 0o4711)
    _write(top, b"group may run", b"g", 0o614)
    if os.geteuid() == 0:
        _write(top, b"nobody may read", b"0", 0o000)


def _names(top: int) -> None:
    os.mkdir(b"names", dir_fd=top)
    with _inside(b"names", top) as names:
        for i, name in enumerate(
            (
                b"caf\xe9", b"\xff\xfe\xfd", b"new\nline", b"-rf", b" leading and trailing ",
                b"back\\slash", b"tab\t", b"\x01\x7f", b"...", b"..x", b".hidden", b"~", b"*",
                b"$(id)", b"'quoted\"", "日本語".encode(), LONG_NAME, b"a:b", b"C:", b"con",
                "e\u0301".encode(), "é".encode(), b"Case", b"case",
            )
        ):  # fmt: skip
            _write(names, name, b"%d" % i)
    # "/" sorts before every other byte of a path, though not before every byte in ASCII order.
    for name in (b"order", b"order.d"):
        os.mkdir(name, dir_fd=top)
        with _inside(name, top) as folder:
            _write(folder, b"inside", name)
    for name in (b"order-a", b"order!", b"order0", b"order\x01"):
        _write(top, name, name)


def _links(top: int) -> None:
    os.mkdir(b"links", dir_fd=top)
    with _inside(b"links", top) as links:
        for name, target in {
            b"relative": b"../text",
            b"absolute": b"/etc/passwd",
            b"dangling": b"nowhere/at all",
            b"to directory": b"..",
            b"to itself": b"to itself",
            b"strange": b"\xff\xfe\n ",
            b"long": b"t/" * 2000,
        }.items():
            os.symlink(target, name, dir_fd=links)
        _write(links, b"first", b"many names")
        os.link(b"first", b"second", src_dir_fd=links, dst_dir_fd=links)
        os.link(b"first", b"0 sorted before", src_dir_fd=links, dst_dir_fd=top)
        _write(links, b"empty twin", b"")
        os.link(b"empty twin", b"empty twin 2", src_dir_fd=links, dst_dir_fd=links)
        _write(links, b"large twin", noise("twin", 2 * MIB), 0o755)
        os.link(b"large twin", b"zz", src_dir_fd=links, dst_dir_fd=top)


def _directories(top: int) -> None:
    os.mkdir(b"empty directory", dir_fd=top)
    for name, mode in ((b"sticky", 0o1777), (b"set group", 0o2755), (b"no write", 0o555)):
        os.mkdir(name, dir_fd=top)
        with _inside(name, top) as folder:
            _write(folder, b"inside", name)
            os.mkdir(b"empty", dir_fd=folder)
            os.fchmod(folder, mode)


def _sparse(top: int) -> None:
    os.mkdir(b"sparse", dir_fd=top)
    with _inside(b"sparse", top) as folder:
        _holed(folder, b"only a hole", 7 * MIB, {})
        _holed(folder, b"odd hole", 3 * MIB + 4097, {})
        _holed(folder, b"holes", 9 * MIB, {0: noise(1, 100), 5 * MIB + 123: noise(2, 70_000)})
        _holed(folder, b"hole first", 6 * MIB + 9, {5 * MIB: prose(3, MIB + 9)})
        _write(folder, b"dense zeros", bytes(3 * MIB))
        _write(folder, b"few zeros", bytes(5000))


def _deep(top: int) -> None:
    fd = os.dup(top)
    for level in range(DEEP_LEVELS):
        name = b"%02d" % level + b"d" * 248
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    _write(fd, b"file", b"far below", 0o640)
    _write(fd, b"large", prose("deep", 2 * MIB))
    os.symlink(b"file", b"symlink", dir_fd=fd)
    os.link(b"file", b"twin", src_dir_fd=fd, dst_dir_fd=fd)
    os.mkdir(b"empty", dir_fd=fd)
    os.close(fd)


def _times(top: int) -> None:
    for name, mtime_ns in {
        b"empty": 0,
        b"one byte": -1_500_000_001,  # before 1970
        b"text": 2**33 * 1_000_000_000 + 1,  # after 2038 and 2106
        b"program": 1,
        b"links/dangling": 999_999_999,
        b"empty directory": 315_532_799_000_000_000,
        b"no write": 1_700_000_000_123_456_789,
    }.items():
        os.utime(name, ns=(0, mtime_ns), dir_fd=top, follow_symlinks=False)


def _write(folder: int, name: bytes, data: bytes, mode: int = 0o644) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        os.fchmod(fd, mode)


def _holed(folder: int, name: bytes, size: int, pieces: dict[int, bytes]) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
    try:
        os.ftruncate(fd, size)
        for at, data in pieces.items():
            os.pwrite(fd, data, at % size)
        os.fchmod(fd, 0o644)
    finally:
        os.close(fd)


def _walk(folder: int, prefix: bytes) -> Iterator[tuple[bytes, os.stat_result, bytes]]:
    yield prefix.rstrip(b"/") or b".", os.fstat(folder), b""
    for name in sorted(os.fsencode(name) for name in os.listdir(folder)):
        path = prefix + name
        st = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            with _inside(name, folder) as below:
                yield from _walk(below, path + b"/")
        elif stat.S_ISLNK(st.st_mode):
            yield path, st, os.readlink(name, dir_fd=folder)
        elif stat.S_ISREG(st.st_mode):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(fd, "rb", buffering=0) as file:
                hasher = blake3()
                while piece := file.read(4 * MIB):
                    hasher.update(piece)
            yield path, st, hasher.hexdigest().encode()
        else:
            yield path, st, b""


@contextmanager
def _inside(path: Path | bytes, folder: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if folder is not None else 0)
    fd = os.open(path, flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)
