"""Remembers what files held when they were last read, so that unchanged ones are not read again.

A local SQLite file; losing it costs time, never correctness. Recipes are kept per tree and path
with the signature (size, times, inode) they were read under. Besides, the signature of a whole
tree leads straight to its manifest.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, CorruptError, EnvstoreError, NoSpaceError
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
_PATIENCE = 30.0
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DENIED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


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
    """One SQLite file shared by concurrent pushes; use each instance from one thread.

    Damage is met by starting anew. Every method raises ``AccessDeniedError``, ``NoSpaceError``,
    and ``EnvstoreError`` for a broken disk.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file."""
        self._path = path
        with self._errors():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if _code(error) not in _DAMAGE:
                    raise
                self._discard()
                self._db = self._open()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def manifest(self, identity: str, signature: bytes) -> bytes | None:
        """Return the manifest of the tree if it last had exactly this signature.

        An empty signature is that of a tree which is not to be trusted, and has none.
        """
        query = "SELECT manifest FROM trees WHERE identity = ? AND signature = ?"
        rows = self._select(query, _key(identity), signature) if signature else []
        return rows[0][0] if rows and rows[0][0] else None

    def recipes(self, identity: str) -> dict[bytes, tuple[bytes, Recipe]]:
        """Return ``{path: (signature, recipe)}`` of a tree; about 2 us a file."""
        rows = self._select(
            "SELECT path, files.signature, digest, names, sizes FROM files "
            "JOIN trees ON tree = id WHERE identity = ?",
            _key(identity),
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
        changed: Sequence[tuple[bytes, bytes, Recipe]],
        gone: Sequence[bytes],
    ) -> None:
        """Remember a pushed tree: ``changed`` are ``(path, signature, recipe)``; atomic.

        An empty ``signature`` says that some file was not settled, so that the tree as a whole
        is not to be trusted next time.
        """
        with self._errors():
            try:
                self._save(_key(identity), signature, manifest, changed, gone)
            except sqlite3.DatabaseError as error:
                if _code(error) not in _DAMAGE:
                    raise
                self._restart()
                self._save(_key(identity), signature, manifest, changed, gone)

    def _save(
        self,
        identity: str,
        signature: bytes,
        manifest: bytes,
        changed: Sequence[tuple[bytes, bytes, Recipe]],
        gone: Sequence[bytes],
    ) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute(
                "INSERT INTO trees (identity, signature, manifest) VALUES (?, ?, ?) "
                "ON CONFLICT (identity) DO UPDATE SET "
                "signature = excluded.signature, manifest = excluded.manifest",
                (identity, signature, manifest),
            )
            (tree,) = db.execute("SELECT id FROM trees WHERE identity = ?", (identity,)).fetchone()
            db.executemany(
                "DELETE FROM files WHERE tree = ? AND path = ?", ((tree, path) for path in gone)
            )
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                ((tree, path, sign, r.digest, *_blobs(r)) for path, sign, r in changed),
            )
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk has rolled back by itself
                db.execute("ROLLBACK")
            raise

    def _select(self, query: str, *values: object) -> list[Any]:
        """Return the rows, none of them if the file turns out to be damaged."""
        with self._errors():
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if _code(error) not in _DAMAGE:
                    raise
                self._restart()
        return []

    def _open(self) -> sqlite3.Connection:
        # Turning a new file over to WAL is the one step SQLite does not wait for by itself.
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._connect()
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
                raise _another_version()
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def _restart(self) -> None:
        self._db.close()
        self._discard()
        self._db = self._open()

    def _discard(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise _failure(self._path, error) from error


def _code(error: sqlite3.Error) -> int:
    # The low byte is the kind of error, the rest its details.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _another_version() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("another version")
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    return error


def _failure(path: Path, error: OSError | sqlite3.Error) -> EnvstoreError:
    reason = f"cannot use the cache {path}: {getattr(error, 'strerror', None) or error}"
    hint = "set ENVSTORE_CACHE_DIR to a directory on a local disk"
    code = _code(error) if isinstance(error, sqlite3.Error) else 0
    if isinstance(error, PermissionError) or code in _DENIED:
        return AccessDeniedError(reason, hint=hint)
    if code == sqlite3.SQLITE_FULL:
        return NoSpaceError(reason, hint=f"free space or {hint}")
    return EnvstoreError(reason, hint=hint)


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
