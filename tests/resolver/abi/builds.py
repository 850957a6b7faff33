"""Environments of a few libraries made by the compiler, and what the real loader says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from envstore.resolver.abi.check import check
from envstore.resolver.abi.findings import Finding
from envstore.resolver.abi.host import AbiTarget, platform_of
from envstore.resolver.abi.reading import directory_tree

SITE = "lib/python3.11/site-packages"
TO_LIB = "-Wl,-rpath,$ORIGIN/../.."
OLD_TAGS = "-Wl,--disable-new-dtags"
"""Has the linker write an RPATH; what it writes otherwise is a RUNPATH."""

_LOAD = "import ctypes, sys\nctypes.CDLL(sys.argv[1])"
_PROGRAM = """
#include <dlfcn.h>
#include <stdio.h>
int from_the_program(void) { return 7; }
int main(int count, char **words) {
    for (int i = 1; i < count; i++)
        if (!dlopen(words[i], RTLD_NOW)) { puts(dlerror()); return 1; }
    return 0;
}
"""


class Build:
    """An environment below ``root``, built file by file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def library(self, path: str, source: str = "", *options: str, script: str = "") -> Path:
        """Compile ``source`` to a shared library; ``script`` maps its symbols to versions."""
        if script:
            versions = self.root.parent / "versions"
            versions.write_text(script)
            options = (f"-Wl,--version-script={versions}", *options)
        soname = f"-Wl,-soname,{path.rpartition('/')[2]}"
        return self._compile(path, source, "-shared", "-fPIC", soname, *options)

    def interpreter(self, *options: str) -> Path:
        """Compile what stands for Python: a program that loads libraries and says what fails."""
        return self._compile("bin/python3.11", _PROGRAM, "-rdynamic", *options)

    def _compile(self, path: str, source: str, *options: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # A library is linked only if it comes after what needs it.
        command = ["gcc", "-O1", "-x", "c", "-", "-x", "none", "-Wl,--no-as-needed"]
        subprocess.run(
            [*command, *options, "-o", target], input=source.encode(), check=True, timeout=60
        )
        return target

    def check(
        self, *, glibc: str = "", cuda: str = "", packages: dict[str, str] | None = None
    ) -> list[Finding]:
        """Check the environment for machines like this one."""
        tree = directory_tree(self.root)
        return check(tree, AbiTarget(own_platform(), glibc, cuda), packages)

    def errors(self, **target: str) -> list[Finding]:
        """Return only what would stop a push."""
        found = self.check(glibc=target.get("glibc", ""), cuda=target.get("cuda", ""))
        return [finding for finding in found if finding.level == "error"]

    def only(self, **target: str) -> Finding:
        """Return the one thing that is wrong."""
        (finding,) = self.check(glibc=target.get("glibc", ""), cuda=target.get("cuda", ""))
        return finding

    def loader(self, path: str) -> str:
        """Return what the real loader says when this Python loads a file; empty if nothing."""
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, self.root / path],
            env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        return done.stderr.strip().rpartition("OSError: ")[2]

    def own_loader(self, *paths: str) -> str:
        """Return what it says when the environment's own program loads files in this order."""
        done = subprocess.run(
            [self.root / "bin/python3.11", *(self.root / path for path in paths)],
            env={}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.strip()


def own_platform() -> str:
    """Return the platform of the Python that runs the tests."""
    from envstore.resolver.abi.facts import elf_facts

    facts = elf_facts(Path(os.path.realpath(sys.executable)))
    assert facts is not None
    found = platform_of(facts.machine, facts.bits, facts.big_endian)
    assert found is not None
    return found
