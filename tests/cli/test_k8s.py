"""``k8s``: manifests that kubectl takes, what nodes say of themselves, and warming them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from envstore.csi import reading
from envstore.csi.cluster import Cluster as ApiServer
from envstore.csi.metrics import Calls, Pages, Sources
from envstore.csi.request import CANONICAL_PREFIX, VolumeRequest, parse_request
from envstore.csi.warmup import fitting
from envstore.errors import UnavailableError
from envstore.store.profiles import Range, new_profile, save_profile
from envstore.store.repository import Repository
from tests.cluster import TOKEN, Cluster, running_cluster
from tests.commands import Cli, one_line

Body = dict[str, Any]

DRIVER, NODE = "envstore-csi", "envstore-node"
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent))


@pytest.fixture
def cluster(stored: Cli, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that ``stored`` means, with a driver installed."""
    words = tmp_path / "last words"
    words.mkdir()
    with running_cluster(words) as found:
        stored.env["KUBECONFIG"] = str(found.kubeconfig(tmp_path / "kubeconfig"))
        found.add_daemons(DRIVER, 1)
        yield found


# --- manifest -------------------------------------------------------------------------------------


def documents(cli: Cli, *arguments: str) -> list[Body]:
    found = cli.json("k8s", "manifest", *arguments)
    assert cli.ok("k8s", "manifest", *arguments) == found["yaml"]
    listed = found["documents"]
    assert isinstance(listed, list)
    return listed


def volume_of(found: list[Body], kind: str) -> dict[str, str]:
    """Return the attributes of the volume in a manifest."""
    first = found[0]
    match kind:
        case "pvc":
            attributes = first["parameters"]
        case "pv":
            attributes = first["spec"]["csi"]["volumeAttributes"]
        case _:
            spec = first["spec"] if kind == "pod" else first["spec"]["template"]["spec"]
            (volume,) = spec["volumes"]
            (mount,) = spec["containers"][0]["volumeMounts"]
            attributes = volume["csi"]["volumeAttributes"]
            assert mount["name"] == volume["name"]
            assert mount["mountPath"] == attributes["prefix"]
            assert mount["readOnly"] is volume["csi"]["readOnly"] is True
            assert volume["csi"]["driver"] == "csi.envstore.dev"
    assert isinstance(attributes, dict)
    return attributes


@pytest.mark.parametrize("kind", ["pod", "job", "pvc", "pv"])
def test_a_manifest_asks_for_what_was_named(stored: Cli, kind: str) -> None:
    digest = stored.json("show", "tree")["digest"]
    found = documents(stored, "tree", "--kind", kind)
    assert parse_request(volume_of(found, kind)) == VolumeRequest(
        "", "default/tree:latest", digest, CANONICAL_PREFIX
    )
    named = documents(
        stored,
        *("tree", "--kind", kind, "--no-pin", "--name", "mine", "--namespace", "science"),
        *("--mount-path", '/opt/a "b" é', "--store-name", "main", "--profile", "train"),
        *("--fast-path", "off", "--image", "registry.example:5000/a/b:1@sha256:00"),
    )
    assert parse_request(volume_of(named, kind)) == VolumeRequest(
        "main", "default/tree:latest", "", '/opt/a "b" é', "off", "train"
    )
    assert named[-1]["metadata"] == {"name": "mine", "namespace": "science"}
    if len(named) == 2:
        volume, claim = named
        assert claim["kind"] == "PersistentVolumeClaim"
        if kind == "pv":
            assert "claimRef" not in found[0]["spec"]
            assert volume["spec"]["claimRef"] == {"name": "mine", "namespace": "science"}
            assert volume["metadata"]["name"] == claim["spec"]["volumeName"]
            assert volume["spec"]["csi"]["volumeHandle"] == volume["metadata"]["name"]
            assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
        else:
            assert claim["spec"]["storageClassName"] == volume["metadata"]["name"] == "mine"


def test_kubectl_takes_every_manifest(stored: Cli, cluster: Cluster, tmp_path: Path) -> None:
    from kubernetes import client

    if KUBECTL is None:
        pytest.skip("needs kubectl")
    cluster.anybody = True
    api = client.ApiClient()
    more = ("--secret", "keys", "--namespace", "science")
    for kind in ("pod", "job", "pvc", "pv"):
        found = stored.json("k8s", "manifest", "tree", "--kind", kind, *more)
        assert "secret" in str(found["documents"]).lower()
        done = subprocess.run(
            [
                *(KUBECTL, "--cache-dir", tmp_path / "cache", "apply", "--dry-run=client"),
                *("--validate=false", "-f", "-"),
            ],
            env={"KUBECONFIG": stored.env["KUBECONFIG"], "HOME": str(tmp_path)},
            input=found["yaml"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("created (dry run)") == len(found["documents"])
        # Nothing is said that Kubernetes does not know: kubectl asks a server for that.
        for one in found["documents"]:
            model = getattr(client, f"V1{one['kind']}").from_dict(one)
            assert api.sanitize_for_serialization(model) == one


def test_names_that_kubernetes_takes(stored: Cli, tree: Path) -> None:
    for ref, name in (
        ("My_Team/Ana.lysis:v1.2", "my-team-ana-lysis-v1-2"),
        ("x" * 100 + ":y", "x" * 52),
        ("a" * 51 + ".b", "a" * 51),
        ("A-", "a"),
    ):
        stored.ok("push", ref, tree, "--kind", "dir")
        (found,) = documents(stored, ref)
        assert found["metadata"] == {"name": name}


def test_a_pinned_ref_stays_what_it_was(stored: Cli, tree: Path) -> None:
    before = stored.json("show", "tree")["digest"]
    (tree / "more").touch()
    stored.ok("push", "tree", tree, "--kind", "dir")
    found = stored.json("k8s", "manifest", f"tree@{before[:12]}")
    assert (found["ref"], found["digest"]) == ("default/tree:latest", before)
    assert f'"tree:latest@{before}"' in found["yaml"]


def test_a_pin_is_to_a_snapshot_of_its_ref(stored: Cli, tree: Path) -> None:
    stored.ok("push", "other", tree, "--kind", "dir", "-m", "another history")
    digest = stored.json("show", "other")["digest"]
    says = [f"@{digest[:12]} is not a snapshot of tree:latest"]
    stored.fails(1, "k8s", "manifest", f"tree@{digest[:12]}", says=says)


def test_who_makes_a_volume_has_the_same_keys(stored: Cli) -> None:
    made, _ = documents(stored, "tree", "--kind", "pvc", "--secret", "keys")
    for use in ("provisioner", "node-publish"):
        key = f"csi.storage.k8s.io/{use}-secret"
        assert made["parameters"][f"{key}-name"] == "keys"
        assert made["parameters"][f"{key}-namespace"] == "${pvc.namespace}"


def test_a_manifest_without_a_store(cli: Cli) -> None:
    assert "ref: " in cli.ok("k8s", "manifest", "no/where:1", "--no-pin")
    cli.fails(1, "k8s", "manifest", "no/where:1", says=["does not exist"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "no ref none:latest"),
        (["a b"], "not a valid ref"),
        (["@abcd"], "a name, not only a digest"),
        (["tree@abcd", "--no-pin"], "is pinned"),
        (["tree", "--name", "Upper"], "cannot be the name of an object"),
        (["tree", "--name", "x" * 53], "at most 52"),
        (["tree", "--namespace", "a\nb"], "cannot be the name of a namespace"),
        (["tree", "--namespace", "-"], "cannot be the name of a namespace"),
        (["tree", "--secret", "a/b"], "cannot be the name of a Secret"),
        (["tree", "--secret", "keys", "--kind", "pv"], "--namespace"),
        (["tree", "--image", "a b"], "no name of an image"),
        (["tree", "--image", 'x"\n  privileged: true'], "no name of an image"),
        (["tree", "--mount-path", "/a:b"], "colon"),
        (["tree", "--mount-path", "relative"], "absolute"),
        (["tree", "--mount-path", "/a\x1b[31m"], "cannot be printed"),
        (["tree", "--mount-path", "/a\u2028b"], "cannot be printed"),
        (["tree", "--store-name", "A/B"], "is not the name of a store"),
        (["tree", "--profile", "../x"], "is not the name of a profile"),
    ],
)
def test_what_cannot_be_written(stored: Cli, arguments: list[str], says: str) -> None:
    done = stored("k8s", "manifest", *arguments)
    assert done.status in (1, 2)
    assert says in one_line(done)


def test_refs_are_completed(stored: Cli) -> None:
    for command in ("manifest", "warm"):
        assert stored.completed(f"envstore k8s {command} t") == ["plain,tree"]


# --- status ---------------------------------------------------------------------------------------


def told(**fields: Any) -> Callable[[], tuple[int, bytes]]:
    """Return what a driver says of itself, with some of it changed."""
    pages = Pages(Sources("n", Calls(), None, list, str, lambda: True))
    server = {
        "up": True, "problem": "", "state": "serving", "version": "9", "restarts": 2,
        "last_failure": "", "snapshots": 1, "cache": {"bytes": 1 << 30, "capacity": 4 << 30},
        "bytes_fetched": 5 << 20, "requests": 3,
        "reads": {"inline": 8, "waited": 1, "missed": 1},
    }  # fmt: skip
    body = {**pages.status(), "node_server": server, "published": 0, **fields}
    return lambda: (200, json.dumps(body).encode())


def volume(condition: str) -> Body:
    return {
        "volume": "csi-1", "namespace": "science", "pod": "job-1", "store": "",
        "ref": "default/tree:latest", "digest": "ab" * 32, "target": "/t", "started": "",
        "fast": True, "condition": condition, "bytes_fetched": 1, "bytes_read": 2, "requests": 3,
    }  # fmt: skip


def test_status_of_a_cluster_that_is_well(stored: Cli, cluster: Cluster) -> None:
    cluster.add_daemons(NODE, 2)
    cluster.daemons[0]["status"]["desiredNumberScheduled"] = 2
    cluster.page = 1
    for node in ("b", "a"):
        cluster.add_pod(NODE, node, restarts=1)
        name = cluster.add_pod(DRIVER, node, restarts=3)
        ill = {"volumes": [volume("ok")], "published": 1}
        cluster.proxied[f"{name}:9465"] = told(**ill)
    out = stored.ok("k8s", "status").splitlines()
    assert [line.split() for line in out] == [
        ["NODE", "STATE", "MOUNTS", "FETCHED", "CACHE", "HITS", "RESTARTS", "VERSION"],
        *(
            [
                node,
                "ready",
                "1",
                "5.0",
                "MiB",
                "1.0",
                "GiB",
                "of",
                "4.0",
                "GiB",
                "90%",
                "6",
                "0.1.0",
            ]
            for node in ("a", "b")
        ),
    ]
    found = stored.json("k8s", "status")
    assert (found["ready"], found["problems"]) == (True, [])
    assert [node["node"] for node in found["nodes"]] == ["a", "b"]
    assert found["nodes"][0]["volumes"] == [volume("ok")]
    assert {one.login for one in cluster.asked} == {f"Bearer {TOKEN}"}
    assert {one.method for one in cluster.asked} == {"GET"}


def test_status_says_what_is_not_ready(stored: Cli, cluster: Cluster) -> None:
    cluster.add_daemons(NODE, 2)
    cluster.daemons[0]["status"]["desiredNumberScheduled"] = 7
    names = {
        node: cluster.add_pod(DRIVER, node) for node in ("broken", "mute", "odd", "old", "ill")
    }
    cluster.add_pod(NODE, "ill", waits="CrashLoopBackOff")
    cluster.add_pod(NODE, "alone")
    cluster.add_pod(DRIVER, None)
    cluster.proxied[f"{names['broken']}:9465"] = lambda: (503, b"no endpoints available")
    cluster.proxied[f"{names['odd']}:9465"] = lambda: (200, b'{"version": []}')
    cluster.proxied[f"{names['old']}:9465"] = lambda: (404, b"look at /metrics\n")
    cluster.proxied[f"{names['ill']}:9465"] = told(
        volumes=[volume("dead"), volume("in progress")], published=2, problems=["disk\x1b[31m full"]
    )
    done = stored("k8s", "status", "--timeout", "0.5")
    assert done.status == 1
    assert done.err == ""
    for words in (
        "DaemonSet envstore-csi has 6 of 7 pods",
        "is on no node: Pending",
        "alone: no driver runs here",
        "does not tell: the cluster says: HTTP 503 no endpoints available",
        "mute: envstore-csi-1 does not tell: the cluster at",
        "odd: envstore-csi-2 tells what this version does not understand",
        "does not tell: the cluster says: HTTP 404 look at /metrics",
        "ill: the volume of science/job-1 is dead",
        "ill: disk\\x1b[31m full",
        "ill: envstore-node-5 is not ready: main: CrashLoopBackOff",
    ):
        assert words in done.out, (words, done.out)
    rows = {line.split()[0]: line.split()[1:3] for line in done.out.splitlines()[1:7]}
    assert rows == {node: ["not", "ready"] for node in (*names, "alone")}
    cluster.gate.set()
    failed = stored("--json", "k8s", "status")
    assert failed.status == 1
    assert failed.json["ready"] is False


def test_answers_that_take_too_long(cluster: Cluster, tmp_path: Path) -> None:
    config = str(cluster.kubeconfig(tmp_path / "config"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", config)
        opened = ApiServer.open()
        cluster.drip = 1
        with pytest.raises(UnavailableError, match="takes too long"):
            opened.get("api", "v1", within=0.5)
        cluster.drip = 0
        patch.setattr("envstore.csi.cluster._LONGEST", 100)
        with pytest.raises(UnavailableError, match="longer than"):
            opened.get("api", "v1")


def test_status_is_for_those_who_may_ask(stored: Cli, cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_pod(DRIVER, "a")
    for word in ("daemonsets", "pods"):
        cluster.denied = [("GET", word)]
        line = stored.fails(1, "k8s", "status", says=["is forbidden", "--help"])
        assert TOKEN not in line
    cluster.denied = [("GET", "proxy")]
    done = stored("k8s", "status")
    assert (done.status, "is forbidden" in done.out) == (1, True)
    cluster.denied = []
    cluster.kubeconfig(Path(stored.env["KUBECONFIG"]), token="wrong")
    stored.fails(1, "k8s", "status", says=["Unauthorized"])


def test_clusters_that_cannot_be_asked(stored: Cli, cluster: Cluster, tmp_path: Path) -> None:
    stored.fails(1, "k8s", "status", "--namespace", "other", says=["no DaemonSet", "other"])
    stored.fails(1, "k8s", "status", "--context", "elsewhere", says=["elsewhere", "--context"])
    config = tmp_path / "other config"
    nowhere = {"KUBECONFIG": str(config)}
    stored.fails(1, "k8s", "status", env=nowhere, says=["KUBECONFIG"])
    config.write_text("clusters: [secret-token\n")
    line = stored.fails(2, "k8s", "status", env=nowhere, says=["kubeconfig cannot be read"])
    assert "secret" not in line
    config.write_text("- 1\n")
    stored.fails(2, "k8s", "status", env=nowhere, says=["kubeconfig cannot be read"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = Cluster(tmp_path, port=free.getsockname()[1])
    gone.kubeconfig(config)
    stored.fails(1, "k8s", "status", env=nowhere, says=["does not answer", "refused"])


# --- warm -----------------------------------------------------------------------------------------


def record(cli: Cli, *ranges: tuple[bytes, int, int]) -> None:
    """Store a start profile of ``tree``."""
    repository = Repository.open(f"file://{cli.store}", None)
    manifest = repository.snapshot(repository.resolve("tree")).manifest
    profile = new_profile([Range(*one) for one in ranges], ["python"])
    save_profile(repository.objects, manifest, "start", profile)
    repository.close()


@pytest.fixture
def warmed(stored: Cli, cluster: Cluster, tree: Path) -> Cli:
    """The command line with two nodes to warm and a recorded start."""
    cluster.volume = tree
    cluster.add_node("a", pool="gpu")
    cluster.add_node("b", pool="gpu")
    cluster.add_node("c", pool="cpu")
    record(stored, (b"lib/deep/data", 1000, 500_000), (b"lib/text", 0, 4), (b"bin/hello", 0, 10))
    return stored


def test_warm_reads_what_a_start_reads(warmed: Cli, cluster: Cluster, tree: Path) -> None:
    os.truncate(tree / "lib/text", 2)  # as relocated files may be shorter than recorded
    done = warmed("k8s", "warm", "tree", "--nodes", "pool=gpu")
    assert done.status == 0, done
    assert done.out == "tree:latest: 2 nodes warm\n"
    assert sorted(line.split()[1] for line in done.err.splitlines()) == ["a:", "b:"]
    assert "read 488 KiB of 3 files" in done.err
    assert cluster.jobs == {}
    assert sorted(cluster.deleted) == sorted(one["metadata"]["name"] for one in cluster.made)
    found = warmed.json("k8s", "warm", "tree", "--node", "c", "--node", "c")
    (node,) = found["nodes"]
    assert (node["node"], node["state"], node["files"]) == ("c", "done", 3)
    assert node["bytes"] == 500_000 + 2 + 10


def test_the_pods_have_no_rights(warmed: Cli, cluster: Cluster) -> None:
    """What they are made of passes the strictest level of pod security, and asks as pods do."""
    words = ("--store-name", "main", "--profile", "start", "--secret", "keys")
    warmed.ok("k8s", "warm", "tree", "--node", "a", *words)
    (made,) = cluster.made
    assert made["metadata"]["namespace"] == "science"
    limits = {"activeDeadlineSeconds": 900, "backoffLimit": 0, "ttlSecondsAfterFinished": 600}
    assert {name: made["spec"][name] for name in limits} == limits
    spec = made["spec"]["template"]["spec"]
    digest = warmed.json("show", "tree")["digest"]
    (volume,) = spec["volumes"]
    assert volume["csi"]["volumeAttributes"] == {
        "ref": f"tree:latest@{digest}",
        "store": "main",
        "prefix": CANONICAL_PREFIX,
        "profile": "start",
    }
    assert volume["csi"]["nodePublishSecretRef"] == {"name": "keys"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["image"] == "driver:1"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # The driver's own programs lie where pods see their volumes.
    assert container["volumeMounts"][0]["mountPath"] != CANONICAL_PREFIX
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()


def test_warm_reads_everything(warmed: Cli, cluster: Cluster, tree: Path) -> None:
    found = warmed.json(
        *("k8s", "warm", "tree", "--nodes", "pool=cpu", "--whole"),
        *("--namespace", "other", "--image", "python:3-slim"),
    )
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    (node,) = found["nodes"]
    assert node["files"] == len(files)
    assert node["bytes"] == sum(path.stat().st_size for path in files)
    (made,) = cluster.made
    assert made["metadata"]["namespace"] == "other"
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == "python:3-slim"
    assert not any("daemonsets" in one.path for one in cluster.asked)


def test_nodes_that_are_not_warm(warmed: Cli, cluster: Cluster, tree: Path) -> None:
    cluster.add_node("away", ready=False, pool="gpu")
    (tree / "bin/hello").unlink()
    done = warmed("k8s", "warm", "tree", "--nodes", "pool=gpu")
    assert done.status == 1
    assert done.out == "tree:latest: 3 nodes not warm\n"
    assert "bin/hello: No such file or directory" in done.err
    assert "away" not in str(cluster.made)
    failed = warmed("--json", "k8s", "warm", "tree", "--nodes", "pool=gpu")
    states = {node["node"]: node["reason"] for node in failed.json["nodes"]}
    assert states["away"] == "it is not ready"
    assert failed.status == 1


_REFUSAL = (
    'MountVolume.SetUp failed for volume "env" : rpc error: code = PermissionDenied desc = '
    "namespace science may not use store main"
)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (("FailedMount", _REFUSAL), "a: namespace science may not use store main"),
        (("FailedCreate", "exceeded quota"), "a: exceeded quota"),
    ],
)
def test_a_refusal_ends_the_waiting(
    warmed: Cli, cluster: Cluster, event: tuple[str, str], says: str
) -> None:
    cluster.hold, cluster.why = True, event
    done = warmed("k8s", "warm", "tree", "--node", "a")
    assert (done.status, done.err) == (1, f"envstore: {says}\n")
    assert cluster.jobs == {}


def test_waiting_has_an_end(warmed: Cli, cluster: Cluster) -> None:
    transient = _REFUSAL.replace("PermissionDenied", "Unavailable")
    cluster.hold, cluster.why = True, ("FailedMount", transient)
    done = warmed("k8s", "warm", "tree", "--node", "a", "--timeout", "1")
    assert done.status == 1
    assert "not done after 1 s: namespace science may not" in done.err
    assert cluster.jobs == {}


def test_an_image_that_cannot_be_had(warmed: Cli, cluster: Cluster) -> None:
    cluster.hold = True
    with warmed.start("k8s", "warm", "tree", "--node", "a", stderr=subprocess.PIPE) as process:
        wait_for(lambda: bool(cluster.pods))
        waiting = {"reason": "ImagePullBackOff", "message": "no such\nimage"}
        cluster.pods[0]["status"]["containerStatuses"] = [{"state": {"waiting": waiting}}]
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == b"envstore: a: ImagePullBackOff: no such image\n"


def test_a_job_that_failed_or_was_removed(warmed: Cli, cluster: Cluster) -> None:
    cluster.hold = True
    for node in ("a", "b"):
        cluster.add_node(node, pool="held")
    with warmed.start(
        "--json", "k8s", "warm", "tree", "--nodes", "pool=held", stdout=subprocess.PIPE
    ) as process:
        wait_for(lambda: len(cluster.jobs) == 2)
        with cluster.lock:
            one, two = sorted(cluster.jobs)
            cluster.jobs[one]["status"] = {
                "conditions": [{"type": "Failed", "status": "True", "message": "deadline"}]
            }
            del cluster.jobs[two]
        out, _ = process.communicate(timeout=60)
    reasons = sorted(node["reason"] for node in json.loads(out)["nodes"])
    assert reasons == ["deadline", "somebody has removed its Job"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_pods(warmed: Cli, cluster: Cluster, number: int) -> None:
    cluster.hold = True
    with warmed.start(
        *("k8s", "warm", "tree", "--nodes", "pool=gpu"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_for(lambda: len(cluster.pods) == 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert out == b""
    assert (process.returncode, err) == (
        (130, b"envstore: interrupted\n") if number == signal.SIGINT else (143, b"")
    )
    assert cluster.jobs == {}


def test_not_waiting(warmed: Cli, cluster: Cluster) -> None:
    out = warmed.ok("k8s", "warm", "tree", "--nodes", "pool=gpu", "--no-wait", "--timeout", "60")
    assert out == "tree:latest: begun on 2 nodes\n"
    assert len(cluster.jobs) == 2
    assert [one["spec"]["activeDeadlineSeconds"] for one in cluster.made] == [60, 60]


def test_rights_that_are_missing(warmed: Cli, cluster: Cluster) -> None:
    for method, word, arguments, says in (
        ("GET", "nodes", ["--nodes", "pool=gpu"], "nodes is forbidden"),
        ("POST", "jobs", ["--node", "a"], "jobs is forbidden"),
        ("GET", "daemonsets", ["--node", "a"], "--image"),
        ("GET", "events", ["--node", "a"], "events is forbidden"),
    ):
        cluster.denied, cluster.hold = [(method, word)], True
        warmed.fails(1, "k8s", "warm", "tree", *arguments, says=[says])
        assert cluster.jobs == {}, word


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either --nodes SELECTOR or --node NAME"),
        (["--nodes", "a=b", "--node", "a"], "either --nodes SELECTOR or --node NAME"),
        (["--nodes", "a=b"], "no node with 'a=b'"),
        (["--node", "a/../b"], "cannot be the name of a node"),
        (["--node", "a", "--profile", "none"], "--whole"),
        (["--node", "a", "--profile", "other"], "no start of tree was recorded as other"),
        (["--node", "a", "--secret", "../x"], "cannot be the name of a Secret"),
        (["--node", "a", "--image", "$(x)"], "no name of an image"),
        (["--node", "a", "--namespace", "../x"], "cannot be the name of a namespace"),
        (["--node", "a", "--driver-namespace", "other"], "no DaemonSet"),
        (["--node", "a", "--context", "other"], "other"),
    ],
)
def test_what_cannot_be_warmed(
    warmed: Cli, cluster: Cluster, arguments: list[str], says: str
) -> None:
    done = warmed("k8s", "warm", "tree", *arguments)
    assert done.status in (1, 2)
    assert says in one_line(done)
    assert cluster.made == []


def test_no_start_was_recorded(stored: Cli, cluster: Cluster) -> None:
    stored.fails(1, "k8s", "warm", "tree", "--node", "a", says=["no start", "--whole"])


# --- what the pods run ----------------------------------------------------------------------------


def test_ranges_survive_a_command_line() -> None:
    tasks = [(b"caf\xe9\n two", 0, 5), (b"-x", 7, 1 << 40), (b"a", 3, -1)]
    assert reading.unpacked(reading.packed(tasks)) == tasks
    noise = [(os.urandom(40).replace(b"\0", b"x"), 0, number) for number in range(60_000)]
    kept = fitting(noise)
    assert 0 < len(kept) < len(noise)
    assert len(reading.packed(kept)) <= 5 * (96 << 10)
    assert list(kept) == noise[: len(kept)]


def test_reading_counts_what_it_cannot_read(tree: Path) -> None:
    root = os.fsencode(tree)
    reader = reading.Reader(root)
    for task in ((b"lib/link", 0, -1), (b"none", 0, -1), (b"lib/text", 5, 100), (b"lib", 0, 1)):
        reader.read(task)
    report = reader.report()
    assert (report["files"], report["bytes"], report["failed"]) == (1, 5, 3)
    assert reader.reason.startswith("lib/link: ")


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
