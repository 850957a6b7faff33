"""Reads the ELF facts of trees that nobody kept facts of: directories, and pushed ones.

Of a pushed file only those chunks are fetched that its header and tables lie in, which is some
200 KB of a library of 10 MB, and what was found is kept by the content's digest.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.resolver.abi.elf import MAGIC
from envstore.resolver.abi.facts import VERSION, ElfFacts, elf_facts, from_json, to_json
from envstore.resolver.abi.search import Tree
from envstore.store.digest import digest
from envstore.store.locations import FrameRef, Located
from envstore.store.manifest import HOLE, Entry, read_entries
from envstore.store.repository import PARALLEL, Repository
from envstore.store.source import DirectorySource, Kind, access_error
from envstore.store.whereabouts import ATTEMPTS, Whereabouts

_FRAMES_HELD = 32
_MOST_KEPT = 200_000
_PATIENCE = 30.0


def directory_tree(root: Path) -> Tree:
    """Return the ELF files of a directory. Raises ``NotFoundError``, ``AccessDeniedError``."""
    source = DirectorySource(root, kind="env", normalise=True)
    files: dict[str, tuple[str, ElfFacts]] = {}
    links: dict[str, str] = {}
    for entry in source.scan():
        path = os.fsdecode(entry.path)
        if entry.kind is Kind.SYMLINK:
            links[path] = os.fsdecode(entry.target)
        elif entry.kind is Kind.FILE and _may_be_elf(path, bool(entry.mode & 0o111)):
            try:
                facts = elf_facts(source.root / path)
            except OSError as error:
                raise access_error(error, os.fsencode(source.root / path)) from error
            if facts is not None:
                files[path] = owner_of(path), facts
    return Tree(files, links, str(source.root))


def pushed_tree(repository: Repository, manifest: bytes, kept: Path) -> Tree:
    """Return the ELF files of a pushed tree; ``kept`` is the file that remembers their facts.

    Raises what reading the store raises.
    """
    root, locations = repository.located(manifest)
    entries = list(read_entries(repository.parts(root, locations)))
    links = {
        os.fsdecode(entry.path): os.fsdecode(entry.target)
        for entry in entries
        if entry.kind is Kind.SYMLINK
    }
    wanted = list(_candidates(entries))
    with _Kept(kept) as memory:
        known = memory.get({entry.digest for entry, _ in wanted})
        unknown = {entry.digest: (entry, at) for entry, at in wanted if entry.digest not in known}
        frames = _Frames(repository, repository.whereabouts(root, locations))

        def read(item: tuple[Entry, int]) -> ElfFacts | None:
            stored = _StoredFile(frames, *item)
            return elf_facts(stored) if stored.read(0, 4) == MAGIC else None

        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                found = dict(zip(unknown, pool.map(read, unknown.values()), strict=True))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        memory.put(found)
    known |= found
    files = {}
    for entry, _ in wanted:
        facts = known[entry.digest]
        if facts is not None:
            path = os.fsdecode(entry.path)
            files[path] = owner_of(path), facts
    return Tree(files, links)


def owner_of(path: str) -> str:
    """Return what to call the package of a file of which only the path is known."""
    parts = path.split("/")
    if "site-packages" in parts[:-1]:
        # What auditwheel adds lies beside the package, in NAME.libs.
        return parts[parts.index("site-packages") + 1].removesuffix(".libs").partition(".")[0]
    if "lib-dynload" in parts or parts[-1].startswith(("python3", "libpython3")):
        return "python"
    return "the environment"


def _may_be_elf(path: str, executable: bool) -> bool:
    return executable or ".so" in path.rpartition("/")[2]


def _candidates(entries: Sequence[Entry]) -> Iterator[tuple[Entry, int]]:
    """Yield files to look into, with the number of their first chunk reference."""
    number = 0
    for entry in entries:
        path = os.fsdecode(entry.path)
        if entry.kind is Kind.FILE and _may_be_elf(path, entry.executable):
            yield entry, number
        number += len(entry.refs)


@dataclass(slots=True)
class _StoredFile:
    """A file of the store; see ``elf.Source``."""

    frames: _Frames
    entry: Entry
    first: int

    @property
    def size(self) -> int:
        return self.entry.size

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        starts = list(accumulate((size for _, size in self.entry.refs), initial=0))
        pieces = []
        at = max(bisect.bisect_right(starts, offset) - 1, 0)
        while at < len(self.entry.refs) and starts[at] < end:
            name, length = self.entry.refs[at]
            low, high = max(offset - starts[at], 0), min(end - starts[at], length)
            if name == HOLE:
                pieces.append(bytes(high - low))
            else:
                chunk = self.frames.chunk(self.first + at, name, length, self.entry.path)
                pieces.append(bytes(chunk[low:high]))
            at += 1
        return b"".join(pieces)


class _Frames:
    """Frames that were fetched, the last few of them."""

    def __init__(self, repository: Repository, whereabouts: Whereabouts) -> None:
        self._repository, self._whereabouts = repository, whereabouts
        self._held: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def chunk(self, number: int, name: bytes, size: int, path: bytes) -> memoryview:
        """Return a chunk, proven. Raises ``CorruptError`` and what the store raises."""
        for _ in range(ATTEMPTS):
            locations = self._whereabouts.locations
            try:
                return self._chunk(locations, number, name, size, path)
            except (CorruptError, NotFoundError):
                if self._whereabouts.again(locations) is None:
                    raise
        return self._chunk(self._whereabouts.locations, number, name, size, path)

    def _chunk(
        self, locations: Located, number: int, name: bytes, size: int, path: bytes
    ) -> memoryview:
        place = locations.ref_frames[number]
        if place >= len(locations.frames):
            raise CorruptError(f"locations: a chunk of {os.fsdecode(path)} is nowhere")
        start = locations.ref_offsets[number]
        data = memoryview(self._load(locations.frames[place]))[start : start + size]
        if digest(data) != name:
            raise CorruptError(f"chunk {name.hex()} is not where its locations say")
        return data

    def _load(self, frame: FrameRef) -> bytes:
        with self._lock:
            if frame.digest in self._held:
                self._held.move_to_end(frame.digest)
                return self._held[frame.digest]
        raw = self._repository.load_frames([frame])[frame.digest]
        with self._lock:
            self._held[frame.digest] = raw
            while len(self._held) > _FRAMES_HELD:
                self._held.popitem(last=False)
        return raw


class _Kept:
    """Facts by the digest of the content they are of. Losing them costs time only."""

    def __init__(self, path: Path) -> None:
        self._db: sqlite3.Connection | None = None
        with contextlib.suppress(OSError, sqlite3.Error):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._db = _open(path)
            except sqlite3.OperationalError:
                raise  # locked, or not ours to write
            except sqlite3.DatabaseError:
                path.unlink()
                self._db = _open(path)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *error: object) -> None:
        if self._db is not None:
            self._db.close()

    def get(self, names: set[bytes]) -> dict[bytes, ElfFacts | None]:
        """Return what is kept of ``names``; ``None`` stands for a file that is not ELF."""
        found: dict[bytes, ElfFacts | None] = {}
        if self._db is None:
            return found
        query = "SELECT facts FROM facts WHERE digest = ? AND version = ?"
        with contextlib.suppress(sqlite3.Error):
            for name in names:
                row = self._db.execute(query, (name, VERSION)).fetchone()
                # What cannot be understood is read again.
                with contextlib.suppress(ValueError, EnvstoreError):
                    if row is not None:
                        found[name] = from_json(json.loads(row[0]))[""] if row[0] else None
        return found

    def put(self, found: dict[bytes, ElfFacts | None]) -> None:
        """Keep facts; the oldest go when there are too many."""
        if self._db is None or not found:
            return
        rows = [
            (name, VERSION, json.dumps(to_json({"": facts})) if facts else "")
            for name, facts in found.items()
        ]
        with contextlib.suppress(sqlite3.Error), self._db:
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", rows)
            self._db.execute(
                "DELETE FROM facts WHERE rowid <= (SELECT MAX(rowid) FROM facts) - ?", [_MOST_KEPT]
            )


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_PATIENCE)
    try:
        db.execute(
            "CREATE TABLE IF NOT EXISTS facts (digest BLOB, version INTEGER, facts TEXT, "
            "PRIMARY KEY (digest, version))"
        )
    except BaseException:
        db.close()
        raise
    return db
