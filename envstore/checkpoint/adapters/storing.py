"""Storing files and directories without moving a ref, for adapters that decide later what to name.

Cost as of a push, but that tensors are not compressed: what is new is hashed (about 1 GB/s) and
sent; a few requests besides.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from envstore.errors import EnvstoreError, UsageError
from envstore.store.describing import place_of, store_manifest
from envstore.store.filing import FiledTree, entries_of, scan, silent, store_files
from envstore.store.frames import Codec
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.locations import FrameRef
from envstore.store.manifest import HOLE, Entry, Root, sort_key
from envstore.store.packing import PackWriter
from envstore.store.repository import Repository
from envstore.store.sessions import claim_bases
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import WINDOW, DirectorySource, Kind, SourceEntry

TENSOR_FILES = (b".safetensors", b".distcp", b".pt", b".pth", b".ckpt", b".bin")
"""How the names of files end that hold numbers, which are not worth compressing."""

_LENGTH_BYTES = 8
_AHEAD = 2
"""Windows that wait for the thread that stores them: the writer is held up beyond."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file whose chunks are stored: its entry, and the ``(frame, offset)`` of each that is new
    to the tree it goes into; holes have none."""

    entry: Entry
    places: Mapping[bytes, tuple[FrameRef, int]]

    def at(self, path: bytes) -> StoredFile:
        """Return the same content under another path."""
        return replace(self, entry=replace(self.entry, path=path))


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A stored directory. ``sent_bytes`` counts what its new chunks take in the store."""

    snapshot: bytes
    manifest: bytes
    files: int
    logical_bytes: int
    sent_bytes: int
    warnings: tuple[str, ...] = ()


def store_directory(
    repository: Repository,
    path: Path,
    *,
    bases: Sequence[bytes] = (),
    message: str = "",
    attributes: Mapping[str, str] | None = None,
) -> StoredTree:
    """Store the tree at ``path`` as a snapshot of kind ``checkpoint``, to which nothing points yet.

    ``bases`` are snapshots to share chunks with; safetensors files are cut along their tensors.
    Raises ``NotFoundError``, ``ChangedError`` (a file changed while it was read), ``UsageError``
    (a socket or device), and the errors of the store.
    """
    source = DirectorySource(path, kind="checkpoint", normalise=True)
    known = KnownChunks(repository, DedupIndex())
    try:
        tree = scan(source)
        known.learn_snapshots(bases)
        known.learn_segments()
        # Checkpoints are numbers, which hardly compress: trying would cost most of the time.
        with _writer(repository, known.index, Codec.RAW) as writer:
            store_files(source, tree, known, writer, silent)
            while not known.forget_lost(tree.chunks()):
                store_files(source, tree, known, writer, silent)
            root = store_manifest(repository, entries_of(source, tree), known, writer)
            sent = writer.stored_bytes
    finally:
        source.close()
    name = save_checkpoint_snapshot(
        repository, root, bases[:1], message=message, attributes=attributes
    )
    warnings = (*source.warnings, *known.warnings)
    return StoredTree(name, root.digest, root.files, root.logical, sent, warnings)


def save_checkpoint_snapshot(
    repository: Repository,
    root: Root,
    parents: Sequence[bytes],
    *,
    kind: str = "checkpoint",
    message: str = "",
    attributes: Mapping[str, str] | None = None,
) -> bytes:
    """Store the snapshot that names a manifest; returns its digest."""
    snapshot = Snapshot(
        kind,
        root.digest,
        root.files,
        root.logical,
        datetime.now(UTC).isoformat(timespec="seconds"),
        tuple(parents),
        message=message,
        attributes=dict(attributes or {}),
    )
    return save_snapshot(repository.objects, snapshot)


class Upload:
    """Stores one file while it is being written, on a thread of its own.

    Use from one thread. Memory: some windows of 4 MiB, and what waits for compression.
    """

    def __init__(
        self, repository: Repository, path: bytes, bases: Callable[[], Iterable[bytes]]
    ) -> None:
        """Begin to store the file called ``path``; ``bases`` are asked for on the thread."""
        self._repository = repository
        self._path = path
        self._bases = bases
        self._carry = bytearray()
        self._windows: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._stored: StoredFile | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises what befell the thread."""
        view = memoryview(data)
        at = 0
        if self._carry:
            at = min(WINDOW - len(self._carry), len(view))
            self._carry += view[:at]
            if len(self._carry) < WINDOW:
                return
            self._hand(bytes(self._carry))
            self._carry.clear()
        while len(view) - at >= WINDOW:
            self._hand(bytes(view[at : at + WINDOW]))
            at += WINDOW
        self._carry += view[at:]

    def finish(self) -> StoredFile:
        """Return the file once all its chunks are stored. Raises what befell the thread."""
        if self._carry:
            self._hand(bytes(self._carry))
            self._carry.clear()
        self._hand(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stored is None:
            raise EnvstoreError(f"{self._path!r} was given up while it was being written")
        return self._stored

    def abandon(self) -> None:
        """Stop; what was stored is left for the next writer of the same bytes."""
        self._stop.set()
        self._thread.join()

    def _hand(self, window: bytes | None) -> None:
        while self._error is None and not self._stop.is_set():
            try:
                self._windows.put(window, timeout=0.1)
                return
            except queue.Full:
                continue
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._stored = self._store()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by whoever writes
            self._error = error

    def _store(self) -> StoredFile:
        first = self._next()
        source = _StreamSource(self._path, first, self._next)
        index = DedupIndex()
        known = KnownChunks(self._repository, index)
        known.learn_snapshots(self._bases())
        known.learn_segments()
        entry = SourceEntry(self._path, Kind.FILE, size=source.size)
        tree = FiledTree([entry], b"")
        tensors = self._path.endswith(TENSOR_FILES)
        with _writer(self._repository, index, Codec.RAW if tensors else Codec.ZSTD) as writer:
            store_files(source, tree, known, writer, silent)
            writer.flush()
            lost = known.index.reused(tree.chunks())
            if lost and not known.forget_lost(tree.chunks()):
                raise EnvstoreError(
                    f"packs that {self._path!r} would share are gone from the store",
                    hint="write it again; `envstore verify` tells more",
                )
        (stored,) = entries_of(source, tree)
        names = {name for name, _ in stored.refs if name != HOLE}
        places = {name: place_of(index, name) for name in names}
        return StoredFile(
            stored, {name: (index.frames[number], at) for name, (number, at) in places.items()}
        )

    def _next(self) -> bytes | None:
        while not self._stop.is_set():
            try:
                return self._windows.get(timeout=0.1)
            except queue.Empty:
                continue
        raise _Stopped


class _Stopped(Exception):  # noqa: N818 - a signal, not an error
    """The file was given up."""


class _StreamSource:
    """A source of one file whose size is known only when it ends."""

    kind = "checkpoint"
    root = Path()
    identity = ""

    def __init__(
        self, path: bytes, first: bytes | None, following: Callable[[], bytes | None]
    ) -> None:
        self.warnings: list[str] = []
        self._path = path
        self._first = first
        self._following = following
        self._claimed = claimed_size(first) if path.endswith(b".safetensors") and first else None
        self.size = self._claimed or 0

    def scan(self) -> list[SourceEntry]:
        """See ``Source``; what there is to file is said elsewhere."""
        return []

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source``."""
        return 0, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source``."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source``; a safetensors file must be as long as its header says."""
        at = 0
        window = self._first
        while window is not None:
            at += len(window)
            if self._claimed is not None and at > self._claimed:
                raise self._mismatch()
            yield window
            window = self._following()
        if self._claimed is not None and at != self._claimed:
            raise self._mismatch()

    def attributes(self) -> dict[str, str]:
        """See ``Source``."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source``."""

    def _mismatch(self) -> UsageError:
        name = self._path.decode(errors="replace")
        return UsageError(
            f"{name} is not as long as its safetensors header says ({self._claimed} bytes)",
            hint="give what is no safetensors file another name",
        )


def claimed_size(first: bytes) -> int | None:
    """Return how long the header says a safetensors file is, ``None`` if it is not one."""
    if len(first) < _LENGTH_BYTES:
        return None
    start = _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")
    if start > len(first):
        return None
    try:
        header = json.loads(first[_LENGTH_BYTES:start])
        ends = [
            int(tensor["data_offsets"][1]) for name, tensor in header.items() if name[:2] != "__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return start + max(ends, default=0)


def store_entries(
    repository: Repository,
    entries: Sequence[Entry],
    *,
    bases: Iterable[bytes] = (),
    files: Iterable[StoredFile] = (),
    root_attributes: tuple[int, int] = (0, 0),
) -> Root:
    """Store the manifest of a tree put together from snapshots (``bases``) and stored files.

    Directories may be left out. Raises the errors of the store.
    """
    bases = tuple(bases)
    claim_bases(repository, bases)
    index = DedupIndex()
    known = KnownChunks(repository, index)
    known.learn_snapshots(bases)
    for file in files:
        frames = list(dict.fromkeys(frame for frame, _ in file.places.values()))
        numbers = {frame: number for number, frame in enumerate(frames)}
        index.add_located(
            frames, ((name, numbers[frame], at) for name, (frame, at) in file.places.items())
        )
    with _writer(repository, index) as writer:
        return store_manifest(
            repository, with_parents(entries), known, writer, root_attributes=root_attributes
        )


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """Return ``entries`` in the order of a manifest, with every directory above them."""
    found = {entry.path: entry for entry in entries}
    for entry in list(found.values()):
        above = entry.path.rpartition(b"/")[0]
        while above and above not in found:
            mode = None if entry.mode is None else 0o755
            found[above] = Entry(above, Kind.DIRECTORY, mode=mode, mtime_ns=entry.mtime_ns)
            above = above.rpartition(b"/")[0]
    return sorted(found.values(), key=lambda entry: sort_key(entry.path))


@contextmanager
def _writer(
    repository: Repository, index: DedupIndex, codec: Codec = Codec.ZSTD
) -> Iterator[PackWriter]:
    writer = PackWriter(repository.objects, index, codec=codec)
    try:
        yield writer
    finally:
        writer.close()
