"""Volumes of a store that takes keys, behind a network that fails: S3, with keys of each volume."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest

from envstore.csi.config import DriverConfig, NamedStore, Rule
from envstore.store.config import init_store
from envstore.store.objects import Credentials, KeyRing, open_objects
from tests.csi.nodes import Node, inline, made_node, refused
from tests.csi.test_node_crashes import end_node_server, start_node_server
from tests.fuse.lives import PATIENCE, ROOT, until
from tests.s3server import S3Server
from tests.tcpproxy import TcpProxy, tcp_proxy

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")

Code = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Bucket:
    """A node, and stores in one bucket behind a proxy: one for each source of keys."""

    node: Node
    proxy: TcpProxy
    keys: dict[str, str]

    def files(self, **keys: str) -> None:
        """Write what is mounted for the driver of a Secret."""
        place = self.node.base / "keys" / "files"
        place.mkdir(parents=True, exist_ok=True)
        for name, value in {**self.keys, **keys}.items():
            (place / name).write_text(value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Bucket]:
    base = tmp_path_factory.mktemp("node")
    with made_node(base, serve=False) as node, tcp_proxy(s3_server.endpoint) as proxy:
        bucket = s3_server.new_bucket()
        keys = KeyRing(Credentials(s3_server.access_key, s3_server.secret_key))
        url = s3_server.url(bucket)
        objects = open_objects(url, create=True, keys=keys)
        init_store(objects)
        for info in node.store.repository.objects.list(""):
            objects.put(info.key, node.store.repository.objects.get(info.key))
        objects.close()
        behind = S3Server(proxy.endpoint, s3_server.access_key, s3_server.secret_key, 0)
        node.stores["volumes"] = NamedStore("volumes", behind.url(bucket), "volume")
        node.stores["files"] = NamedStore("files", behind.url(bucket), "secret")
        node.config = DriverConfig(node.stores, "main", (Rule(),))
        node.credentials = base / "keys"
        said = {
            "access_key_id": s3_server.access_key,
            "secret_access_key": s3_server.secret_key,
        }
        yield Bucket(node, proxy, said)


@pytest.fixture
def bucket(shared: Bucket) -> Iterator[Bucket]:
    """Each test starts drivers of its own, and leaves nothing."""
    node = shared.node
    assert node.left() == []
    node.told.delays.clear()
    yield shared
    shared.proxy.restore()
    left = node.left()
    node.clear()
    node.stop()
    assert left == []


def secrets_are_nowhere(bucket: Bucket, log: str) -> None:
    node, secret = bucket.node, bucket.keys["secret_access_key"]
    assert secret not in log
    assert secret not in node.log()
    kept = list((node.state / "published").iterdir())
    assert kept
    for path in kept:
        assert secret.encode() not in path.read_bytes()


def test_each_volume_needs_keys_of_its_own(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    node = bucket.node
    caplog.set_level("DEBUG")
    node.serve(keep=False)
    target = node.publish("pod-1", store="volumes", secrets=bucket.keys)
    assert (target / "file").read_bytes() == b"content"
    secrets_are_nowhere(bucket, caplog.text)
    with refused(Code.INVALID_ARGUMENT, "nodePublishSecretRef"):
        node.publish("pod-2", store="volumes")
    # That this node serves it already gives nobody else a right to it.
    wrong = {**bucket.keys, "secret_access_key": "wrong"}
    with refused(Code.PERMISSION_DENIED, "refuses the volume's credentials"):
        node.publish("pod-2", store="volumes", secrets=wrong)
    assert node.mounted() == [str(target)]
    assert len(node.leases()) == len(node.records()) == 1
    node.unpublish("pod-1")


def test_new_keys_are_handed_on_and_wrong_ones_cost_no_mount(bucket: Bucket) -> None:
    node = bucket.node
    node.serve(keep=False)
    target = node.publish("pod-1", store="volumes", secrets=bucket.keys)
    ((lease,), (record,)) = node.leases(), node.records()
    with refused(Code.PERMISSION_DENIED):
        node.publish("pod-1", store="volumes", secrets={**bucket.keys, "access_key_id": "other"})
    assert node.mounted() == [str(target)]
    node.stop()
    node.serve(keep=False)
    node.publish("pod-1", store="volumes", secrets=bucket.keys)
    assert [one["id"] for one in node.leases()] == [lease["id"]]
    assert node.records() == [record]
    node.unpublish("pod-1")


def test_a_store_that_was_led_elsewhere_gets_no_keys_for_an_old_mount(bucket: Bucket) -> None:
    node = bucket.node
    node.serve(keep=False)
    target = node.publish("pod-1", store="volumes", secrets=bucket.keys)
    node.stop()
    moved = NamedStore("volumes", f"{node.stores['volumes'].url}&path_style=1", "volume")
    node.config = DriverConfig({**node.stores, "volumes": moved}, "main", (Rule(),))
    try:
        node.serve(keep=False)
        with refused(Code.FAILED_PRECONDITION, "was changed since"):
            node.publish("pod-1", store="volumes", secrets=bucket.keys)
        assert (target / "file").read_bytes() == b"content"
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))
    node.unpublish("pod-1")


def test_the_drivers_own_keys_are_read_anew(bucket: Bucket) -> None:
    node = bucket.node
    node.serve(keep=False)
    with refused(Code.UNAVAILABLE, "files"):
        node.publish("pod-1", store="files")
    bucket.files(secret_access_key="wrong")
    with refused(Code.PERMISSION_DENIED):
        node.publish("pod-1", store="files")
    assert node.left() == []
    bucket.files()
    target = node.publish("pod-1", store="files")
    assert (target / "file").read_bytes() == b"content"
    node.unpublish("pod-1")


def test_what_the_kubelet_alone_has_keys_for_waits_for_it(bucket: Bucket) -> None:
    node = bucket.node
    bucket.files()
    node.serve()
    own = node.publish("pod-1", store="volumes", secrets=bucket.keys)
    driven = node.publish("pod-2", store="files")
    end_node_server(node)
    start_node_server(node)
    until(lambda: not node.stats("pod-2").volume_condition.abnormal, "a new mount")
    assert (driven / "file").read_bytes() == b"content"
    assert node.stats("pod-1").volume_condition.abnormal
    until(lambda: published(bucket, "pod-1"), "a publish")
    assert (own / "file").read_bytes() == b"content"
    node.unpublish("pod-1")
    node.unpublish("pod-2")


def published(bucket: Bucket, pod: str) -> bool:
    try:
        bucket.node.publish(pod, store="volumes", secrets=bucket.keys)
    except grpc.RpcError as error:
        assert "under way" in str(error)  # noqa: PT017 - what mends may be at work
        return False
    return True


def test_a_store_that_does_not_answer(bucket: Bucket) -> None:
    node = bucket.node
    node.slow_after = 0.1
    node.serve()
    node.slow_after = PATIENCE
    bucket.proxy.hang()
    request = node.asked("pod-1", store="volumes", secrets=bucket.keys)
    with refused(Code.DEADLINE_EXCEEDED):
        node.stub.NodePublishVolume(request, timeout=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            node.publish, "pod-2", store="volumes", secrets=bucket.keys, **inline("pod-2")
        )
        until(lambda: node.told.delays, "a word to the pod")
        bucket.proxy.restore()
        waiting.result()
    ((pod, message),) = node.told.delays
    assert pod.name == "pod-2"
    assert "default/tree:latest" in message
    assert "MB were fetched so far" in message
    node.unpublish("pod-2")
    until(lambda: node.left() == [], "the end of what was left")
