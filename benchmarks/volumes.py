"""Volumes as a kubelet asks for them: publishing, containers that use them, and what they outlive.

``python -m benchmarks volumes [publish|cold|many|survive]``. The driver and its node server are
real processes, called over the driver's socket; containers are runc's, with the volume bound in as
a container runtime does it. Needs root, runc and busybox (`make setup` installs them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console

from benchmarks.cold_start import empty_directory
from benchmarks.measure import BenchmarkError, drop_caches, settle
from examples.client import Envstore, envstore_command
from examples.seaweed import S3Server, running_s3

PARTS = ("publish", "cold", "many", "survive")
PREFIX = "/opt/envstore"

_TEMPORARY = "/tmp"  # noqa: S108 - of a container, its own
_VOLUMES, _ROUNDS = 50, 10
_WITHIN = 60.0
_NUMPY = "import numpy; print(numpy.arange(10).sum())"
_READ = """
import hashlib, os, random, sys, time
root, seed, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
choose, reads, longest = random.Random(seed), 0, 0.0
names = sorted(
    os.path.join(at, name) for at, _, found in os.walk(root) for name in found
    if name.endswith((".py", ".so")))
sums = {}
while not os.path.exists(stop):
    name = choose.choice(names)
    began = time.monotonic()
    with open(name, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.sha256(file.read()).digest()
    longest = max(longest, time.monotonic() - began)
    assert sums.setdefault(name, found) == found, name
    reads += 1
print(reads, longest)
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks volumes", description="Measure volumes of the CSI driver."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="[%(default)s]")
    parser.add_argument("--containers", type=int, default=10, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="of reading [%(default)s]"
    )
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    options = parser.parse_args(arguments)
    options.parts = tuple(options.parts) or PARTS
    if set(options.parts) - set(PARTS):
        parser.error(f"choose from {', '.join(PARTS)}")
    return options


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Measure and print."""
    options = parse(arguments)
    if os.geteuid() != 0 or not shutil.which("runc") or not shutil.which("busybox"):
        raise BenchmarkError("volumes take root, runc and busybox-static: make setup")
    options.work.mkdir(parents=True, exist_ok=True)
    with empty_directory(options.work) as scratch, running_s3(scratch / "s3") as server:
        bucket = server.new_bucket()
        variables = {**server.environment}
        client = Envstore(server.url(bucket), scratch, variables)
        say("pushing an environment with numpy")
        client.call("init")
        (scratch / "requirements.txt").write_text("numpy==2.4.6\n")
        client.call("push", "analysis", scratch / "requirements.txt")
        local = scratch / "local"
        say("writing the same environment to local disk")
        client.call("pull", "analysis", local, "--prefix", PREFIX)
        bench = _Bench(options, scratch, server, bucket, local, console)
        for part in options.parts:
            console.print(f"[bold]{part}[/]")
            settle()
            getattr(bench, part)()
    return 0


@dataclass(slots=True)
class Driver:
    """A driver with its node server, and calls to it."""

    directory: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    stub: Any = None
    channel: Any = None

    @property
    def targets(self) -> Path:
        """Where a kubelet's volumes would be."""
        return self.directory / "kubelet"

    @property
    def node_socket(self) -> Path:
        """Where the node server listens."""
        return self.directory / "run" / "node.sock"

    def node(self) -> None:
        """Start the node server."""
        run = self.directory / "run"
        run.mkdir(exist_ok=True)
        done = subprocess.run(
            [
                *envstore_command(), "node", "--background", "--socket", str(self.node_socket),
                "--directory", str(run / "mnt"), "--targets", str(self.targets),
            ],
            env=self.environment, check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise BenchmarkError(f"the node server does not start: {done.stderr}")

    def start(self) -> None:
        """Start the driver, or start it again."""
        import grpc

        from envstore.csi.proto import csi_pb2, csi_pb2_grpc

        socket = self.directory / "csi.sock"
        log = (self.directory / "csi.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [
                    *envstore_command(), "csi", "serve", "--endpoint", f"unix://{socket}",
                    "--node-id", "bench", "--state-dir", str(self.directory / "state"),
                    "--node-socket", str(self.node_socket),
                ],
                env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.channel = grpc.insecure_channel(f"unix://{socket}")
        self.stub = csi_pb2_grpc.NodeStub(self.channel)
        probe = csi_pb2_grpc.IdentityStub(self.channel)
        end = time.monotonic() + _WITHIN
        while True:
            try:
                if probe.Probe(csi_pb2.ProbeRequest(), wait_for_ready=True, timeout=10).ready.value:
                    return
            except grpc.RpcError as error:
                if time.monotonic() > end:
                    raise BenchmarkError(f"the driver does not start: {error}") from error
            time.sleep(0.05)

    def publish(self, number: int, ref: str = "analysis") -> Path:
        """Publish an inline volume; returns where."""
        from envstore.csi.proto import csi_pb2

        target = self.targets / "pods" / f"{number}" / "mount"
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY
        self.stub.NodePublishVolume(
            csi_pb2.NodePublishVolumeRequest(
                volume_id=f"csi-{number}",
                target_path=str(target),
                readonly=True,
                volume_capability=csi_pb2.VolumeCapability(
                    mount=csi_pb2.VolumeCapability.MountVolume(),
                    access_mode=csi_pb2.VolumeCapability.AccessMode(mode=mode),
                ),
                volume_context={
                    "ref": ref,
                    "prefix": PREFIX,
                    "csi.storage.k8s.io/ephemeral": "true",
                    "csi.storage.k8s.io/pod.name": f"pod-{number}",
                    "csi.storage.k8s.io/pod.namespace": "bench",
                    "csi.storage.k8s.io/pod.uid": f"uid-{number}",
                },
            ),
            wait_for_ready=True,
            timeout=_WITHIN,
        )
        return target

    def unpublish(self, number: int) -> None:
        """Take a volume away."""
        from envstore.csi.proto import csi_pb2

        target = self.targets / "pods" / f"{number}" / "mount"
        self.stub.NodeUnpublishVolume(
            csi_pb2.NodeUnpublishVolumeRequest(volume_id=f"csi-{number}", target_path=str(target)),
            wait_for_ready=True,
            timeout=_WITHIN,
        )

    def node_pids(self) -> dict[str, int]:
        """Return the processes of the node server."""
        from envstore.fuse.sockets import ask

        control = ask(self.node_socket, 10.0, ask="state")["control"]
        found = ask(control, 10.0, ask="status")
        return {"holder": found["holder_pid"], "server": found["server_pid"]}

    def upgrade(self) -> None:
        """Replace the node server's code, in place."""
        subprocess.run(
            [*envstore_command(), "remount", "--upgrade", str(self.directory / "run" / "mnt")],
            env=self.environment, check=True, capture_output=True,
        )  # fmt: skip

    def stop(self) -> None:
        """End both."""
        if self.channel is not None:
            self.channel.close()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(_WITHIN)
        with suppress(Exception):
            subprocess.run(
                [*envstore_command(), "umount", "--lazy", str(self.directory / "run" / "mnt")],
                env=self.environment, check=False, capture_output=True, timeout=_WITHIN,
            )  # fmt: skip


@dataclass(slots=True)
class _Bench:
    options: argparse.Namespace
    scratch: Path
    server: S3Server
    bucket: str
    local: Path
    console: Console
    root: Path = field(init=False)
    flags: Path = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        self.root = _root_filesystem(self.scratch / "rootfs")
        self.flags = self.scratch / "flags"
        self.flags.mkdir(mode=0o755)

    @contextmanager
    def driver(self) -> Iterator[Driver]:
        """Yield a driver on a node that has nothing of the store yet."""
        self.number += 1
        directory = self.scratch / f"node{self.number}"
        (directory / "kubelet").mkdir(parents=True)
        # As on a node, where what is mounted there reaches the containers' name spaces.
        place = str(directory / "kubelet")
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "--make-rshared", place], check=True)
        environment = {
            **os.environ,
            **self.server.environment,
            "ENVSTORE_URL": self.server.url(self.bucket),
            "ENVSTORE_CACHE_DIR": str(directory / "cache"),
            "XDG_STATE_HOME": str(directory / "records"),
        }
        driver = Driver(directory, environment)
        try:
            driver.node()
            driver.start()
            yield driver
        finally:
            driver.stop()
            subprocess.run(["umount", "--recursive", "--lazy", place], check=False)

    def publish(self) -> None:
        """Time publishing what the node serves already."""
        with self.driver() as driver:
            driver.publish(0)
            times = []
            for number in range(1, 101):
                began = time.monotonic()
                driver.publish(number)
                times.append((time.monotonic() - began) * 1000)
            for number in range(101):
                driver.unpublish(number)
            worst = quantiles(times, n=20)[-1]
            self.say(f"NodePublish of a known snapshot: {median(times):.1f} ms, p95 {worst:.1f} ms")

    def cold(self) -> None:
        """Time a container's start on a cold node beside the same from local disk."""
        found: dict[str, list[float]] = {"published": [], "volume": [], "local": []}
        for _ in range(self.options.rounds):
            with self.driver() as driver:
                drop_caches()
                began = time.monotonic()
                target = driver.publish(0)
                found["published"].append(time.monotonic() - began)
                self.run(target, _NUMPY)
                found["volume"].append(time.monotonic() - began)
                driver.unpublish(0)
            drop_caches()
            began = time.monotonic()
            self.run(self.local, _NUMPY)
            found["local"].append(time.monotonic() - began)
        volume, local = median(found["volume"]), median(found["local"])
        self.say(
            f"cold node until import numpy ended: {volume:.2f} s "
            f"(published after {median(found['published']):.2f} s); from local disk {local:.2f} s; "
            f"wanted at most {1.5 * local + 1:.2f} s"
        )

    def many(self) -> None:
        """Publish and unpublish many volumes at once, and look for what is left."""
        with self.driver() as driver, ThreadPoolExecutor(_VOLUMES) as pool:
            list(pool.map(driver.publish, range(_VOLUMES)))
            list(pool.map(driver.unpublish, range(_VOLUMES)))
            before = self.footprint(driver)
            seconds = []
            for _ in range(_ROUNDS):
                began = time.monotonic()
                targets = list(pool.map(driver.publish, range(_VOLUMES)))
                if not all((target / "bin" / "python3").exists() for target in targets):
                    raise BenchmarkError("a volume that was published is empty")
                list(pool.map(driver.unpublish, range(_VOLUMES)))
                seconds.append(time.monotonic() - began)
            after = self.footprint(driver)
            self.say(
                f"{_VOLUMES} volumes published and unpublished at once, {_ROUNDS} times: "
                f"{median(seconds):.2f} s each; before {before}, after {after}"
            )

    def survive(self) -> None:
        """Kill and upgrade everything under containers that read."""
        count = self.options.containers
        with self.driver() as driver:
            targets = [driver.publish(number) for number in range(count)]
            stop = self.flags / "stop"
            stop.unlink(missing_ok=True)
            with ThreadPoolExecutor(count) as pool:
                readers = [
                    pool.submit(self.run, target, _READ, f"{PREFIX}/lib", str(n), "/flags/stop")
                    for n, target in enumerate(targets)
                ]
                kills = self.torment(driver, time.monotonic() + self.options.seconds)
                stop.touch()
                said = [reader.result().split() for reader in readers]
            for number in range(count):
                driver.unpublish(number)
        reads, longest = sum(int(one) for one, _ in said), max(float(one) for _, one in said)
        self.say(
            f"{count} containers read {reads} files without an error; longest {longest:.2f} s; "
            + ", ".join(f"{what} {times}" for what, times in kills.items())
        )

    def torment(self, driver: Driver, end: float) -> dict[str, int]:
        """Kill the driver, server and holder and upgrade, in turn; returns how often."""
        kills = {"driver killed": 0, "server killed": 0, "holder killed": 0, "upgraded": 0}
        while time.monotonic() < end:
            os.kill(driver.node_pids()["server"], signal.SIGKILL)
            kills["server killed"] += 1
            time.sleep(0.5)
            assert driver.process is not None
            driver.process.kill()
            driver.process.wait()
            driver.channel.close()
            driver.start()
            kills["driver killed"] += 1
            driver.upgrade()
            kills["upgraded"] += 1
            time.sleep(0.5)
            os.kill(driver.node_pids()["holder"], signal.SIGKILL)
            kills["holder killed"] += 1
            time.sleep(1.0)
        return kills

    def footprint(self, driver: Driver) -> dict[str, int]:
        """Return what may leak: mounts, processes, open files, records."""
        assert driver.process is not None
        pids = [driver.process.pid, *driver.node_pids().values()]
        mounts = Path("/proc/self/mountinfo").read_text().count(str(driver.targets))
        return {
            "mounts": mounts,
            "open files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            "processes": sum(_is_below(driver.directory, pid) for pid in _processes()),
            "files": sum(len(names) for _, _, names in os.walk(driver.directory / "state")),
            "directories": len(list((driver.targets / "pods").glob("*/*"))),
        }

    def run(self, volume: Path, code: str, *arguments: str) -> str:
        """Run Python code in a container whose environment is ``volume``; returns what it says."""
        self.number += 1
        name = f"bench-{os.getpid()}-{threading.get_ident()}-{self.number}"
        bundle = self.scratch / "bundles" / name
        bundle.mkdir(parents=True)
        command = [f"{PREFIX}/bin/python3", "-B", "-c", code, *arguments]
        config = _config(self.root, volume, self.flags, command)
        (bundle / "config.json").write_text(json.dumps(config))
        done = subprocess.run(
            ["runc", "--root", str(self.scratch / "runc"), "run", "--bundle", str(bundle), name],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise BenchmarkError(f"the container failed: {done.stderr or done.stdout}")
        return done.stdout

    def say(self, text: str) -> None:
        """Print one result."""
        self.console.print(f"  {text}", highlight=False, soft_wrap=True)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_below(directory: Path, pid: int) -> bool:
    """Whether a process was started for ``directory``."""
    try:
        return str(directory).encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _root_filesystem(root: Path) -> Path:
    """Return a root file system with the C library that the interpreter of the volume needs."""
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "flags", PREFIX[1:]):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(shutil.which("busybox") or "busybox", root / "bin" / "sh")
    said = subprocess.run(
        ["ldd", os.path.realpath(sys.executable)], check=True, capture_output=True, text=True
    ).stdout
    libraries = [word for line in said.splitlines() for word in line.split() if word[0] == "/"]
    folder = Path(next(one for one in libraries if "libc.so" in one)).parent
    extra = ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1",
             "libgcc_s.so.1", "libstdc++.so.6", "libz.so.1", "libexpat.so.1")  # fmt: skip
    for library in {*libraries, *(str(folder / name) for name in extra)}:
        if os.path.exists(library):
            place = root / library[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    return root


def _config(root: Path, volume: Path, flags: Path, command: list[str]) -> dict[str, Any]:
    """Return the OCI runtime configuration of a container as unprivileged as a pod's."""

    def bind(source: Path, target: str, *options: str) -> dict[str, Any]:
        return {
            "destination": target,
            "type": "bind",
            "source": str(source),
            "options": ["rbind", "rslave", *options],
        }

    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": command,
            "env": ["PATH=/bin", f"HOME={_TEMPORARY}", "OPENBLAS_NUM_THREADS=1"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": _TEMPORARY, "type": "tmpfs", "source": "tmpfs"},
            bind(volume, PREFIX, "ro"),
            bind(flags, "/flags", "ro"),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
    }
