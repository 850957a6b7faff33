"""Holds uploads down to so many bytes a second, so that training keeps its share of the network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from envstore.store import session_records
from envstore.store.doomed import STATE_KEY
from envstore.store.objects.base import ObjectInfo, ObjectStore, ignore
from envstore.store.objects.body import Body, length

BURST_SECONDS = 1.0
"""How long an idle time is saved up for: after any pause, a second's worth passes at once."""


class TokenBucket:
    """Lets ``rate`` bytes a second pass, and ``rate`` more after a pause. Safe for many threads.

    Whoever comes is let through as long as the account is not overdrawn, and then charged: an
    object larger than a second's worth passes too, and those after it wait for it to be paid off.
    Over any time of ``t`` seconds at most ``rate * (t + BURST_SECONDS)`` bytes and one object for
    each thread pass.
    """

    def __init__(
        self,
        rate: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Begin with a second's worth. ``None`` lets everything pass, until ``limit`` is called."""
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._rate = rate
        self._balance = (rate or 0.0) * BURST_SECONDS
        self._seen = clock()

    @property
    def rate(self) -> float | None:
        """Bytes a second; ``None`` without a limit."""
        return self._rate

    def limit(self, rate: float | None) -> None:
        """Let ``rate`` bytes a second pass from now on; ``None`` lifts the limit."""
        with self._lock:
            self._refill()
            self._rate = rate
            self._balance = min(self._balance, (rate or 0.0) * BURST_SECONDS)

    def take(self, count: int) -> None:
        """Wait until ``count`` bytes may pass."""
        while True:
            with self._lock:
                self._refill()
                if self._rate is None:
                    return
                if self._balance > 0:
                    self._balance -= count
                    return
                # So that the account is not overdrawn any more, by one byte.
                pause = (1 - self._balance) / self._rate
            self._sleep(pause)

    def _refill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            most = self._rate * BURST_SECONDS
            self._balance = min(most, self._balance + (now - self._seen) * self._rate)
        self._seen = now


class LimitedObjects:
    """An ``ObjectStore`` whose uploads go through a bucket; all else passes as it is."""

    def __init__(self, inner: ObjectStore, bucket: TokenBucket) -> None:
        self.url = inner.url
        self.traffic = inner.traffic
        self._inner = inner
        self._bucket = bucket

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self._inner.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        return self._inner.get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with what is there from ``start``."""
        self._inner.get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        return self._inner.iter_range(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its opaque version."""
        return self._inner.get_versioned(key)

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key`` when the bucket lets it pass."""
        self._bucket.take(length(data))
        self._inner.put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` only if the object still has ``version``, once it may pass.

        What says that this writer is alive passes at once: late, it would be taken for dead.
        """
        if not key.startswith((session_records.PREFIX, STATE_KEY)):
            self._bucket.take(len(data))
        return self._inner.put_if(key, data, version)

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None``."""
        return self._inner.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``."""
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
        """Return the time by the store's clock."""
        return self._inner.now()

    def close(self) -> None:
        """Release what was opened."""
        self._inner.close()
