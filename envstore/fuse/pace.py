"""Keeps transfers that nobody waits for below a bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST = 0.25
"""Seconds' worth of bytes that may come at once after a pause."""


class Pace:
    """A bucket of ``rate`` bytes a second, shared by any number of threads."""

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate} bytes a second")
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free = clock()
        """When all bytes taken so far will have been paid for."""

    def wait(self, size: int) -> None:
        """Return when ``size`` bytes more keep the rate."""
        with self._lock:
            now = self._clock()
            self._free = max(self._free, now - _BURST) + size / self._rate
            pause = self._free - now
        if pause > 0:
            self._sleep(pause)
