"""Fetches snapshots ahead of the jobs that will mount them, beside all that is mounted."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from envstore.errors import EnvstoreError, NotFoundError, UnavailableError
from envstore.fuse.bringing import Bringer
from envstore.fuse.lease import Asked
from envstore.fuse.metrics import Metrics
from envstore.fuse.prefetch import ProfileSearch, plan
from envstore.fuse.volumes import Volumes
from envstore.store.cache import BlobCache
from envstore.store.locations import FrameRef

_AT_ONCE, _MOST, _REMEMBERED = 2, 32, 256
_CONCURRENCY = 2
_SHARE = 0.8
"""Of the cache, what one snapshot may fill."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Warming:
    """One snapshot on its way: ``of`` stored bytes are wanted, ``had`` were here before.

    ``left_out`` are those that the cache has no room for.
    """

    state: str = "waiting"
    of: int = 0
    had: int = 0
    left_out: int = 0
    reason: str = ""
    account: Metrics = field(default_factory=Metrics)

    def report(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "bytes": min(self.of, self.had + self.account.brought_bytes),
            "of": self.of,
            "left_out": self.left_out,
            "reason": self.reason,
        }


class Warmer:
    """Warms a node's cache, a few snapshots at a time. Belongs to one trio run."""

    def __init__(self, volumes: Volumes, bringer: Bringer) -> None:
        self._volumes = volumes
        self._bringer = bringer
        self._turns = trio.CapacityLimiter(_AT_ONCE)
        self._all: dict[str, _Warming] = {}

    def begin(self, nursery: trio.Nursery, asked: Asked, *, whole: bool) -> str:
        """Begin to fetch what ``asked`` names, in ``nursery``; returns the name for ``report``.

        What its profile names; with ``whole`` then everything else. Raises ``UnavailableError``
        when too many wait already.
        """
        ended = [name for name, one in self._all.items() if one.state in ("done", "failed")]
        if len(self._all) - len(ended) >= _MOST:
            raise UnavailableError(
                f"{_MOST} snapshots are being fetched ahead", hint="ask again when some are done"
            )
        for name in ended[: max(0, len(self._all) - _REMEMBERED)]:
            del self._all[name]
        identity = secrets.token_hex(8)
        self._all[identity] = warming = _Warming()
        nursery.start_soon(self._warm, warming, asked, whole)
        return identity

    def report(self, identity: str) -> dict[str, Any]:
        """Return ``state``, ``bytes`` here and ``of`` how many, ``left_out`` and a ``reason``.

        The state is ``waiting``, ``loading``, ``fetching``, ``done`` or ``failed``. Raises
        ``NotFoundError``: another server knows nothing of what was begun here.
        """
        warming = self._all.get(identity)
        if warming is None:
            raise NotFoundError("nothing is fetched ahead under this id", hint="ask for it again")
        return warming.report()

    async def _warm(self, warming: _Warming, asked: Asked, whole: bool) -> None:
        name = asked.lease.name
        try:
            async with self._turns:
                warming.state = "loading"
                frames = await self._wanted(warming, asked, whole)
                warming.state = "fetching"
                loader = self._volumes.supplies.supply(asked.source).loader
                await loader.stream(frames, concurrency=_CONCURRENCY, account=warming.account)
                left = await trio.to_thread.run_sync(_missing, frames, self._volumes.cache)
            if left:
                raise UnavailableError(f"{left} of {warming.of} bytes could not be fetched")
            warming.had = warming.of
            warming.state = "done"
            _log.info("fetched %s ahead: %d bytes", name, warming.of)
        except EnvstoreError as error:
            warming.reason, warming.state = str(error), "failed"
            _log.warning("cannot fetch %s ahead: %s", name, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, others go on
            warming.reason, warming.state = f"it failed: {type(error).__name__}", "failed"
            _log.exception("fetching %s ahead failed", name)

    async def _wanted(self, warming: _Warming, asked: Asked, whole: bool) -> Sequence[FrameRef]:
        """Prove, load, and decide what is to be fetched."""
        lease, bringer, volumes = asked.lease, self._bringer, self._volumes
        snapshot = await bringer.prove(asked)
        prefix = os.fsencode(lease.prefix)
        repository, _ = await bringer.opened(asked.source, snapshot)
        volumes.supplies.supply(asked.source, repository)
        await volumes.run_supplies()
        search = ProfileSearch(repository, snapshot, lease.profile)
        served = volumes.served(asked.source, snapshot, prefix)
        if served is None:
            content = await bringer.content(asked, repository, snapshot)
            os.close(content.fd)  # the tree does without
        else:
            content = served.content
        if lease.prefix and lease.fast_path != "off":
            try:
                await bringer.fast_parts.of(content)
            except EnvstoreError as error:
                _log.info("no fast path for %s: %s", lease.name, error)

        def decide() -> Sequence[FrameRef]:
            room = int(volumes.cache.capacity * _SHARE)
            frames = plan(search.result(), content.tree, content.locations, room)
            if whole:
                frames = [*dict.fromkeys((*frames, *content.locations.frames))]
            frames, warming.left_out = _fitting(frames, room)
            warming.of = sum(frame.stored for frame in frames)
            warming.had = warming.of - _missing(frames, volumes.cache)
            return frames

        return await trio.to_thread.run_sync(decide)


def _fitting(frames: list[FrameRef], room: int) -> tuple[list[FrameRef], int]:
    """Return the frames that fit into ``room`` raw bytes, and the stored bytes of the others."""
    fits = []
    left_out = 0
    for frame in frames:
        room -= frame.raw
        if room >= 0:
            fits.append(frame)
        else:
            left_out += frame.stored
    return fits, left_out


def _missing(frames: Sequence[FrameRef], cache: BlobCache) -> int:
    """Return the stored bytes of the frames that are not cached."""
    return sum(frame.stored for frame in frames if not cache.contains(frame.digest))
