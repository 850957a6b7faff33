"""Counts what a mount does, for benchmarks, monitoring and whoever wonders what it is doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from envstore.fuse.histogram import Histogram
from envstore.store.fetch import FrameFetcher

_NUMBERS = (
    *("bytes_read", "inline", "waited", "missed", "missed_bytes", "ahead"),
    *("brought_bytes", "brought_requests"),
    *("prefetched", "prefetched_bytes", "prefetched_used", "prefetched_used_bytes"),
    *("damaged", "corrupt", "retries", "errors"),
)


@dataclass(slots=True)
class Metrics:
    """Totals of one snapshot's reads, or of a whole server, since it was first started.

    ``requests`` counts the kernel's requests by kind, ``latency`` how long they took. Of the runs
    of bytes that reads were made of, ``inline`` came from the cache without waiting, ``waited``
    from the cache after waiting for the disk, ``missed`` from the store, in frames of
    ``missed_bytes`` stored bytes. ``ahead`` counts frames asked for before anybody read them,
    ``damaged`` cached blobs found wrong, ``corrupt`` frames that came wrong from the store,
    ``retries`` requests that were sent again, ``errors`` reads that failed. Of the frames and
    stored bytes that came before anybody waited for them, ``prefetched``, reads have used
    ``prefetched_used`` so far; what a former server prefetched counts as never used.
    ``brought_bytes`` are the stored bytes of frames that came on account of one snapshot, read
    or fetched ahead, in ``brought_requests`` requests.
    """

    requests: Counter[str] = field(default_factory=Counter)
    latency: dict[str, Histogram] = field(default_factory=dict)
    bytes_read: int = 0
    inline: int = 0
    waited: int = 0
    missed: int = 0
    missed_bytes: int = 0
    ahead: int = 0
    brought_bytes: int = 0
    brought_requests: int = 0
    prefetched: int = 0
    prefetched_bytes: int = 0
    prefetched_used: int = 0
    prefetched_used_bytes: int = 0
    damaged: int = 0
    corrupt: int = 0
    retries: int = 0
    errors: int = 0
    _fetchers: list[FrameFetcher] = field(default_factory=list)
    _before: Counter[str] = field(default_factory=Counter)

    def observe(self, kind: str, seconds: float) -> None:
        """Count how long the kernel waited for the answer to a request of some kind."""
        histogram = self.latency.get(kind)
        if histogram is None:
            histogram = self.latency[kind] = Histogram()
        histogram.add(seconds)

    def include(self, fetcher: FrameFetcher) -> None:
        """Count what ``fetcher`` and its store have received, and will, among these totals."""
        self._fetchers.append(fetcher)

    def including(self, others: Iterable[Metrics]) -> Metrics:
        """Return new metrics of what these and ``others`` have counted by now."""
        total = Metrics()
        for one in (self, *others):
            total.resume(one.state())
        return total

    def state(self) -> dict[str, Any]:
        """Return all counts as JSON, for ``resume`` in the server that comes next."""
        return {
            "requests": dict(self.requests),
            "latency": {
                kind: [histogram.counts, histogram.seconds]
                for kind, histogram in self.latency.items()
            },
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "received": dict(self._received()),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Add the counts of an earlier server; those that this version lacks are left out."""
        self.requests.update(state["requests"])
        for kind, (counts, seconds) in state["latency"].items():
            ours = self.latency.get(kind, Histogram())
            total = [one + other for one, other in zip(ours.counts, counts, strict=True)]
            self.latency[kind] = Histogram(total, ours.seconds + seconds)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + state["numbers"].get(name, 0))
        self._before.update(state["received"])

    def report(self, used: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """Return everything as one JSON object.

        ``used`` are the raw bytes of all chunks that reads touched, and their share of the
        stored bytes: what a perfect reader would have fetched.
        """
        received = self._received()
        return {
            "requests": dict(self.requests),
            "latency": {
                kind: {
                    "count": histogram.count,
                    "seconds": round(histogram.seconds, 9),
                    "p50": histogram.quantile(0.5),
                    "p99": histogram.quantile(0.99),
                    "buckets": histogram.counts,
                }
                for kind, histogram in self.latency.items()
            },
            "bytes_read": self.bytes_read,
            "runs": {"inline": self.inline, "waited": self.waited, "missed": self.missed},
            "missed_bytes": self.missed_bytes,
            "frames_ahead": self.ahead,
            "prefetch": {
                "frames": self.prefetched,
                "bytes": self.prefetched_bytes,
                "used_frames": self.prefetched_used,
                "used_bytes": self.prefetched_used_bytes,
            },
            "damaged_blobs": self.damaged,
            "corrupt_frames": self.corrupt,
            "retries": self.retries,
            "errors": self.errors,
            "fetched": {
                "requests": received["fetch_requests"],
                "frames": received["frames"],
                "bytes": received["fetch_bytes"],
            },
            "store": {"requests": received["requests"], "bytes": received["bytes"]},
            "used": {"raw_bytes": used[0], "stored_bytes": used[1]},
        }

    def _received(self) -> Counter[str]:
        total = Counter(self._before)
        for fetcher in self._fetchers:
            fetched, traffic = fetcher.fetched, fetcher.traffic
            total["fetch_requests"] += fetched.requests
            total["frames"] += fetched.frames
            total["fetch_bytes"] += fetched.bytes
            total["requests"] += traffic.requests
            total["bytes"] += traffic.bytes_in
        return total
