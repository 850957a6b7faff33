"""Holds uploads down to so many bytes a second, so that training keeps its share of the network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from envstore.store import session_records
from envstore.store.doomed import STATE_KEY
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.body import Body, length
from envstore.store.objects.passing import PassingObjects

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


class LimitedObjects(PassingObjects):
    """An ``ObjectStore`` whose uploads go through a bucket; all else passes as it is."""

    def __init__(self, inner: ObjectStore, bucket: TokenBucket) -> None:
        super().__init__(inner)
        self._bucket = bucket

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key`` when the bucket lets it pass."""
        self._bucket.take(length(data))
        self.inner.put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` only if the object still has ``version``, once it may pass.

        What says that this writer is alive passes at once: late, it would be taken for dead.
        """
        if not key.startswith((session_records.PREFIX, STATE_KEY)):
            self._bucket.take(len(data))
        return self.inner.put_if(key, data, version)
