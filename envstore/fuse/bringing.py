"""Brings snapshots from their stores to whoever asks the node server for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from envstore.fuse.access import Access
from envstore.fuse.content import Content, load_content
from envstore.fuse.fastparts import FastParts
from envstore.fuse.lease import Asked
from envstore.fuse.supplies import Source
from envstore.fuse.turns import Turns
from envstore.fuse.volume import Volume
from envstore.fuse.volumes import Volumes
from envstore.store.objects import Credentials
from envstore.store.repository import Repository

_ASKING, _LOADING = 8, 4

_T = TypeVar("_T")


class _Lane:
    """Threads for one store, apart from those of readers and of other stores.

    Whatever does not answer keeps nobody waiting who wants something else.
    """

    def __init__(self) -> None:
        self.asking = trio.CapacityLimiter(_ASKING)
        self.loading = trio.CapacityLimiter(_LOADING)


class Bringer:
    """Proves, loads and prepares for one node server. Belongs to one trio run."""

    def __init__(self, volumes: Volumes, no_fast_path: str = "") -> None:
        self._volumes = volumes
        self._access = Access(volumes.cache, volumes.supplies)
        self._turns = Turns()
        self._lanes: dict[str, _Lane] = {}
        self.fast_parts = FastParts(volumes.cache, no_fast_path)

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
            work = partial(self._access.prove, source, ref, of, credentials)
            snapshot = await self._ask(source, work)
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
            content = await self.content(asked, repository, snapshot)
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
        opening = partial(self._volumes.supplies.repository, source)
        repository = await self._ask(source, opening)
        reading = partial(repository.snapshot, snapshot)
        return repository, (await self._ask(source, reading)).manifest

    async def content(self, asked: Asked, repository: Repository, snapshot: bytes) -> Content:
        """Load a snapshot; a few of a store at a time, for the memory that takes."""
        lease = asked.lease
        prefix = os.fsencode(lease.prefix)
        work = partial(load_content, repository, snapshot, lease.name, prefix)
        return await trio.to_thread.run_sync(work, limiter=self._lane(asked.source).loading)

    async def _ask(self, source: Source, work: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(work, limiter=self._lane(source).asking)

    def _lane(self, source: Source) -> _Lane:
        return self._lanes.setdefault(source.url, _Lane())
