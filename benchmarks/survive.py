"""What mounts live through: killed servers, an upgrade, a store that is away, many mounts at once.

``python -m benchmarks survive [kill|upgrade|outage|many]``. Every byte that is read is compared
with the tree that was pushed; what is told of times is the longest that anybody waited.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cold_start import empty_directory
from benchmarks.measure import BenchmarkError, drop_caches
from benchmarks.workloads import LARGE, build, environment
from examples.client import Envstore
from examples.seaweed import running_s3

PARTS = ("kill", "upgrade", "outage", "many")

_SUMMED = 5_000
_MOUNTS = 20


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks survive", description="Measure what mounts live through."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--large", type=Path, help="a venv with torch [one is built]")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--every", type=float, default=0.3, metavar="SECONDS", help="between kills [%(default)s]"
    )
    parser.add_argument("--outage", type=float, default=60, metavar="SECONDS", help="[%(default)s]")
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
    if os.geteuid() != 0:
        raise BenchmarkError("only root can empty the page cache and serve a node")
    options.work.mkdir(parents=True, exist_ok=True)
    tree = options.large or build(LARGE, options.work, say)
    with empty_directory(options.work) as scratch, running_s3(scratch / "s3") as server:
        variables = {**server.environment, "ENVSTORE_NODE_SOCKET": str(scratch / "node.sock")}
        client = Envstore(server.url(server.new_bucket()), scratch, variables)
        say("pushing the tree")
        client.call("init")
        client.call("push", "tree", tree)
        bench = _Bench(options, tree, scratch, client, server.pid, console)
        for part in options.parts:
            console.print(f"[bold]{part}[/]")
            getattr(bench, part)()
    return 0


@dataclass(slots=True)
class _Readers:
    """Threads that read files of a mount over and over and compare them with their source."""

    tree: Path
    place: Path
    files: list[str]
    sums: dict[str, bytes] = field(default_factory=dict)
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    longest: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def reading(self, threads: int) -> Iterator[None]:
        for name in self.files:
            self.sums[name] = _sum(self.tree / name)
        workers = [threading.Thread(target=self._read, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            self.stop.set()
            for worker in workers:
                worker.join()

    def _read(self, number: int) -> None:
        choose = random.Random(number)
        while not self.stop.is_set():
            name = choose.choice(self.files)
            started = time.monotonic()
            try:
                with open(self.place / name, "rb") as file:
                    # Or the kernel would answer from its own cache.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    found = hashlib.file_digest(file, "sha256").digest()
                if found != self.sums[name]:
                    self.wrong.append(name)
            except OSError as error:
                self.wrong.append(f"{name}: {error}")
            self.reads += 1
            self.longest = max(self.longest, time.monotonic() - started)


@dataclass(slots=True)
class _Bench:
    options: argparse.Namespace
    tree: Path
    scratch: Path
    client: Envstore
    s3: int
    console: Console

    def kill(self) -> None:
        """Kill the server every so often during imports, then during checksums of many files."""
        place = self._place("kill")
        with self.client.mounted("tree", place, "--node", "off"):
            code = environment("large", self.tree).command(place, "import torch")
            rounds, took = 0, 0.0
            with self._killing(place) as killed:
                while killed.count < self.options.kills:
                    drop_caches()
                    started = time.monotonic()
                    done = subprocess.run(code, check=False, capture_output=True)
                    if done.returncode:
                        raise BenchmarkError(f"import torch: {done.stderr.decode()[-500:]}")
                    rounds += 1
                    took = time.monotonic() - started
            self._tell(
                f"{rounds} imports of torch, the last in {took:.1f} s, through {killed.count} kills"
                f" every {self.options.every} s: no error"
            )
            names = self._files(_SUMMED)
            expected = [_sum(self.tree / name) for name in names]
            wrong, rounds = 0, 0
            with self._killing(place) as killed:
                while killed.count < self.options.kills:
                    drop_caches()
                    wrong += sum(
                        _sum(place / name) != right
                        for name, right in zip(names, expected, strict=True)
                    )
                    rounds += 1
            restarts = self._mount(place)["restarts"]
            self._tell(
                f"{rounds} x sha256 of {len(names)} files through {killed.count} kills: "
                f"{wrong} wrong; restarts in all: {restarts}"
            )

    def upgrade(self) -> None:
        """Replace holder and server under readers, several times."""
        place = self._place("upgrade")
        with self.client.mounted("tree", place, "--node", "off"):
            readers = _Readers(self.tree, place, self._files(300))
            seconds = []
            with readers.reading(4):
                time.sleep(3)
                readers.longest = 0.0
                time.sleep(5)
                usual = readers.longest
                readers.longest = 0.0
                for _ in range(10):
                    started = time.monotonic()
                    self.client.call("remount", "--upgrade", place)
                    seconds.append(time.monotonic() - started)
                    time.sleep(1)
            self._tell(
                f"10 upgrades under 4 readers: {len(readers.wrong)} errors in {readers.reads} "
                f"reads; longest read {readers.longest * 1000:.0f} ms, before {usual * 1000:.0f} "
                f"ms; the command takes {sorted(seconds)[5]:.1f} s {readers.wrong[:2]}"
            )

    def outage(self) -> None:
        """Stop the S3 server in the middle of reads, and let it go on."""
        place = self._place("outage")
        names = sorted(self._files(10**6), key=lambda name: -(self.tree / name).stat().st_size)
        big, small = names[0], names[-300:]
        with self.client.mounted("tree", place, "--node", "off", "--profile", "none"):
            readers = _Readers(self.tree, place, small)
            for name in small:
                (place / name).read_bytes()
            found: list[Any] = []

            def read() -> None:
                started = time.monotonic()
                try:
                    found.append(_sum(place / big) == _sum(self.tree / big))
                except OSError as error:
                    found.append(error)
                found.append(time.monotonic() - started)

            with readers.reading(1):
                reader = threading.Thread(target=read)
                reader.start()
                time.sleep(0.4)
                os.kill(self.s3, signal.SIGSTOP)
                try:
                    time.sleep(self.options.outage)
                finally:
                    os.kill(self.s3, signal.SIGCONT)
                reader.join()
            self._tell(
                f"S3 away for {self.options.outage:.0f} s while {big} was read: "
                f"{'right' if found[0] is True else found[0]} after {found[1]:.1f} s; meanwhile "
                f"{readers.reads} reads of cached files, {len(readers.wrong)} errors, the longest "
                f"{readers.longest * 1000:.0f} ms"
            )

    def many(self) -> None:
        """Mount many snapshots that differ through one node server, and walk them all."""
        copy = self.scratch / "copy"
        subprocess.run(["cp", "-al", self.tree, copy], check=True)
        for number in range(_MOUNTS):
            (copy / "number").write_text(f"{number}\n")
            self.client.call("push", f"tree:{number}", copy)
        (self.scratch / "node").mkdir()
        self.client.call("node", "--background", "--directory", self.scratch / "node")
        places, times = [], []
        try:
            for number in range(_MOUNTS):
                place = self._place(f"many-{number}")
                options = ("--node", "on", "--fast-path", "off")
                found = self.client.call("mount", f"tree:{number}", place, *options)
                times.append(float(found["seconds"]))
                places.append(place)
            before = self._node_memory()
            for place in places:
                subprocess.run(["find", place, "-type", "f", "-size", "+1G"], check=True)
            after = self._node_memory()
            extra = self._place("again")
            found = self.client.call("mount", "tree:0", extra, *options)
            again = float(found["seconds"])
            places.append(extra)
            self._tell(
                f"{_MOUNTS} snapshots through one node server: {before / 1e6:.0f} MB, "
                f"{after / 1e6:.0f} MB after walking all; a mount takes "
                f"{sorted(times)[_MOUNTS // 2] * 1000:.0f} ms, of what is served already "
                f"{again * 1000:.0f} ms"
            )
        finally:
            for place in places:
                self.client.call("umount", place)
            self.client.call("umount", self.scratch / "node")

    def _node_memory(self) -> int:
        """Return the proportional set size in bytes of the holder, its servers and their memory."""
        holder = self._mount(self.scratch / "node")["holder_pid"]
        children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        return sum(_pss(int(pid)) for pid in (holder, *children))

    @contextmanager
    def _killing(self, place: Path) -> Iterator[_Killed]:
        killed = _Killed()
        killer = threading.Thread(target=self._kill, args=(place, killed))
        killer.start()
        try:
            yield killed
        finally:
            killed.stop.set()
            killer.join()

    def _kill(self, place: Path, killed: _Killed) -> None:
        while not killed.stop.wait(self.options.every):
            pid = self._mount(place)["server_pid"]
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                killed.count += 1

    def _mount(self, place: Path) -> dict[str, Any]:
        from envstore.fuse.records import RecordFiles
        from envstore.fuse.sockets import ask

        os.environ["XDG_STATE_HOME"] = self.client.environment()["XDG_STATE_HOME"]
        record = RecordFiles(os.path.realpath(place)).load()
        if record is None:
            raise BenchmarkError(f"{place} is not mounted")
        found: dict[str, Any] = ask(record.control, 30, ask="status")
        return found

    def _files(self, count: int) -> list[str]:
        found = [
            str(path.relative_to(self.tree))
            for path in sorted(self.tree.rglob("*"))
            if path.is_file() and not path.is_symlink() and path.suffix != ".pyc"
        ]
        return random.Random(1).sample(found, min(count, len(found)))

    def _place(self, name: str) -> Path:
        place = self.scratch / name
        place.mkdir()
        return place

    def _tell(self, text: str) -> None:
        self.console.print(text)


@dataclass(slots=True)
class _Killed:
    count: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def _sum(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _pss(pid: int) -> int:
    """Return a process's share of the memory it has mapped, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
