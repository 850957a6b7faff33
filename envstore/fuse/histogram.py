"""How long things took, in buckets of powers of two."""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = 30
"""Bucket ``i`` counts what took less than 2**i microseconds and was not counted before; one more
counts all that took longer than the last, nine minutes."""


class Histogram:
    """Counts durations. Adding one takes a fraction of a microsecond."""

    __slots__ = ("counts", "seconds")

    def __init__(self, counts: Sequence[int] = (), seconds: float = 0.0) -> None:
        """Go on from ``counts`` of each bucket and their sum in ``seconds``."""
        if counts and len(counts) != BUCKETS + 1:
            raise ValueError(f"{len(counts)} buckets instead of {BUCKETS + 1}")
        self.counts = list(counts) or [0] * (BUCKETS + 1)
        self.seconds = seconds

    def add(self, seconds: float) -> None:
        """Count one duration."""
        bucket = int(seconds * 1e6).bit_length()
        self.counts[bucket if bucket < BUCKETS else BUCKETS] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return about how many seconds the fastest ``share`` took at most; 0 if there are none.

        Never off by more than a factor of two.
        """
        left = share * self.count
        for bucket, count in enumerate(self.counts):
            if count and count >= left:
                low = bound(bucket - 1) if bucket else 0.0
                return low + (bound(bucket) - low) * left / count
            left -= count
        return 0.0


def bound(bucket: int) -> float:
    """Return the seconds below which ``bucket`` counts."""
    return float(2**bucket) / 1e6
