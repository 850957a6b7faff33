"""What every scenario is given: the tree, where to write, how often, and what was asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Context:
    """The choices of one run; ``tools`` are starts of names, none for all tools.

    ``say`` prints a line of progress.
    """

    tree: Path
    work: Path
    repetitions: int
    small_files: int
    torch_pair: bool
    tools: tuple[str, ...]
    say: Callable[[str], None]

    def wants(self, tool: str) -> bool:
        """Return whether ``tool`` is to be measured."""
        return not self.tools or tool.startswith(self.tools)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a new directory that is gone afterwards; short, as sockets will lie in it."""
        self.work.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix="run-", dir=self.work))
        try:
            yield path
        finally:
            shutil.rmtree(path)
