"""Environments of packages: pushing requirements beside installing them with uv.

``python -m benchmarks environments``. Both read the same requirements and ask the same index on
this machine, which is filled once. uv's cache is warm, as its users know it; envstore's own caches
are empty whenever it pushes for the first time.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.measure import BenchmarkError, interleave, run
from benchmarks.results import OURS, Metric, Result
from examples.client import Envstore

REQUIREMENTS = (
    *("pandas", "scipy", "scikit-learn", "pyarrow", "matplotlib", "transformers", "sympy"),
    *("networkx", "httpx", "fastapi", "sqlalchemy", "jinja2", "rich", "typer", "aiohttp"),
    *("requests", "beautifulsoup4", "lxml", "pytest", "joblib", "cloudpickle"),
)
"""About 60 wheels with what they need."""
CHANGED = "cloudpickle"
"""The small package that comes in another version."""
OLDER = "3.1.1"

FIRST = Metric("first push, or install", "s")
STORED = Metric("push or install when all packages are there", "s")
LOCKED = Metric("push of the lock when all packages are there", "s")
CHANGE = Metric("push with one package changed", "s")
MANY = Metric("push of a lock of 200 stored packages, fresh machine", "s")
DOWNLOADED = Metric("downloaded by that push", "B")

UV, UV_COMPILED = "uv", "uv --compile-bytecode"
_MANY = 200
_MANY_FILES = 40


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks environments",
        description="Measure pushes of requirements beside installations by uv.",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Make what is missing, measure and print."""
    options = parse(arguments)
    work = options.work.expanduser().resolve() / "environments"
    uv = Path(sys.executable).with_name("uv")
    wheels = _wheels(work, uv, say)
    result = Result("environments", "Environments of packages")
    result.facts["wheels"] = len(list(wheels.glob("*.whl")))
    scratch = work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with _serving(_index(scratch / "index", wheels)) as index:
            rounds = _Rounds(scratch, index, uv, result)
            rounds.warm()
            result.absent |= interleave(
                options.rounds,
                {
                    UV: lambda: rounds.install(UV),
                    UV_COMPILED: lambda: rounds.install(UV_COMPILED, "--compile-bytecode"),
                    OURS: rounds.push,
                    "200 packages": rounds.many,
                },
                say,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.show(console, result)
    return 1 if result.absent else 0


class _Rounds:
    """One round of each; everything it makes lies below ``scratch``."""

    def __init__(self, scratch: Path, index: str, uv: Path, result: Result) -> None:
        self._scratch, self._uv, self._result = scratch, uv, result
        self._requirements = scratch / "requirements.txt"
        lines = [f"--index-url {index}", *REQUIREMENTS]
        self._requirements.write_text("\n".join(lines) + "\n")
        self._older = scratch / "older.txt"
        self._older.write_text("\n".join([*lines, f"{CHANGED}=={OLDER}"]) + "\n")
        self._many: Path | None = None

    def warm(self) -> None:
        """Fill uv's cache."""
        self.install("")

    def install(self, name: str, *options: str) -> None:
        """Make a virtual environment and install into it with uv."""
        place = self._scratch / "venv"
        shutil.rmtree(place, ignore_errors=True)
        venv = run([self._uv, "venv", "--python", sys.executable, place])
        # For uv a requirement file's own options are enough; nothing else shall be asked.
        install = run(
            [self._uv, "pip", "install", *options, "-r", self._requirements],
            env={**os.environ, "VIRTUAL_ENV": str(place)},
            sync=False,
        )
        if name:
            self._result.add(FIRST, name, venv.seconds + install.seconds)
            self._result.add(STORED, name, venv.seconds + install.seconds)

    def push(self) -> None:
        """Push to a new store, then from another machine, then with one package changed."""
        shutil.rmtree(self._scratch / "store", ignore_errors=True)
        requirements, store = self._requirements, self._scratch / "store"
        first = self._machine(store, "first")
        self._timed(FIRST, first, "push", "env", requirements)
        self._timed(STORED, self._machine(store, "second"), "push", "again", requirements)
        lock = self._scratch / "envstore.lock"
        first.call("lock", requirements, "-o", lock)
        self._timed(LOCKED, self._machine(store, "third"), "push", "locked", lock)
        said = self._timed(CHANGE, first, "push", "env", self._older)
        if said["new_packages"] != 1:
            raise BenchmarkError(f"{said['new_packages']} packages were new, not 1")

    def many(self) -> None:
        """Push a lock of many packages that are all stored, from a machine that has nothing."""
        store = self._scratch / "many"
        if self._many is None:
            self._many = self._lock_of_many(store)
        fresh = self._machine(store, "fresh")
        said = self._timed(MANY, fresh, "push", f"env-{random.getrandbits(32)}", self._many)
        self._result.add(DOWNLOADED, OURS, said["downloaded_bytes"])

    def _lock_of_many(self, store: Path) -> Path:
        folder = self._scratch / "many wheels"
        folder.mkdir()
        for number in range(_MANY):
            _make_wheel(folder, number)
        requirements = self._scratch / "many.txt"
        names = [f"bench-many-{number}" for number in range(_MANY)]
        lines = [f"--find-links {folder.as_uri()}", "--no-index", *names]
        requirements.write_text("\n".join(lines) + "\n")
        lock = self._scratch / "many.lock"
        machine = self._machine(store, "maker")
        machine.call("lock", requirements, "-o", lock)
        machine.call("push", "env", lock)
        shutil.rmtree(folder)
        return lock

    def _machine(self, store: Path, name: str) -> Envstore:
        """Return a machine on which envstore was never used."""
        home = self._scratch / "machines" / name
        shutil.rmtree(home, ignore_errors=True)
        store.parent.mkdir(parents=True, exist_ok=True)
        machine = Envstore(f"file://{store}", home)
        if not store.exists():
            machine.call("init")
        return machine

    def _timed(self, metric: Metric, machine: Envstore, *arguments: str | Path) -> dict[str, float]:
        command = [Path(sys.executable).with_name("envstore"), *arguments, "--json"]
        said = self._scratch / "said.json"
        timing = run(command, env=machine.environment(), output=said)
        self._result.add(metric, OURS, timing.seconds)
        return dict(json.loads(said.read_text()))


def _wheels(work: Path, uv: Path, say: Callable[[str], None]) -> Path:
    """Return a directory with the wheels, downloading them once."""
    folder = work / "wheels"
    done = folder / ".complete"
    if not done.exists():
        say("downloading about 60 wheels")
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        run([*pip, "--only-binary", ":all:", *REQUIREMENTS])
        run([*pip, "--no-deps", "--only-binary", ":all:", f"{CHANGED}=={OLDER}"])
        done.touch()
    return folder


def _index(directory: Path, wheels: Path) -> Path:
    """Make a simple index (PEP 503) of the wheels and return its directory."""
    projects: dict[str, list[str]] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        with wheel.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        link = f'<a href="../../files/{wheel.name}#sha256={sha256}">{wheel.name}</a>'
        projects.setdefault(name, []).append(link)
    for name, links in projects.items():
        page = directory / "simple" / name / "index.html"
        page.parent.mkdir(parents=True)
        page.write_text("<!DOCTYPE html>\n" + "\n".join(links) + "\n")
    (directory / "files").symlink_to(wheels)
    return directory


@contextmanager
def _serving(directory: Path) -> Iterator[str]:
    """Serve ``directory`` over HTTP from a process of its own; yields the index's URL."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=directory, stdout=quiet, stderr=quiet)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        else:
            raise BenchmarkError("the index does not answer")
        yield f"http://127.0.0.1:{port}/simple/"
    finally:
        server.terminate()
        server.wait()


def _make_wheel(folder: Path, number: int) -> None:
    """Write a small pure wheel with some modules."""
    name = f"bench_many_{number}"
    rng = random.Random(number)
    files = {
        f"{name}/module_{at}.py": "\n".join(
            f"def f{line}():\n    return {rng.getrandbits(64)}" for line in range(40)
        )
        for at in range(_MANY_FILES)
    }
    info = f"{name}-1.0.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(
        f"{path},sha256={_digest(text.encode())},{len(text)}\n" for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
