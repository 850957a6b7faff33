"""The tree of a checkpoint in the store: what a restore reads, through the cache of the node."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from envstore.checkpoint.layout import Want
from envstore.errors import CorruptError, NotFoundError
from envstore.store.manifest import Entry, read_entries
from envstore.store.ranges import Content, Range
from envstore.store.repository import Repository
from envstore.store.scatter import prefetch, scatter
from envstore.store.source import Kind
from envstore.store.whereabouts import ATTEMPTS

MAX_READ = 1 << 30
"""Bytes of the largest file that is read whole: a description or an object, never tensors."""


class SnapshotTree:
    """The files of a snapshot; implements ``layout.Tree``. Of use to one thread at a time.

    Opening it takes three round trips (snapshot, then root and locations at once, then the
    manifest's parts), fewer of what the node cache holds. The repository stays the caller's.
    """

    def __init__(
        self, repository: Repository, snapshot: bytes, *, threads: int | None = None
    ) -> None:
        """Open the snapshot called ``snapshot``; read with so many ``threads``, else as it fits.

        Raises ``NotFoundError``, ``CorruptError``, ``UnsupportedFormatError`` and the errors of
        the store.
        """
        self._repository = repository
        self._threads = threads
        self._closed = threading.Event()
        self.snapshot = repository.snapshot(snapshot)
        root, locations = repository.located(self.snapshot.manifest)
        self._whereabouts = repository.whereabouts(root, locations)
        entries: dict[str, Entry] = {}
        contents: dict[str, Content] = {}
        first = 0
        for entry in read_entries(repository.parts(root, locations)):
            if entry.kind is Kind.FILE:
                path = entry.path.decode("utf-8", "surrogateescape")
                entries[path] = entry
                contents[path] = Content.of(path, entry.refs, first)
                first += len(entry.refs)
        self.entries: Mapping[str, Entry] = entries
        """What the manifest says of each file, by path."""
        self._contents = contents
        self._sizes = {path: entry.size for path, entry in entries.items()}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by path."""
        return self._sizes

    def read(self, path: str) -> bytes:
        """Return a whole file of at most ``MAX_READ`` bytes.

        Raises ``NotFoundError``, ``CorruptError`` (also if it is larger) and the errors of the
        store.
        """
        size = self._content(path).size
        if size > MAX_READ:
            raise CorruptError(f"{path} has {size} bytes, which is more than it can be meant to")
        buffer = bytearray(size)
        self.read_into((Want(path, 0, memoryview(buffer)),))
        return bytes(buffer)

    def read_into(self, wants: Sequence[Want]) -> None:
        """Fill every view, verified, many at a time; see ``store.scatter``.

        Raises ``CorruptError`` naming the file, ``NotFoundError``, ``ValueError`` for a range
        that leaves its file, and the errors of the store; the views then hold anything.
        """
        ranges = [Range(self._content(want.path), want.start, _flat(want.view)) for want in wants]
        scatter(self._repository, self._whereabouts, ranges, threads=self._threads)

    def prefetch(self, paths: Iterable[str] | None = None) -> int:
        """Have the node cache hold these files, by default all; returns the bytes fetched.

        As much as the cache has room for, and until ``close``. Does nothing for a store on this
        machine.
        """
        chosen = self._contents if paths is None else paths
        ranges = [(self._content(path), 0, self._content(path).size) for path in chosen]
        for left in reversed(range(ATTEMPTS)):
            locations = self._whereabouts.locations
            try:
                return prefetch(
                    self._repository, locations, ranges, threads=self._threads, stop=self._closed
                )
            except (CorruptError, NotFoundError):
                if not left or self._whereabouts.again(locations) is None:
                    raise
        raise AssertionError("the last attempt either returns or raises")

    def close(self) -> None:
        """End a ``prefetch`` that another thread is at; idempotent. Nothing else is held open."""
        self._closed.set()

    def _content(self, path: str) -> Content:
        content = self._contents.get(path)
        if content is None:
            name = self.snapshot.manifest.hex()
            raise NotFoundError(f"{path} is not in the checkpoint (manifest {name[:12]})")
        return content


def _flat(view: memoryview) -> memoryview:
    # What has no bytes may have a shape that cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(bytearray())
