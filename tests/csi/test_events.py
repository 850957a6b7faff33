from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from envstore.csi.cluster import Cluster
from envstore.csi.events import PodEvents, Silent
from envstore.csi.here import ClusterHere
from envstore.csi.request import Pod
from envstore.errors import NotFoundError
from tests.csi.apiserver import ApiServer, running_api_server, until

POD = Pod("team-a", "train-0", "5f0c1a1e-8f3c", "trainer")
OTHER = Pod("team-b", "train-0", "77777777-8f3c")


@pytest.fixture(scope="module")
def api_server() -> Iterator[ApiServer]:
    with running_api_server() as server:
        yield server


@pytest.fixture
def api(api_server: ApiServer) -> ApiServer:
    api_server.reset()
    return api_server


@pytest.fixture
def cluster(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Cluster]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    found = ClusterHere.find()
    assert found is not None
    return found


Start = Callable[..., PodEvents]


@pytest.fixture
def start(cluster: Callable[[], Cluster], api: ApiServer) -> Iterator[Start]:
    started: list[PodEvents] = []

    def start(every: float = 3600.0) -> PodEvents:
        started.append(PodEvents(cluster, "node-1", every=every))
        return started[-1]

    yield start
    api.gate.set()
    for one in started:
        one.close(60.0)
        assert not one.is_alive()


def test_a_pod_is_told_why_its_volume_is_refused(api: ApiServer, start: Start) -> None:
    start().refused(POD, "namespace team-a may not use secret/env:latest")
    api.wait(lambda: len(api.events) == 1)
    event = api.events[0]
    name = event["metadata"].pop("name")
    assert name.startswith("train-0.")
    first, last = event.pop("firstTimestamp"), event.pop("lastTimestamp")
    assert datetime.fromisoformat(first) <= datetime.fromisoformat(last)
    assert event == {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": "team-a"},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": "team-a",
            "name": "train-0",
            "uid": "5f0c1a1e-8f3c",
        },
        "type": "Warning",
        "reason": "EnvstoreRefused",
        "message": "namespace team-a may not use secret/env:latest",
        "count": 1,
        "source": {"component": "csi.envstore.dev", "host": "node-1"},
        "reportingComponent": "csi.envstore.dev",
        "reportingInstance": "node-1",
    }
    assert api.asked == [("POST", "/api/v1/namespaces/team-a/events")]


def test_a_pod_is_told_that_its_volume_takes_long(api: ApiServer, start: Start) -> None:
    start().slow(POD, "fetched 120 MiB in 20 s so far")
    api.wait(lambda: len(api.events) == 1)
    assert (api.events[0]["reason"], api.events[0]["type"]) == ("EnvstoreSlow", "Normal")


def test_what_is_told_again_and_again_is_counted(api: ApiServer, start: Start) -> None:
    events = start()
    events.refused(POD, "first")
    api.wait(lambda: len(api.events) == 1)
    for number in range(50):
        events.refused(POD, f"again {number}")
    events.slow(POD, "slow")
    events.refused(OTHER, "other")
    api.wait(lambda: len(api.events) == 3)
    events.close(60.0)
    assert {(e["involvedObject"]["uid"], e["reason"]) for e in api.events} == {
        (POD.uid, "EnvstoreRefused"),
        (POD.uid, "EnvstoreSlow"),
        (OTHER.uid, "EnvstoreRefused"),
    }


def test_what_was_counted_is_told_next_time(api: ApiServer, start: Start) -> None:
    events = start(every=0.0)
    api.gate.clear()
    events.refused(POD, "first")
    api.wait(lambda: len(api.asked) == 1)
    for number in range(50):
        events.refused(POD, f"again {number}")
    api.gate.set()
    api.wait(lambda: len(api.events) == 2)
    assert [(e["message"], e["count"]) for e in api.events] == [("first", 1), ("again 49", 50)]
    assert api.events[0]["metadata"]["name"] != api.events[1]["metadata"]["name"]


def test_nobody_waits_for_a_server_that_is_silent(
    api: ApiServer,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("envstore.csi.events._MOST_WAITING", 16)
    api.gate.clear()
    events = start()
    events.refused(POD, "first")
    api.wait(lambda: len(api.asked) == 1)
    with caplog.at_level(logging.WARNING):
        for number in range(2000):
            events.refused(Pod("team-a", "p", f"uid-{number}"), "x")
    assert "dropped 1024 events of pods so far" in caplog.messages
    events.close(0.0)
    api.gate.set()
    events.close(60.0)
    assert len(api.events) == 17


def test_what_was_told_is_forgotten_one_day(
    api: ApiServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.csi.events._MOST_KNOWN", 2)
    events = start()
    for number in range(4):
        events.refused(Pod("team-a", "p", f"uid-{number}"), "x")
        api.wait(lambda number=number: len(api.events) == number + 1)  # type: ignore[misc]
    until(lambda: len(events._told) == 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_a_server_that_refuses_an_event_is_left_alone(
    api: ApiServer, start: Start, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    api.status = status
    events = start()
    with caplog.at_level(logging.WARNING):
        events.refused(POD, "x")
        until(lambda: "is not told of EnvstoreRefused" in caplog.text)
        for _ in range(10):
            events.refused(POD, "x")
        events.close(60.0)
    assert len(api.asked) == 1
    assert "pod team-a/train-0" in caplog.text
    assert "a-token" not in caplog.text


def test_a_server_that_is_down_for_a_moment_is_asked_again(
    api: ApiServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.csi.events._AGAIN_AFTER", 0.0)
    api.status = 503
    api.gate.clear()
    events = start()
    events.refused(POD, "first")
    api.wait(lambda: len(api.asked) == 1)
    events.refused(POD, "second")
    api.status = 0
    api.gate.set()
    api.wait(lambda: len(api.events) == 1)
    assert (api.events[0]["message"], api.events[0]["count"]) == ("second", 2)


def test_a_server_that_stays_down_is_given_up(
    api: ApiServer,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("envstore.csi.events._AGAIN_AFTER", 0.0)
    api.status = 500
    with caplog.at_level(logging.WARNING):
        start().refused(POD, "x")
        until(lambda: "is not told of EnvstoreRefused" in caplog.text)
    assert len(api.asked) == 3


def test_a_message_becomes_one_short_line_and_a_name_one_that_fits(
    api: ApiServer, start: Start
) -> None:
    start().refused(Pod("team-a", "p" * 229 + "-" * 20 + "x", "uid"), "a\nb\x1b[31m" + "x" * 5000)
    api.wait(lambda: len(api.events) == 1)
    message, name = api.events[0]["message"], api.events[0]["metadata"]["name"]
    assert message.startswith("a b [31mxxx")
    assert len(message) == 1000
    assert name.startswith("p" * 229 + ".")
    assert len(name) <= 253


def test_what_is_due_is_told_before_the_end(api: ApiServer, start: Start) -> None:
    api.gate.clear()
    events = start()
    for number in range(20):
        events.refused(Pod("team-a", "p", f"uid-{number}"), "x")
    threading.Timer(0.1, api.gate.set).start()
    events.close(60.0)
    assert len(api.events) == 20
    events.refused(POD, "too late")
    assert not events.is_alive()


def test_one_event_that_cannot_be_made_does_not_end_the_others(
    api: ApiServer, cluster: Callable[[], Cluster], caplog: pytest.LogCaptureFixture
) -> None:
    fails = iter([NotFoundError("no cluster"), ZeroDivisionError("a bug")])

    def opened() -> Cluster:
        for error in fails:
            raise error
        return cluster()

    events = PodEvents(opened, "node-1")
    for number in range(3):
        events.refused(Pod("team-a", "p", f"uid-{number}"), "x")
    api.wait(lambda: len(api.events) == 1)
    events.close(60.0)
    assert "no cluster" in caplog.text
    assert "could not be made" in caplog.text


def test_outside_of_a_cluster_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.INFO):
        assert ClusterHere.find() is None
    assert caplog.messages == [
        "no Kubernetes API here: no events for pods, no labels of namespaces"
    ]
    silent = Silent()
    silent.refused(POD, "x")
    silent.slow(POD, "x")
    silent.close()
