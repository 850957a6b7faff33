"""Files that were generated, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from envstore.resolver.layout import layout_order
from envstore.resolver.packages.generated import GeneratedFile
from envstore.store.source import WINDOW, Kind, SourceEntry


class MemorySource:
    """The files ``files`` and the directories above them."""

    kind = "env"
    identity = ""
    root = Path("/")

    def __init__(self, files: Sequence[GeneratedFile]) -> None:
        self._files = {file.path: file for file in files}
        self.warnings: list[str] = []

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``."""
        found = [
            SourceEntry(
                file.path,
                Kind.FILE,
                0o755 if file.executable else 0o644,
                size=len(file.data),
                relocation=file.relocation,
            )
            for file in self._files.values()
        ]
        directories: set[bytes] = set()
        for path in self._files:
            while b"/" in path:
                path = path.rpartition(b"/")[0]
                directories.add(path)
        return found + [SourceEntry(path, Kind.DIRECTORY, 0o755) for path in directories]

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return layout_order(entry.path)

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``: all is at hand."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        data = self._files[entry.path].data
        return (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``: none."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source.close``: nothing is held."""
