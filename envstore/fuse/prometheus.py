"""What is counted, in the text format that Prometheus reads (0.0.4), over HTTP."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import trio

from envstore.errors import UsageError
from envstore.fuse.histogram import BUCKETS, bound
from envstore.fuse.sockets import listen

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORTEST = 4
"""The first bucket shown: 16 microseconds."""
_MAX_REQUEST, _SECONDS, _CLIENTS = 8 << 10, 10, 16
_AGAIN_AFTER = 5.0

_Labels = Mapping[str, str]

_log = logging.getLogger(__name__)


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


async def serve_metrics(
    address: str,
    render: Callable[[], str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer ``GET /metrics`` at HOST:PORT or a socket's path with what ``render`` returns.

    Until cancelled. An address that cannot be had is tried again and again, for the server
    before this one may still hold it. Raises ``UsageError`` for what is no address.
    """
    place = check_address(address)
    task_status.started()
    listeners: list[trio.SocketListener] = []
    complained = False
    while not listeners:
        try:
            listeners = await _listeners(address, place)
        except OSError as error:
            if not complained:
                _log.warning("no metrics at %s yet: %s", address, error.strerror or error)
            complained = True
            await trio.sleep(_AGAIN_AFTER)
    limiter = trio.CapacityLimiter(_CLIENTS)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_SECONDS):
                async with limiter:
                    await _answer(stream, render)

    await trio.serve_listeners(answer, listeners)


async def _listeners(address: str, place: tuple[str, int] | None) -> list[trio.SocketListener]:
    if place is not None:
        return list(await trio.open_tcp_listeners(place[1], host=place[0]))
    if os.path.lexists(address) and not _is_socket(address):
        raise FileExistsError(errno.EEXIST, f"{address} exists and is no socket")
    listener = listen(address)
    os.chmod(address, 0o660)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


async def _answer(stream: trio.SocketStream, render: Callable[[], str]) -> None:
    """Answer one HTTP request and close the connection."""
    request = bytearray()
    try:
        while b"\r\n\r\n" not in request and b"\n\n" not in request:
            piece = await stream.receive_some()
            request += piece
            if not piece or len(request) > _MAX_REQUEST:
                return
        words = bytes(request).split(b"\r\n", 1)[0].split(b" ")
        if words[0] not in (b"GET", b"HEAD") or len(words) < 2:
            status, body = "405 Method Not Allowed", b"only GET is known here\n"
        elif words[1].split(b"?", 1)[0] != b"/metrics":
            status, body = "404 Not Found", b"look at /metrics\n"
        else:
            try:
                status, body = "200 OK", render().encode()
            except Exception:  # noqa: BLE001 - a bug here must not end the mount
                _log.exception("rendering metrics failed")
                status, body = "500 Internal Server Error", b"see the log\n"
        kind = CONTENT_TYPE if status[0] == "2" else "text/plain"
        head = (
            f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        await stream.send_all(head.encode() + (b"" if words[0] == b"HEAD" else body))
    except trio.BrokenResourceError:
        return  # asked and gone
