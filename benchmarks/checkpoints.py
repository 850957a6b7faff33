"""Checkpoints beside torch.save, DCP and s3torchconnector: what they cost and what they survive.

``python -m benchmarks checkpoints [stall|durable|restore|uploads|training|survive|failover]``.
Everything is measured in turns in the same run, and told as ratios of medians. The state is
random float32 tensors of 16 MiB, changed before every save, so that nothing is saved by chance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import checkpoint_peers as peers
from benchmarks.cold_start import empty_directory
from benchmarks.measure import BenchmarkError, settle
from examples.seaweed import S3Server, running_s3

PARTS = ("stall", "durable", "s3", "restore", "uploads", "training", "survive", "failover")
_ROOT = Path(__file__).resolve().parent.parent
_PEERS = _ROOT / ".venv" / "peers" / "bin" / "python"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks checkpoints", description="Measure checkpoints of training."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--size", type=float, default=0.75, metavar="GIB", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--kills", type=int, default=100, metavar="N", help="of trainers [%(default)s]"
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
    if not _PEERS.exists():
        raise BenchmarkError("the peers are not installed: make bench-setup")
    os.environ["ENVSTORE_SLOTS"] = f"/dev/shm/envstore-bench-{os.getpid()}"  # noqa: S108
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        with empty_directory(options.work) as scratch:
            bench = _Bench(options, scratch, console)
            for part in options.parts:
                console.print(f"[bold]{part}[/] ({options.size} GiB, {options.rounds} rounds)")
                settle()
                getattr(bench, part)()
    finally:
        shutil.rmtree(os.environ["ENVSTORE_SLOTS"], ignore_errors=True)
    return 0


@dataclass(slots=True)
class _Times:
    """Seconds by what was measured."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        self.found.setdefault(what, []).append(seconds)

    def of(self, what: str) -> float:
        return median(self.found[what])

    def ratio(self, what: str, to: str) -> str:
        return f"{self.of(what) / self.of(to):.2f}x {to}"


@dataclass(slots=True)
class _Bench:
    options: argparse.Namespace
    scratch: Path
    console: Console

    def say(self, text: str) -> None:
        """Print one result."""
        self.console.print(f"  {text}", highlight=False, soft_wrap=True)

    def tell(self, times: _Times, *ratios: tuple[str, str, float]) -> None:
        """Print medians, and ratios beside what they should be at most."""
        parts = [f"{what} {times.of(what):.3f} s" for what in times.found]
        self.say(", ".join(parts))
        for what, to, bound in ratios:
            self.say(f"{what}: {times.ratio(what, to)} (wanted at most {bound})")

    @contextmanager
    def run(self, store: str, name: str = "bench/run", **options: Any) -> Iterator[Any]:
        """Yield a run whose slots and persister are gone afterwards."""
        from envstore import checkpoint

        run = checkpoint.Run(name, store=store, keep=checkpoint.last(2), **options)
        try:
            yield run
        finally:
            run.close()

    def new_store(self, name: str) -> str:
        """Make an embedded store; returns its URL."""
        url = f"file://{self.scratch / name}"
        subprocess.run(
            [sys.executable, "-m", "envstore", "--store", url, "init"],
            check=True, capture_output=True,
        )  # fmt: skip
        return url

    def peer_file(self, step: int) -> Path:
        """Return a new file: an overwritten one would have its pages in the cache already."""
        return self.scratch / f"peer-{step}.pt"

    def stall(self) -> None:
        """Time for how long a save holds the training loop."""
        times = _Times()
        tensors = peers.state(self.options.size)
        peers.start_group(self.scratch)
        with self.run(self.new_store("stall")) as run:
            run.prewarm(tensors)
            peers.change(tensors)
            began = time.perf_counter()
            save = run.save(1, tensors)
            times.add("first save", time.perf_counter() - began)
            save.durable.result()
            run.save(2, tensors).durable.result()
            for step in range(3, 3 + self.options.rounds):
                peers.change(tensors)
                times.add("torch.save", peers.torch_save(tensors, self.peer_file(step)))
                peers.change(tensors)
                target = self.scratch / "peer-dcp"
                times.add("DCP async_save", peers.async_stall(tensors, target))
                shutil.rmtree(target)
                os.sync()
                peers.change(tensors)
                began = time.perf_counter()
                save = run.save(step, tensors)
                times.add("save", time.perf_counter() - began)
                save.durable.result()
                os.sync()
        self.tell(
            times,
            ("save", "torch.save", 0.40),
            ("save", "DCP async_save", 0.70),
            ("first save", "save", 1.3),
        )

    def durable(self) -> None:
        """Time from the call of save() until the checkpoint is committed on local disk."""
        times = _Times()
        tensors = peers.state(self.options.size)
        with self.run(self.new_store("durable")) as run:
            run.prewarm(tensors)
            run.save(1, tensors).durable.result()
            for step in range(2, 2 + self.options.rounds):
                peers.change(tensors)
                times.add("torch.save", peers.torch_save(tensors, self.peer_file(step)))
                os.sync()
                peers.change(tensors)
                began = time.perf_counter()
                save = run.save(step, tensors)
                times.add("stall", time.perf_counter() - began)
                save.durable.result()
                times.add("durable", time.perf_counter() - began)
                os.sync()
        self.tell(times, ("durable", "torch.save", 0.75))

    @contextmanager
    def s3_peers(self, server: S3Server) -> Iterator[Callable[[str, str, str], float]]:
        """Yield a function that has a peer save or load; returns the seconds."""
        with (self.scratch / "peers.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    str(_PEERS), "-m", "benchmarks.checkpoint_peers", str(self.options.size),
                    server.endpoint, server.new_bucket(),
                ],
                cwd=_ROOT, env={**os.environ, **server.environment}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise BenchmarkError((self.scratch / "peers.log").read_text()[-2000:])
            return dict(json.loads(line))

        def order(do: str, how: str, name: str) -> float:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, "how": how, "name": name}) + "\n")
            process.stdin.flush()
            return float(answer()["seconds"])

        try:
            answer()
            yield order
        finally:
            process.stdin.close()
            process.wait()

    def s3(self) -> None:
        """Time saving to S3 and reading from it."""
        from envstore import checkpoint

        times = _Times()
        with running_s3(self.scratch / "s3") as server, self.s3_peers(server) as peer:
            os.environ |= server.environment
            url = server.url(server.new_bucket())
            subprocess.run(
                [sys.executable, "-m", "envstore", "--store", url, "init"],
                check=True, capture_output=True,
            )  # fmt: skip
            tensors = peers.state(self.options.size)
            with self.run(url) as run:
                run.prewarm(tensors)
                for step in range(1, 1 + self.options.rounds):
                    for how in ("raw", "fsspec", "s3torch"):
                        times.add(f"{how} save", peer("save", how, f"{how}-{step}"))
                    peers.change(tensors)
                    began = time.perf_counter()
                    save = run.save(step, tensors)
                    times.add("stall", time.perf_counter() - began)
                    save.durable.result()
                    times.add("save", time.perf_counter() - began)
            for step in range(1, 1 + self.options.rounds):
                for how in ("raw", "fsspec", "s3torch"):
                    times.add(f"{how} load", peer("load", how, f"{how}-{step}"))
                for what in ("S3 restore", "cache restore"):
                    found = self.restored(url, tensors, self.scratch / f"cache-{step}")
                    times.add(what, found)
                peers.torch_save(tensors, self.scratch / "peer.pt")
                times.add("torch.load", self.loaded(self.scratch / "peer.pt"))
                shutil.rmtree(self.scratch / f"cache-{step}")
            read = self.weights_only(url, checkpoint)
        self.tell(
            times,
            ("stall", "fsspec save", 0.05),
            ("save", "raw save", 1.1),
            ("S3 restore", "fsspec load", 0.35),
            ("S3 restore", "s3torch load", 0.80),
            ("cache restore", "torch.load", 0.65),
        )
        self.say(f"weights only: {read:.3f} of their bytes read (wanted at most 1.02)")

    def loaded(self, path: Path) -> float:
        """Return the seconds of ``torch.load``."""
        import torch

        return peers.timed(lambda: torch.load(path, weights_only=True))

    def restored(self, url: str, tensors: dict[str, dict[str, Any]], cache: Path) -> float:
        """Return the seconds of restoring into ``tensors``, checked, with a node cache."""
        expected = {name: group["layers.0.weight"].clone() for name, group in tensors.items()}
        os.environ["ENVSTORE_CACHE_DIR"] = str(cache)
        os.environ["ENVSTORE_CACHE_SIZE"] = f"{int(self.options.size * 2 + 2)}G"
        for group in tensors.values():
            for tensor in group.values():
                tensor.zero_()
        with self.run(url) as run:
            seconds = peers.timed(lambda: run.restore(tensors))
        for name, tensor in expected.items():
            if not tensor.equal(tensors[name]["layers.0.weight"]):
                raise BenchmarkError("what was restored is not what was saved")
        return seconds

    def weights_only(self, url: str, checkpoint: Any) -> float:
        """Return the bytes read for the weights alone, in those of the weights."""
        state = {"model": peers.state(self.options.size)["model"]}
        size = sum(tensor.nbytes for tensor in state["model"].values())
        os.environ["ENVSTORE_CACHE_DIR"] = str(self.scratch / "cache-weights")
        with self.run(url) as run:
            before = run.traffic.bytes_in
            run.restore(state, only=["model"])
            return float((run.traffic.bytes_in - before) / size)

    def uploads(self) -> None:
        """Count what later saves send, of what has changed."""
        for what, changing in (("full", 1.0), ("half frozen", 0.5), ("LoRA", 1 / 24)):
            tensors = peers.state(self.options.size)
            flat = [tensor for group in tensors.values() for tensor in group.values()]
            active = flat[: max(1, round(len(flat) * changing))]
            with self.run(self.new_store(f"uploads-{what.replace(' ', '-')}")) as run:
                run.save(1, tensors).durable.result()
                sent = []
                for step in range(2, 4):
                    for tensor in active:
                        tensor.mul_(1.0001)
                    before = run.status()["sent"]
                    run.save(step, tensors).durable.result()
                    run.wait()
                    grown = run.status()["sent"] - before
                    sent.append(grown / sum(tensor.nbytes for tensor in active))
            bound = 1.005 if what == "full" else 1.02
            self.say(f"{what}: sent {max(sent):.4f} of what changed (wanted at most {bound})")

    def training(self) -> None:
        """Time steps of training while nothing, and while a save, is being persisted."""
        import torch

        for threads in (1, 2):
            torch.set_num_threads(threads)
            left = torch.randn(512, 512)
            tensors = peers.state(self.options.size)
            times: dict[str, list[float]] = {"idle": [], "persisting": []}

            def step() -> float:
                began = time.perf_counter()
                torch.linalg.multi_dot([left] * 24)  # noqa: B023
                return time.perf_counter() - began

            with self.run(self.new_store(f"training-{threads}")) as run:
                run.save(1, tensors).durable.result()
                for number in range(2, 2 + self.options.rounds):
                    settle()
                    times["idle"] += [step() for _ in range(200)]
                    peers.change(tensors)
                    save = run.save(number, tensors)
                    while not save.durable.done():
                        times["persisting"].append(step())
            torch.set_num_threads(2)
            ratio = median(times["persisting"]) / median(times["idle"])
            free = "a core free" if threads == 1 else "both cores busy"
            self.say(
                f"{free}: median step {1000 * median(times['idle']):.1f} ms, while persisting "
                f"{1000 * median(times['persisting']):.1f} ms ({len(times['persisting'])} steps): "
                f"{ratio:.3f}x" + (" (wanted at most 1.05)" if threads == 1 else "")
            )

    @contextmanager
    def trainer(
        self, url: str, node: str, mib: int, steps: int | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Yield a trainer on a node of its own: slots and cache; it is dead afterwards."""
        slots = Path(os.environ["ENVSTORE_SLOTS"]) / node
        slots.mkdir(parents=True, exist_ok=True)
        cache = self.scratch / f"cache-{node}"
        process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.checkpoint_trainer", url, "bench/killed",
                str(mib), *([] if steps is None else [str(steps)]),
            ],
            cwd=_ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "ENVSTORE_SLOTS": str(slots), "ENVSTORE_CACHE_DIR": str(cache)},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def heard(self, process: subprocess.Popen[str], what: str) -> dict[str, Any]:
        """Return the next line that says ``what``."""
        assert process.stdout is not None
        for line in process.stdout:
            said = dict(json.loads(line))
            if said["what"] == what:
                return said
        raise BenchmarkError(f"the trainer ended before it said {what!r}")

    def survive(self) -> None:
        """Kill trainers right after save() returned; look whether what they saved is there."""
        from benchmarks.checkpoint_trainer import blank, fill
        from envstore import checkpoint

        mib = 64
        chance = random.Random(0)
        url = self.new_store("survive")
        whole = 0
        for _ in range(self.options.kills):
            with self.trainer(url, "one", mib) as process:
                for _ in range(chance.randrange(1, 4)):
                    saved = self.heard(process, "saved")["step"]
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
            with self.run(url, "bench/killed", incarnation="judge") as run:
                end = time.monotonic() + 60
                while (run.latest() or -1) < saved and time.monotonic() < end:
                    time.sleep(0.02)
                state, expected = blank(mib), blank(mib)
                step = run.restore(state, step=saved)
                fill(expected, saved)
                equal = all(
                    state[name][key].equal(expected[name][key])
                    for name in state
                    for key in state[name]
                )
                whole += step == saved and equal
        self.say(f"{whole} of {self.options.kills} saves committed and bit-identical after SIGKILL")
        del checkpoint

    def failover(self) -> None:
        """Time from the death of a trainer to the first step on another node."""
        times = _Times()
        mib = round(self.options.size * 1024)
        with running_s3(self.scratch / "s3-failover") as server:
            os.environ |= server.environment
            url = server.url(server.new_bucket())
            subprocess.run(
                [sys.executable, "-m", "envstore", "--store", url, "init"],
                check=True, capture_output=True,
            )  # fmt: skip
            for number in range(self.options.rounds):
                with self.trainer(url, f"a{number}", mib, steps=number + 1) as process:
                    self.heard(process, "durable")
                    began = time.monotonic()
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    with self.trainer(url, f"b{number}", mib, steps=0) as second:
                        first = self.heard(second, "first step")
                        times.add("killed to first step", first["at"] - began)
                settle()
                began = time.monotonic()
                with self.trainer(url, f"c{number}", mib, steps=0) as calm:
                    restored = self.heard(calm, "restored")["at"]
                    times.add("start and restore", restored - began)
        self.tell(times, ("killed to first step", "start and restore", 1.3))
