"""What is counted, how counts outlive a server, and how Prometheus gets to see them."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from envstore.errors import UsageError
from envstore.fuse.histogram import BUCKETS, Histogram, bound
from envstore.fuse.ledger import SLOT, read_counts, write_counts
from envstore.fuse.metrics import Metrics
from envstore.fuse.prometheus import CONTENT_TYPE, check_address, render
from envstore.fuse.reader import Reader
from envstore.fuse.scraping import serve_metrics
from tests.site import Site

# Histograms.


def test_durations_fall_where_they_belong() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.9e-6, 1.5e-6, 3e-6, 0.001, 1.0, 1e9):
        histogram.add(seconds)
    assert histogram.count == 7
    assert histogram.counts[:3] == [2, 1, 1]
    assert histogram.counts[-1] == 1
    for seconds in (1.7e-6, 0.004, 77.0):
        one = Histogram()
        one.add(seconds)
        bucket = one.counts.index(1)
        assert bound(bucket - 1) <= seconds < bound(bucket)


def test_quantiles_are_right_within_a_factor_of_two() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0
    for number in range(1, 1001):
        histogram.add(number / 1000)
    for share in (0.01, 0.5, 0.99, 1.0):
        assert share / 2 <= histogram.quantile(share) <= share * 2.1
    with pytest.raises(ValueError, match="buckets"):
        Histogram([1, 2])


# The ledger.


@pytest.fixture
def memory() -> Any:
    fd = os.memfd_create("counts")
    yield fd
    os.close(fd)


def test_what_was_counted_last_is_read(memory: int) -> None:
    assert read_counts(memory) is None
    for number in range(5):
        write_counts(memory, {"number": number, "padding": "x" * (100 - 20 * number)})
        found = read_counts(memory)
        assert found is not None
        assert found["number"] == number
    with pytest.raises(ValueError, match="bytes of counts"):
        write_counts(memory, {"too much": "x" * SLOT})


@pytest.mark.parametrize("at", [0, 9, 13, 20, 60])
def test_a_write_that_was_cut_short_is_as_if_it_had_not_been(memory: int, at: int) -> None:
    write_counts(memory, {"number": 1})
    write_counts(memory, {"number": 2, "more": "y" * 100})
    place = 0 if os.pread(memory, 1, 0) == b"\x02" else SLOT
    byte = os.pread(memory, 1, place + at)
    os.pwrite(memory, bytes([byte[0] ^ 0x55]), place + at)
    assert read_counts(memory) == {"number": 1}
    write_counts(memory, {"number": 3})
    assert read_counts(memory) == {"number": 3}


def test_a_killed_writer_leaves_counts_whole(memory: int) -> None:
    program = (
        "import sys; from envstore.fuse.ledger import write_counts; number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    write_counts(int(sys.argv[1]), {'number': number, 'same': [number] * 1000})\n"
        "    if number == 20: print(flush=True)\n"
    )
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(memory)],
            pass_fds=[memory],
            stdout=subprocess.PIPE,
        )
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            child.kill()
        found = read_counts(memory)
        assert found is not None
        assert found["same"] == [found["number"]] * 1000


# Counts of a mount.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.store.close()


def _resumed(memory: int) -> Metrics:
    state = read_counts(memory)
    assert state is not None
    metrics = Metrics()
    metrics.resume(state)
    return metrics


def test_the_next_server_goes_on_counting(site: Site, memory: int) -> None:
    site.again()

    async def main(reader: Reader) -> None:
        await site.read(reader, "large")
        await site.read(reader, "large", 0, 10)

    site.run(main)
    site.metrics.observe("read", 0.25)
    site.metrics.requests["read"] += 2
    write_counts(memory, site.metrics.state())
    before = site.metrics.report()
    assert before["fetched"]["frames"] > 0
    assert before["store"]["requests"] > 0
    assert before["missed_bytes"] <= before["fetched"]["bytes"]
    after = _resumed(memory)
    assert after.report() == before
    after.observe("read", 0.5)
    write_counts(memory, after.state())
    third = _resumed(memory)
    assert third.report()["latency"]["read"]["count"] == 2
    assert third.report()["requests"] == {"read": 2}


def test_totals_of_several(site: Site) -> None:
    one, two = Metrics(), Metrics()
    for metrics, number in ((one, 3), (two, 4)):
        metrics.include(site.fetcher)
        metrics.bytes_read = number
        metrics.requests["read"] = number
        metrics.observe("read", number)
    total = one.including([two]).report()
    assert (total["bytes_read"], total["requests"]) == (7, {"read": 7})
    assert (total["latency"]["read"]["count"], total["latency"]["read"]["seconds"]) == (2, 7)
    assert total["store"]["requests"] == 2 * one.report()["store"]["requests"]
    assert one.bytes_read == 3


def test_what_was_fetched_ahead_and_used_is_told_from_what_was_not(site: Site) -> None:
    site.again()

    async def main(reader: Reader) -> None:
        frames = list(dict.fromkeys(site.locations.frames))
        await reader._loader.stream(frames)
        assert site.metrics.prefetched == len(frames)
        for _ in range(2):
            await site.read(reader, "large")
        report = site.metrics.report()["prefetch"]
        assert 0 < report["used_frames"] < report["frames"] == len(frames)
        assert 0 < report["used_bytes"] < report["bytes"]

    site.run(main)


# Prometheus.

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (\S+)")
_PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')
_ESCAPE = re.compile(r"\\(.)")


def _parse(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read the text format as strictly as its description allows."""
    assert text.endswith("\n")
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    types: dict[str, str] = {}
    helped: set[str] = set()
    family = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, name, _ = line.split(" ", 3)
            assert name not in helped
            helped.add(name)
            family = name
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert name not in types
            assert kind in ("counter", "gauge", "histogram")
            types[name] = kind
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
            assert name in {family + suffix for suffix in suffixes}
            assert types[family] != "counter" or name.endswith("_total")
            pairs = tuple(
                (key, _ESCAPE.sub(lambda found: {"n": "\n"}.get(found[1], found[1]), text))
                for key, text in _PAIR.findall(labels or "")
            )
            assert len(dict(pairs)) == len(pairs)
            assert (name, pairs) not in samples
            samples[name, pairs] = float(value)
    assert helped == set(types)
    return samples


AWKWARD = 'a "quoted"\\ name,\nüber \udcff}'


def _report() -> dict[str, Any]:
    metrics = Metrics()
    metrics.requests.update({"read": 5, "lookup": 2})
    metrics.bytes_read, metrics.inline, metrics.missed = 12345678901234, 7, 3
    metrics.corrupt, metrics.prefetched = 2, 9
    for seconds in (1e-6, 20e-6, 0.003, 5.0, 4000.0):
        metrics.observe("read", seconds)
    mount = {"mountpoint": AWKWARD, "ref": "team/env:latest", "digest": "ab" * 32}
    return {**metrics.report(), "restarts": 4, "mounts": [{**Metrics().report(), **mount}]}


def test_the_page_says_what_was_counted() -> None:
    samples = _parse(render(_report()))
    assert samples["envstore_requests_total", (("kind", "read"),)] == 5
    assert samples["envstore_read_bytes_total", ()] == 12345678901234
    assert samples["envstore_restarts_total", ()] == 4
    assert samples["envstore_verify_failures_total", (("where", "store"),)] == 2
    ours = (("mountpoint", AWKWARD.replace("\udcff", "\\udcff")), ("ref", "team/env:latest"))
    assert samples["envstore_mount_cache_hits_total", ours] == 0
    assert samples["envstore_mount_info", (*ours, ("digest", "ab" * 32))] == 1
    buckets = [
        (float(labels[1][1]), value)
        for (name, labels), value in samples.items()
        if name == "envstore_request_seconds_bucket"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), 5)
    assert samples["envstore_request_seconds_count", (("kind", "read"),)] == 5
    assert samples["envstore_request_seconds_sum", (("kind", "read"),)] == pytest.approx(4005.003)
    for seconds in (1e-6, 20e-6, 0.003, 5.0):
        below = [value for limit, value in buckets if limit < seconds]
        above = [value for limit, value in buckets if limit >= seconds]
        assert max(below, default=0) < min(above)
    assert len(buckets) == BUCKETS - 4 + 1


def test_a_server_of_nothing_yet_has_a_page() -> None:
    assert _parse(render({**Metrics().report(), "restarts": 0}))


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def _served(address: str, page: Callable[[], str], client: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_metrics, address, page)
            with trio.fail_after(60):
                await client()
            nursery.cancel_scope.cancel()

    trio.run(main)


def _get(connection: http.client.HTTPConnection, path: str, method: str = "GET") -> Any:
    while True:
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # not yet
        finally:
            connection.close()  # after a failure too, or it would take no other request


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_page_is_served(kind: str, tmp_path: Path) -> None:
    if kind == "tcp":
        # An address of this process alone: nobody else takes the port before it is served.
        pid = os.getpid()
        host = f"127.{1 + (pid >> 16) % 254}.{pid >> 8 & 255}.{pid & 255}"
        with socket.create_server((host, 0)) as probe:
            port = probe.getsockname()[1]
        address = f"{host}:{port}"
        connection = http.client.HTTPConnection(host, port, timeout=30)
    else:
        address = str(tmp_path / "metrics.sock")
        connection = _Unix(address)
        # A server that was killed left it behind.
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(address)

    async def client() -> None:
        run = trio.to_thread.run_sync
        status, headers, body = await run(_get, connection, "/metrics")
        assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE)
        assert int(headers["Content-Length"]) == len(body)
        assert _parse(body.decode())
        assert (await run(_get, connection, "/metrics?x=1"))[0] == 200
        assert (await run(_get, connection, "/"))[0] == 404
        assert (await run(_get, connection, "/metrics/"))[0] == 404
        assert (await run(_get, connection, "/metrics", "POST"))[0] == 405
        status, headers, body = await run(_get, connection, "/metrics", "HEAD")
        assert (status, body) == (200, b"")

    _served(address, lambda: render(_report()), client)


def test_what_is_no_request_is_not_answered(tmp_path: Path) -> None:
    address = str(tmp_path / "metrics.sock")

    async def client() -> None:
        while True:
            try:
                stream = await trio.open_unix_socket(address)
                break
            except OSError:
                await trio.sleep(0.01)
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - it may break at any step
            for _ in range(1000):
                await stream.send_all(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1000)
                await trio.sleep(0)
        await stream.aclose()
        for words in (b"", b"\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n"):
            stream = await trio.open_unix_socket(address)
            await stream.send_all(words or b"x")
            await stream.send_eof()
            assert not (await _all(stream)).startswith(b"HTTP/1.0 200")
            await stream.aclose()
        stream = await trio.open_unix_socket(address)
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await _all(stream)).startswith(b"HTTP/1.0 500")
        await stream.aclose()

    async def _all(stream: trio.SocketStream) -> bytes:
        found = b""
        while piece := await stream.receive_some():
            found += piece
        return found

    def broken() -> str:
        raise RuntimeError("a bug")

    _served(address, broken, client)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = tmp_path / "precious"
    address.write_text("data")

    async def client() -> None:
        while "no metrics at" not in caplog.text:
            await trio.sleep(0.01)

    _served(str(address), lambda: "", client)
    assert address.read_text() == "data"


def test_addresses() -> None:
    assert check_address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert check_address("[::1]:80") == ("::1", 80)
    assert check_address(":9464") == ("127.0.0.1", 9464)
    assert check_address("./metrics.sock") is None
    for wrong in ("", "metrics", "host:", "host:port", "host:0", "host:65536", "1:²"):
        with pytest.raises(UsageError, match="address"):
            check_address(wrong)
