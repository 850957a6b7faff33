"""Counts what a mount does, for benchmarks and for whoever wonders what it is doing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from envstore.store.fetch import FrameFetcher
from envstore.store.objects.base import ObjectStore


@dataclass(slots=True)
class Metrics:
    """Totals since the server started.

    ``requests`` counts the kernel's requests by kind. Of the runs of bytes that reads were made
    of, ``inline`` came from the cache without waiting, ``waited`` from the cache after waiting
    for the disk, ``missed`` from the store. ``ahead`` counts frames asked for before anybody
    read them, ``damaged`` cached blobs found wrong, ``corrupt`` frames that came wrong from the
    store, ``retries`` requests that were sent again, ``errors`` reads that failed. Of the frames
    and stored bytes that came before anybody waited for them, ``prefetched``, reads have used
    ``prefetched_used`` so far.
    """

    requests: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    inline: int = 0
    waited: int = 0
    missed: int = 0
    ahead: int = 0
    prefetched: int = 0
    prefetched_bytes: int = 0
    prefetched_used: int = 0
    prefetched_used_bytes: int = 0
    damaged: int = 0
    corrupt: int = 0
    retries: int = 0
    errors: int = 0

    def report(
        self, fetcher: FrameFetcher, objects: ObjectStore, used: tuple[int, int]
    ) -> dict[str, Any]:
        """Return everything as one JSON object.

        ``used`` are the raw bytes of all chunks that reads touched, and their share of the
        stored bytes: what a perfect reader would have fetched.
        """
        fetched, traffic = fetcher.fetched, objects.traffic
        return {
            "requests": dict(self.requests),
            "bytes_read": self.bytes_read,
            "runs": {"inline": self.inline, "waited": self.waited, "missed": self.missed},
            "frames_ahead": self.ahead,
            "damaged_blobs": self.damaged,
            "errors": self.errors,
            "fetched": {
                "requests": fetched.requests,
                "frames": fetched.frames,
                "bytes": fetched.bytes,
            },
            "store": {"requests": traffic.requests, "bytes": traffic.bytes_in},
            "used": {"raw_bytes": used[0], "stored_bytes": used[1]},
        }
