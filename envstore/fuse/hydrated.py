"""Snapshots that are whole on this machine, and what mounts them without a store.

Each has a directory in the cache's ``hydrated``: the snapshot, its manifest and locations as the
store has them, the manifest's parts, the image of its names, and second names of its files, which
keep them from being evicted; and what ``placing`` makes for each prefix. What has a record is
whole, for that is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from envstore.errors import ConflictError, CorruptError, UsageError
from envstore.fuse.content import Content, content_from_image
from envstore.fuse.erofs import ensure_image, find_image
from envstore.fuse.image import make_image
from envstore.store.cache import BlobCache
from envstore.store.digest import parse_hex
from envstore.store.locations import open_locations
from envstore.store.manifest import decode_part, open_root
from envstore.store.private import make_private, private

FORMAT = 1
_RECORD = "record.json"


@dataclass(frozen=True, slots=True)
class Record:
    """What is told of a hydrated snapshot.

    Digests are hex; ``ref`` is the name it was asked by, ``files`` and ``bytes`` count distinct
    contents as they are stored, ``at`` is when it became whole (RFC 3339 UTC), ``relocates``
    whether any of it is another wherever it is mounted.
    """

    snapshot: str
    manifest: str
    ref: str
    files: int
    bytes: int
    at: str
    relocates: bool = False


@dataclass(frozen=True, slots=True)
class Hydrated:
    """A snapshot that is whole here; ``local`` is the directory of files for ``mount_fast``."""

    record: Record
    directory: Path
    local: Path

    @property
    def snapshot(self) -> bytes:
        """The digest of the snapshot."""
        return bytes.fromhex(self.record.snapshot)

    @property
    def manifest(self) -> bytes:
        """The digest of its manifest."""
        return bytes.fromhex(self.record.manifest)

    def image(self) -> Path:
        """Return the image for ``mount_fast``, verified, and written anew if it is damaged.

        It shows files as they are stored. Raises ``CorruptError``, ``EnvstoreError``.
        """
        images = self.directory / "image"
        found = find_image(self.manifest, images)
        if found is not None:
            return found
        content = self.content()
        os.close(content.fd)
        return ensure_image(content.tree, self.manifest, images)

    def content(self, prefix: bytes = b"") -> Content:
        """Return the snapshot's tree and locations, for who serves it; ``fd`` is the caller's.

        The tree is that at ``prefix``, or as it is stored if that is empty. Raises
        ``CorruptError``, ``UsageError`` (the prefix is too long).
        """
        try:
            data, places, parts = (
                (self.directory / name).read_bytes() for name in ("manifest", "locations", "parts")
            )
        except OSError as error:
            raise CorruptError(
                f"the hydrated snapshot in {self.directory} is not whole: {error.strerror}",
                hint=f"envstore hydrate @{self.record.snapshot[:12]}",
            ) from error
        root = open_root(data, self.manifest)
        refs = sum(part.refs for part in root.parts)
        locations = open_locations(places, self.manifest, parts=len(root.parts), refs=refs)
        ends, at = [], 0
        for info in root.parts:
            ends.append((at, at + info.size))
            at += info.size
        decoded = (decode_part(parts[start:end]) for start, end in ends)
        fd = make_image(self.manifest, root, decoded, locations, prefix)
        return content_from_image(fd, self.record.ref, self.snapshot)


def hydrated(cache: BlobCache, name: bytes) -> Hydrated | None:
    """Return the hydrated snapshot whose digest, or whose manifest's, is ``name``."""
    for found in list_hydrated(cache):
        if name in (found.snapshot, found.manifest):
            return found
    return None


def find_hydrated(cache: BlobCache, text: str) -> Hydrated | None:
    """Return the hydrated snapshot that ``@digest-prefix`` stands for; ``None`` for a ref.

    A ref may have moved since, which only the store can tell. Raises ``UsageError`` when several
    hydrated snapshots start so.
    """
    prefix = text.removeprefix("@")
    if prefix == text or len(prefix) < 4:
        return None
    found = [item for item in list_hydrated(cache) if item.record.snapshot.startswith(prefix)]
    if len(found) > 1:
        raise UsageError(f"{text} matches {len(found)} hydrated snapshots", hint="give more digits")
    return found[0] if found else None


def list_hydrated(cache: BlobCache) -> list[Hydrated]:
    """Return all snapshots that are whole here, the latest last."""
    found = []
    for directory in _top(cache).glob("*/"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fields = json.loads((directory / _RECORD).read_text())
            if fields.pop("format") == FORMAT:
                record = Record(**fields)
                if record.snapshot == directory.name and parse_hex(record.manifest):
                    found.append(Hydrated(record, directory, cache.files))
    return sorted(found, key=lambda item: (item.record.at, item.record.snapshot))


def list_unfinished(cache: BlobCache) -> list[tuple[bytes, bool]]:
    """Return the snapshots that were begun and are not whole, each with whether one is at it."""
    whole = {item.directory for item in list_hydrated(cache)}
    found = []
    for directory in sorted(_top(cache).glob("*/")):
        snapshot = parse_hex(directory.name)
        if snapshot is not None and directory not in whole:
            try:
                with claim(cache, snapshot):
                    found.append((snapshot, False))
            except ConflictError:
                found.append((snapshot, True))
    return found


def log_path(cache: BlobCache, snapshot: bytes) -> Path:
    """Return where a hydration in the background says what it does."""
    return _top(cache) / f"{snapshot.hex()}.log"


def drop_hydrated(cache: BlobCache, snapshot: bytes) -> bool:
    """Let the files of a snapshot be evicted again; returns whether any were kept from it.

    An unfinished hydration counts as well. Raises ``ConflictError`` while one is running.
    """
    directory = _top(cache) / snapshot.hex()
    if not directory.exists():
        return False
    with claim(cache, snapshot), cache.errors():
        # Without its record it is not whole any more, however far the rest of this comes.
        (directory / _RECORD).unlink(missing_ok=True)
        log_path(cache, snapshot).unlink(missing_ok=True)
        shutil.rmtree(directory)
    return True


@contextmanager
def claim(cache: BlobCache, snapshot: bytes) -> Iterator[Path]:
    """Hold the directory of a snapshot, made if missing, against other processes.

    Raises ``ConflictError`` when another has it.
    """
    directory = _top(cache) / snapshot.hex()
    with cache.errors():
        make_private(directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another process is hydrating @{snapshot.hex()[:12]}", hint="wait for it"
            ) from None
        yield directory
    finally:
        os.close(fd)


def save_record(directory: Path, record: Record) -> None:
    """Declare a snapshot whole. Raises ``OSError``."""
    save(directory / _RECORD, json.dumps({"format": FORMAT, **asdict(record)}).encode())


def save(path: Path, data: bytes) -> None:
    """Replace a file by one that is safely on disk. Raises ``OSError``."""
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb", opener=private) as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _top(cache: BlobCache) -> Path:
    return cache.root / "hydrated"
