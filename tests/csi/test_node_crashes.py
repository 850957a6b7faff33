"""Whatever ends at the worst moment, the driver, the node server or both: nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from envstore.csi.config import DriverConfig, Rule
from envstore.csi.nodeserver import NodeServer, Wanted
from envstore.csi.records import Records
from envstore.fuse.mount import clear_dead
from envstore.fuse.records import RecordFiles
from tests.csi.nodes import Node, inline, made_node, refused
from tests.fuse.lives import PATIENCE, ROOT, gone, kill, until

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with made_node(tmp_path_factory.mktemp("node"), serve=False) as made:
        yield made


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """Each test starts drivers of its own, and leaves nothing."""
    assert shared.left() == []
    shared.told.refusals.clear()
    shared.told.delays.clear()
    yield shared
    if not shared.processes():
        start_node_server(shared)
    left = shared.left()
    shared.clear()
    shared.stop()
    assert left == []


def nothing_is_left(node: Node) -> None:
    until(lambda: node.left() == [], "the end of what was left")


def end_node_server(node: Node) -> None:
    """Kill holder and servers at once: what they served is dead for ever."""
    stopped: set[int] = set()
    while more := {*node.processes()} - stopped:  # one of them may just have started another
        for pid in more:
            kill(pid, signal.SIGSTOP)
        until(lambda: all(state(pid) in "TZX" for pid in more), "a stop")
        stopped |= more
    for pid in stopped:
        kill(pid)
    # Their threads may hold files for a moment after they have ended.
    lock = RecordFiles(str(node.place))
    until(lambda: gone(*stopped) and not lock.alive(), "the end of the node server")


def state(pid: int) -> str:
    """Return the letter for what a process does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def start_node_server(node: Node) -> None:
    clear_dead(str(node.place))
    node.mount()


# --- the driver -----------------------------------------------------------------------------------

_DYING = """
import os, signal
def dying(owner, step, after):
    real = getattr(owner, step)
    def call(*arguments, **more):
        armed = os.path.exists({armed!r})
        if armed and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **more)
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(owner, step, call)
from envstore.csi.nodeserver import NodeServer
from envstore.csi.records import Records
dying({owner}, {step!r}, {after!r})
"""

_PUBLISHING = [
    ("Records", "save", True),
    ("NodeServer", "take", True),
    ("NodeServer", "show", True),
]
_UNPUBLISHING = [
    ("NodeServer", "hide", True),
    ("NodeServer", "give_back", True),
]


def test_a_driver_killed_at_any_step_leaves_nothing(node: Node) -> None:
    armed = node.base / "armed"
    for number, (owner, step, after) in enumerate((*_PUBLISHING, *_UNPUBLISHING)):
        driver = node.start(_DYING.format(armed=str(armed), owner=owner, step=step, after=after))
        nothing_is_left(node)
        call = node.publish
        if number >= len(_PUBLISHING):
            node.publish("pod-1")
            call = node.unpublish  # type: ignore[assignment]
        armed.touch()
        with refused(Code.UNAVAILABLE):
            call("pod-1")
        assert driver.wait(PATIENCE) == -signal.SIGKILL
        assert node.left() != [], f"{step} left nothing to see to"
        armed.unlink()
    node.start()
    nothing_is_left(node)
    assert (node.publish("pod-1") / "file").read_bytes() == b"content"
    node.unpublish("pod-1")


def test_a_driver_killed_while_it_mends_is_no_worse(node: Node) -> None:
    armed = node.base / "armed"
    node.serve(keep=False)
    target = node.publish("pod-1")
    node.stop()
    subprocess.run(["umount", "-l", target], check=True)
    armed.touch()
    for step in ("take", "show"):
        driver = node.start(
            _DYING.format(armed=str(armed), owner="NodeServer", step=step, after=True), wait=False
        )
        assert driver.wait(PATIENCE) == -signal.SIGKILL
    armed.unlink()
    node.serve()
    until(lambda: len(node.leases()) == 1, "the end of other leases")
    until(lambda: works(node, "pod-1"), "a publish")
    assert node.mounted() == [str(target)]
    until(lambda: unpublished(node, "pod-1"), "the end of the mount")


def test_volumes_outlive_the_driver(node: Node) -> None:
    driver = node.start()
    target = node.publish("pod-1")
    with (target / "file").open("rb") as opened:
        kill(driver.pid)
        driver.wait(PATIENCE)
        assert (target / "file").read_bytes() == b"content"
        leases = node.leases()
        node.serve()
        assert opened.read() == b"content"
    node.publish("pod-1")
    assert not node.stats("pod-1").volume_condition.abnormal
    assert [one["id"] for one in node.leases()] == [one["id"] for one in leases]
    with refused(Code.ALREADY_EXISTS):
        node.publish("pod-1", prefix="/opt/other")
    node.unpublish("pod-1")


def test_a_tag_stays_what_it_was_in_the_next_life(node: Node) -> None:
    node.push("moving", {"file": b"one"})
    node.serve()
    node.publish("pod-1", "v", ref="moving")
    node.push("moving", {"file": b"two"})
    node.stop()
    node.serve()
    assert (node.publish("pod-2", "v", ref="moving") / "file").read_bytes() == b"one"
    node.unpublish("pod-1", "v")
    node.unpublish("pod-2", "v")


def test_a_lost_record_costs_no_mount(node: Node) -> None:
    node.push("lost", {"file": b"one"})
    node.serve()
    target = node.publish("pod-1", ref="lost")
    other = node.publish("pod-2", ref="lost")
    node.push("lost", {"file": b"two"})
    with (target / "file").open("rb") as opened:
        node.stop()
        for path in (node.state / "published").iterdir():
            path.write_bytes(b"damaged")
        node.serve()
        orphan = take(node, node.target("pod-3"))
        until(lambda: orphan not in [one["id"] for one in node.leases()], "a look at everything")
        assert (target / "file").read_bytes() == (other / "file").read_bytes() == b"one"
        # The kubelet asks again, and must get what it had.
        node.publish("pod-1", ref="lost")
        assert (target / "file").read_bytes() == opened.read() == b"one"
    node.unpublish("pod-1")
    node.unpublish("pod-2")
    for path in (node.state / "published").glob("*.damaged"):
        path.unlink()
    nothing_is_left(node)


# --- the node server ------------------------------------------------------------------------------


def test_a_node_server_that_is_away(node: Node) -> None:
    node.serve()
    target, ending = node.publish("pod-1"), node.publish("ending")
    end_node_server(node)
    for call in (
        lambda: node.publish("new"),
        lambda: node.publish("pod-1"),
        lambda: node.unpublish("ending"),
    ):
        with refused(Code.UNAVAILABLE, "node server"):
            call()
    assert {record.target for record in node.records()} == {str(target), str(ending)}
    condition = node.stats("pod-1").volume_condition
    assert condition.abnormal
    assert "node server" in condition.message
    start_node_server(node)
    until(lambda: not node.stats("pod-1").volume_condition.abnormal, "a new mount")
    assert (target / "file").read_bytes() == b"content"
    # What was to go is gone, though the kubelet has not asked again.
    until(lambda: node.mounted() == [str(target)], "the end of the other mount")
    until(lambda: not ending.exists(), "the end of the other target")
    until(lambda: unpublished(node, "ending"), "the end of the other record")
    until(lambda: unpublished(node, "pod-1"), "the end of the mount")


def test_dead_mounts_are_unpublished_without_touching_them(node: Node) -> None:
    node.serve(keep=False)
    targets = [node.publish(f"pod-{number}") for number in range(3)]
    end_node_server(node)
    for target in targets:
        with pytest.raises(OSError, match="connect"):
            (target / "file").read_bytes()
    start_node_server(node)
    assert node.stats("pod-0").volume_condition.abnormal
    for number in range(3):
        node.unpublish(f"pod-{number}")
    assert node.left() == []


def test_a_dead_mount_is_made_again_by_publishing(node: Node) -> None:
    node.push("moving", {"file": b"one"})
    node.serve(keep=False)
    target = node.publish("pod-1", ref="moving")
    node.push("moving", {"file": b"two"})
    end_node_server(node)
    start_node_server(node)
    assert (node.publish("pod-1", ref="moving") / "file").read_bytes() == b"one"
    assert node.mounted() == [str(target)]
    assert len(node.leases()) == 1
    subprocess.run(["umount", "-l", target], check=True)
    node.publish("pod-1", ref="moving")
    assert (target / "file").read_bytes() == b"one"
    assert len(node.leases()) == 1
    node.unpublish("pod-1")


def test_what_cannot_be_mounted_again_is_tried_again(node: Node) -> None:
    node.serve(keep=False)
    target = node.publish("pod-1")
    (record,) = node.records()
    with (target / "file").open("rb") as opened:
        subprocess.run(["umount", "-l", target], check=True)
        node.target("pod-1").mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "theirs", target], check=True)
        with refused(Code.ABORTED, "theirs"):
            node.publish("pod-1")
        assert node.records() == [record]
        assert [one["id"] for one in node.leases()] == [record.lease]
        assert opened.read() == b"content"
    subprocess.run(["umount", target], check=True)
    node.publish("pod-1")
    assert (target / "file").read_bytes() == b"content"
    assert len(node.leases()) == 1
    node.unpublish("pod-1")


def test_everything_at_once_and_no_record_left(node: Node) -> None:
    node.serve()
    target = node.publish("pod-1")
    node.stop()
    end_node_server(node)
    shutil.rmtree(node.state / "published")
    start_node_server(node)
    assert node.mounted() == [str(target)]
    node.serve()
    nothing_is_left(node)


def test_statistics_do_not_wait_for_a_server_that_hangs(node: Node) -> None:
    node.serve(keep=False)
    node.publish("pod-1")
    pid = node.server_pid()
    kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(10) as pool:
            found = [*pool.map(node.stats, ["pod-1"] * 10)]
        assert [one.usage[0].total for one in found] == [len(b"content#!/bin/sh\necho ran\n")] * 10
        # It was killed meanwhile if these answers took as long as it may hang.
        assert node.stats("pod-1").volume_condition.abnormal
        assert state(pid) == "T"
    finally:
        kill(pid, signal.SIGCONT)
    until(lambda: not node.stats("pod-1").volume_condition.abnormal, "a good condition")
    node.unpublish("pod-1")


def test_a_driver_that_starts_first(node: Node) -> None:
    end_node_server(node)
    clear_dead(str(node.place))
    node.serve()
    with refused(Code.UNAVAILABLE, "node server"):
        node.publish("pod-1")
    assert node.records() == []
    node.mount()
    node.publish("pod-1")
    node.unpublish("pod-1")


# --- time -----------------------------------------------------------------------------------------


def test_who_does_not_wait_leaves_nothing(node: Node) -> None:
    node.serve()
    pid = node.server_pid()
    kill(pid, signal.SIGSTOP)
    try:
        request = node.asked("pod-1")
        with refused(Code.DEADLINE_EXCEEDED):
            node.stub.NodePublishVolume(request, timeout=0.5)
        cancelled = node.stub.NodePublishVolume.future(node.asked("pod-2"))
        until(lambda: len(node.records()) == 2, "a second publish")
        cancelled.cancel()
        with refused(Code.ABORTED):
            node.publish("pod-2")
    finally:
        kill(pid, signal.SIGCONT)
    nothing_is_left(node)
    for pod in ("pod-1", "pod-2"):
        until(lambda pod=pod: works(node, pod), "a publish")  # type: ignore[misc]
        until(lambda pod=pod: unpublished(node, pod), "the end of the mount")  # type: ignore[misc]


def unpublished(node: Node, pod: str) -> bool:
    """Whether a pod's volume could be unpublished: what mends it may be at work."""
    try:
        node.unpublish(pod)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)  # noqa: PT017 - for its code
        assert error.code() is Code.ABORTED  # noqa: PT017
        return False
    return True


def works(node: Node, pod: str) -> bool:
    try:
        return (node.publish(pod) / "file").read_bytes() == b"content"
    except grpc.RpcError:
        return False


def test_a_pod_is_told_that_the_node_server_hangs(node: Node) -> None:
    node.slow_after = 0.0
    node.serve()
    node.slow_after = PATIENCE
    pid = node.server_pid()
    kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(node.publish, "pod-1", **inline("pod-1"))
            until(lambda: node.told.delays, "a word to the pod")
            kill(pid, signal.SIGCONT)
            publishing.result()
    finally:
        kill(pid, signal.SIGCONT)
    ((pod, message),) = node.told.delays
    assert pod.name == "pod-1"
    assert "default/tree:latest" in message
    assert "the node server does not answer" in message
    until(lambda: unpublished(node, "pod-1"), "the end of the mount")


# --- what else may be left ------------------------------------------------------------------------


def take(node: Node, target: Path) -> str:
    """Take a lease as a driver does, without a record."""
    lease = os.urandom(8).hex()
    wanted = Wanted(
        lease, node.store.url, "default/tree:latest", str(target), "/opt/x", fast_path="off"
    )
    NodeServer(str(node.socket)).take(wanted, PATIENCE)
    return lease


def test_a_lease_without_a_record_is_given_back(node: Node) -> None:
    take(node, node.target("pod-1"))
    node.serve()
    nothing_is_left(node)


def test_a_publish_that_was_begun_in_a_former_life_is_cleared(node: Node) -> None:
    node.serve(keep=False)
    target = node.publish("pod-1")
    (record,) = node.records()
    node.stop()
    Records(node.state / "published").save(replace(record, complete=False))
    node.serve(keep=False)
    with refused(Code.NOT_FOUND):
        node.stats("pod-1")
    assert (node.publish("pod-1") / "file").read_bytes() == b"content"
    assert node.mounted() == [str(target)]
    (fresh,) = node.records()
    assert [one["id"] for one in node.leases()] == [fresh.lease] != [record.lease]
    node.stop()
    Records(node.state / "published").save(replace(fresh, ending=True))
    node.serve()
    nothing_is_left(node)


def test_a_mount_that_somebody_removed_is_made_again(node: Node) -> None:
    node.serve()
    target = node.publish("pod-1")
    subprocess.run(["umount", "-l", target], check=True)
    until(lambda: node.mounted() == [str(target)], "a new mount")
    until(lambda: not node.stats("pod-1").volume_condition.abnormal, "a good condition")
    assert (target / "file").read_bytes() == b"content"
    until(lambda: unpublished(node, "pod-1"), "the end of the mount")


def test_a_pod_whose_directory_has_gone_is_forgotten(node: Node) -> None:
    node.serve()
    target = node.publish("pod-1")
    node.stop()
    subprocess.run(["umount", "-l", target], check=True)
    shutil.rmtree(node.pods / "pod-1")
    node.serve()
    nothing_is_left(node)


def test_what_is_denied_is_not_mounted_again(node: Node) -> None:
    node.serve(keep=False)
    target = node.publish("pod-1", **inline("pod-1", "team-a"))
    subprocess.run(["umount", "-l", target], check=True)
    node.stop()
    node.config = DriverConfig(node.stores, "main", (Rule(namespaces=("team-b",)),))
    try:
        node.serve()
        orphan = take(node, node.target("pod-2"))
        until(lambda: orphan not in [one["id"] for one in node.leases()], "a look at everything")
        assert node.mounted() == []
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))
    until(lambda: node.mounted() == [str(target)], "a new mount")
    until(lambda: unpublished(node, "pod-1"), "the end of the mount")
