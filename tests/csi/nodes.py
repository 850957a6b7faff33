"""A node as a kubelet has it: a real node server, the driver in front of it, and what is left.

    with made_node(tmp_path) as node:
        node.push("default/tree:v1", {"file": b"content"})
        target = node.publish("pod-1", ref="tree:v1")
        assert (target / "file").read_bytes() == b"content"
        node.unpublish("pod-1")
        assert node.left() == []

The driver is served by this process, at a real socket, unless a test starts one of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from envstore.csi.config import DriverConfig, NamedStore, Rule
from envstore.csi.metrics import Calls
from envstore.csi.node import NodeService
from envstore.csi.nodeserver import NodeServer
from envstore.csi.policy import Policy
from envstore.csi.proto import csi_pb2 as pb
from envstore.csi.proto import csi_pb2_grpc
from envstore.csi.publishing import Grants, Publisher
from envstore.csi.reconcile import Keeper
from envstore.csi.records import Publication, Records
from envstore.csi.request import KUBERNETES, Pod
from envstore.csi.server import Server
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mountinfo import list_mounts
from envstore.fuse.sockets import ask_lasting
from tests.fuse.lives import PATIENCE, Live, lived, until

MODES = pb.VolumeCapability.AccessMode
SWEEP = 0.5


class Told:
    """What pods were told."""

    def __init__(self) -> None:
        self.refusals: list[tuple[Pod, str]] = []
        self.delays: list[tuple[Pod, str]] = []

    def refused(self, pod: Pod, message: str) -> None:
        self.refusals.append((pod, message))

    def slow(self, pod: Pod, message: str) -> None:
        self.delays.append((pod, message))


def capability(mode: str = "MULTI_NODE_READER_ONLY", **mount: Any) -> pb.VolumeCapability:
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(**mount),
        access_mode=MODES(mode=MODES.Mode.Value(mode)),
    )


def inline(pod: str = "pod-1", namespace: str = "team-a") -> dict[str, str]:
    """Return what a kubelet adds to the attributes of a volume in a pod spec."""
    return {
        KUBERNETES + "ephemeral": "true",
        KUBERNETES + "pod.name": pod,
        KUBERNETES + "pod.namespace": namespace,
        KUBERNETES + "pod.uid": f"uid-of-{pod}",
        KUBERNETES + "serviceAccount.name": "default",
    }


@contextmanager
def refused(code: grpc.StatusCode, *words: str) -> Iterator[None]:
    """See that a call is refused with ``code`` and a message that holds these words."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is code, error
    for word in words:
        assert word in (error.details() or ""), error.details()


class Node(Live):
    """A node server with its driver. What volumes there are is said by their pods."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.pods = base / "pods"
        self.pods.mkdir()
        self.state = base / "driver"
        self.socket = base / "node.sock"
        self.request = MountRequest(
            "", "", str(self.place), allow_other=True, node=str(self.socket),
            targets=[str(self.pods)], lease_grace=1.0,
        )  # fmt: skip
        self.stores = {"main": NamedStore("main", self.store.url)}
        self.config = DriverConfig(self.stores, "main", (Rule(),))
        self.credentials: Path | None = None
        self.slow_after = PATIENCE
        self.told = Told()
        self._server: Server | None = None
        self._keeper: Keeper | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._channels: list[grpc.Channel] = []

    # --- the driver -----------------------------------------------------------------------------

    def serve(self, *, keep: bool = True) -> csi_pb2_grpc.NodeStub:
        """Start the driver in this process; without ``keep`` nothing is reconciled."""
        server = NodeServer(str(self.socket))
        publisher = Publisher(Records(self.state / "published"), server)
        grants = Grants(Policy(lambda: self.config), self.credentials)
        if keep:
            self._keeper = Keeper(publisher, grants, SWEEP)
            self._keeper.start()
        self.service = NodeService(
            "node-1", publisher, grants, self.told, slow_after=self.slow_after
        )
        path = str(self.base / "csi.sock")
        add = partial(csi_pb2_grpc.add_NodeServicer_to_server, self.service)
        self._server = Server(path, [add], observe=Calls().observe)
        return self.connect(path)

    def connect(self, path: str) -> csi_pb2_grpc.NodeStub:
        # Each time anew: gRPC shares connections, also those that were lost, and waits.
        channel = grpc.insecure_channel(f"unix:{path}", [("grpc.use_local_subchannel_pool", 1)])
        self._channels.append(channel)
        self.stub = csi_pb2_grpc.NodeStub(channel)
        return self.stub

    def start(self, program: str = "", *, wait: bool = True) -> subprocess.Popen[str]:
        """Start the driver as a process of its own, after ``program`` has run in it."""
        path = self.base / "csi.sock"
        path.unlink(missing_ok=True)
        code = f"{program}\nfrom envstore.cli.main import main\nmain()\n"
        command = [
            sys.executable, "-c", code, "--store", self.store.url, "csi", "serve",
            "--endpoint", f"unix://{path}", "--node-id", "node-1", "--state-dir", str(self.state),
            "--node-socket", str(self.socket),
        ]  # fmt: skip
        with (self.base / "driver.log").open("a") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, text=True)
        self._started.append(process)
        if not wait:
            return process
        until(lambda: path.exists() or process.poll() is not None, "the driver's start")
        assert path.exists(), (self.base / "driver.log").read_text()
        self.connect(str(path))
        return process

    def stop(self) -> None:
        """End the driver as SIGTERM does."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        if self._server is not None:
            assert self._server.stop(PATIENCE)
            self._server = None
        if self._keeper is not None:
            self._keeper.stop(PATIENCE)
            self._keeper = None
        for process in self._started:
            process.terminate()
            process.wait(PATIENCE)
        self._started.clear()

    # --- a kubelet ------------------------------------------------------------------------------

    def push(self, ref: str, files: Mapping[str, bytes]) -> Path:
        """Push files as ``ref``; returns the source."""
        source = self.base / "sources" / ref.replace("/", "+")
        for name, data in files.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.startswith("bin/") else 0o644)
        self.store.push(source, ref)
        return source

    def target(self, pod: str) -> Path:
        """Return the target path of a pod's volume; the kubelet makes what it is in."""
        found = self.pods / pod / "volumes" / "kubernetes.io~csi" / "env" / "mount"
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def asked(
        self,
        pod: str,
        volume: str = "",
        mode: str = "MULTI_NODE_READER_ONLY",
        secrets: Mapping[str, str] | None = None,
        *,
        readonly: bool = False,
        **attributes: str,
    ) -> pb.NodePublishVolumeRequest:
        """Return the request that a kubelet makes for a pod."""
        attributes.setdefault("ref", "tree")
        attributes.setdefault("fastPath", "off")
        attributes.setdefault("profile", "none")
        return pb.NodePublishVolumeRequest(
            volume_id=volume or f"volume-of-{pod}",
            target_path=str(self.target(pod)),
            volume_capability=capability(mode),
            readonly=readonly,
            volume_context=attributes,
            secrets=secrets or {},
        )

    def publish(self, pod: str, volume: str = "", **more: Any) -> Path:
        """Publish a volume for a pod; returns its target."""
        self.stub.NodePublishVolume(self.asked(pod, volume, **more), timeout=PATIENCE)
        return self.target(pod)

    def unpublish(self, pod: str, volume: str = "") -> None:
        request = pb.NodeUnpublishVolumeRequest(
            volume_id=volume or f"volume-of-{pod}", target_path=str(self.target(pod))
        )
        self.stub.NodeUnpublishVolume(request, timeout=PATIENCE)

    def stats(self, pod: str, volume: str = "") -> pb.NodeGetVolumeStatsResponse:
        request = pb.NodeGetVolumeStatsRequest(
            volume_id=volume or f"volume-of-{pod}", volume_path=str(self.target(pod))
        )
        return self.stub.NodeGetVolumeStats(request, timeout=PATIENCE)

    # --- what there is --------------------------------------------------------------------------

    def leases(self) -> list[dict[str, Any]]:
        """Return what the node server has leased to the driver."""
        found = ask_lasting(self.socket, PATIENCE, ask="status")["mounts"]
        return [one for one in found if one["owner"] == "csi"]

    def mounted(self) -> list[str]:
        """Return the mount points below the pods."""
        start = f"{self.pods}/"
        return [one.mountpoint for one in list_mounts() if one.mountpoint.startswith(start)]

    def records(self) -> list[Publication]:
        """Return the records, which are left as they are: the driver may be writing."""
        found = []
        for path in (self.state / "published").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found.append(Publication.decode(path.read_bytes()))
        return found

    def targets(self) -> list[str]:
        """Return the target paths that there are."""
        return [str(one) for one in self.pods.glob("*/volumes/*/*/mount")]

    def left(self) -> list[object]:
        """Return what is left of volumes: mounts, directories, leases, records."""
        kept = [path.name for path in (self.state / "published").glob("*")]
        return [*self.mounted(), *self.targets(), *self.leases(), *kept]

    def clear(self) -> None:
        """Unpublish whatever is there, so that the next test is not blamed for it."""
        for record in self.records():
            request = pb.NodeUnpublishVolumeRequest(
                volume_id=record.volume, target_path=record.target
            )
            with contextlib.suppress(grpc.RpcError):
                self.stub.NodeUnpublishVolume(request, timeout=PATIENCE)

    def descriptors(self) -> int:
        """Return how many files all processes have open together, this one included."""
        found = 0
        for pid in (*self.processes(), os.getpid()):
            with contextlib.suppress(FileNotFoundError):
                found += len(os.listdir(f"/proc/{pid}/fd"))
        return found

    def server_pid(self) -> int:
        return int(ask_lasting(self.socket, PATIENCE, ask="status")["server_pid"])

    def holder_pid(self) -> int:
        assert self.record is not None
        return int(ask_lasting(self.record.control, PATIENCE, ask="status")["holder_pid"])

    def close(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.wait(PATIENCE)
        self._started.clear()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.stop()
        super().close()


@contextmanager
def made_node(base: Path, *, serve: bool = True, keep: bool = True) -> Iterator[Node]:
    """Yield a node whose node server and driver run, with a small tree pushed as ``tree``."""
    with pytest.MonkeyPatch.context() as patch, lived(base, patch, Node) as node:
        node.push("tree", {"file": b"content", "bin/run": b"#!/bin/sh\necho ran\n"})
        node.mount()
        if serve:
            node.serve(keep=keep)
        yield node
