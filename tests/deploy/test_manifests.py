"""What kustomize makes of deploy/, judged by Kubernetes' own models and by our own parsers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from kubernetes import client

from envstore import __version__
from envstore.cli.group import cli
from envstore.csi.config import read_config
from envstore.csi.refusal import NAME
from envstore.csi.request import CANONICAL_PREFIX, parse_request

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
OVERLAYS = ("default", "sidecars", "provisioner", "checkpoints", "maintenance", "e2e")
NAMESPACE = "envstore-system"
UNPRIVILEGED = {
    "privileged": False,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

_MODELS = {
    "v1/Namespace": client.V1Namespace,
    "v1/ServiceAccount": client.V1ServiceAccount,
    "v1/ConfigMap": client.V1ConfigMap,
    "v1/Secret": client.V1Secret,
    "v1/Pod": client.V1Pod,
    "v1/PersistentVolume": client.V1PersistentVolume,
    "v1/PersistentVolumeClaim": client.V1PersistentVolumeClaim,
    "batch/v1/CronJob": client.V1CronJob,
    "batch/v1/Job": client.V1Job,
    "apps/v1/DaemonSet": client.V1DaemonSet,
    "apps/v1/Deployment": client.V1Deployment,
    "networking.k8s.io/v1/NetworkPolicy": client.V1NetworkPolicy,
    "storage.k8s.io/v1/CSIDriver": client.V1CSIDriver,
    "storage.k8s.io/v1/StorageClass": client.V1StorageClass,
    "rbac.authorization.k8s.io/v1/ClusterRole": client.V1ClusterRole,
    "rbac.authorization.k8s.io/v1/ClusterRoleBinding": client.V1ClusterRoleBinding,
}

Object = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", DEPLOY / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return tuple(yaml.safe_load_all(done.stdout))


def examples() -> Iterator[Object]:
    for path in sorted((DEPLOY / "examples").glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def one(overlay: str, kind: str, name: str) -> Object:
    (found,) = (
        each
        for each in rendered(overlay)
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


def workloads(overlay: str) -> list[Object]:
    return [each for each in rendered(overlay) if each["kind"] in ("DaemonSet", "Deployment")]


def jobs(overlay: str) -> list[Object]:
    """What is to run at set times: only what does so may be without metrics and probes."""
    return [each["spec"]["jobTemplate"] for each in rendered(overlay) if each["kind"] == "CronJob"]


def containers(overlay: str) -> list[tuple[Object, Object]]:
    """Each container with the spec of its pod."""
    specs = [each["spec"]["template"]["spec"] for each in (*workloads(overlay), *jobs(overlay))]
    assert not any("initContainers" in spec for spec in specs)
    return [(container, spec) for spec in specs for container in spec["containers"]]


def same_as_modelled(found: Object) -> None:
    """Fail for keys that Kubernetes does not know, and for values of another type than it has."""
    kind = f"{found['apiVersion']}/{found['kind']}"
    model = _MODELS[kind].from_dict(found)
    assert client.ApiClient().sanitize_for_serialization(model) == found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_key_is_known_to_kubernetes(overlay: str) -> None:
    for found in rendered(overlay):
        same_as_modelled(found)


def test_every_key_of_the_examples_is_known_to_kubernetes() -> None:
    for found in examples():
        same_as_modelled(found)


def test_a_key_that_kubernetes_does_not_know_is_found() -> None:
    node = json.loads(json.dumps(one("default", "DaemonSet", "envstore-node")))
    node["spec"]["template"]["spec"]["containers"][0]["securitycontext"] = {}
    with pytest.raises((AssertionError, ValueError)):
        same_as_modelled(node)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_node_server_is_privileged(overlay: str) -> None:
    for container, spec in containers(overlay):
        security = container["securityContext"]
        if container["name"] == "node":
            assert security == {"privileged": True, "readOnlyRootFilesystem": True}
            continue
        wanted = UNPRIVILEGED
        if container["name"] == "checkpoints":
            # Root, for slots are their owners' alone, and of what root may only that with files.
            capabilities = {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]}
            wanted = {**UNPRIVILEGED, "capabilities": capabilities, "runAsUser": 0}
        assert security.items() >= wanted.items()
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all("mountPropagation" not in mount for mount in container["volumeMounts"])
        for host in ("hostNetwork", "hostPID", "hostIPC"):
            assert host not in spec


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_may_be_done_that_is_not_listed_here(overlay: str) -> None:
    allowed = {
        "envstore-csi": {"namespaces": ["get"], "events": ["create"]},
        "envstore-controller": {
            "persistentvolumes": ["get", "list", "watch", "create", "patch", "delete"],
            "persistentvolumeclaims": ["get", "list", "watch", "update"],
            "storageclasses": ["get", "list", "watch"],
            "events": ["list", "watch", "create", "update", "patch"],
            "namespaces": ["get"],
        },
    }
    accounts = {
        each["metadata"]["name"] for each in rendered(overlay) if each["kind"] == "ServiceAccount"
    }
    for found in rendered(overlay):
        if found["kind"] == "ClusterRole":
            rights = {what: rule["verbs"] for rule in found["rules"] for what in rule["resources"]}
            assert rights == allowed[found["metadata"]["name"]]
            assert all("*" not in group for rule in found["rules"] for group in rule["apiGroups"])
        if found["kind"] == "ClusterRoleBinding":
            (subject,) = found["subjects"]
            assert subject["namespace"] == NAMESPACE
            assert subject["name"] in accounts
    node = one(overlay, "DaemonSet", "envstore-node")["spec"]["template"]["spec"]
    assert node["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_is_referred_to_is_there(overlay: str) -> None:
    config_maps = {
        each["metadata"]["name"] for each in rendered(overlay) if each["kind"] == "ConfigMap"
    }
    accounts = {
        each["metadata"]["name"] for each in rendered(overlay) if each["kind"] == "ServiceAccount"
    }
    for workload in (*workloads(overlay), *jobs(overlay)):
        template = workload["spec"]["template"]
        selector = workload["spec"].get("selector", {}).get("matchLabels", {})
        assert template["metadata"]["labels"].items() >= selector.items()
        spec = template["spec"]
        assert spec["serviceAccountName"] in accounts
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        used = {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]}
        assert used == volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in config_maps
        for container in spec["containers"]:
            ports = {
                port["name"]: port["containerPort"]
                for each in spec["containers"]
                for port in each.get("ports", ())
            }
            for probe in ("livenessProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports
            if container["name"] not in ("checkpoints", "maintenance"):  # they have no metrics
                scraped = template["metadata"]["annotations"]["prometheus.io/port"]
                assert int(scraped) == ports["metrics"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_says_what_it_needs(overlay: str) -> None:
    for container, spec in containers(overlay):
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        if container["name"] != "maintenance":  # it may wait, and be tried again
            assert spec["priorityClassName"].startswith("system-")
        # Without a CPU limit nobody who reads is throttled; the node server has no limit at all,
        # because whoever kills it for its memory gains nothing.
        assert set(container["resources"].get("limits", {})) <= {"memory"}
    for name in ("envstore-node", "envstore-csi"):
        found = one(overlay, "DaemonSet", name)["spec"]
        assert found["template"]["spec"]["tolerations"] == [{"operator": "Exists"}]
        assert found["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": "10%"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_named_and_no_registry_is(overlay: str) -> None:
    for container, _ in containers(overlay):
        host, _, rest = container["image"].partition("/")
        assert host in ("registry.example", "localhost")
        name, _, tag = rest.partition(":")
        assert tag not in ("", "latest")
        if name == "envstore" and overlay != "e2e":
            assert tag == __version__
    for path in DEPLOY.glob("base/*.yaml"):
        assert "/" not in "".join(re.findall(r"image: (.*)", path.read_text()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_option_is_one_that_envstore_has(overlay: str) -> None:
    commands = [each["command"] for each, _ in containers(overlay) if "command" in each]
    assert len(commands) >= 3
    for program, *words in commands:
        assert program == "envstore"
        command: click.Command = cli
        context = click.Context(command)
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None
            command = found
        known = {option for parameter in command.params for option in parameter.opts}
        arguments = [each for each in command.params if isinstance(each, click.Argument)]
        places = [word for word in words if not word.startswith("-")]
        options = words[len(places) :]
        assert words[: len(places)] == places
        assert all(place.startswith("/") for place in places)
        assert sum(each.required for each in arguments) <= len(places) <= len(arguments)
        assert {word.partition("=")[0] for word in options} <= known


def test_the_driver_is_described_as_it_is() -> None:
    found = one("default", "CSIDriver", NAME)
    assert found["spec"] == {
        "attachRequired": False,
        "podInfoOnMount": True,
        "requiresRepublish": True,
        "fsGroupPolicy": "None",
        "storageCapacity": False,
        "volumeLifecycleModes": ["Persistent", "Ephemeral"],
    }
    assert (
        found["metadata"]["labels"]["security.kubernetes.io/csi-ephemeral-volume-profile"]
        == "restricted"
    )
    namespace = one("default", "Namespace", NAMESPACE)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_kubelets_directory_is_the_same_everywhere(overlay: str) -> None:
    csi = one(overlay, "DaemonSet", "envstore-csi")["spec"]["template"]["spec"]
    node = one(overlay, "DaemonSet", "envstore-node")["spec"]["template"]["spec"]
    kubelet = "/var/lib/envstore-e2e/kubelet" if overlay == "e2e" else "/var/lib/kubelet"
    hosts = {
        volume["name"]: volume["hostPath"]["path"]
        for spec in (csi, node)
        for volume in spec["volumes"]
        if "hostPath" in volume
    }
    assert hosts["pods"] == f"{kubelet}/pods"
    assert hosts["plugin"] == f"{kubelet}/plugins/{NAME}"
    assert hosts["registry"] == f"{kubelet}/plugins_registry"
    # The kubelet says targets as it sees them.
    assert {"name": "pods", "mountPath": hosts["pods"], "mountPropagation": "Bidirectional"} in (
        node["containers"][0]["volumeMounts"]
    )
    assert f"--targets={hosts['pods']}" in node["containers"][0]["command"]
    words = [word for one in csi["containers"] for word in one.get("args", one.get("command"))]
    seen = f"{hosts['plugin']}/csi.sock"
    assert {f"--kubelet-endpoint={seen}", f"--kubelet-registration-path={seen}"} & set(words)


@pytest.mark.parametrize("overlay", ["sidecars"])
def test_the_sidecars_register_in_place_of_the_driver(overlay: str) -> None:
    csi, *others = one(overlay, "DaemonSet", "envstore-csi")["spec"]["template"]["spec"][
        "containers"
    ]
    assert not any(option.startswith("--register") for option in csi["command"])
    assert {"node-driver-registrar", "liveness-probe", "fdstore"} == {
        each["name"] for each in others
    }
    registrar = next(each for each in others if each["name"] == "node-driver-registrar")
    assert (
        f"--kubelet-registration-path=/var/lib/kubelet/plugins/{NAME}/csi.sock" in registrar["args"]
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_is_one_that_the_driver_takes(overlay: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(one(overlay, "ConfigMap", "envstore-config")["data"]["config.yaml"])
    config = read_config(path)
    assert config.default == "main"
    assert config.rules
    assert all(rule.labels or rule.namespaces for rule in config.rules)


def test_volumes_in_the_examples_are_ones_that_the_driver_takes() -> None:
    requests = {}
    for found in examples():
        if found["kind"] == "StorageClass":
            assert found["provisioner"] == NAME
            requests["StorageClass"] = found["parameters"]
        elif found["kind"] == "PersistentVolume":
            assert found["spec"]["csi"]["driver"] == NAME
            requests["PersistentVolume"] = found["spec"]["csi"]["volumeAttributes"]
        elif found["kind"] == "Pod":
            (volume,) = found["spec"]["volumes"]
            (mount,) = found["spec"]["containers"][0]["volumeMounts"]
            assert volume["csi"]["driver"] == NAME
            assert mount["mountPath"] == CANONICAL_PREFIX
            requests["Pod"] = volume["csi"]["volumeAttributes"]
    assert len(requests) == 3
    for attributes in requests.values():
        assert parse_request(attributes).ref == "team/train:2026-11"


def test_maintenance_runs_alone_and_without_rights() -> None:
    for name, command in (("envstore-gc", "gc"), ("envstore-verify", "verify")):
        spec = one("maintenance", "CronJob", name)["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        pod = spec["jobTemplate"]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["command"][1] == command
        # The root is read-only: what it writes besides has to have a place.
        writable = {mount["mountPath"] for mount in container["volumeMounts"]}
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert {variables["ENVSTORE_CACHE_DIR"], variables["TMPDIR"]} <= writable


def test_the_policy_for_the_network_leaves_the_metrics_ports_and_no_others() -> None:
    (policy,) = (found for found in examples() if found["kind"] == "NetworkPolicy")
    assert policy["metadata"]["namespace"] == NAMESPACE
    assert policy["spec"]["podSelector"] == {}
    (rule,) = policy["spec"]["ingress"]
    left = {port["port"] for port in rule["ports"]}
    metrics = {
        port["containerPort"]
        for container, _ in containers("provisioner")
        for port in container.get("ports", ())
        if port["name"] == "metrics"
    }
    assert left == metrics
