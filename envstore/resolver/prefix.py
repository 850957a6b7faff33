"""A Python environment as a source: two installs of the same packages give the same bytes.

What an installation leaves behind by accident is taken out: times, owners, permission bits beyond
"executable", which names are hard links, and everything about bytecode but the code itself.
``pycache`` says which bytecode the tree then has, ``bytecode`` makes it. Where the environment
lay is taken out too (``portable``), so it can be mounted anywhere and is the same wherever it was
installed; only its interpreter must be below it for that, as in conda's environments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from envstore.resolver.bytecode import BytecodePool, InterpreterError, Job
from envstore.resolver.interpreter import Interpreter, facts, find_interpreter, own_interpreter
from envstore.resolver.layout import layout_order
from envstore.resolver.portable import ALGORITHM, Portable
from envstore.resolver.pycache import plan
from envstore.store.cache import default_directory
from envstore.store.source import WINDOW, DirectorySource, OmitEntry, SourceEntry


class PrefixSource:
    """A virtual environment, conda prefix or other installation of Python.

    The size of a ``.pyc`` that is made is an estimate until it is read. Bytecode is made by
    processes of the environment's own interpreter, which ``close`` ends; without one that runs
    here, by the one that runs this program if it is the same version, else bytecode is left out.
    ``warnings`` says so.
    """

    kind = "env"

    def __init__(self, root: Path, *, workers: int = 0, patience: float = 120) -> None:
        """Take ``root``; ``workers`` and ``patience`` are those of ``BytecodePool``.

        Raises ``NotFoundError``, ``UsageError`` (neither a directory nor a file).
        """
        self._tree = DirectorySource(root, kind="env", normalise=True)
        self.root = self._tree.root
        self.identity = f"{self._tree.identity}\0portable {ALGORITHM}"
        self._portable = Portable(self._tree, default_directory() / "prefixes")
        self.warnings: list[str] = []
        self._base = os.fsencode(self.root)
        self._workers, self._patience = workers, patience
        self._interpreter: Interpreter | None = None
        self._jobs: dict[bytes, Job] = {}
        self._pool: BytecodePool | None = None

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``. Nothing is executed.

        Opened are a few small files, and, unless they were at an earlier scan and have not
        changed since, those that may name the place of the environment.
        """
        self.close()
        self._pool = None
        self.warnings.clear()
        self._jobs = {}
        entries = self._portable.apply(self._tree.scan())
        self.warnings += self._portable.warnings
        self._interpreter = find_interpreter(self.root)
        self._pool = self._find_pool(self._interpreter)
        planned = plan(entries, self._base, self._interpreter if self._pool else None)
        if self._interpreter is None and planned.dropped:
            self.warnings.append(f"no CPython 3 found in {self.root}: bytecode is left out")
        self._jobs = planned.jobs
        return planned.entries

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return layout_order(entry.path)

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``: the workers start on the bytecode among ``entries``."""
        jobs = [self._jobs[entry.path] for entry in entries if entry.path in self._jobs]
        pool = self._started() if jobs else None
        if pool is not None:
            pool.announce(jobs)

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``. Raises ``OmitEntry`` for a source that cannot be compiled."""
        job = self._jobs.get(entry.path)
        if job is None:
            changed = self._portable.read(entry)
            return self._tree.read(entry) if changed is None else changed
        pool = self._started()
        if pool is None:
            raise OmitEntry(lasting=False)
        data = pool.result(job)
        if data is None:
            raise OmitEntry
        return (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``: ``python`` and ``platform``."""
        return facts(self.root)

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return self._tree.root_attributes()

    def close(self) -> None:
        """See ``Source.close``."""
        if self._pool is not None:
            self._pool.close()

    def _find_pool(self, interpreter: Interpreter | None) -> BytecodePool | None:
        """Return what makes the bytecode; ``None``, and mostly a warning, if nothing can."""
        if interpreter is None:
            return None
        if interpreter.program is None:
            return self._own_pool(interpreter, interpreter.trouble)
        return self._pool_of(interpreter.program, interpreter)

    def _own_pool(self, interpreter: Interpreter, trouble: str) -> BytecodePool | None:
        own = own_interpreter(interpreter.tag)
        if own is None or (self._pool is not None and self._pool.interpreter == own):
            self.warnings.append(f"{trouble}: bytecode is left out, imports will be slower")
            return None
        self.warnings.append(f"{trouble}: bytecode is made by {own}")
        return self._pool_of(own, interpreter)

    def _pool_of(self, program: Path, interpreter: Interpreter) -> BytecodePool:
        return BytecodePool(
            program, interpreter.tag, self.root, workers=self._workers, patience=self._patience
        )

    def _started(self) -> BytecodePool | None:
        """Return the pool with a worker in it, or ``None`` if no interpreter runs here."""
        while self._pool is not None and self._interpreter is not None:
            try:
                self._pool.start()
            except InterpreterError as error:
                self._pool = self._own_pool(self._interpreter, error.message)
            else:
                return self._pool
        return None
