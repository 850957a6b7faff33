"""An object store that is read no faster than it may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from envstore.errors import UnavailableError
from envstore.store.objects.base import ObjectInfo, ObjectStore, ignore
from envstore.store.objects.body import Body


class Limiter:
    """Hands out ``rate`` bytes a second, to any number of threads in turn."""

    def __init__(self, rate: float) -> None:
        """Begin now; nothing is saved up while nobody asks."""
        self._rate = rate
        self._lock = threading.Lock()
        self._free = time.monotonic()
        self._stopped = threading.Event()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may have been moved. Raises ``UnavailableError`` if stopped."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            until = self._free
        if self._stopped.wait(max(0.0, until - time.monotonic())):
            raise UnavailableError("given up")

    def stop(self) -> None:
        """Let nobody wait any longer."""
        self._stopped.set()


class LimitedObjects:
    """``inner`` with what is read of it paid for at a ``Limiter``. See ``ObjectStore``.

    Of a range the bytes are paid for before they are asked for, of a whole object afterwards.
    """

    def __init__(self, inner: ObjectStore, limiter: Limiter) -> None:
        """Read from ``inner``, which stays open when this is closed."""
        self._inner = inner
        self._limiter = limiter
        self.url = inner.url
        self.traffic = inner.traffic

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        data = self._inner.get(key)
        self._limiter.take(len(data))
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        self._limiter.take(length)
        return self._inner.get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on."""
        self._limiter.take(sum(map(len, views)))
        self._inner.get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        for piece in self._inner.iter_range(key, start, length):
            self._limiter.take(len(piece))
            yield piece

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its version."""
        data, version = self._inner.get_versioned(key)
        self._limiter.take(len(data))
        return data, version

    def put(self, key: str, data: Body) -> None:
        """Store ``data``."""
        self._inner.put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` if the object still has ``version``."""
        return self._inner.put_if(key, data, version)

    def size(self, key: str) -> int | None:
        """Return the object's size."""
        return self._inner.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield what is below ``prefix``."""
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._inner.delete(key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object while ``check`` holds, in time or not at all."""
        self._inner.delete_within(key, seconds, check)

    def settle(self, seconds: float) -> None:
        """Return once nobody who is gone can delete anything any more."""
        self._inner.settle(seconds)

    def now(self) -> float:
        """Return the time of the store's clock."""
        return self._inner.now()

    def close(self) -> None:
        """Do nothing: ``inner`` belongs to whoever made it."""
