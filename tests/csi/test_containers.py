"""Volumes in real containers: an environment at its prefix, whatever happens to who serves it.

The containers are runc's, as unprivileged as a pod's, and see the volume as a container runtime
shows it to them: a bind of the target path with rslave propagation. Their root file system holds
no Python, only the C library that Debian's needs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from envstore.csi.request import CANONICAL_PREFIX as PREFIX
from tests.channel.pypi import build_index
from tests.commands import Cli
from tests.csi.nodes import Node, inline
from tests.fuse.lives import PATIENCE, ROOT, gone, kill, lived, until

pytestmark = pytest.mark.skipif(
    not (ROOT and shutil.which("runc") and shutil.which("busybox")),
    reason="containers take root, runc and busybox-static",
)

USER = 1000
# What the C library and extension modules may ask for that `ldd` of the interpreter does not name.
LIBRARIES = (
    "libc.so.6", "libdl.so.2", "libexpat.so.1", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0",
    "librt.so.1", "libstdc++.so.6", "libutil.so.1", "libz.so.1",
)  # fmt: skip

_NUMPY = """
import os, sys, numpy
maps = open("/proc/self/maps").read()
mapped = {line.split()[-1] for line in maps.splitlines() if sys.prefix in line}
try:
    open(sys.prefix + "/new", "w")
except OSError as error:
    refused = error.strerror
print(sys.prefix, os.getuid(), int(numpy.arange(10).sum()), refused)
print(sum(path.endswith(".so") for path in mapped))
"""
# Every file it meets it meets again, read anew, and each round starts a Python that maps numpy's
# libraries. A file that cannot be read, or reads otherwise than before, ends it with an error.
_WORK = """
import hashlib, os, random, subprocess, sys
choose = random.Random(sys.argv[1])
names = [os.path.join(at, name) for at, _, found in os.walk(sys.prefix) for name in found]
names = sorted(name for name in names if name.endswith((".py", ".so")) and "/numpy/" in name)
program = "import numpy; print(numpy.arange(10).sum())"
seen, rounds = {}, 0
while not os.path.exists("/flags/stop"):
    for name in [*choose.sample(names, 20), *choose.sample(sorted(seen), min(20, len(seen)))]:
        with open(name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            digest = hashlib.sha256(file.read()).digest()
        assert seen.setdefault(name, digest) == digest, name
    if rounds % 3 == 0:
        said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
        assert said.stdout == b"45\\n", said
    rounds += 1
    print("round", rounds, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Container:
    """A container that was started, and what it has said so far."""

    process: subprocess.Popen[bytes]
    said: Path
    complained: Path

    def rounds(self) -> int:
        """Return how many rounds of work it has done."""
        assert self.process.poll() is None, self.complained.read_text()
        return self.said.read_text().count("round")

    def goes_on(self) -> None:
        """Wait until it has done a round that began after now."""
        done = self.rounds()
        until(lambda: self.rounds() >= done + 2, "another round in a container")

    def end(self) -> str:
        """Wait for its end, which must be a good one; returns what it said."""
        status = self.process.wait(PATIENCE)
        assert (status, self.complained.read_text()) == (0, ""), (status, self.said.read_text())
        return self.said.read_text()


class Containers:
    """Runs containers on a node, all with one root file system."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.base = node.base / "containers"
        self.root = root_file_system(self.base / "rootfs")
        self.flags = self.base / "flags"
        self.flags.mkdir()
        self._count = 0

    @contextmanager
    def running(self, volume: Path, code: str, *arguments: str) -> Iterator[Container]:
        """Run Python code with ``volume`` at its prefix; a container that is left is killed."""
        self._count += 1
        name = f"envstore-{os.getpid()}-{self._count}"
        bundle = self.base / name
        bundle.mkdir()
        command = [f"{PREFIX}/bin/python3", "-B", "-c", code, *arguments]
        (bundle / "config.json").write_text(json.dumps(self.config(volume, command)))
        runc = ["runc", "--root", str(self.base / "runc")]
        said, complained = bundle / "stdout", bundle / "stderr"
        with said.open("wb") as out, complained.open("wb") as err:
            process = subprocess.Popen(
                [*runc, "run", "--bundle", str(bundle), name],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        with process:
            try:
                yield Container(process, said, complained)
            finally:
                if process.poll() is None:
                    # Its mounts go with its processes.
                    subprocess.run([*runc, "delete", "--force", name], check=False, timeout=30)
                    process.kill()

    def run(self, volume: Path, code: str) -> str:
        """Run Python code to its end; returns what it said."""
        with self.running(volume, code) as container:
            return container.end()

    def config(self, volume: Path, command: list[str]) -> dict[str, Any]:
        """Return the OCI runtime configuration of a container without privileges."""
        shown = {PREFIX: volume, "/flags": self.flags}
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": USER, "gid": USER},
                "args": command,
                "env": ["PATH=/bin", "OPENBLAS_NUM_THREADS=1"],
                "cwd": "/",
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                *(
                    {
                        "destination": target,
                        "type": "bind",
                        "source": str(source),
                        "options": ["rbind", "rslave", "ro"],
                    }
                    for target, source in shown.items()
                ),
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
            },
        }


def root_file_system(root: Path) -> Path:
    """Make a root file system of a shell and the libraries that a Python from outside needs."""
    for name in ("bin", "dev", "flags", "proc", PREFIX[1:]):
        (root / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), root / "bin" / "sh")
    said = subprocess.run(
        ["ldd", os.path.realpath(sys.executable)], check=True, capture_output=True, text=True
    ).stdout
    needed = {word for word in said.split() if word.startswith("/")}
    (folder,) = {os.path.dirname(path) for path in needed if "/libc.so" in path}
    for library in {*needed, *(f"{folder}/{name}" for name in LIBRARIES)}:
        if os.path.exists(library):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    return root


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node server and a store that holds an environment with numpy; no driver yet."""
    base = tmp_path_factory.mktemp("node")
    index = build_index(base / "index", small=False, real=["numpy"])
    cli = Cli(base / "cli")
    (cli.root / "requirements.txt").write_text(
        f"--no-index\n--find-links {index.find_links}\nnumpy\n"
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        lived(base, patch, Node) as made,
        ExitStack() as end,
    ):
        cli.ok("--store", made.store.url, "push", "analysis", "requirements.txt")
        # As a kubelet's directory is, so that what is mounted there later reaches containers.
        subprocess.run(["mount", "--bind", made.pods, made.pods], check=True)
        end.callback(subprocess.run, ["umount", "--recursive", "--lazy", made.pods], check=True)
        subprocess.run(["mount", "--make-rshared", made.pods], check=True)
        made.mount()
        yield made


@pytest.fixture(scope="module")
def containers(node: Node) -> Containers:
    return Containers(node)


def publish(node: Node, pod: str) -> Path:
    return node.publish(pod, **inline(pod), ref="analysis")


def test_an_environment_runs_in_a_container(node: Node, containers: Containers) -> None:
    node.start()
    said, mapped = containers.run(publish(node, "pod-1"), _NUMPY).splitlines()
    assert said == f"{PREFIX} {USER} 45 Read-only file system"
    assert int(mapped) >= 5
    node.unpublish("pod-1")
    assert node.left() == []
    node.stop()


def test_containers_go_on_whoever_is_killed(node: Node, containers: Containers) -> None:
    driver = node.start()
    with ExitStack() as stack:
        working = [
            stack.enter_context(containers.running(publish(node, pod), _WORK, pod))
            for pod in ("pod-1", "pod-2")
        ]

        def all_go_on() -> None:
            for container in working:
                container.goes_on()

        all_go_on()
        for _ in range(2):
            server = node.server_pid()
            kill(server)
            until(lambda server=server: gone(server))  # type: ignore[misc]
            all_go_on()
            driver.kill()
            driver.wait(PATIENCE)
            all_go_on()
            driver = node.start()
        # What is new works beside what has gone on.
        said = containers.run(publish(node, "pod-3"), _NUMPY)
        assert said.startswith(f"{PREFIX} {USER} 45 ")
        node.unpublish("pod-3")
        holder = node.holder_pid()
        kill(holder)
        until(lambda: gone(holder))
        all_go_on()
        driver.send_signal(signal.SIGTERM)
        driver.wait(PATIENCE)
        server = node.server_pid()
        kill(server)
        all_go_on()
        (containers.flags / "stop").touch()
        for container in working:
            container.end()
    node.start()
    for pod in ("pod-1", "pod-2"):
        node.unpublish(pod)
    assert node.left() == []
    node.stop()
