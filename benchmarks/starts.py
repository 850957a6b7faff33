"""How envstore starts an environment cold: with and without what it knows of earlier starts."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.artefacts import Bench, Maker, Record
from benchmarks.link import Link
from benchmarks.measure import BenchmarkError
from benchmarks.mounted import Available
from benchmarks.workloads import WORKLOADS, Environment, Workload
from examples.client import Envstore, envstore_command
from examples.seaweed import S3Server

_PATIENCE, _POLL = 120.0, 0.01
REF = "bench"
PLAIN, PROFILED, REPACKED = "envstore", "envstore-profiled", "envstore-repacked"


@dataclass(frozen=True, slots=True)
class Start:
    """A start that is to be timed.

    ``scratch`` is the node's directory on local disk for caches and settings, ``place`` the name
    in it of where the environment is to be; ``record`` tells what was made for it in the store.
    """

    environment: Environment
    workload: Workload
    server: S3Server
    link: Link
    record: Record
    scratch: Path
    place: str = "mnt"

    @property
    def mountpoint(self) -> Path:
        """Where the environment is to be: a directory that does not exist yet."""
        return self.scratch / self.place


def plain_environment() -> dict[str, str]:
    """Return variables for programs that are to talk to the server and to nobody else."""
    variables = Envstore("", Path()).environment()
    kept = {
        name: value
        for name, value in variables.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("UV_", "RCLONE_"))
    }
    return {**kept, "NO_PROXY": "*", "no_proxy": "*"}


def client(server: S3Server, endpoint: str, bucket: str, home: Path) -> Envstore:
    """Return a node of its own that reaches the store in ``bucket`` by ``endpoint``."""
    reached = S3Server(endpoint, server.metrics, server.pid)
    variables = {**reached.environment, "NO_PROXY": "*", "no_proxy": "*"}
    # A node server of the machine's own has no part in this.
    variables["ENVSTORE_NODE_SOCKET"] = str(home / "node.sock")
    return Envstore(reached.url(bucket), home, variables)


class EnvstoreStart:
    """envstore's mount with the given options, from a store that was made in the given way."""

    programs = ()

    def __init__(self, name: str, artefact: str, *options: str, follows: bool = False) -> None:
        self.name, self.artefact = name, artefact
        self._options, self._follows = options, follows

    def lacking(self) -> str | None:
        """Return which of its options or commands this envstore has not, None if it has all."""
        wanted = {PROFILED: ["profile"], REPACKED: ["profile", "repack"]}.get(self.artefact, [])
        known = _help()
        absent = [f"envstore {command}" for command in wanted if f"\n  {command} " not in known]
        options = [*self._options[::2], *(["--profile"] if self._follows else [])]
        known = _help("mount")
        absent += [f"envstore mount {option}" for option in options if option not in known]
        return f"not there yet: {', '.join(absent)}" if absent else None

    def maker(self) -> Maker:
        """Return what stores the environment, with profiles or repacked where that is asked."""
        return {PLAIN: push, PROFILED: record_profiles, REPACKED: repack}[self.artefact]

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        """Nothing: an empty node."""
        yield

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        """Mount the snapshot; it ends with the block."""
        node = client(start.server, start.link.endpoint, start.record["bucket"], start.scratch)
        options = [*self._options]
        if self._follows and start.workload.environment == start.environment.name:
            options += ["--profile", start.workload.name]
        with node.mounted(REF, start.mountpoint, *options) as mount:
            yield Available(mount.path, mount.pid, mount)


class NodeStart(EnvstoreStart):
    """envstore's mount through a node server, which runs before on every node of a cluster."""

    def lacking(self) -> str | None:
        """Return what this envstore has not, None if it has all; only root can."""
        if os.geteuid() != 0:
            return "only root can"
        absent = None if "\n  node " in _help() else "not there yet: envstore node"
        return absent or super().lacking()

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        """Run the node server, with an empty cache."""
        endpoint, bucket = start.link.endpoint, start.record["bucket"]
        variables = client(start.server, endpoint, bucket, start.scratch).environment()
        command = [*envstore_command(), "node", "--directory", str(start.scratch / "node")]
        log = start.scratch / "node.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        try:
            deadline = time.monotonic() + _PATIENCE
            while not Path(variables["ENVSTORE_NODE_SOCKET"]).is_socket():
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text(errors="replace").strip().splitlines()[-2:]
                    raise BenchmarkError(f"envstore node failed: {' | '.join(text)}")
                time.sleep(_POLL)
            yield
        finally:
            process.terminate()
            process.wait(_PATIENCE)


def push(bench: Bench) -> Record:
    """Push the environment into a new bucket."""
    bucket = bench.server.new_bucket()
    node = client(bench.server, bench.server.endpoint, bucket, bench.home)
    node.call("init")
    node.call("push", REF, bench.environment.tree)
    return {"bucket": bucket}


def record_profiles(bench: Bench) -> Record:
    """Push the environment and record every workload in it, each as a profile of its name."""
    record = push(bench)
    node = client(bench.server, bench.server.endpoint, record["bucket"], bench.home)
    for workload in _workloads(bench):
        bench.say(f"recording {workload.name}")
        code = "import os, sys\n"
        code += f"sys.path.insert(0, os.environ['ENVSTORE_PREFIX'] + '/{bench.environment.site}')\n"
        command = [bench.environment.interpreter, "-I", "-B", "-c", code + workload.code]
        recording = [*envstore_command(), "profile", REF, "--name", workload.name, "--", *command]
        done = subprocess.run(recording, env=node.environment(), capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-2:]
            raise BenchmarkError(f"envstore profile failed: {' | '.join(said)}")
    return record


def repack(bench: Bench) -> Record:
    """Push, record, and lay what was recorded side by side."""
    record = record_profiles(bench)
    node = client(bench.server, bench.server.endpoint, record["bucket"], bench.home)
    if _workloads(bench):
        node.call("repack", REF)
    return record


def _workloads(bench: Bench) -> list[Workload]:
    return [one for one in WORKLOADS.values() if one.environment == bench.environment.name]


def _help(*command: str) -> str:
    asked = [*envstore_command(), *command, "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout
