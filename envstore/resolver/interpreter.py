"""Finds an environment's interpreter and says what it is, without running it."""

from __future__ import annotations

import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from envstore.store.source import stat_signature

_LIB = re.compile(rb"python3\.(\d+)t?")
_PYVENV = re.compile(r"^version(?:_info)?\s*=\s*(\d+\.\d+(?:\.\d+)?)", re.MULTILINE | re.IGNORECASE)
_CONDA = re.compile(r"python-(\d+\.\d+\.\d+)-[^-]+\.json")
_PATCHLEVEL = re.compile(r'^#define\s+PY_VERSION\s+"(\d+\.\d+\.\d+)', re.MULTILINE)
_ELF = struct.Struct("4sBBBB8xHH")
_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64"} | {
    243: "riscv64",
    258: "loongarch64",
}
_LINUX_ABIS = (0, 3)

FIRST_WITH_HASHES = 7
"""The minor version of Python 3 from which bytecode need not be checked against times."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The interpreter of an environment as its files describe it.

    ``minor`` is the X of Python 3.X. ``libraries`` are the directories below the root that it
    imports from, relative, as raw bytes. ``program`` is ``None`` and ``trouble`` says why when it
    cannot run on this machine. ``identity`` changes whenever it may make other bytecode.
    """

    minor: int
    libraries: tuple[bytes, ...]
    program: Path | None
    trouble: str
    identity: bytes

    @property
    def tag(self) -> str:
        """The part of a bytecode file's name that belongs to it."""
        return f"cpython-3{self.minor}"


def find_interpreter(root: Path) -> Interpreter | None:
    """Return the CPython 3 that ``root`` is a prefix of, or ``None``.

    When there are libraries of several versions, the one that ``bin/python3`` stands for wins.
    """
    libraries = _libraries(root)
    if not libraries:
        return None
    minor = _minor(root, libraries)
    below = tuple(sorted(path for path, version in libraries.items() if version == minor))
    program, trouble = _program(root, minor)
    identity = sys.version.encode()
    if program is not None:
        identity = os.fsencode(os.path.realpath(program)) + stat_signature(os.stat(program))
    return Interpreter(minor, below, program, trouble, identity)


def own_interpreter(tag: str) -> Path | None:
    """Return the interpreter that runs this program if its bytecode is that of ``tag``."""
    return Path(sys.executable) if sys.implementation.cache_tag == tag else None


def facts(root: Path) -> dict[str, str]:
    """Return ``python`` (3.X or 3.X.Y) and ``platform`` (``linux-x86_64``) as far as certain."""
    found = {}
    libraries = _libraries(root)
    if libraries:
        minor = _minor(root, libraries)
        exact = _exact_version(root, minor)
        found["python"] = exact or f"3.{minor}"
        for name in _names(minor):
            machine = elf_machine(root / "bin" / name)
            if machine:
                found["platform"] = f"linux-{machine}"
                break
    return found


def elf_machine(path: Path) -> str | None:
    """Return the machine that a Linux program is for, ``None`` if it is not a known one."""
    try:
        with open(path, "rb") as file:
            head = file.read(_ELF.size)
    except OSError:
        return None
    if len(head) < _ELF.size or head[:4] != b"\x7fELF":
        return None
    order = ">" if head[5] == 2 else "<"
    _, _, _, _, abi, _, machine = struct.unpack(order + _ELF.format, head)
    return _MACHINES.get(machine) if abi in _LINUX_ABIS else None


def _libraries(root: Path) -> dict[bytes, int]:
    found = {}
    # Debian's own Python installs packages below local/lib.
    for parent in (b"lib", b"lib64", b"local/lib"):
        directory = os.path.join(os.fsencode(root), parent)
        if os.path.islink(directory):
            continue
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            match = _LIB.fullmatch(name)
            path = os.path.join(directory, name)
            if match and os.path.isdir(path) and not os.path.islink(path):
                found[parent + b"/" + name] = int(match[1])
    return found


def _minor(root: Path, libraries: dict[bytes, int]) -> int:
    there = set(libraries.values())
    if len(there) == 1:
        return there.pop()
    said = _first_version(root / "pyvenv.cfg", _PYVENV) or _conda_version(root)
    if said and int(said.split(".")[1]) in there:
        return int(said.split(".")[1])
    target = os.path.basename(os.path.realpath(root / "bin" / "python3"))
    match = _LIB.fullmatch(os.fsencode(target))
    if match and int(match[1]) in there:
        return int(match[1])
    programs = {minor for minor in there if os.path.exists(root / "bin" / f"python3.{minor}")}
    return max(programs or there)


def _exact_version(root: Path, minor: int) -> str | None:
    header = root / "include" / f"python3.{minor}" / "patchlevel.h"
    for said in (
        _first_version(root / "pyvenv.cfg", _PYVENV),
        _conda_version(root),
        _first_version(header, _PATCHLEVEL),
    ):
        if said and said.split(".")[1] == str(minor):
            return said
    return None


def _first_version(path: Path, pattern: re.Pattern[str]) -> str | None:
    try:
        match = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def _conda_version(root: Path) -> str | None:
    try:
        names = os.listdir(root / "conda-meta")
    except OSError:
        return None
    for name in sorted(names):
        match = _CONDA.fullmatch(name)
        if match:
            return match[1]
    return None


def _names(minor: int) -> tuple[str, ...]:
    return (f"python3.{minor}", "python3", "python")


def _program(root: Path, minor: int) -> tuple[Path | None, str]:
    """Return the program, or what keeps it from running here as far as that can be seen."""
    if minor < FIRST_WITH_HASHES:
        return None, f"Python 3.{minor} knows only bytecode that is checked against file times"
    trouble = f"there is no bin/python3.{minor}"
    for name in _names(minor):
        path = root / "bin" / name
        if not os.path.lexists(path):
            continue
        if not os.path.isfile(path):
            trouble = f"bin/{name} leads to {os.path.realpath(path)}, which is not there"
        elif not os.access(path, os.X_OK):
            trouble = f"bin/{name} is not executable"
        else:
            theirs, ours = elf_machine(path), elf_machine(Path(sys.executable))
            if not theirs or not ours or theirs == ours:
                return path, ""
            return None, f"bin/{name} is for {theirs}"
    return None, trouble
