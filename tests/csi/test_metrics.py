"""The driver's pages: what they say of a real driver and its volumes, and that they hold out."""

from __future__ import annotations

import http.client
import json
import re
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from envstore.csi.metrics import MAX_VOLUMES, Calls, Pages, Sources
from envstore.csi.nodeserver import NodeServer
from envstore.csi.pages import PageServer
from envstore.csi.probing import driver_answers
from envstore.csi.records import Publication
from envstore.csi.request import Pod, VolumeRequest
from envstore.errors import AccessDeniedError, UsageError
from envstore.fuse.sockets import short_address
from tests.csi.driving import NODE_ID, Site, refused
from tests.fuse.lives import PATIENCE, until

_SAMPLE = re.compile(
    r'envstore_[a-z_]+(?:\{[a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+=.*)?\})? [-+.e0-9]+'
)


def fetch(where: int | str, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and body of one page, at a port or at a socket's path."""
    connection = http.client.HTTPConnection("127.0.0.1", where if isinstance(where, int) else 80)
    if isinstance(where, str):
        connection.sock = socket.socket(socket.AF_UNIX)
        with short_address(where) as address:
            connection.sock.connect(address)
    connection.timeout = PATIENCE
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def samples(page: str) -> dict[str, float]:
    """Return the value of every series, and see that none is there twice."""
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    assert all(map(_SAMPLE.fullmatch, lines)), lines
    found = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert len(found) == len(lines)
    return found


# --- a real driver --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(node_site: Site) -> Site:
    """A driver with metrics at a socket."""
    node_site.start("--metrics", metrics_of(node_site))
    until(lambda: Path(metrics_of(node_site)).exists(), "metrics")
    return node_site


def metrics_of(site: Site) -> str:
    return str(site.base / "metrics.sock")


def status(site: Site) -> dict[str, Any]:
    code, body = fetch(metrics_of(site), "/status")
    assert code == 200
    found = json.loads(body)
    assert isinstance(found, dict)
    return found


def test_a_driver_tells_what_it_has_published(watched: Site) -> None:
    where = metrics_of(watched)
    assert (fetch(where, "/healthz"), fetch(where, "/livez")) == ((200, "ok\n"), (200, "ok\n"))
    assert stat.S_IMODE(Path(where).stat().st_mode) == 0o660
    before = samples(fetch(where, "/metrics")[1])
    refused(lambda: watched.publish(attributes={"ref": "none"}), "NOT_FOUND")
    with watched.published() as target:
        data = (target / "lib/data").read_bytes()
        found = status(watched)
        (volume,) = found["volumes"]
        assert (found["node"], found["published"], found["problems"]) == (NODE_ID, 1, [])
        assert {name: volume[name] for name in ("volume", "namespace", "pod", "target")} == {
            "volume": "csi-1",
            "namespace": "team-a",
            "pod": "pod-1",
            "target": str(target),
        }
        snapshot = watched.store.repository.resolve("env").hex()
        assert (volume["ref"], volume["digest"]) == ("default/env:latest", snapshot)
        assert volume["store"] == "default"
        assert (volume["condition"], volume["bytes_read"]) == ("ok", len(data))
        assert 0 < volume["bytes_fetched"] <= found["node_server"]["bytes_fetched"]
        assert volume["requests"] > 0
        page = samples(fetch(where, "/metrics")[1])
        labels = (
            '{volume="csi-1",namespace="team-a",pod="pod-1",ref="default/env:latest",'
            f'digest="{snapshot[:12]}"}}'
        )
        assert page[f"envstore_csi_volume_fetched_bytes{labels}"] == volume["bytes_fetched"]
        assert page[f"envstore_csi_volume_abnormal{labels}"] == 0
        assert page["envstore_csi_published_volumes"] == 1
        assert page["envstore_csi_node_server_up"] == 1
        assert page["envstore_csi_cache_capacity_bytes"] > page["envstore_csi_cache_bytes"] > 0

    def grown(name: str) -> float:
        return page.get(name, 0) - before.get(name, 0)

    page = samples(fetch(where, "/metrics")[1])
    assert grown('envstore_csi_calls_total{method="NodePublishVolume",code="OK"}') == 1
    assert grown('envstore_csi_calls_total{method="NodePublishVolume",code="NOT_FOUND"}') == 1
    assert grown('envstore_csi_refused_publishes_total{code="NOT_FOUND"}') == 1
    assert grown('envstore_csi_call_seconds_count{method="NodePublishVolume"}') == 2
    assert grown('envstore_csi_call_seconds_count{method="NodeUnpublishVolume"}') == 1
    assert page["envstore_csi_published_volumes"] == 0
    assert not any("csi_volume_" in name for name in page)


def test_a_node_server_that_was_replaced_is_counted(watched: Site) -> None:
    was = status(watched)["node_server"]["restarts"]
    with watched.published() as target:
        watched.kill_server()
        assert (target / "empty").read_bytes() == b""
        until(lambda: status(watched)["node_server"].get("restarts") == was + 1, "a restart")
        assert [one["condition"] for one in status(watched)["volumes"]] == ["ok"]


def test_health_is_of_the_driver_and_of_the_node_server(node_site: Site, tmp_path: Path) -> None:
    """A driver whose node server is away lives, and is not healthy."""
    where = str(tmp_path / "pages")
    node_site.signal()
    node_site.start("--node-socket", tmp_path / "nobody.sock", "--metrics", where)
    try:
        until(lambda: Path(where).exists(), "metrics")
        assert fetch(where, "/livez") == (200, "ok\n")
        code, said = fetch(where, "/healthz")
        assert (code, said.count("\n")) == (503, 1)
        assert "the node server does not answer" in said
        found = json.loads(fetch(where, "/status")[1])
        assert found["problems"] == [found["node_server"]["problem"]]
        assert samples(fetch(where, "/metrics")[1])["envstore_csi_node_server_up"] == 0
    finally:
        node_site.signal()
    assert not Path(where).exists()
    node_site.start("--metrics", metrics_of(node_site))
    until(lambda: Path(metrics_of(node_site)).exists(), "metrics")


def test_an_address_that_is_taken(node_site: Site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        driver = node_site.spawn(
            node_site.arguments(
                *("--endpoint", f"unix://{tmp_path}/csi.sock", "--state-dir", tmp_path / "state"),
                *("--metrics", where),
            )
        )
        assert driver.wait(PATIENCE) == 1
    assert f"envstore: cannot listen at {where}: Address already in use" in node_site.driver_log()


def test_whether_a_driver_answers(watched: Site, tmp_path: Path) -> None:
    assert driver_answers(str(watched.socket), PATIENCE)
    assert not driver_answers(str(tmp_path / "none.sock"), 0.5)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        assert not driver_answers(str(tmp_path / "silent.sock"), 0.5)


# --- the pages alone ------------------------------------------------------------------------------


def volume(number: int, **fields: Any) -> Publication:
    request = VolumeRequest("", 'default/e"v\\il:latest', pod=Pod("ns", f"pod-{number}", "u"))
    words = {"volume": f"vol-{number}", "target": f"/t/{number}", "digest": "ab" * 32, **fields}
    return Publication(
        lease="0" * 16,
        store="main",
        url="",
        access="",
        readonly=True,
        request=request,
        started="",
        **words,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Nothing is published, and there is no node server."""
    silent = NodeServer(str(tmp_path / "none.sock"))
    return Sources("n", Calls(), silent, list, str, lambda: True)


@pytest.fixture
def serve(sources: Sources, tmp_path: Path) -> Iterator[Callable[..., int]]:
    servers: list[PageServer] = []

    def start(pages: Pages | None = None) -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        servers.append(PageServer(f"127.0.0.1:{port}", pages or Pages(sources)))
        assert servers[-1].port == port
        return port

    yield start
    for server in servers:
        server.close()


def test_only_pages_are_served(serve: Callable[..., int]) -> None:
    port = serve()
    assert fetch(port, "/livez?verbose")[0] == 200
    assert fetch(port, "/metrics", "HEAD") == (200, "")
    for path in ("/", "/../etc/passwd", "/metrics/", "//status", "http://elsewhere/status"):
        assert fetch(port, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "CONNECT", "get"):
        assert fetch(port, "/metrics", method)[0] == 405, method


def test_hostile_clients_do_not_keep_others_waiting(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.csi.pages._SECONDS", 1.0)
    port = serve()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:
        silent[0].sendall(b"GET /metrics HTTP/1.1\r\n")
        silent[1].sendall(b"GET /" + b"x" * 100_000)
        silent[2].sendall(b"\0\xff\r\n\r\n")
        silent[3].sendall(b"\r\n\r\n")
        with ThreadPoolExecutor(8) as pool:
            assert {one[0] for one in pool.map(lambda _: fetch(port, "/livez"), range(16))} == {200}
    finally:
        for one in silent:
            one.close()


def test_a_page_that_fails_is_an_error_of_its_own(
    serve: Callable[..., int], sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Pages):
        def status(self) -> dict[str, Any]:
            raise KeyError("secret")

    port = serve(Broken(sources))
    assert fetch(port, "/status") == (500, "see the log\n")
    assert "KeyError" in caplog.text
    assert fetch(port, "/livez")[0] == 200


def test_a_driver_that_does_not_answer(tmp_path: Path) -> None:
    pages = Pages(Sources("n", Calls(), None, list, str, lambda: False))
    assert pages.live() == pages.healthy() == "the driver does not answer"


def test_a_controller_has_no_node(tmp_path: Path) -> None:
    pages = Pages(Sources("", Calls(), None, list, lambda: "line 3 is wrong", lambda: True))
    assert pages.healthy() == ""
    assert pages.status()["problems"] == ["line 3 is wrong"]
    page = samples(pages.metrics())
    assert page["envstore_csi_config_broken"] == 1
    assert not any("node" in name or "published_v" in name for name in page)


def test_labels_are_escaped_and_bounded(sources: Sources, tmp_path: Path) -> None:
    many = [volume(number, complete=True) for number in range(MAX_VOLUMES + 10)]
    long = [volume(number, volume="x" * 500, target="/other") for number in (1, 1)]
    found = Pages(Sources("n", Calls(), sources.node, lambda: [*many, *long], str, lambda: True))
    assert (found.status()["published"], len(found.status()["volumes"])) == (
        MAX_VOLUMES + 12,
        MAX_VOLUMES,
    )
    assert {one["condition"] for one in found.status()["volumes"]} == {"unknown"}
    text = found.metrics()
    assert samples(text)["envstore_csi_published_volumes"] == MAX_VOLUMES + 12
    assert r'ref="default/e\"v\\il:latest"' in text
    few = Pages(Sources("n", Calls(), sources.node, lambda: long, str, lambda: True))
    (name,) = [name for name in samples(few.metrics()) if "volume_abnormal" in name]
    assert len(name) < 500


def test_kinds_of_calls_are_bounded() -> None:
    calls = Calls()
    for number in range(1000):
        calls.observe(f"Method{number}", "OK", 0.1)
    counts, _ = calls.report()
    assert len(counts) <= 257
    assert sum(counts.values()) == 1000


def test_calls_are_counted_by_many_threads() -> None:
    calls = Calls()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: calls.observe("NodePublishVolume", "OK", 0.001), range(4000)))
    counts, took = calls.report()
    assert counts == {("NodePublishVolume", "OK"): 4000}
    assert took["NodePublishVolume"]["count"] == 4000


def test_a_socket_is_taken_over_from_the_dead_only(sources: Sources, tmp_path: Path) -> None:
    where = str(tmp_path / "pages")
    first = PageServer(where, Pages(sources))
    with pytest.raises(UsageError, match="somebody listens"):
        PageServer(where, Pages(sources))
    first.close()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(where)
    second = PageServer(where, Pages(sources))
    assert fetch(where, "/livez") == (200, "ok\n")
    second.close()
    with pytest.raises(AccessDeniedError, match="cannot listen"):
        PageServer(str(tmp_path / "none" / "pages"), Pages(sources))
