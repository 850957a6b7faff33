"""Brings snapshots from their stores to whoever asks the node server for them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from envstore.errors import EnvstoreError
from envstore.fuse.access import Access
from envstore.fuse.content import Content, load_content
from envstore.fuse.fast import prepare_fast_path
from envstore.fuse.lease import Asked
from envstore.fuse.overlay import probe
from envstore.fuse.supplies import Source
from envstore.fuse.volumes import Volume, Volumes
from envstore.store.objects import Credentials
from envstore.store.repository import Repository

_THREADS, _LOADS = 16, 4

_T = TypeVar("_T")


class Turns:
    """Locks by key, each there for as long as somebody wants it."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, trio.Lock] = {}

    @asynccontextmanager
    async def of(self, key: Hashable) -> AsyncIterator[None]:
        """Be the only one with ``key`` in here. Leaving takes no other task's turn."""
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.statistics().locked:
                self._locks.pop(key, None)


class Bringer:
    """Proves, loads and prepares for one node server. Belongs to one trio run."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._access = Access(volumes.cache, volumes.supplies)
        self._turns = Turns()
        # Apart from the threads of readers, whom no store that somebody wants to mount may delay.
        self._threads = trio.CapacityLimiter(_THREADS)
        self._loads = trio.CapacityLimiter(_LOADS)
        self._fast: str | None = "not tried"

    async def prove(self, asked: Asked) -> bytes:
        """Return the snapshot that is asked for; raises if it may not be had.

        At once if that is known. Credentials that are proven now are used from now on for all
        that was asked for with others. Raises as ``Access.prove`` does.
        """
        return await self._proven(asked.source, asked.lease.name, asked.lease.of, asked.credentials)

    async def prove_again(self, asked: Asked, snapshot: bytes) -> None:
        """See that credentials still are good for a snapshot that was had before."""
        if asked.credentials is not None:
            await self._proven(asked.source, f"@{snapshot.hex()}", "", asked.credentials)

    async def _proven(
        self, source: Source, ref: str, of: str, credentials: Credentials | None
    ) -> bytes:
        snapshot = self._access.known(source, ref, of, credentials)
        if snapshot is None:
            snapshot = await self._run(self._access.prove, source, ref, of, credentials)
            if credentials is not None:
                self._volumes.supplies.admit(source, credentials)
        return snapshot

    async def volume(self, asked: Asked, snapshot: bytes) -> Volume:
        """Return a snapshot that is being served from now on, and until its slot is retired.

        Whoever wants to keep it takes a lease before the next checkpoint. Raises as
        ``load_content`` does.
        """
        source, lease = asked.source, asked.lease
        volumes, prefix = self._volumes, os.fsencode(lease.prefix)
        served = volumes.served(source, snapshot, prefix)
        if served is not None:
            return served
        async with self._turns.of((source, snapshot, prefix)):
            repository, manifest = await self.opened(source, snapshot)
            wanted = source, repository.config.id, manifest, prefix
            served = volumes.volume(volumes.find(*wanted))
            if served is not None:
                return served
            content = await self.content(repository, snapshot, lease.name, prefix)
            async with volumes.loading:
                slot = volumes.find(*wanted)
                served = volumes.volume(slot)
                if served is not None:  # brought back meanwhile
                    os.close(content.fd)
                    return served
                served = await volumes.plant(slot, source, repository, content)
                volumes.follow_profile(served, repository, lease.profile)
            return served

    async def opened(self, source: Source, snapshot: bytes) -> tuple[Repository, bytes]:
        """Return the open store and the snapshot's manifest."""
        repository = await self._run(self._volumes.supplies.repository, source)
        return repository, (await self._run(repository.snapshot, snapshot)).manifest

    async def content(
        self, repository: Repository, snapshot: bytes, name: str, prefix: bytes
    ) -> Content:
        """Load a snapshot; a few at a time, for the memory that takes."""
        work = partial(load_content, repository, snapshot, name, prefix)
        return await trio.to_thread.run_sync(work, limiter=self._loads)

    async def fast_parts(self, content: Content) -> dict[str, Any]:
        """Return what the fast path is laid of. Raises ``EnvstoreError`` if there is none."""
        cache = self._volumes.cache
        if self._fast is not None:
            self._fast = await trio.to_thread.run_sync(probe, cache.root)
            if self._fast is not None:
                raise EnvstoreError(self._fast)
        return await trio.to_thread.run_sync(prepare_fast_path, content, cache)

    async def _run(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(partial(work, *arguments), limiter=self._threads)
