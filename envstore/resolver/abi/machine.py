"""The libraries of this machine, for who asks whether an environment works here and now."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from envstore.resolver.abi.facts import ElfFacts, elf_facts

_DEFAULT = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
_PATIENCE = 30.0


class MachineLibraries:
    """Finds libraries where the loader does that is installed here, by its own cache."""

    def __init__(self, machine: int, bits: int) -> None:
        """Only libraries of this ``e_machine`` and class count."""
        self._architecture = machine, bits
        self._paths = _cached_paths()
        self._facts: dict[str, ElfFacts | None] = {}

    def find(self, soname: str) -> ElfFacts | None:
        """Return the facts of the machine's library of that name, ``None`` if it has none."""
        if soname not in self._facts:
            self._facts[soname] = self._find(soname)
        return self._facts[soname]

    def _find(self, soname: str) -> ElfFacts | None:
        if "/" in soname:
            candidates = [soname]
        else:
            candidates = self._paths.get(soname, [])
            candidates = candidates + [os.path.join(folder, soname) for folder in _DEFAULT]
        for path in candidates:
            try:
                facts = elf_facts(Path(path))
            except OSError:
                continue
            if facts is not None and (facts.machine, facts.bits) == self._architecture:
                return facts
        return None


def _cached_paths() -> dict[str, list[str]]:
    """Return what ``ldconfig -p`` lists: ``\\tlibz.so.1 (libc6,x86-64) => /lib/.../libz.so.1``."""
    program = shutil.which("ldconfig", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    found: dict[str, list[str]] = {}
    if program is None:
        return found
    try:
        listed = subprocess.run(
            [program, "-p"], capture_output=True, timeout=_PATIENCE, check=True, text=True
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return found
    for line in listed.splitlines():
        left, arrow, path = line.partition(" => ")
        if arrow:
            found.setdefault(left.split()[0], []).append(path.strip())
    return found
