"""The stores that a server fetches from, and whose credentials it does that with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from envstore.errors import EnvstoreError
from envstore.fuse.complaints import Complaints
from envstore.fuse.keeping import Keepsake
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.opened import Opened
from envstore.store.cache import BlobCache
from envstore.store.fetch import FrameFetcher
from envstore.store.objects import Credentials, KeyRing, parse_url
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.deferred import DeferredObjects
from envstore.store.repository import Repository

KEYS = "keys/"
"""What the keepsakes of credentials are called, before the URL that they are for."""

_MOST = 256


@dataclass(frozen=True, slots=True)
class Source:
    """A store by its canonical URL, and whether it is opened with credentials that were given.

    If so, those of this process have no part in it: the two ways to one store share no request.
    """

    url: str
    given: bool = False

    @classmethod
    def asked(cls, url: str, *, given: bool) -> Source:
        """Return the source that a URL as somebody wrote it stands for. Raises ``UsageError``."""
        return cls(parse_url(url).url, given)

    @classmethod
    def kept(cls, body: Mapping[str, Any]) -> Source:
        """Return the source that a snapshot's keepsake names."""
        return cls(body["store"], bool(body.get("given")))


@dataclass(slots=True, eq=False)
class Supply:
    """One store, as a source of frames."""

    objects: ObjectStore
    fetcher: FrameFetcher
    loader: FrameLoader
    running: bool = False


class Supplies:
    """All sources of one server's frames."""

    def __init__(
        self,
        cache: BlobCache,
        metrics: Metrics,
        complaints: Complaints,
        patience: float,
        keep: Callable[[str, Keepsake], None],
    ) -> None:
        """Fetch into ``cache``; ``keep`` is told which credentials the next server needs."""
        self._cache = cache
        self._metrics = metrics
        self._complaints = complaints
        self._patience = patience
        self._keep = keep
        self._supplies: dict[Source, Supply] = {}
        self._rings: dict[str, KeyRing] = {}
        self._opened: Opened[Source] = Opened(_MOST)

    def repository(self, source: Source) -> Repository:
        """Return the open store. Blocking; may be called from any thread.

        Raises as ``Repository.open`` does; ``AccessDeniedError`` if credentials are to be given
        and none were.
        """
        ring = self._ring(source)
        return self._opened.get(source, lambda: Repository.open(source.url, self._cache, ring))

    def supply(self, source: Source, repository: Repository | None = None) -> Supply:
        """Return the supply from a source, which is opened when needed unless it is open."""
        found = self._supplies.get(source)
        if found is None:
            if repository is None:
                objects: ObjectStore = DeferredObjects(source.url, self._ring(source))
                fetcher = FrameFetcher(objects, self._cache)
            else:
                objects, fetcher = repository.objects, repository.fetcher
            loader = FrameLoader(
                fetcher,
                self._cache,
                self._metrics,
                self._complaints,
                patience=self._patience,
                renewed=source.given,
            )
            found = self._supplies[source] = Supply(objects, fetcher, loader)
        return found

    def admit(self, source: Source, credentials: Credentials) -> None:
        """Use from now on credentials that were found to be good, whatever runs already."""
        ring = self._ring(source)
        if ring is not None and ring.add(credentials):
            keys = [one.encode() for one in ring.all()]
            body = {"store": source.url, "credentials": keys}
            self._keep(KEYS + source.url, Keepsake(body))

    def restore(self, keepsake: Keepsake) -> None:
        """Take over credentials that another server was given."""
        ring = self._ring(Source(keepsake.body["store"], given=True))
        if ring is not None:
            for credentials in reversed(keepsake.body["credentials"]):
                ring.add(Credentials.parse(credentials))

    def prepare(self) -> None:
        """Do ahead what takes time: get ready to ask."""
        for supply in self._supplies.values():
            if isinstance(supply.objects, DeferredObjects):
                with contextlib.suppress(EnvstoreError):
                    supply.objects.open()

    async def run(self, nursery: trio.Nursery) -> None:
        """Begin to fetch from those that were added, with tasks in ``nursery``."""
        for supply in [*self._supplies.values()]:
            if not supply.running:
                supply.running = True
                await nursery.start(supply.loader.run)

    def _ring(self, source: Source) -> KeyRing | None:
        return self._rings.setdefault(source.url, KeyRing()) if source.given else None


def prefix_of(body: Mapping[str, Any]) -> bytes:
    """Return the prefix in a snapshot's keepsake; before there were relocations it had none."""
    return os.fsencode(body.get("prefix", ""))
