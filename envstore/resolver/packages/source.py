"""Unpacked packages as one source, so that what is read together lies together in the store.

The trees lie side by side below one directory, each under a number. Bytecode is made as for any
other environment (``pycache``), by an interpreter of exactly the version that will run it: then
it depends on the package and that version alone, whoever makes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from envstore.resolver.bytecode import BytecodePool, Job
from envstore.resolver.interpreter import Interpreter
from envstore.resolver.layout import layout_order
from envstore.resolver.lock import PythonFacts
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.pycache import plan
from envstore.store.source import WINDOW, DirectorySource, Kind, OmitEntry, SourceEntry


class PackagesSource:
    """The packages ``unpacked``, the n-th of which lies in ``root``/n.

    Without ``python`` or ``program`` (an interpreter of that version) they have no bytecode.
    """

    kind = "env"
    identity = ""

    def __init__(
        self,
        root: Path,
        unpacked: Sequence[Unpacked],
        python: PythonFacts | None,
        program: Path | None,
    ) -> None:
        self._tree = DirectorySource(root, kind="env", normalise=True)
        self.root = self._tree.root
        self.warnings: list[str] = []
        self._unpacked = unpacked
        self._jobs: dict[bytes, Job] = {}
        self._interpreter = self._pool = None
        if python is not None and program is not None:
            self._interpreter = _interpreter(python, program, len(unpacked))
            self._pool = BytecodePool(program, self._interpreter.tag, self.root)

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``: what the packages list, each path below its package's number."""
        listed = {
            b"%d/%b" % (number, entry.path): entry
            for number, package in enumerate(self._unpacked)
            for entry in package.entries
        }
        entries = []
        for found in self._tree.scan():
            entry = listed.get(found.path)
            if entry is not None:
                mode = 0o755 if entry.executable or entry.kind is Kind.DIRECTORY else 0o644
                entries.append(
                    replace(found, mode=mode, target=entry.target, relocation=entry.relocation)
                )
        planned = plan(entries, os.fsencode(self.root), self._interpreter, inner=True)
        self._jobs = planned.jobs
        return planned.entries

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``: by class over all packages, then package by package."""
        rank, _ = layout_order(entry.path.partition(b"/")[2])
        return rank, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``: the workers start on the bytecode among ``entries``."""
        jobs = [self._jobs[entry.path] for entry in entries if entry.path in self._jobs]
        if jobs and self._pool is not None:
            self._pool.announce(jobs)

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``. Raises ``OmitEntry`` for a source that cannot be compiled."""
        job = self._jobs.get(entry.path)
        if job is None or self._pool is None:
            return self._tree.read(entry)
        data = self._pool.result(job)
        if data is None:
            raise OmitEntry
        return (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``: packages have none."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source.close``."""
        if self._pool is not None:
            self._pool.close()


def _interpreter(python: PythonFacts, program: Path, packages: int) -> Interpreter:
    below = {f"lib/python{python.minor}", python.site_packages}
    libraries = tuple(
        b"%d/%b" % (number, os.fsencode(path)) for number in range(packages) for path in below
    )
    return Interpreter(
        int(python.minor.split(".")[1]), libraries, program, "", python.version.encode()
    )
