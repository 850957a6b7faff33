"""An object store that is read no faster than it may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from envstore.errors import UnavailableError
from envstore.store.objects.base import ObjectStore, ignore
from envstore.store.objects.passing import PassingObjects


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


class LimitedObjects(PassingObjects):
    """``inner`` with what is read of it paid for at a ``Limiter``. See ``ObjectStore``.

    Of a range the bytes are paid for before they are asked for, of a whole object afterwards.
    """

    def __init__(self, inner: ObjectStore, limiter: Limiter) -> None:
        """Read from ``inner``, which stays open when this is closed."""
        super().__init__(inner)
        self._limiter = limiter

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        data = self.inner.get(key)
        self._limiter.take(len(data))
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        self._limiter.take(length)
        return self.inner.get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on."""
        self._limiter.take(sum(map(len, views)))
        self.inner.get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        for piece in self.inner.iter_range(key, start, length):
            self._limiter.take(len(piece))
            yield piece

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its version."""
        data, version = self.inner.get_versioned(key)
        self._limiter.take(len(data))
        return data, version

    def close(self) -> None:
        """Do nothing: ``inner`` belongs to whoever made it."""
