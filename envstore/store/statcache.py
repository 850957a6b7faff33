"""Remembers what files held when they were last read, so that unchanged ones are not read again.

A local SQLite file; losing it costs time, never correctness. Recipes are kept per tree and path
with the signature (size, times, inode) they were read under. Besides, the signature of a whole
tree leads straight to its manifest.
"""

from __future__ import annotations

import contextlib
import sqlite3
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import CorruptError, EnvstoreError
from envstore.store.binary import pack_array, unpack_array
from envstore.store.chunking import CHUNKER_ID
from envstore.store.digest import DIGEST_SIZE

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trees (
    id INTEGER PRIMARY KEY, identity TEXT UNIQUE, signature BLOB, manifest BLOB);
CREATE TABLE IF NOT EXISTS files (
    tree INTEGER, path BLOB, signature BLOB, digest BLOB, names BLOB, sizes BLOB,
    PRIMARY KEY (tree, path)) WITHOUT ROWID;
"""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a file held: its size, its digest and its chunk references.

    ``digest`` is empty for a file that its source leaves out of the snapshot.
    """

    digest: bytes
    refs: tuple[tuple[bytes, int], ...] = ()

    @property
    def omitted(self) -> bool:
        """Whether the source leaves the file out."""
        return not self.digest

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(size for _, size in self.refs)


class StatCache:
    """One SQLite file shared by concurrent pushes; use each instance from one thread."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. One that is damaged is started anew."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = self._open(path)
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open(path)
        except OSError as error:
            raise EnvstoreError(
                f"cannot use the cache directory {path.parent}: {error.strerror}",
                hint="set ENVSTORE_CACHE_DIR",
            ) from error

    def _open(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
                raise sqlite3.DatabaseError("another version")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def manifest(self, identity: str, signature: bytes) -> bytes | None:
        """Return the manifest of the tree if it last had exactly this signature."""
        row = self._db.execute(
            "SELECT manifest FROM trees WHERE identity = ? AND signature = ?",
            (_key(identity), signature),
        ).fetchone()
        return bytes(row[0]) if row and row[0] else None

    def recipes(self, identity: str) -> dict[bytes, tuple[bytes, Recipe]]:
        """Return ``{path: (signature, recipe)}`` of a tree; about 2 us a file."""
        rows = self._db.execute(
            "SELECT path, files.signature, digest, names, sizes FROM files "
            "JOIN trees ON tree = id WHERE identity = ?",
            (_key(identity),),
        )
        found = {}
        for path, signature, name, names, sizes in rows:
            with contextlib.suppress(CorruptError):
                found[path] = signature, Recipe(name, _refs(names, sizes))
        return found

    def save(
        self,
        identity: str,
        signature: bytes,
        manifest: bytes,
        changed: Iterable[tuple[bytes, bytes, Recipe]],
        gone: Iterable[bytes],
    ) -> None:
        """Remember a pushed tree: ``changed`` are ``(path, signature, recipe)``; atomic.

        An empty ``signature`` says that some file was not settled, so that the tree as a whole
        is not to be trusted next time.
        """
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute(
                "INSERT INTO trees (identity, signature, manifest) VALUES (?, ?, ?) "
                "ON CONFLICT (identity) DO UPDATE SET "
                "signature = excluded.signature, manifest = excluded.manifest",
                (_key(identity), signature, manifest),
            )
            (tree,) = db.execute(
                "SELECT id FROM trees WHERE identity = ?", (_key(identity),)
            ).fetchone()
            db.executemany(
                "DELETE FROM files WHERE tree = ? AND path = ?", ((tree, path) for path in gone)
            )
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                ((tree, path, sign, r.digest, *_blobs(r)) for path, sign, r in changed),
            )
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


def _key(identity: str) -> str:
    # Recipes cut another way are of no use, so the way is part of the name.
    text = f"{CHUNKER_ID}\0{identity}"
    return text.encode(errors="surrogateescape").hex() if not text.isascii() else text


def _refs(names: bytes, sizes: bytes) -> tuple[tuple[bytes, int], ...]:
    numbers = unpack_array(sizes, 4)
    return tuple(
        (names[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE], size) for i, size in enumerate(numbers)
    )


def _blobs(recipe: Recipe) -> tuple[bytes, bytes]:
    names = b"".join(name for name, _ in recipe.refs)
    return names, pack_array(array("I", (size for _, size in recipe.refs)))
