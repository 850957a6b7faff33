"""Pods with a volume of ours, what they say, and what is left of them on the node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tests.e2e.cluster import KUBELET, Cluster
from tests.e2e.parts import ClusterError, mounts_below, wait_until

SYSTEM = "envstore-system"
ALLOWED, FOREIGN = "allowed", "foreign"
APP_IMAGE = "localhost/debian:e2e"
PLACE = "/opt/envstore"
PYTHON = f"{PLACE}/bin/python3"

# Reads files at random, past the page cache, and starts interpreters, until it is killed.
READER = f"""
import hashlib, os, random, subprocess, sys, time
files = [os.path.join(top, name) for top, _, names in os.walk("{PLACE}") for name in names]
files = sorted(path for path in files if not os.path.islink(path) and os.path.getsize(path))
sums, reads, starts, errors, said = {{}}, 0, 0, 0, 0.0
while True:
    path = random.choice(files)
    try:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.sha256(file.read()).digest()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sums.setdefault(path, found) != found:
            raise OSError("other bytes than before")
        reads += 1
        if reads % 100 == 0:
            starts += 1
            subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        errors += 1
        print("ERROR", path, error, flush=True)
    if time.monotonic() - said > 0.5:
        said = time.monotonic()
        print("READ", reads, starts, errors, flush=True)
"""


@dataclass(frozen=True)
class Progress:
    """How far a reader has come."""

    reads: int
    starts: int
    errors: int


def inline(ref: str, **attributes: str) -> dict[str, Any]:
    """Return a volume as it is written in a pod spec."""
    return {
        "csi": {
            "driver": "csi.envstore.dev",
            "readOnly": True,
            "volumeAttributes": {"ref": ref, **attributes},
        }
    }


def claimed(name: str) -> dict[str, Any]:
    """Return a volume of a claim."""
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}


class Pods:
    """Makes pods in the name spaces of a test, and removes them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._made: list[tuple[str, str]] = []
        for name, labels in ((ALLOWED, {"envstore.dev/mount": "allowed"}), (FOREIGN, {})):
            self.label(name, labels)

    def label(self, namespace: str, labels: dict[str, str]) -> None:
        """Make a name space, or give it other labels."""
        metadata = {"name": namespace, "labels": labels}
        self.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        wait_until(
            lambda: self.cluster.get("serviceaccount", "default", f"--namespace={namespace}"),
            "a service account",
        )

    def start(
        self, name: str, volume: dict[str, Any], program: str, *, namespace: str = ALLOWED
    ) -> None:
        """Make a pod that runs ``program`` with the interpreter that is in the volume."""
        container = {
            "name": "main",
            "image": APP_IMAGE,
            "imagePullPolicy": "Never",
            "command": [PYTHON, "-c", program],
            "volumeMounts": [{"name": "environment", "mountPath": PLACE, "readOnly": True}],
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
        }
        spec = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [container],
            "volumes": [{"name": "environment", **volume}],
        }
        metadata = {"name": name, "namespace": namespace}
        self._made.append((namespace, name))
        self.cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def read(self, name: str, volume: dict[str, Any], *, namespace: str = ALLOWED) -> None:
        """Make a pod that reads without end, and wait until it has begun."""
        self.start(name, volume, READER, namespace=namespace)
        self.wait(name, "Running", namespace=namespace)
        self.further(name, namespace=namespace)

    def phase(self, name: str, *, namespace: str = ALLOWED) -> str:
        """Return where a pod is in its life, empty if it is not there."""
        pod = self.cluster.get("pod", name, f"--namespace={namespace}")
        return str(pod.get("status", {}).get("phase", ""))

    def wait(self, name: str, phase: str, *, namespace: str = ALLOWED) -> None:
        """Wait until a pod is in a phase."""

        def is_so() -> bool:
            found = self.phase(name, namespace=namespace)
            if found in ("Failed", "Succeeded") and found != phase:
                said = self.said(name, namespace=namespace)
                raise ClusterError(f"the pod {name} has {found.lower()}: {said[-2000:]}")
            return found == phase

        wait_until(is_so, f"the pod {name} {phase}")

    def said(self, name: str, *, namespace: str = ALLOWED) -> str:
        """Return what a pod has printed, nothing if it has not begun."""
        return self.cluster.kubectl("logs", f"--namespace={namespace}", name, check=False)

    def progress(self, name: str, *, namespace: str = ALLOWED) -> Progress:
        """Return how far a reader is."""
        found = re.findall(r"^READ (\d+) (\d+) (\d+)$", self.said(name, namespace=namespace), re.M)
        return Progress(*map(int, found[-1])) if found else Progress(0, 0, 0)

    def further(self, name: str, *, namespace: str = ALLOWED) -> None:
        """Wait until a reader has read and started more than by now."""
        before = self.progress(name, namespace=namespace)

        def is_further() -> bool:
            now = self.progress(name, namespace=namespace)
            return now.reads > before.reads + 20 and now.starts > before.starts

        wait_until(is_further, f"more read by {name} than {before}")

    def errors(self, name: str, *, namespace: str = ALLOWED) -> list[str]:
        """Return the errors that a reader has met."""
        said = self.said(name, namespace=namespace).splitlines()
        return [line for line in said if not line.startswith("READ ")]

    def events(self, name: str, *, namespace: str = ALLOWED) -> dict[str, list[str]]:
        """Return what a pod was told: messages by reason."""
        found: dict[str, list[str]] = {}
        for event in self.cluster.get("events", f"--namespace={namespace}").get("items", ()):
            if event["involvedObject"].get("name") == name:
                found.setdefault(event["reason"], []).append(event["message"])
        return found

    def mounts(self, name: str, *, namespace: str = ALLOWED) -> list[str]:
        """Return where volumes of a pod are mounted on the node."""
        pod = self.cluster.get("pod", name, f"--namespace={namespace}")
        return csi_mounts(pod["metadata"]["uid"])

    def remove(self, name: str, *, namespace: str = ALLOWED) -> None:
        """Delete a pod, and wait until nothing of it is left on the node."""
        pod = self.cluster.get("pod", name, f"--namespace={namespace}")
        if pod:
            self.cluster.kubectl("delete", "pod", name, f"--namespace={namespace}", timeout=120)
            uid = pod["metadata"]["uid"]
            wait_until(lambda: not csi_mounts(uid), f"no mount of {name} left")
            wait_until(
                lambda: not (KUBELET / "pods" / uid).exists(), f"no directory of {name} left"
            )
        self._made.remove((namespace, name))

    def remove_all(self) -> None:
        """Delete what there still is, all at once."""
        for namespace in {namespace for namespace, _ in self._made}:
            names = [name for where, name in self._made if where == namespace]
            self.cluster.kubectl(
                "delete", "pod", *names, f"--namespace={namespace}", "--ignore-not-found",
                timeout=120,
            )  # fmt: skip
        self._made.clear()
        wait_until(lambda: not csi_mounts(), "no volume of any pod mounted")


def csi_mounts(uid: str = "") -> list[str]:
    """Return where volumes of pods, or of one pod, are mounted on the node."""
    return [path for path in mounts_below(KUBELET / "pods" / uid) if "kubernetes.io~csi" in path]
