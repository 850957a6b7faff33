"""What passes everything on to another object store, for those that change some of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from envstore.store.objects.base import ObjectInfo, ObjectStore, ignore
from envstore.store.objects.body import Body


class PassingObjects:
    """``inner`` as it is, with its address and traffic. See ``ObjectStore``."""

    def __init__(self, inner: ObjectStore) -> None:
        """Pass on to ``inner``, which is closed with this."""
        self.url = inner.url
        self.traffic = inner.traffic
        self.inner = inner

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self.inner.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        return self.inner.get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on."""
        self.inner.get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        return self.inner.iter_range(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its opaque version."""
        return self.inner.get_versioned(key)

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key``."""
        self.inner.put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` only if the object still has ``version``."""
        return self.inner.put_if(key, data, version)

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None``."""
        return self.inner.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``."""
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        """Remove the object."""
        self.inner.delete(key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object while ``check`` holds, in time or not at all."""
        self.inner.delete_within(key, seconds, check)

    def settle(self, seconds: float) -> None:
        """Return once nobody who is gone can delete anything any more."""
        self.inner.settle(seconds)

    def now(self) -> float:
        """Return the time by the store's clock."""
        return self.inner.now()

    def close(self) -> None:
        """Release what ``inner`` holds."""
        self.inner.close()
