"""What is counted, in the text format that Prometheus reads (0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from envstore.errors import UsageError
from envstore.fuse.histogram import BUCKETS, bound

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORTEST = 4
"""The first bucket shown: 16 microseconds."""

_Labels = Mapping[str, str]


def render(report: Mapping[str, Any]) -> str:
    """Return a server's report as Prometheus' text format.

    ``report`` is what ``Metrics.report`` returns, with ``restarts`` and, in ``mounts``, for each
    mount the report of its own reads with its ``mountpoint``, ``ref`` and ``digest``.
    """
    page = Page()
    page.family(
        *("requests_total", "counter", "Requests of the kernel."),
        [({"kind": kind}, count) for kind, count in sorted(report["requests"].items())],
    )
    page.histogram(
        *("request_seconds", "How long the kernel waited for an answer."),
        [({"kind": kind}, found) for kind, found in sorted(report["latency"].items())],
    )
    for name, text, path in _TOTALS:
        page.family(name, "counter", text, [({}, _at(report, path))])
    page.family(
        *("verify_failures_total", "counter", "Bytes found not to be what they should be."),
        [
            ({"where": "cache"}, report["damaged_blobs"]),
            ({"where": "store"}, report["corrupt_frames"]),
        ],
    )
    mounts = [
        ({name: str(mount[name]) for name in ("mountpoint", "ref")}, mount)
        for mount in report.get("mounts", ())
    ]
    page.family(
        *("mount_info", "gauge", "1 for each mount."),
        [({**labels, "digest": str(mount["digest"])}, 1) for labels, mount in mounts],
    )
    for name, text, path in _OF_MOUNTS:
        page.family(name, "counter", text, [(labels, _at(mount, path)) for labels, mount in mounts])
    return page.text()


_TOTALS = (
    ("restarts_total", "Times that a server took over from one that died.", "restarts"),
    ("read_bytes_total", "Bytes that programs have read.", "bytes_read"),
    ("read_errors_total", "Reads that failed.", "errors"),
    ("cache_hits_total", "Ranges read that the cache had at hand.", "runs.inline"),
    ("cache_waits_total", "Ranges read from the cache's disk.", "runs.waited"),
    ("cache_misses_total", "Ranges read that had to be fetched.", "runs.missed"),
    ("fetched_frames_total", "Frames fetched from the store.", "fetched.frames"),
    ("fetched_bytes_total", "Bytes of packs fetched from the store.", "fetched.bytes"),
    ("fetch_requests_total", "Requests for ranges of packs.", "fetched.requests"),
    ("store_requests_total", "All requests sent to the store.", "store.requests"),
    ("store_received_bytes_total", "All bytes received from the store.", "store.bytes"),
    ("retries_total", "Requests to the store that were sent again.", "retries"),
    ("prefetched_frames_total", "Frames fetched before they were read.", "prefetch.frames"),
    ("prefetched_bytes_total", "Their stored bytes.", "prefetch.bytes"),
    ("prefetch_used_frames_total", "Those of them that were read later.", "prefetch.used_frames"),
    ("prefetch_used_bytes_total", "Their stored bytes.", "prefetch.used_bytes"),
)
_OF_MOUNTS = (
    ("mount_read_bytes_total", "Bytes that programs have read.", "bytes_read"),
    ("mount_read_errors_total", "Reads that failed.", "errors"),
    ("mount_cache_hits_total", "Ranges read that the cache had at hand.", "runs.inline"),
    ("mount_cache_waits_total", "Ranges read from the cache's disk.", "runs.waited"),
    ("mount_cache_misses_total", "Ranges read that had to be fetched.", "runs.missed"),
    ("mount_missed_bytes_total", "Stored bytes of the frames missed.", "missed_bytes"),
)


def _at(report: Mapping[str, Any], path: str) -> float:
    value: Any = report
    for name in path.split("."):
        value = value[name]
    return float(value)


class Page:
    """Families of samples, each with its help and type. All names begin with ``envstore_``."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(
        self, name: str, kind: str, text: str, samples: Iterable[tuple[_Labels, float]]
    ) -> None:
        """Add a counter or gauge."""
        self._head(name, kind, text)
        for labels, value in samples:
            self._sample(name, labels, value)

    def histogram(
        self, name: str, text: str, samples: Iterable[tuple[_Labels, Mapping[str, Any]]]
    ) -> None:
        """Add histograms as ``Metrics.report`` has them: ``buckets``, ``count``, ``seconds``."""
        self._head(name, "histogram", text)
        for labels, found in samples:
            for bucket, count in enumerate(accumulate(found["buckets"])):
                if _SHORTEST <= bucket < BUCKETS:
                    self._sample(f"{name}_bucket", {**labels, "le": f"{bound(bucket):g}"}, count)
            self._sample(f"{name}_bucket", {**labels, "le": "+Inf"}, found["count"])
            self._sample(f"{name}_sum", labels, found["seconds"])
            self._sample(f"{name}_count", labels, found["count"])

    def text(self) -> str:
        """Return the page."""
        return "\n".join((*self._lines, ""))

    def _head(self, name: str, kind: str, text: str) -> None:
        text = text.replace("\\", r"\\").replace("\n", r"\n")
        self._lines += [f"# HELP envstore_{name} {text}", f"# TYPE envstore_{name} {kind}"]

    def _sample(self, name: str, labels: _Labels, value: float) -> None:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        shown = int(value) if value == int(value) else value
        self._lines.append(f"envstore_{name}{f'{{{inside}}}' if inside else ''} {shown}")


def _escaped(text: str) -> str:
    # A path may hold bytes that are no text; the format is UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def check_address(address: str) -> tuple[str, int] | None:
    """Return the host and port of HOST:PORT, ``None`` for the path of a socket.

    A path has a slash in it, and an IPv6 address brackets around it. Raises ``UsageError``.
    """
    if "/" in address:
        return None
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(
            f"{address!r} is no address for metrics",
            hint="write HOST:PORT such as 127.0.0.1:9464, or a path with a slash in it",
        )
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)
