"""A real driver process, its node server and its store, and the calls that a kubelet makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mountinfo import list_mounts
from envstore.fuse.sockets import ask, somebody_listens
from tests.fuse.lives import PATIENCE, Live, until

NODE_ID = "node-1"
FILES = {"bin/hello": b"#!/bin/sh\necho hello\n", "lib/data": b"d" * 70_000, "empty": b""}
"""What ``default/env:latest`` holds."""

_POD = {
    "csi.storage.k8s.io/pod.name": "pod-1",
    "csi.storage.k8s.io/pod.namespace": "team-a",
    "csi.storage.k8s.io/pod.uid": "8c2b2b5e-0000-4000-8000-000000000001",
    "csi.storage.k8s.io/serviceAccount.name": "default",
}
POD = {**_POD, "csi.storage.k8s.io/ephemeral": "true"}
"""What the kubelet adds to the attributes of a volume in a pod spec."""


class Site(Live):
    """A node server for the directory ``kubelet``, and a driver, as often as one is started.

    with site.published() as target:
        assert (target / "empty").read_bytes() == b""
    """

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.kubelet = base / "kubelet"
        self.kubelet.mkdir()
        self.socket = base / "plugin" / "csi.sock"
        self.state = base / "driver"
        self.node_socket = base / "node.sock"
        self.request = MountRequest(
            "",
            "",
            str(self.place),
            allow_other=True,
            node=str(self.node_socket),
            targets=[str(self.kubelet)],
        )
        self.driver: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    # --- the store -----------------------------------------------------------------------------

    def add(self, ref: str, files: Mapping[str, bytes]) -> Path:
        """Push files as ``ref``, those in ``bin`` executable; returns the source."""
        source = self.base / f"source {ref.replace('/', ' ')} {time.monotonic()}"
        for name, data in files.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.startswith("bin/") else 0o644)
        self.store.push(source, ref)
        return source

    # --- the driver ----------------------------------------------------------------------------

    def arguments(self, *more: str | Path) -> list[str]:
        """Return a driver's command line; later options win over earlier ones."""
        return [
            *(sys.executable, "-m", "envstore", "--store", self.store.url, "csi", "serve"),
            *("--endpoint", f"unix://{self.socket}", "--node-id", NODE_ID),
            *("--state-dir", str(self.state), "--node-socket", str(self.node_socket)),
            "--controller",
            *map(str, more),
        ]

    def start(self, *more: str | Path, env: Mapping[str, str] | None = None) -> None:
        """Start the driver and return when it can be called."""
        self.driver = self.spawn(self.arguments(*more), env)

        def began() -> bool:
            assert self.driver is not None
            assert self.driver.poll() is None, self.driver_log()
            return serves(self.socket)

        until(began, "that the driver serves")
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")

    def spawn(
        self, arguments: list[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command that writes to the driver's log."""
        with open(self.base / "driver.log", "ab") as log:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
                start_new_session=True,
            )

    def signal(self, number: int = signal.SIGTERM) -> int:
        """End the driver by a signal; returns its exit status."""
        assert self.driver is not None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.driver.poll() is None:
            self.driver.send_signal(number)
        return self.driver.wait(PATIENCE)

    def restart(self, *more: str | Path) -> None:
        self.signal()
        self.start(*more)

    def driver_log(self) -> str:
        return (self.base / "driver.log").read_text(errors="replace")

    # --- calls ---------------------------------------------------------------------------------

    @property
    def channel(self) -> grpc.Channel:
        assert self._channel is not None
        return self._channel

    @property
    def identity(self) -> csi_pb2_grpc.IdentityStub:
        return csi_pb2_grpc.IdentityStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def node(self) -> csi_pb2_grpc.NodeStub:
        return csi_pb2_grpc.NodeStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def controller(self) -> csi_pb2_grpc.ControllerStub:
        return csi_pb2_grpc.ControllerStub(self.channel)  # type: ignore[no-untyped-call]

    def target(self, name: str = "vol") -> Path:
        """Return the target path of a volume in a pod of that name; its parent exists."""
        path = self.kubelet / "pods" / name / "volumes" / "kubernetes.io~csi" / "env" / "mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(
        self,
        volume: str = "csi-1",
        target: Path | str | None = None,
        attributes: Mapping[str, str] | None = None,
        *,
        pod: Mapping[str, str] = POD,
        timeout: float = PATIENCE,
        **fields: Any,
    ) -> Path:
        """Publish ``default/env``, or what the attributes say, and return the target."""
        path = self.target() if target is None else target
        self.node.NodePublishVolume(
            publish_request(volume, str(path), attributes, pod=pod, **fields), timeout=timeout
        )
        return Path(path)

    def unpublish(self, volume: str = "csi-1", target: Path | str | None = None) -> None:
        path = self.target() if target is None else target
        self.node.NodeUnpublishVolume(
            csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(path)),
            timeout=PATIENCE,
        )

    def volume_stats(
        self, volume: str = "csi-1", target: Path | str | None = None
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        path = self.target() if target is None else target
        found = self.node.NodeGetVolumeStats(
            csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=str(path)),
            timeout=PATIENCE,
        )
        assert isinstance(found, csi_pb2.NodeGetVolumeStatsResponse)
        return found

    @contextmanager
    def published(self, volume: str = "csi-1", **publish: Any) -> Iterator[Path]:
        """Publish for as long as the block runs."""
        target = self.publish(volume, **publish)
        yield target
        self.unpublish(volume, target)

    # --- what there is -------------------------------------------------------------------------

    def node_status(self) -> dict[str, Any]:
        """Return what the node server says of itself and its leases."""
        found = ask(self.node_socket, PATIENCE, ask="status")
        assert isinstance(found, dict)
        return found

    def shown(self) -> list[str]:
        """Return every mount below the kubelet's directory."""
        return [
            one.mountpoint for one in list_mounts() if one.mountpoint.startswith(f"{self.kubelet}/")
        ]

    def remains(self) -> list[str]:
        """Return what is left of volumes when none is published: mounts, leases, records, dirs."""
        records = self.state / "published"
        targets = self.kubelet.glob("pods/*/volumes/*/*/mount")
        return [
            *self.shown(),
            *(one["id"] for one in self.node_status()["mounts"]),
            *(path.name for path in records.iterdir()),
            *map(str, targets),
        ]

    def close(self) -> None:
        if self.driver is not None:
            self.signal(signal.SIGKILL)
        super().close()


def publish_request(
    volume: str,
    target: str,
    attributes: Mapping[str, str] | None = None,
    *,
    pod: Mapping[str, str] = POD,
    **fields: Any,
) -> csi_pb2.NodePublishVolumeRequest:
    """Return the kubelet's request for a volume with these attributes."""
    context = {"ref": "env"} if attributes is None else attributes
    fields.setdefault("volume_capability", capability())
    return csi_pb2.NodePublishVolumeRequest(
        volume_id=volume, target_path=target, volume_context={**context, **pod}, **fields
    )


def capability(mode: str = "SINGLE_NODE_WRITER", **mount: Any) -> csi_pb2.VolumeCapability:
    """Return a capability of a mounted volume."""
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(**mount),
        access_mode=csi_pb2.VolumeCapability.AccessMode(
            mode=getattr(csi_pb2.VolumeCapability.AccessMode, mode)
        ),
    )


def refused(call: Callable[[], object], code: str, *words: str) -> str:
    """See a call refused with a status code, in one line that has these words; return the line."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    details = str(error.details())
    assert error.code() is getattr(grpc.StatusCode, code), (error.code(), details)
    assert "\n" not in details
    for word in ("Traceback", 'File "', *(() if code != "INTERNAL" else ("Error",))):
        assert word not in details
    for said in words:
        assert said in details, details
    return details


def serves(socket: Path) -> bool:
    """Whether a driver can be called: one that was killed leaves its socket there."""
    try:
        return somebody_listens(socket)
    except FileNotFoundError:
        return False  # not even its directory
