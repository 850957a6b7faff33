"""The Node service as the CSI specification has it, asked at a real socket for real mounts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from envstore.csi.config import DriverConfig, NamedStore, Rule
from envstore.csi.proto import csi_pb2 as pb
from tests.csi.nodes import Node, capability, inline, made_node, refused
from tests.fuse.lives import PATIENCE, ROOT, until, within

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")

Code = grpc.StatusCode
WRITERS = (
    "SINGLE_NODE_WRITER",
    "SINGLE_NODE_SINGLE_WRITER",
    "SINGLE_NODE_MULTI_WRITER",
    "MULTI_NODE_SINGLE_WRITER",
    "MULTI_NODE_MULTI_WRITER",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with made_node(tmp_path_factory.mktemp("node"), keep=False) as made:
        yield made


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """Each test finds nothing, and leaves nothing."""
    assert shared.left() == []
    shared.told.refusals.clear()
    yield shared
    left = shared.left()
    shared.clear()
    assert left == []


def options(target: Path) -> set[str]:
    with open("/proc/self/mountinfo") as table:
        (found,) = [line.split()[5] for line in table if line.split()[4] == str(target)]
    return set(found.split(","))


# --- what there is --------------------------------------------------------------------------------


def test_information_and_capabilities(node: Node) -> None:
    info = node.stub.NodeGetInfo(pb.NodeGetInfoRequest())
    assert info.node_id == "node-1"
    assert info.max_volumes_per_node == 0
    assert not info.HasField("accessible_topology")
    found = node.stub.NodeGetCapabilities(pb.NodeGetCapabilitiesRequest())
    kinds = pb.NodeServiceCapability.RPC.Type
    assert {kinds.Name(one.rpc.type) for one in found.capabilities} == {
        "GET_VOLUME_STATS",
        "VOLUME_CONDITION",
        "SINGLE_NODE_MULTI_WRITER",
    }


def test_what_is_not_offered_is_unimplemented(node: Node) -> None:
    stub = node.stub
    for call, request in (
        (stub.NodeStageVolume, pb.NodeStageVolumeRequest(volume_id="v")),
        (stub.NodeUnstageVolume, pb.NodeUnstageVolumeRequest(volume_id="v")),
        (stub.NodeExpandVolume, pb.NodeExpandVolumeRequest(volume_id="v")),
    ):
        with refused(Code.UNIMPLEMENTED):
            call(request, timeout=PATIENCE)  # type: ignore[operator]


def test_a_volume_is_mounted_read_only_and_executable(node: Node) -> None:
    target = node.publish("pod-1")
    assert (target / "file").read_bytes() == b"content"
    assert {"ro", "nosuid", "nodev"} <= options(target)
    assert "noexec" not in options(target)
    assert within(PATIENCE, target / "bin/run") == "ran\n"
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "new").write_bytes(b"")
    (record,) = node.records()
    assert (record.volume, record.complete) == ("volume-of-pod-1", True)
    assert [one["id"] for one in node.leases()] == [record.lease]
    node.unpublish("pod-1")
    assert not target.exists()
    assert target.parent.is_dir()


def test_a_target_that_exists_is_used(node: Node) -> None:
    node.target("pod-1").mkdir()
    assert (node.publish("pod-1") / "file").exists()
    node.unpublish("pod-1")


def test_a_volume_in_a_pod_spec_is_read_only_whatever_the_kubelet_asks(node: Node) -> None:
    for mode in ("SINGLE_NODE_WRITER", "SINGLE_NODE_MULTI_WRITER"):
        target = node.publish("pod-1", mode=mode, **inline())
        assert "ro" in options(target)
        node.unpublish("pod-1")


@pytest.mark.parametrize("mode", WRITERS)
def test_a_persistent_volume_cannot_be_written_to(node: Node, mode: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "read-only", "ReadOnlyMany"):
        node.publish("pod-1", mode=mode)
    assert "ro" in options(node.publish("pod-1", mode=mode, readonly=True))
    node.unpublish("pod-1")


# --- wrong arguments ------------------------------------------------------------------------------


def change(**fields: Any) -> Callable[[pb.NodePublishVolumeRequest], None]:
    def changed(request: pb.NodePublishVolumeRequest) -> None:
        for name, value in fields.items():
            request.ClearField(name)
            if isinstance(value, dict):
                getattr(request, name).update(value)
            elif isinstance(value, pb.VolumeCapability):
                request.volume_capability.CopyFrom(value)
            elif value is not None:
                setattr(request, name, value)

    return changed


def context(**attributes: str) -> Callable[[pb.NodePublishVolumeRequest], None]:
    return change(volume_context={"ref": "tree", **attributes})


def below(path: str) -> Callable[[pb.NodePublishVolumeRequest], None]:
    def changed(request: pb.NodePublishVolumeRequest) -> None:
        request.target_path = request.target_path + path

    return changed


MOUNT = capability().mount
WRONG = {
    "no id": change(volume_id=None),
    "no target": change(target_path=None),
    "no capability": change(volume_capability=None),
    "long id": change(volume_id="x" * 129),
    "id with a line end": change(volume_id="a\nb"),
    "traversal in the id": change(volume_id="../../etc/passwd"),
    "traversal within the id": change(volume_id="a/../b"),
    "relative target": change(target_path="var/lib/kubelet"),
    "relative target with dots": change(target_path="../../mnt"),
    "root": change(target_path="/"),
    "two slashes": change(target_path="//mnt"),
    "traversal in the target": below("/../../x"),
    "dot in the target": below("/./x"),
    "slash at the end": below("/"),
    "zero byte": below("\0"),
    "line end in the target": below("\nx"),
    "long target": below("/x" * 2048),
    "long name in the target": below("/" + "x" * 300 + "/mount"),
    "elsewhere": change(target_path="/etc/envstore-test/mount"),
    "just beside": change(target_path="{pods}-2/mount"),
    "the pods' own directory": change(target_path="{pods}"),
    "no parent": below("/none/mount"),
    "below a file": change(target_path="{pods}/file/mount"),
    "through a link": change(target_path="{pods}/link/mount"),
    "a link": change(target_path="{pods}/link"),
    "a file": change(target_path="{pods}/file"),
    "not empty": change(target_path="{pods}/full"),
    "block device": change(
        volume_capability=pb.VolumeCapability(
            block=pb.VolumeCapability.BlockVolume(), access_mode=capability().access_mode
        )
    ),
    "no access type": change(
        volume_capability=pb.VolumeCapability(access_mode=capability().access_mode)
    ),
    "no access mode": change(volume_capability=pb.VolumeCapability(mount=MOUNT)),
    "unknown access mode": change(volume_capability=capability("UNKNOWN")),
    "file system": change(volume_capability=capability(fs_type="ext4")),
    "group": change(volume_capability=capability(volume_mount_group="1000")),
    "rw": change(volume_capability=capability(mount_flags=["rw"])),
    "noexec": change(volume_capability=capability(mount_flags=["ro,noexec"])),
    "unknown flag": change(volume_capability=capability(mount_flags=["password=hunter2"])),
    "no ref": change(volume_context={"fastPath": "off"}),
    "empty ref": context(ref=""),
    "traversal in the ref": context(ref="../../other"),
    "traversal in the tag": context(ref="tree:../x"),
    "absolute ref": context(ref="/etc/passwd"),
    "only a digest": context(ref="@" + "a" * 64),
    "ref with a line end": context(ref="tree\n"),
    "url as a ref": context(ref="s3://bucket/tree"),
    "traversal in the prefix": context(prefix="/opt/../etc"),
    "relative prefix": context(prefix="opt"),
    "long prefix": context(prefix="/" + "x" * 4090),
    "unknown attribute": context(bucket="mine"),
    "endpoint": context(endpoint="http://mine.example"),
    "huge attributes": context(profile="x" * 5000),
    "many attributes": change(volume_context={f"k{number}": "v" for number in range(100)}),
    "wrong fast path": context(fastPath="very"),
    "wrong digest": context(digest="a" * 63),
    "traversal in the store": context(store="../main"),
    "keys for a store that takes none": change(secrets={"access_key_id": "x"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_and_nothing_is_done(node: Node, case: str) -> None:
    (node.pods / "file").write_bytes(b"")
    (node.pods / "full").mkdir(exist_ok=True)
    (node.pods / "full/file").write_bytes(b"")
    (node.base / "elsewhere").mkdir(exist_ok=True)
    if not (node.pods / "link").is_symlink():
        (node.pods / "link").symlink_to(node.base / "elsewhere")
    request = node.asked("pod-1")
    before = sorted(str(path) for path in node.pods.rglob("*"))
    WRONG[case](request)
    request.target_path = request.target_path.replace("{pods}", str(node.pods))
    with refused(Code.INVALID_ARGUMENT):
        node.stub.NodePublishVolume(request, timeout=PATIENCE)
    assert sorted(str(path) for path in node.pods.rglob("*")) == before
    assert os.listdir(node.base / "elsewhere") == []
    assert node.left() == []


def test_flags_are_not_repeated(node: Node) -> None:
    request = node.asked("pod-1")
    request.volume_capability.mount.mount_flags.append("password=hunter2")
    with pytest.raises(grpc.RpcError) as caught:
        node.stub.NodePublishVolume(request, timeout=PATIENCE)
    assert "hunter2" not in str(caught.value)


def test_flags_that_hold_anyway_are_accepted(node: Node) -> None:
    request = node.asked("pod-1")
    request.volume_capability.mount.mount_flags.extend(["ro", "exec,nosuid", "nodev", "noatime"])
    node.stub.NodePublishVolume(request, timeout=PATIENCE)
    node.unpublish("pod-1")


@pytest.mark.parametrize(
    ("id", "path"),
    [
        ("", "/var/lib"),
        ("v", ""),
        ("v", "relative"),
        ("v", "/a/../b"),
        ("v", "/a//b"),
        ("v", "/a\0"),
        ("v", "/" + "x" * 4096),
        ("x" * 129, "/var/lib"),
    ],
)
def test_wrong_arguments_of_the_other_calls(node: Node, id: str, path: str) -> None:
    with refused(Code.INVALID_ARGUMENT):
        node.stub.NodeUnpublishVolume(
            pb.NodeUnpublishVolumeRequest(volume_id=id, target_path=path), timeout=PATIENCE
        )
    with refused(Code.INVALID_ARGUMENT):
        node.stub.NodeGetVolumeStats(
            pb.NodeGetVolumeStatsRequest(volume_id=id, volume_path=path), timeout=PATIENCE
        )


def test_a_target_with_any_name_will_do(node: Node) -> None:
    names = ["with blank", "tab\\011", "ünï-☃", "-rf", "a,b=c:d", "x" * 200]
    for name in names:
        target = node.publish(name, volume="v")
        assert (target / "file").read_bytes() == b"content"
    for name in names:
        node.unpublish(name, volume="v")


# --- again and again ------------------------------------------------------------------------------


def test_every_call_may_come_ten_times(node: Node) -> None:
    for _ in range(10):
        target = node.publish("pod-1")
    assert node.mounted() == [str(target)]
    assert len(node.leases()) == len(node.records()) == 1
    for _ in range(10):
        found = node.stats("pod-1")
        assert not found.volume_condition.abnormal
    for _ in range(10):
        node.unpublish("pod-1")
        assert node.left() == []
    for _ in range(10):
        with refused(Code.NOT_FOUND):
            node.stats("pod-1")


def test_another_spelling_is_the_same_volume(node: Node) -> None:
    node.publish("pod-1", ref="tree")
    node.publish("pod-1", ref="default/tree:latest")
    node.unpublish("pod-1")


@pytest.mark.parametrize(
    "other",
    [
        {"volume": "another"},
        {"ref": "tree:other"},
        {"prefix": "/opt/other"},
        {"fastPath": "on"},
        {"mode": "SINGLE_NODE_READER_ONLY"},
        {"readonly": True},
        {"digest": "a" * 64},
        {**inline()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_arguments_for_the_same_target(node: Node, other: dict[str, Any]) -> None:
    target = node.publish("pod-1")
    with refused(Code.ALREADY_EXISTS, str(target)):
        node.publish("pod-1", **other)
    assert (target / "file").read_bytes() == b"content"
    node.unpublish("pod-1")


@pytest.mark.parametrize("mode", [*WRITERS, "SINGLE_NODE_READER_ONLY", "MULTI_NODE_READER_ONLY"])
def test_one_volume_at_two_targets(node: Node, mode: str) -> None:
    first = node.publish("pod-1", "v", mode=mode, readonly=True)
    if mode.startswith("MULTI_NODE") or mode == "SINGLE_NODE_MULTI_WRITER":
        second = node.publish("pod-2", "v", mode=mode, readonly=True)
        assert (second / "file").read_bytes() == b"content"
        node.unpublish("pod-2", "v")
    else:
        with refused(Code.FAILED_PRECONDITION, str(first), mode):
            node.publish("pod-2", "v", mode=mode, readonly=True)
    assert (first / "file").read_bytes() == b"content"
    node.unpublish("pod-1", "v")


def test_one_volume_at_one_target_only_of_many_at_once(node: Node) -> None:
    def published(pod: str) -> bool:
        try:
            node.publish(pod, "v", mode="SINGLE_NODE_READER_ONLY")
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # noqa: PT017
            assert error.code() is Code.FAILED_PRECONDITION  # noqa: PT017
            return False
        return True

    pods = [f"pod-{number}" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        assert [*pool.map(published, pods)].count(True) == 1
    for record in node.records():
        node.unpublish(Path(record.target).parents[3].name, "v")


def test_unpublishing_what_is_not_there(node: Node) -> None:
    node.unpublish("pod-1")
    target = node.target("pod-1")
    target.mkdir()
    node.unpublish("pod-1")
    assert not target.exists()
    request = pb.NodeUnpublishVolumeRequest(
        volume_id="../../any id \u2028", target_path=str(node.pods / "none/of/these/mount")
    )
    node.stub.NodeUnpublishVolume(request, timeout=PATIENCE)


def test_unpublishing_another_volume_is_a_mistake(node: Node) -> None:
    target = node.publish("pod-1")
    with refused(Code.NOT_FOUND, str(target)):
        node.unpublish("pod-1", "another")
    assert (target / "file").read_bytes() == b"content"
    node.unpublish("pod-1")


def test_what_others_put_at_a_target_is_left(node: Node) -> None:
    target = node.target("pod-1")
    target.mkdir()
    (target / "theirs").write_bytes(b"theirs")
    with refused(Code.ABORTED):
        node.unpublish("pod-1")
    with refused(Code.INVALID_ARGUMENT, "not empty"):
        node.publish("pod-1")
    (target / "theirs").unlink()
    node.unpublish("pod-1")
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "theirs", target], check=True)
    try:
        for call in (node.publish, node.unpublish):
            with refused(Code.ABORTED, "theirs"):
                call("pod-1")
    finally:
        subprocess.run(["umount", target], check=True)
    node.unpublish("pod-1")


# --- many at once ---------------------------------------------------------------------------------


def test_fifty_volumes_at_once(node: Node) -> None:
    pods = [f"pod-{number}" for number in range(50)]
    node.settled()
    processes = 0
    opened = []
    with ThreadPoolExecutor(50) as pool:
        for turn in range(4):
            targets = [*pool.map(node.publish, pods)]
            assert sorted(node.mounted()) == sorted(map(str, targets))
            assert len(node.leases()) == len(node.records()) == 50
            for target in targets:
                assert (target / "file").read_bytes() == b"content"
            conditions = [one.volume_condition for one in pool.map(node.stats, pods)]
            assert not any(one.abnormal for one in conditions)
            list(pool.map(node.unpublish, pods))
            assert node.left() == []
            opened.append(node.descriptors())
            if not turn:
                processes = len(node.processes())
    until(lambda: len(node.processes()) <= processes, "the end of all helpers")
    # What is opened once, by whoever comes first, does not grow with every round; a leak does.
    assert any(later <= before for before, later in pairwise(opened)), opened


def test_one_target_at_once(node: Node) -> None:
    def code(call: Callable[[str], object]) -> Code:
        try:
            call("pod-1")
        except grpc.RpcError as error:
            return error.code() if isinstance(error, grpc.Call) else Code.UNKNOWN
        return Code.OK

    with ThreadPoolExecutor(20) as pool:
        for _ in range(3):
            found = {*pool.map(code, [node.publish] * 20)}
            assert Code.OK in found
            assert found <= {Code.OK, Code.ABORTED}
            assert len(node.mounted()) == len(node.leases()) == 1
            found = {*pool.map(code, [node.unpublish] * 20)}
            assert Code.OK in found
            assert found <= {Code.OK, Code.ABORTED}
            node.unpublish("pod-1")
            assert node.left() == []
            # Whoever comes last, all of it is there or nothing.
            assert {*pool.map(code, [node.publish, node.unpublish] * 10)} <= {Code.OK, Code.ABORTED}
            assert len(node.mounted()) == len(node.leases()) == len(node.records())
            node.unpublish("pod-1")


# --- which snapshot -------------------------------------------------------------------------------


def test_a_tag_is_resolved_once_for_a_volume(node: Node) -> None:
    node.push("moving", {"file": b"one"})
    with ThreadPoolExecutor(8) as pool:
        names = [f"pod-{number}" for number in range(8)]
        list(pool.map(lambda pod: node.publish(pod, "v", ref="moving"), names))
    node.push("moving", {"file": b"two"})
    first = node.publish("pod-0", "v", ref="moving")
    late = node.publish("late", "v", ref="moving")
    other = node.publish("other", ref="moving")
    assert (first / "file").read_bytes() == (late / "file").read_bytes() == b"one"
    assert (other / "file").read_bytes() == b"two"
    for pod in (*names, "late"):
        node.unpublish(pod, "v")
    assert (node.publish("late", "v", ref="moving") / "file").read_bytes() == b"two"
    node.unpublish("late", "v")
    node.unpublish("other")


def test_a_digest_pins_a_volume_within_the_history_of_its_ref(node: Node) -> None:
    node.push("pinned", {"file": b"one"})
    digest = node.store.repository.resolve("pinned").hex()
    node.push("pinned", {"file": b"two"})
    assert (node.publish("pod-1", ref=f"pinned@{digest}") / "file").read_bytes() == b"one"
    assert (node.publish("pod-2", ref="pinned", digest=digest) / "file").read_bytes() == b"one"
    assert (node.publish("pod-3", ref="pinned") / "file").read_bytes() == b"two"
    for pod in ("pod-1", "pod-2", "pod-3"):
        node.unpublish(pod)
    for other in (digest, "a" * 64):
        with refused(Code.PERMISSION_DENIED, "tree:latest"):
            node.publish("pod-1", ref=f"tree@{other}", **inline("pod-1"))


def test_a_claim_keeps_its_snapshot_when_its_ref_is_led_elsewhere(node: Node) -> None:
    node.push("claimed", {"file": b"one"})
    digest = node.store.repository.resolve("claimed").hex()
    node.publish("pod-1", "claim", ref="tree", digest=digest)
    assert (node.target("pod-1") / "file").read_bytes() == b"one"
    node.unpublish("pod-1", "claim")


def test_a_prefix_is_where_files_believe_to_be(node: Node) -> None:
    node.publish("pod-1", prefix="/opt/one")
    node.publish("pod-2", prefix="/opt/two")
    assert {one["prefix"] for one in node.leases()} == {"/opt/one", "/opt/two"}
    node.unpublish("pod-1")
    node.unpublish("pod-2")


def test_the_fast_path(node: Node) -> None:
    target = node.publish("pod-1", fastPath="auto")
    assert (target / "file").read_bytes() == b"content"
    assert within(PATIENCE, target / "bin/run") == "ran\n"
    (record,) = node.records()
    assert record.fast == (next(one for one in node.leases())["id"] == record.lease and record.fast)
    node.unpublish("pod-1")


# --- failures -------------------------------------------------------------------------------------


def test_what_does_not_exist_is_not_found(node: Node) -> None:
    with refused(Code.NOT_FOUND, "nothing"):
        node.publish("pod-1", ref="nothing:v1", **inline("pod-1"))
    ((pod, message),) = node.told.refusals
    assert (pod.name, pod.uid) == ("pod-1", "uid-of-pod-1")
    assert "nothing" in message
    # Where the store is, a tenant need not know.
    assert node.store.url.removeprefix("file://") not in message


def test_a_store_that_is_away_is_unavailable(node: Node) -> None:
    place = node.store.path("")
    place.rename(place.with_name("away"))
    try:
        with refused(Code.NOT_FOUND):
            node.publish("pod-1", ref="other")
    finally:
        place.with_name("away").rename(place)


def test_who_is_not_granted_a_volume_is_told_so(node: Node) -> None:
    node.config = DriverConfig(node.stores, "main", (Rule(namespaces=("team-a",)),))
    try:
        node.publish("pod-1", **inline("pod-1", "team-a"))
        with refused(Code.PERMISSION_DENIED, "team-b"):
            node.publish("pod-2", **inline("pod-2", "team-b"))
        ((pod, message),) = node.told.refusals
        assert (pod.namespace, pod.name) == ("team-b", "pod-2")
        assert "team-b" in message
        with refused(Code.PERMISSION_DENIED):
            node.publish("pod-3", store="other", **inline("pod-3", "team-a"))
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))
    node.unpublish("pod-1")


def test_a_pod_is_told_what_is_wrong_with_its_volume(node: Node) -> None:
    with refused(Code.INVALID_ARGUMENT):
        node.publish("pod-1", bucket="mine", **inline("pod-1"))
    ((pod, message),) = node.told.refusals
    assert pod.name == "pod-1"
    assert "bucket" in message


def test_another_default_store_changes_nothing_for_a_volume(node: Node) -> None:
    target = node.publish("pod-1")
    other = NamedStore("other", "file:///none")
    renamed = NamedStore("renamed", node.store.url)
    configs = (
        DriverConfig({"main": node.stores["main"], "other": other}, "other", (Rule(),)),
        DriverConfig({"renamed": renamed, "other": other}, "renamed", (Rule(),)),
    )
    try:
        for node.config in configs:
            node.publish("pod-1")
            subprocess.run(["umount", "-l", target], check=True)
            node.publish("pod-1")
            assert (target / "file").read_bytes() == b"content"
        node.config = DriverConfig({"other": other}, "other", (Rule(),))
        with refused(Code.ABORTED, "no rule allows it"):
            node.publish("pod-1")
        assert node.mounted() == []
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))
    node.unpublish("pod-1")
    assert node.left() == []


def test_a_grant_that_is_revoked_unmounts(node: Node) -> None:
    attributes = inline("pod-1", "team-a")
    target = node.publish("pod-1", **attributes)
    node.config = DriverConfig(node.stores, "main", (Rule(namespaces=("team-b",)),))
    try:
        for _ in range(3):
            # Other codes make kubelets forget the volume: they would never unpublish it.
            with refused(Code.ABORTED, "no rule allows it"):
                node.publish("pod-1", **attributes)
            assert node.mounted() == node.targets() == node.leases() == []
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))
    assert {message for _, message in node.told.refusals}
    node.publish("pod-1", **attributes)
    assert (target / "file").read_bytes() == b"content"
    node.unpublish("pod-1")
    assert node.left() == []


def test_a_volume_that_lost_its_grant_is_unpublished_like_any_other(node: Node) -> None:
    attributes = inline("pod-1", "team-a")
    node.publish("pod-1", **attributes)
    node.config = DriverConfig(node.stores, "main", (Rule(namespaces=("team-b",)),))
    try:
        with refused(Code.ABORTED):
            node.publish("pod-1", **attributes)
        node.unpublish("pod-1")
        assert node.left() == []
        with refused(Code.PERMISSION_DENIED):
            node.publish("pod-1", **attributes)
        assert node.left() == []
    finally:
        node.config = DriverConfig(node.stores, "main", (Rule(),))


# --- statistics -----------------------------------------------------------------------------------


def test_statistics(node: Node) -> None:
    node.publish("pod-1")
    found = node.stats("pod-1")
    units = pb.VolumeUsage
    assert {one.unit: (one.total, one.used, one.available) for one in found.usage} == {
        units.BYTES: (len(b"content#!/bin/sh\necho ran\n"),) * 2 + (0,),
        units.INODES: (3, 3, 0),
    }
    assert found.volume_condition.message
    with refused(Code.NOT_FOUND):
        node.stats("pod-1", "another")
    with refused(Code.NOT_FOUND):
        node.stats("pod-2", "volume-of-pod-1")
    node.unpublish("pod-1")
