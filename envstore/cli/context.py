"""What every command needs before it starts: which store, which cache, how to speak."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from envstore.errors import NotFoundError

if TYPE_CHECKING:
    from envstore.store.cache import BlobCache
    from envstore.store.repository import Repository
    from envstore.store.statcache import StatCache

PROGRAM = "envstore"


@dataclass(slots=True)
class Settings:
    """The global options as given so far; ``None`` leaves the choice to the environment."""

    store: str | None = None
    json: bool = False
    quiet: bool = False
    verbose: int = 0
    cache_dir: Path | None = None
    cache_size: str | None = None

    @property
    def url(self) -> str:
        """The store to use: ``--store``, else ``ENVSTORE_URL``, else the user's own."""
        from envstore.store.objects.url import default_store

        return self._named() or str(default_store())

    @property
    def is_default(self) -> bool:
        """Whether nobody named a store, so that the user's own one is meant."""
        return self._named() is None

    @property
    def cache_directory(self) -> Path:
        """Where the cache lies."""
        from envstore.store.cache import default_directory

        return self.cache_dir or default_directory()

    @property
    def cache_capacity(self) -> int:
        """The cache's cap in bytes. Raises ``UsageError``."""
        from envstore.store.cache import DEFAULT_CAPACITY, parse_size

        text = self.cache_size or os.environ.get("ENVSTORE_CACHE_SIZE")
        return parse_size(text) if text else DEFAULT_CAPACITY

    def cache(self) -> BlobCache:
        """Return the node cache, made if missing. Raises ``AccessDeniedError``, ``UsageError``."""
        from envstore.store.cache import BlobCache

        return BlobCache(self.cache_directory, self.cache_capacity)

    def open(self, *, cached: bool = True) -> Repository:
        """Open the store; without ``cached`` every byte comes from the store itself.

        Raises what ``Repository.open`` does.
        """
        from envstore.store.repository import Repository

        self.require_store()
        return self._watched(Repository.open(self.url, self.cache() if cached else None))

    def _watched(self, repository: Repository) -> Repository:
        """Have what becomes of the store's refs remembered on this machine."""
        from envstore.store.witness import Witness

        repository.witness = Witness(self.cache_directory / "refs" / repository.config.id)
        return repository

    def require_store(self) -> None:
        """Tell whoever has not pushed anything yet so. Raises ``NotFoundError``."""
        if self.is_default and not os.path.exists(self.url):
            raise NotFoundError(
                f"nothing was pushed yet: there is no store in {self.url}",
                hint=f"push something: {PROGRAM} push NAME PATH; or name a store with --store",
            )

    def export_cache(self) -> None:
        """Let the processes that are started from here use the same cache.

        Raises ``UsageError`` for a malformed size.
        """
        capacity = self.cache_capacity
        if self.cache_dir is not None or os.environ.get("ENVSTORE_CACHE_DIR"):
            # Absolute, for a server goes to another directory.
            os.environ["ENVSTORE_CACHE_DIR"] = str(self.cache_directory.absolute())
        if self.cache_size is not None:
            os.environ["ENVSTORE_CACHE_SIZE"] = str(capacity)

    def open_for_push(self) -> tuple[Repository, bool]:
        """Open the store, making the user's own one if it is meant and missing.

        Returns whether it was made.
        """
        if not self.is_default:
            return self.open(), False
        from envstore.store.config import init_store
        from envstore.store.objects import open_objects
        from envstore.store.repository import Repository

        objects = open_objects(self.url, create=True)
        try:
            config, created = init_store(objects)
            return self._watched(Repository(objects, config, self.cache())), created
        except BaseException:
            objects.close()
            raise

    @contextmanager
    def stat_cache(self) -> Iterator[StatCache]:
        """Yield the record of what pushed files held. Raises ``EnvstoreError``."""
        from envstore.store.statcache import StatCache

        opened = StatCache(self.cache_directory / "stat.sqlite")
        try:
            yield opened
        finally:
            opened.close()

    def pending(self, repository: Repository) -> Path:
        """Return where interrupted pushes to this store leave the lists of their packs."""
        return self.cache_directory / "pending" / repository.config.id

    def _named(self) -> str | None:
        return self.store or os.environ.get("ENVSTORE_URL") or None
