"""Sources that tell a test what is read, and let it act at a chosen moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from envstore.store.source import DirectorySource, Kind, SourceEntry


class WatchedSource(DirectorySource):
    """A directory that records which files are opened and how many bytes are read.

    ``act(event, path)`` is called with ``scanned`` (once, and no path), ``opening`` before each
    file, ``piece`` after each piece that was read of it, and ``done`` at its end.
    """

    def __init__(
        self,
        root: Path,
        act: Callable[[str, bytes], None] = lambda event, path: None,
        *,
        kind: str = "dir",
        normalise: bool = False,
    ) -> None:
        super().__init__(root, kind=kind, normalise=normalise)
        self._act = act
        self.opened: list[bytes] = []
        self.bytes_read = 0

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``."""
        found = super().scan()
        self._act("scanned", b"")
        return found

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        self.opened.append(entry.path)
        self._act("opening", entry.path)
        for piece in super().read(entry):
            self.bytes_read += len(piece)
            yield piece
            self._act("piece", entry.path)
        self._act("done", entry.path)


class BlindSource(WatchedSource):
    """A directory on a file system whose time stamps never tell anything."""

    settled = False

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``."""
        return [
            replace(entry, signature=b"always the same", settled=self.settled, mtime_ns=0)
            for entry in super().scan()
        ]

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``; cannot check anything either."""
        self.opened.append(entry.path)
        yield (self.root / entry.path.decode()).read_bytes()


class ListedSource:
    """Files held in memory, for trees whose making on disk would take longer than the test."""

    kind = "dir"
    root = Path("/listed")

    def __init__(self, files: dict[bytes, bytes], identity: str = "listed") -> None:
        self.identity = identity
        self.files = files
        self.warnings: list[str] = []
        self.opened: list[bytes] = []

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``; directories are made up from the paths."""
        folders = {
            path[:at] for path in self.files for at in range(len(path)) if path[at : at + 1] == b"/"
        }
        entries = [SourceEntry(path, Kind.DIRECTORY, 0o755) for path in folders]
        for path, data in self.files.items():
            entries.append(SourceEntry(path, Kind.FILE, size=len(data), settled=False))
        return entries

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return 0, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        self.opened.append(entry.path)
        data = self.files[entry.path]
        for at in range(0, len(data), 4 << 20):
            yield data[at : at + (4 << 20)]

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``."""
        return {"listed": "yes"}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source.close``."""
