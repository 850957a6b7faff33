"""What a cluster is made of: certificates, configuration, and ways to look at it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ClusterError(Exception):
    """The cluster does not do what it should; the message says what is known of it."""


def run(*command: str, check: bool = True) -> None:
    """Run a command that is to say nothing. Raises ``ClusterError`` with what it said instead."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")


def wait_until(
    true: Callable[[], Any], what: str, *, within: float = 120.0, every: float = 0.3
) -> Any:
    """Return what ``true`` returns once it is something; fail after ``within`` seconds."""
    end = time.monotonic() + within
    while not (found := true()):
        if time.monotonic() > end:
            raise ClusterError(f"after {within:.0f} s there is still not: {what}")
        time.sleep(every)
    return found


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points below ``directory``, the deepest first; touches none of them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split()[4].encode().decode("unicode_escape")
        if path == str(directory) or path.startswith(f"{directory}/"):
            found.append(path)
    return sorted(found, reverse=True)


def mount_options(target: str) -> list[str]:
    """Return the options of the mount on ``target``, as the kernel has them."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(line[5] for line in lines if line[4] == target).split(",")


def make_certificates(pki: Path, addresses: tuple[str, str], node: str) -> None:
    """Write keys, certificates and kubeconfigs; the API server has the first address."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run(
        "openssl", "req", "-x509", *key, "-days", "7", "-subj", "/CN=e2e",
        "-keyout", str(pki / "ca.key"), "-out", str(pki / "ca.crt"),
    )  # fmt: skip
    (pki / "extensions").write_text(
        "extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=DNS:kubernetes.default.svc,"
        f"DNS:{node},IP:127.0.0.1,IP:{addresses[0]},IP:{addresses[1]}\n"
    )
    for name, subject in (
        ("apiserver", "/CN=kube-apiserver"),
        ("admin", "/O=system:masters/CN=admin"),
        ("controllers", "/CN=system:kube-controller-manager"),
        ("scheduler", "/CN=system:kube-scheduler"),
        ("kubelet", f"/O=system:nodes/CN=system:node:{node}"),
    ):
        base = str(pki / name)
        run(
            "openssl", "req", *key, "-subj", subject,
            "-keyout", f"{base}.key", "-out", f"{base}.csr",
        )  # fmt: skip
        run(
            "openssl", "x509", "-req", "-days", "7", "-in", f"{base}.csr",
            "-out", f"{base}.crt", "-CA", str(pki / "ca.crt"), "-CAkey", str(pki / "ca.key"),
            "-CAcreateserial", "-extfile", str(pki / "extensions"),
        )  # fmt: skip
        (pki / f"{name}.kubeconfig").write_text(json.dumps(_kubeconfig(pki, name, addresses[0])))
    tokens = str(pki / "tokens.key")
    run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", tokens)


def _kubeconfig(pki: Path, name: str, address: str) -> dict[str, Any]:
    user = {
        "client-certificate": str(pki / f"{name}.crt"),
        "client-key": str(pki / f"{name}.key"),
    }
    server = {
        "server": f"https://{address}",
        "certificate-authority": str(pki / "ca.crt"),
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "e2e",
        "clusters": [{"name": "e2e", "cluster": server}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": name}}],
    }


def containerd_config(base: Path, pause: str) -> str:
    """Return containerd's configuration, all of it below ``base``."""
    return f"""
version = 2
root = "{base}/containerd/root"
state = "{base}/containerd/state"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{base}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{base}/cni"
"""


def kubelet_config(pki: Path, address: str) -> dict[str, Any]:
    """Return the kubelet's configuration."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "healthzPort": 0,
        "readOnlyPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet.key"),
        "featureGates": {"CSIServiceAccountToken": True},
        "clusterDNS": ["198.18.1.10"],  # nobody is there, nor does anybody here ask by name
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # What a machine without CAP_SYS_RESOURCE can do.
        "maxOpenFiles": 20000,
        "oomScoreAdj": 0,
        # Volumes are published again with each look at a pod: soon, for tests that wait for it.
        "syncFrequency": "5s",
        "volumeStatsAggPeriod": "20s",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
    }
