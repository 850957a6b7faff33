"""A Kubernetes of one node on this machine: its own daemons, network and directory, nothing else.

etcd, containerd and runc are Debian's, Kubernetes 1.20 is built from Debian's source package
(``scripts/build-kubernetes.sh``). Nothing listens on an address that other machines could reach:
the node and its pods share a bridge without a port, and the API server has the first address of
the services' range on it, so that pods reach it as in any cluster without a kube-proxy.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.e2e.parts import (
    ClusterError,
    containerd_config,
    kubelet_config,
    make_certificates,
    mounts_below,
    run,
    wait_until,
)

BASE = Path("/var/lib/envstore-e2e")  # as in deploy/overlays/e2e
KUBELET = BASE / "kubelet"
STATE = BASE / "state"
NODE = "node1"
NODE_ADDRESS = "198.18.0.1"
API_ADDRESS = "198.18.1.1"
PAUSE = "localhost/pause:e2e"

_BRIDGE = "envstore-e2e"
_ETCD = "http://127.0.0.1:18379"
_ETCD_PEER = "http://127.0.0.1:18380"
_GATES = "CSIServiceAccountToken=true"  # requiresRepublish, an alpha feature of 1.20
_DAEMONS = ("kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_ELSEWHERE = [
    Path(path)
    for path in ("/var/log/pods", "/var/log/containers", "/var/lib/cni", "/run/containerd")
]
# The kernel kills every daemon with the test run, however that ends.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)
_UMOUNT_DETACH = 2


class Cluster:
    """One cluster; ``up`` starts it, ``down`` leaves nothing of it."""

    def __init__(self, binaries: Path) -> None:
        """Name the directory with kubelet, kube-apiserver and so on."""
        self._binaries = binaries
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._up = False
        self._lock = os.open("/run/lock/envstore-e2e", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._forwarding = _FORWARDING.read_text()
        # What the kubelet and network plugins cannot be told to put below a directory of ours.
        self._made = [path for path in _ELSEWHERE if not path.exists()]
        self._kubectl = Path(sys.executable).parent / "kubectl"
        self._config = BASE / "pki" / "admin.kubeconfig"

    # What tests ask it.

    def kubectl(
        self, *arguments: str, given: str | None = None, timeout: float = 60.0, check: bool = True
    ) -> str:
        """Return what kubectl prints."""
        done = subprocess.run(
            [self._kubectl, "--kubeconfig", self._config, *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(BASE)},
        )
        if check and done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """Return what `kubectl get` finds, as JSON; nothing at all is an empty one."""
        text = self.kubectl("get", *arguments, "--ignore-not-found", "--output=json")
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change objects."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--validate=false", "--filename=-", given=json.dumps(listed))

    def apply_directory(self, directory: Path) -> None:
        """Apply what kustomize makes of a directory."""
        rendered = self.kubectl("kustomize", str(directory))
        self.kubectl("apply", "--validate=false", "--filename=-", given=rendered)

    def ctr(self, *arguments: str, timeout: float = 120.0, check: bool = True) -> str:
        """Return what containerd's client prints."""
        done = subprocess.run(
            ["ctr", "--address", BASE / "containerd.sock", "--namespace", "k8s.io", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def is_rolled_out(self, name: str) -> bool:
        """Return whether every pod of a DaemonSet of ours is ready, and as it should be."""
        found = self.get("daemonset", name, "--namespace=envstore-system")
        told = found.get("status", {})
        return (
            told.get("observedGeneration") == found.get("metadata", {}).get("generation")
            and told.get("desiredNumberScheduled", 0) > 0
            and told.get("numberReady") == told["desiredNumberScheduled"]
            and told.get("updatedNumberScheduled") == told["desiredNumberScheduled"]
        )

    def drivers(self) -> list[str]:
        """Return the CSI drivers that are registered with the kubelet."""
        found = self.get("csinode", NODE).get("spec", {}).get("drivers") or []
        return [driver["name"] for driver in found]

    def explain(self) -> str:
        """Return what somebody wants to read who looks for a failure's cause."""
        parts = []
        for title, arguments in (
            ("pods", ("get", "pods", "--all-namespaces", "--output=wide")),
            ("events", ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")),
        ):
            parts.append(f"--- {title}\n{self.kubectl(*arguments, check=False)[-6000:]}")
        namespace = "--namespace=envstore-system"
        for name in ("envstore-node", "envstore-csi"):
            for previous in ((), ("--previous",)):
                log = self.kubectl(
                    "logs", namespace, f"daemonset/{name}", "--all-containers", "--tail=40",
                    *previous, check=False,
                )  # fmt: skip
                parts.append(f"--- log of {name} {' '.join(previous)}\n{log[-6000:]}")
        for daemon in ("kubelet",):
            lines = (BASE / "log" / daemon).read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("E") or "csi" in line]
            parts.append(f"--- {daemon}\n" + "\n".join(said[-20:]))
        return "\n".join(parts)

    # Its life.

    def up(self, images: Sequence[Path]) -> None:
        """Start everything and wait until the node is ready. About half a minute."""
        self._refuse_company()
        self._up = True
        self.sweep()
        for name in ("pki", "log", "kubelet", "state", "run", "containerd", "cni", "etcd"):
            (BASE / name).mkdir(parents=True, exist_ok=True)
        for shared in (KUBELET, STATE):
            run("mount", "--bind", str(shared), str(shared))
            run("mount", "--make-rshared", str(shared))
        self._make_network()
        make_certificates(BASE / "pki", (API_ADDRESS, NODE_ADDRESS), NODE)
        self._start_containerd()
        self._start_api()
        for image in images:
            self.ctr("images", "import", str(image))
        self._wait("the API", lambda: self.kubectl("get", "--raw=/readyz", check=False) == "ok")
        self._start_controllers()
        self._start_kubelet()
        self._wait("a node that is ready", self._is_ready)
        self._wait("a service account", lambda: self.get("serviceaccount", "default"))

    def down(self) -> None:
        """Stop everything and remove what it left; fails if something stays."""
        if not self._up:
            return
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            self.kubectl(
                "delete", "daemonsets,deployments,pods", "--all", "--all-namespaces",
                "--grace-period=1", "--timeout=40s", timeout=60, check=False,
            )  # fmt: skip
        for name in _DAEMONS:
            self._stop(name)
        self.sweep()

    def sweep(self) -> None:
        """Remove whatever is left of this or an earlier cluster. Raises ``ClusterError``."""
        names = []
        if "containerd" in self._daemons:
            for container in self.ctr("containers", "list", "--quiet", check=False).split():
                names += re.findall(r"/(cni-[0-9a-f-]+)", self.ctr("containers", "info", container))
                self.ctr("tasks", "delete", "--force", container, check=False)
                self.ctr("containers", "delete", container, check=False)
        self._stop("containerd")
        for pid in _processes_of(str(BASE / "containerd.sock")):
            for child in [*_descendants(pid), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        wait_until(lambda: not _processes_of(str(BASE / "containerd.sock")), "the end of all shims")
        libc = ctypes.CDLL(None, use_errno=True)
        for path in mounts_below(BASE):
            libc.umount2(os.fsencode(path), _UMOUNT_DETACH)
        for group in sorted(Path("/sys/fs/cgroup").glob("*/kubepods")):
            for directory, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        for name in names:
            run("ip", "netns", "delete", name, check=False)
        run("ip", "link", "delete", _BRIDGE, check=False)
        _FORWARDING.write_text(self._forwarding)
        if left := mounts_below(BASE):
            raise ClusterError(f"these are still mounted: {left}")
        for path in (BASE, *self._made):
            shutil.rmtree(path, ignore_errors=True)

    def _refuse_company(self) -> None:
        if os.geteuid() != 0:
            raise ClusterError("a cluster takes root")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("there is such a cluster on this machine already") from None
        if any(Path("/sys/fs/cgroup").glob("*/kubepods")) and not BASE.exists():
            raise ClusterError("this machine runs pods already: its cgroups are there")

    def _is_ready(self) -> bool:
        for condition in self.get("node", NODE).get("status", {}).get("conditions", ()):
            if condition["type"] == "Ready":
                return bool(condition["status"] == "True")
        return False

    def _wait(self, what: str, true: Callable[[], Any]) -> None:
        def answered() -> Any:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    log = (BASE / "log" / name).read_text(errors="replace")
                    raise ClusterError(f"{name} has ended: {log[-1500:]}")
            return true()

        wait_until(answered, what, within=180)

    def _start(self, name: str, *arguments: str, program: Path | None = None) -> None:
        with (BASE / "log" / name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-c", _DIE_WITH_PARENT),
                    *(program or self._binaries / name, *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=BASE,
                env={"PATH": os.environ["PATH"], "HOME": str(BASE)},
                process_group=0,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _make_network(self) -> None:
        run("ip", "link", "add", _BRIDGE, "type", "bridge")
        for address in (f"{NODE_ADDRESS}/24", f"{API_ADDRESS}/32"):
            run("ip", "address", "add", address, "dev", _BRIDGE)
        run("ip", "link", "set", _BRIDGE, "up")
        plugin = {
            "type": "bridge",
            "bridge": _BRIDGE,
            "isDefaultGateway": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(BASE / "cni" / "addresses"),
                "ranges": [[{"subnet": "198.18.0.0/24"}]],
            },
        }
        listed = {"cniVersion": "0.4.0", "name": "e2e", "plugins": [plugin]}
        (BASE / "cni" / "10-e2e.conflist").write_text(json.dumps(listed))

    def _start_containerd(self) -> None:
        config = BASE / "containerd" / "config.toml"
        config.write_text(containerd_config(BASE, PAUSE))
        self._start("containerd", f"--config={config}", program=Path("containerd"))
        self._wait("containerd", lambda: self.ctr("version", check=False))

    def _start_api(self) -> None:
        pki = BASE / "pki"
        self._start(
            "etcd",
            "--name=e2e",
            f"--data-dir={BASE / 'etcd'}",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            f"--listen-peer-urls={_ETCD_PEER}",
            f"--initial-advertise-peer-urls={_ETCD_PEER}",
            f"--initial-cluster=e2e={_ETCD_PEER}",
            program=Path("etcd"),
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={_ETCD}",
            f"--bind-address={API_ADDRESS}",
            f"--advertise-address={API_ADDRESS}",
            "--secure-port=443",
            "--endpoint-reconciler-type=none",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-cluster-ip-range=198.18.1.0/24",
            "--allow-privileged=true",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--feature-gates={_GATES}",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--kubelet-certificate-authority={pki / 'ca.crt'}",
            f"--kubelet-client-certificate={pki / 'admin.crt'}",
            f"--kubelet-client-key={pki / 'admin.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki / 'tokens.key'}",
            f"--service-account-signing-key-file={pki / 'tokens.key'}",
        )

    def _start_controllers(self) -> None:
        pki = BASE / "pki"
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={pki / 'controllers.kubeconfig'}",
            f"--root-ca-file={pki / 'ca.crt'}",
            f"--service-account-private-key-file={pki / 'tokens.key'}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--port=0",
        )
        self._start(
            "kube-scheduler",
            f"--kubeconfig={pki / 'scheduler.kubeconfig'}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--port=0",
        )

    def _start_kubelet(self) -> None:
        pki = BASE / "pki"
        path = BASE / "kubelet.yaml"
        path.write_text(json.dumps(kubelet_config(pki, NODE_ADDRESS)))
        self._start(
            "kubelet",
            f"--config={path}",
            f"--kubeconfig={pki / 'kubelet.kubeconfig'}",
            f"--root-dir={KUBELET}",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_ADDRESS}",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{BASE / 'containerd.sock'}",
            "--v=2",
        )


def _processes_of(word: str) -> list[int]:
    """Return the shims that were started for a containerd with ``word`` in their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "containerd-shim" in words[0] and word in words:
                found.append(int(directory.name))
    return found


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _descendants(int(child))
            yield int(child)
