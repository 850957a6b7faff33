"""What whoever asks the node server may have: what their own credentials can read in the store.

That a snapshot is served already, or lies in the cache, says nothing about who asks next. So each
of them is made to prove it, by a request with those credentials and no others; for some minutes
the proof is remembered, under a keyed hash, so that it costs the next mount nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from typing import Any

from envstore.fuse.opened import Opened
from envstore.fuse.supplies import Source, Supplies
from envstore.store.cache import BlobCache
from envstore.store.digest import parse_hex
from envstore.store.lineage import check_lineage
from envstore.store.objects import Credentials, KeyRing
from envstore.store.refs import RefName, read_ref
from envstore.store.repository import Repository
from envstore.store.snapshots import load_snapshot

REMEMBERED = 300.0
"""Seconds that a proof is good for."""

_PROOFS, _STORES, _LINEAGES = 4096, 32, 4096


class Access:
    """Decides who may have which snapshot. Every method may be called from any thread."""

    def __init__(self, cache: BlobCache, supplies: Supplies) -> None:
        """Ask with what callers give, or else through ``supplies``."""
        self._cache = cache
        self._supplies = supplies
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._proofs: dict[bytes, tuple[float, bytes]] = {}
        self._lineages: dict[tuple[bytes, bytes], None] = {}
        self._stores: Opened[bytes] = Opened(_STORES)

    def known(
        self, source: Source, ref: str, of: str, credentials: Credentials | None
    ) -> bytes | None:
        """Return the snapshot if it was proven lately that it may be had. Asks nobody.

        Only of a ref that ends in a whole ``@digest``: others move.
        """
        snapshot = pinned(ref)
        if snapshot is None or (credentials is None and not of):
            return snapshot
        with self._lock:
            end, found = self._proofs.get(
                self._hashed(source.url, credentials, ref, of), (0.0, b"")
            )
        return found if time.monotonic() < end else None

    def prove(self, source: Source, ref: str, of: str, credentials: Credentials | None) -> bytes:
        """Return the snapshot that ``ref`` stands for, having read it with these credentials.

        ``of`` names a REF whose snapshot it must be, or an ancestor's. Two requests more than
        ``ref`` takes, and those of the ancestors that are not cached. Raises ``NotFoundError``,
        ``AccessDeniedError``, ``UsageError``, ``UnavailableError``.
        """
        repository = self._store(source, credentials)
        snapshot = repository.resolve(ref)
        if credentials is not None:
            load_snapshot(repository.objects, snapshot)  # the cache would tell anybody
        if of:
            self._check_lineage(repository, of, snapshot)
        if pinned(ref) is not None:
            with self._lock:
                proof = self._hashed(source.url, credentials, ref, of)
                self._proofs.pop(proof, None)
                self._proofs[proof] = (time.monotonic() + REMEMBERED, snapshot)
                _shorten(self._proofs, _PROOFS)
        return snapshot

    def _store(self, source: Source, credentials: Credentials | None) -> Repository:
        if credentials is None:
            return self._supplies.repository(source)
        ring = KeyRing(credentials)
        return self._stores.get(
            self._hashed(source.url, credentials),
            lambda: Repository.open(source.url, self._cache, ring),
        )

    def _check_lineage(self, repository: Repository, of: str, snapshot: bytes) -> None:
        name = RefName.parse(of)
        head = read_ref(repository.objects, name).snapshot
        if head == snapshot or (head, snapshot) in self._lineages:
            return
        check_lineage(repository, head, snapshot, str(name))
        with self._lock:
            self._lineages[head, snapshot] = None
            _shorten(self._lineages, _LINEAGES)

    def _hashed(self, url: str, credentials: Credentials | None, *words: str) -> bytes:
        keys = None if credentials is None else credentials.encode()
        text = json.dumps([url, keys, *words])
        return hashlib.blake2b(text.encode(), key=self._key, digest_size=32).digest()


def pinned(ref: str) -> bytes | None:
    """Return the digest that a ref ends in, ``None`` unless there is a whole one.

    Raises ``UsageError`` if what is before it is no REF.
    """
    head, at, digest = ref.rpartition("@")
    if head:
        RefName.parse(head)
    return parse_hex(digest) if at else None


def _shorten(table: dict[Any, Any], most: int) -> None:
    while len(table) > most:
        del table[next(iter(table))]
