"""A real Kubernetes with envstore in it: pods, claims, and whatever may happen to our own pods.

The tests run in order and share one cluster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.fuse.sockets import short_address
from tests.e2e.cluster import BASE, KUBELET, NODE, STATE, Cluster
from tests.e2e.conftest import OVERLAY, REPOSITORY, STORE_URL
from tests.e2e.parts import mount_options, mounts_below, wait_until
from tests.e2e.pods import (
    ALLOWED,
    APP_IMAGE,
    FOREIGN,
    PLACE,
    SYSTEM,
    Pods,
    claimed,
    csi_mounts,
    inline,
)
from tests.s3server import S3Server

pytestmark = pytest.mark.timeout(420)

IMPORT = "import sys, numpy; print(numpy.__file__, sys.prefix, numpy.arange(5).sum())"
IMPORTED = f"{PLACE}/"


@pytest.fixture
def readers(pods: Pods, environment: str) -> Iterator[list[str]]:
    """Two pods that read without end: over FUSE alone, and by the kernel's fast path."""
    names = {"plain": "off", "fast": "auto"}
    for name, fast in names.items():
        pods.read(name, inline(environment, fastPath=fast))
    yield list(names)
    for name in names:
        pods.further(name)
        assert pods.errors(name) == []


def status(cluster: Cluster) -> dict[str, Any]:
    """Return what the node server says of itself."""
    text = cluster.kubectl(
        "exec", f"--namespace={SYSTEM}", "daemonset/envstore-node", "--",
        "envstore", "--json", "node", "--status",
    )  # fmt: skip
    found: dict[str, Any] = json.loads(text)
    return found


def pod_of(cluster: Cluster, name: str) -> dict[str, Any]:
    """Return the one pod of a DaemonSet that is not about to go."""
    selector = f"--selector=app.kubernetes.io/name={name}"
    found = cluster.get("pods", f"--namespace={SYSTEM}", selector).get("items", [])
    staying = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return staying[0] if len(staying) == 1 else {}


def replace_pod(cluster: Cluster, *names: str) -> None:
    """Delete the pods of DaemonSets, all at once, and wait for their successors."""
    before = {name: pod_of(cluster, name)["metadata"]["uid"] for name in names}
    selector = f"--selector=app.kubernetes.io/name in ({','.join(names)})"
    cluster.kubectl("delete", "pods", f"--namespace={SYSTEM}", selector, timeout=200)
    for name in names:

        def is_another(name: str = name) -> bool:
            pod = pod_of(cluster, name)
            return bool(pod) and pod["metadata"]["uid"] != before[name]

        wait_until(is_another, f"another pod of {name}")
        wait_until(lambda name=name: cluster.is_rolled_out(name), f"{name} ready")


def kill_container(cluster: Cluster, daemons: str, container: str) -> None:
    """Kill every process of a container at once, and wait until it has been started again."""

    def state() -> dict[str, Any]:
        statuses = pod_of(cluster, daemons)["status"]["containerStatuses"]
        return next(one for one in statuses if one["name"] == container)

    before = state()
    identity = before["containerID"].removeprefix("containerd://")
    tasks = dict(line.split()[:2] for line in cluster.ctr("tasks", "list").splitlines()[1:])
    os.kill(int(tasks[identity]), signal.SIGKILL)  # the first of its name space takes all with it
    wait_until(
        lambda: state()["restartCount"] > before["restartCount"] and state()["ready"],
        f"{container} started again",
    )


def test_the_driver_registers_itself(driver: Cluster) -> None:
    assert "csi.envstore.dev" in driver.drivers()
    assert driver.get("csidriver", "csi.envstore.dev")["spec"]["podInfoOnMount"] is True


def test_a_pod_names_an_environment_in_its_spec(pods: Pods, environment: str) -> None:
    pods.start("inline", inline(environment), IMPORT)
    pods.wait("inline", "Succeeded")
    said = pods.said("inline").split()
    assert said[0].startswith(IMPORTED)
    assert said[1:] == [PLACE, "10"]
    pods.remove("inline")


def test_nobody_writes_into_a_volume(pods: Pods, environment: str) -> None:
    program = (
        "import os, time\n"
        f"for path in ('{PLACE}/new', '{PLACE}/bin/python3'):\n"
        "    try:\n"
        "        open(path, 'w')\n"
        "    except OSError as error:\n"
        "        print(error.errno)\n"
        f"flags = os.statvfs('{PLACE}').f_flag\n"
        "print(flags & os.ST_RDONLY, flags & os.ST_NOEXEC, flush=True)\n"
        "time.sleep(600)"
    )
    pods.start("writer", inline(environment), program)
    wait_until(lambda: pods.said("writer").split() == ["30", "30", "1", "0"], "both refused")
    (target,) = pods.mounts("writer")
    # runc drops the last two where it mounts a volume read-only into a container.
    assert {"ro", "nosuid", "nodev"} <= set(mount_options(target))


def test_pods_share_what_they_mount(driver: Cluster, pods: Pods, environment: str) -> None:
    for name in ("one", "two"):
        pods.read(name, inline(environment))
    assert len(csi_mounts()) >= 2
    found = status(driver)["mounts"]
    assert len(found) == 2
    assert len({one["digest"] for one in found}) == 1
    pods.remove("one")
    pods.further("two")
    assert pods.errors("two") == []
    assert len(status(driver)["mounts"]) == 1


def test_a_claim_of_a_volume_that_somebody_made(
    driver: Cluster, pods: Pods, environment: str
) -> None:
    made = list(
        yaml.safe_load_all((REPOSITORY / "deploy" / "examples" / "volume.yaml").read_text())
    )
    volume, claim = made
    volume["spec"]["csi"]["volumeAttributes"]["ref"] = environment
    volume["spec"]["claimRef"]["namespace"] = claim["metadata"]["namespace"] = ALLOWED
    driver.apply(volume, claim)
    name = claim["metadata"]["name"]
    for pod in ("first", "second"):
        pods.start(pod, claimed(name), IMPORT)
    for pod in ("first", "second"):
        pods.wait(pod, "Succeeded")
        assert pods.said(pod).startswith(IMPORTED)
    pods.remove_all()
    driver.kubectl("delete", "pvc", name, f"--namespace={ALLOWED}")
    driver.kubectl("delete", "pv", volume["metadata"]["name"])


def test_a_claim_for_which_the_controller_makes_a_volume(
    driver: Cluster, pods: Pods, environment: str
) -> None:
    """The sidecar that asks the controller is not in Debian: what it does, this test does."""
    socket = start_controller(driver)
    request = csi_pb2.CreateVolumeRequest(
        name="envstore-e2e",
        parameters={"ref": environment, "csi.storage.k8s.io/pvc/namespace": ALLOWED},
    )
    capability = request.volume_capabilities.add()
    capability.mount.SetInParent()
    capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    with short_address(socket) as address, grpc.insecure_channel(f"unix:{address}") as channel:
        controller = csi_pb2_grpc.ControllerStub(channel)
        made = controller.CreateVolume(request, timeout=60).volume
        foreign = csi_pb2.CreateVolumeRequest()
        foreign.CopyFrom(request)
        foreign.name = "foreign"
        foreign.parameters["csi.storage.k8s.io/pvc/namespace"] = FOREIGN
        with pytest.raises(grpc.RpcError) as refused:
            controller.CreateVolume(foreign, timeout=60)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert made.volume_context["digest"]
    metadata = {"name": "made"}
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": "envstore"}
    driver.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": metadata,
            "spec": {
                **common,
                "capacity": {"storage": str(made.capacity_bytes)},
                "claimRef": {"namespace": ALLOWED, "name": "made"},
                "csi": {
                    "driver": "csi.envstore.dev",
                    "volumeHandle": made.volume_id,
                    "volumeAttributes": dict(made.volume_context),
                    "readOnly": True,
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {**metadata, "namespace": ALLOWED},
            "spec": {**common, "resources": {"requests": {"storage": "1"}}},
        },
    )
    pods.start("claimer", claimed("made"), IMPORT)
    pods.wait("claimer", "Succeeded")
    assert pods.said("claimer").startswith(IMPORTED)
    pods.remove("claimer")
    driver.kubectl("delete", "pvc", "made", f"--namespace={ALLOWED}")
    driver.kubectl("delete", "pv", "made")
    driver.kubectl("delete", "deployment", "envstore-controller", f"--namespace={SYSTEM}")


def start_controller(cluster: Cluster) -> Path:
    """Start what the overlay `provisioner` has but its sidecar; returns the socket's path."""
    rendered = cluster.kubectl("kustomize", str(REPOSITORY / "deploy" / "overlays" / "provisioner"))
    wanted = [
        found
        for found in yaml.safe_load_all(rendered)
        if found["metadata"]["name"] == "envstore-controller"
    ]
    deployment = next(found for found in wanted if found["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    spec["containers"] = [one for one in spec["containers"] if one["name"] == "csi"]
    spec["containers"][0] |= {"image": "localhost/envstore:e2e", "imagePullPolicy": "Never"}
    cluster.apply(*wanted)
    cluster.kubectl(
        "rollout", "status", "deployment/envstore-controller", f"--namespace={SYSTEM}",
        "--timeout=120s", timeout=150,
    )  # fmt: skip
    uid = pod_of(cluster, "envstore-controller")["metadata"]["uid"]
    return KUBELET / "pods" / uid / "volumes" / "kubernetes.io~empty-dir" / "socket" / "csi.sock"


def test_whoever_is_not_allowed_is_told_so(driver: Cluster, pods: Pods, environment: str) -> None:
    pods.start("stranger", inline(environment), IMPORT, namespace=FOREIGN)

    def told() -> bool:
        events = pods.events("stranger", namespace=FOREIGN)
        return {"EnvstoreRefused", "FailedMount"} <= events.keys()

    wait_until(told, "events of a refusal")
    events = pods.events("stranger", namespace=FOREIGN)
    for reason in ("EnvstoreRefused", "FailedMount"):
        assert any("no rule allows it" in message for message in events[reason])
    assert pods.phase("stranger", namespace=FOREIGN) == "Pending"
    assert not pods.mounts("stranger", namespace=FOREIGN)
    # Once somebody allows it, the pod starts by itself.
    pods.label(FOREIGN, {"envstore.dev/mount": "allowed"})
    pods.wait("stranger", "Succeeded", namespace=FOREIGN)
    pods.label(FOREIGN, {"envstore.dev/mount": "no"})
    pods.remove("stranger", namespace=FOREIGN)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ref": "../../etc"}, "ref"),
        ({"ref": "science", "prefix": "/opt/../etc"}, "prefix"),
        ({"ref": "science", "bucket": "mine"}, "bucket"),
        ({"ref": "science:never-pushed"}, "never-pushed"),
    ],
)
def test_a_volume_that_makes_no_sense_is_refused(
    pods: Pods, attributes: dict[str, str], reason: str
) -> None:
    pods.start("hostile", inline(**attributes), IMPORT)
    wait_until(lambda: "EnvstoreRefused" in pods.events("hostile"), "the refusal's event")
    assert any(reason in message for message in pods.events("hostile")["EnvstoreRefused"])
    assert pods.phase("hostile") == "Pending"
    assert not pods.mounts("hostile")
    # The events of one pod must not be taken for those of the next.
    pods.remove("hostile")
    wait_until(lambda: delete_events(pods), "no event of it left")


def delete_events(pods: Pods) -> bool:
    pods.cluster.kubectl("delete", "events", "--all", f"--namespace={ALLOWED}")
    return not pods.events("hostile")


def test_a_grant_that_is_taken_back_takes_the_volume_away(
    driver: Cluster, pods: Pods, environment: str
) -> None:
    pods.label(FOREIGN, {"envstore.dev/mount": "allowed"})
    pods.read("guest", inline(environment), namespace=FOREIGN)
    assert pods.mounts("guest", namespace=FOREIGN)
    pods.label(FOREIGN, {"envstore.dev/mount": "no"})
    # The kubelet publishes again when it looks at a pod, every minute or two.
    wait_until(
        lambda: not pods.mounts("guest", namespace=FOREIGN), "the volume taken away", within=240
    )
    assert any("no rule" in one for one in pods.events("guest", namespace=FOREIGN)["FailedMount"])
    pods.remove("guest", namespace=FOREIGN)


def test_nobody_notices_that_the_driver_is_replaced(
    driver: Cluster, pods: Pods, readers: list[str], environment: str
) -> None:
    replace_pod(driver, "envstore-csi")
    for name in readers:
        pods.further(name)
    pods.start("after", inline(environment), IMPORT)
    pods.wait("after", "Succeeded")


def test_nobody_notices_that_the_node_server_is_replaced(
    driver: Cluster, pods: Pods, readers: list[str], environment: str
) -> None:
    replace_pod(driver, "envstore-node")
    for name in readers:
        pods.further(name)
    assert len(status(driver)["mounts"]) == len(readers)
    pods.start("after", inline(environment), IMPORT)
    pods.wait("after", "Succeeded")


@pytest.mark.parametrize(
    ("daemons", "container"),
    [("envstore-node", "node"), ("envstore-csi", "csi"), ("envstore-csi", "fdstore")],
)
def test_nobody_notices_that_a_container_is_killed(
    driver: Cluster,
    pods: Pods,
    readers: list[str],
    environment: str,
    daemons: str,
    container: str,
) -> None:
    kill_container(driver, daemons, container)
    for name in readers:
        pods.further(name)
    pods.start("after", inline(environment), IMPORT)
    pods.wait("after", "Succeeded")


def test_nobody_notices_an_upgrade_of_everything(
    driver: Cluster, pods: Pods, readers: list[str], environment: str
) -> None:
    replace_pod(driver, "envstore-node", "envstore-csi")
    for name in readers:
        pods.further(name)
    pods.start("after", inline(environment), IMPORT)
    pods.wait("after", "Succeeded")


def test_what_people_see_of_it(driver: Cluster, pods: Pods, environment: str) -> None:
    pods.read("watched", inline(environment))
    wait_until(lambda: k8s(driver, "status")["ready"], "all well again")
    found = k8s(driver, "status")
    assert [one["node"] for one in found["nodes"]] == [NODE]
    assert found["nodes"][0]["mounts"] == 1


def test_a_node_is_warmed_by_pods_without_rights(
    driver: Cluster, pods: Pods, environment: str, s3: S3Server
) -> None:
    found = k8s(
        driver,
        *("--store", STORE_URL, "warm", environment, "--whole", "--namespace", ALLOWED),
        *("--nodes", "kubernetes.io/os=linux"),
        env=s3.env,
    )
    assert found["warm"], found
    (node,) = found["nodes"]
    assert (node["node"], node["unreadable"]) == (NODE, 0)
    assert node["bytes"] > 10 << 20
    refused = k8s(
        driver,
        *("--store", STORE_URL, "warm", environment, "--whole", "--namespace", FOREIGN),
        *("--node", NODE),
        env=s3.env,
    )
    (node,) = refused["nodes"]
    assert (node["state"], FOREIGN in node["reason"]) == ("failed", True), node
    wait_until(lambda: not csi_mounts(), "the volumes of both are gone")


def test_manifests_are_taken_as_they_are(
    driver: Cluster, pods: Pods, environment: str, s3: S3Server
) -> None:
    words = ("--store", STORE_URL, "manifest", environment, "--namespace", ALLOWED)
    found = k8s(driver, *words, "--image", APP_IMAGE, "--name", "printed", env=s3.env)
    driver.kubectl("apply", "--filename=-", given=found["yaml"])
    pods.wait("printed", "Succeeded")
    driver.kubectl("delete", "pod", "printed", f"--namespace={ALLOWED}", timeout=120)


def k8s(cluster: Cluster, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what `envstore k8s` says, as JSON."""
    done = subprocess.run(
        [Path(sys.executable).parent / "envstore", "--json", "k8s", *words],
        env={
            **os.environ,
            "KUBECONFIG": str(BASE / "pki" / "admin.kubeconfig"),
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def test_nothing_is_left_of_it(driver: Cluster) -> None:
    rendered = driver.kubectl("kustomize", str(OVERLAY))
    driver.kubectl("delete", "--filename=-", "--ignore-not-found", given=rendered, timeout=200)
    wait_until(lambda: not driver.drivers(), "the driver is not registered any more")
    assert not [path for path in mounts_below(STATE) if path != str(STATE)]
    assert not csi_mounts()
