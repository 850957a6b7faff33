"""An object store that is opened when it is first needed, and tried again as long as it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectInfo, ObjectStore, Traffic, ignore
from envstore.store.objects.body import Body
from envstore.store.objects.credentials import KeyRing


class DeferredObjects:
    """The store at ``url``, see ``ObjectStore``; every method may also raise what opening does.

    For whoever can do without the store most of the time, as a server whose cache holds
    everything: neither connections nor client libraries are there before they are of use.
    """

    def __init__(self, url: str, keys: KeyRing | None = None) -> None:
        """Remember ``url`` and whose ``keys`` it takes; nothing is looked at yet."""
        self.url = url
        self._keys = keys
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._opened: ObjectStore | None = None

    def _store(self) -> ObjectStore:
        with self._lock:
            if self._opened is None:
                self._opened = open_objects(self.url, keys=self._keys)
                self._opened.traffic = self.traffic
            return self._opened

    def open(self) -> None:
        """Open the store now; an S3 server is not contacted for it."""
        self._store()

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self._store().get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        return self._store().get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on."""
        self._store().get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        return self._store().iter_range(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its opaque version."""
        return self._store().get_versioned(key)

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key``."""
        self._store().put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` only if the object still has ``version``."""
        return self._store().put_if(key, data, version)

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None``."""
        return self._store().size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``."""
        return self._store().list(prefix)

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._store().delete(key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object while ``check`` holds, in time or not at all."""
        self._store().delete_within(key, seconds, check)

    def settle(self, seconds: float) -> None:
        """Return once nobody who is gone can delete anything any more."""
        self._store().settle(seconds)

    def now(self) -> float:
        """Return the time by the store's clock."""
        return self._store().now()

    def close(self) -> None:
        """Release what was opened."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
