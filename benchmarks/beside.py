"""What a push loses while garbage is collected all the time, on the same machine and store.

``python -m benchmarks beside``. Pushes of new trees alone and beside ``envstore gc`` take turns;
each leaves garbage for the next collection, so that there is always something to mark, to move
and to delete.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.cold_start import empty_directory
from benchmarks.measure import interleave, middle
from examples.client import CommandError, Envstore
from examples.seaweed import running_s3

ALONE, BESIDE = "alone", "beside gc"
MB = 1_000_000
_KEPT = 12
_FILES = 96


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks beside", description="Measure pushes beside garbage collection."
    )
    parser.add_argument("--size", type=int, default=192, metavar="MB", help="[%(default)s]")
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--store", choices=("s3", "file"), default="s3", help="where to [%(default)s]"
    )
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Measure and print."""
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with empty_directory(options.work) as scratch:
        if options.store == "file":
            _measure(options, Envstore(f"file://{scratch}/store", scratch), scratch, console, say)
        else:
            with running_s3(scratch / "s3") as server:
                url = server.url(server.new_bucket())
                client = Envstore(url, scratch, server.environment)
                _measure(options, client, scratch, console, say)
    return 0


def _measure(
    options: argparse.Namespace,
    client: Envstore,
    scratch: Path,
    console: Console,
    say: Callable[[str], None],
) -> None:
    client.call("init")
    tree = _Tree(scratch / "tree", options.size * MB)
    say(f"pushing {_KEPT} trees, of which every second is removed")
    for number in range(_KEPT):
        tree.change()
        client.call("push", f"old:v{number}", tree.path)
        if number % 2:
            client.call("rm", "--yes", f"old:v{number}")
    rates: dict[str, list[float]] = {ALONE: [], BESIDE: []}
    runs = [0, 0, 0]

    def push(name: str) -> None:
        tree.change()
        done = client.call("push", "new", tree.path)
        rates[name].append(done["new_chunk_bytes"] / done["seconds"])

    def beside() -> None:
        with _collecting(client) as collected:
            push(BESIDE)
        for number, value in enumerate((collected.runs, collected.freed, collected.condemned)):
            runs[number] += value

    failed = interleave(options.repetitions, {ALONE: lambda: push(ALONE), BESIDE: beside}, say)
    if failed:
        raise CommandError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    alone, with_gc = middle(rates[ALONE]), middle(rates[BESIDE])
    console.print(
        f"push of {options.size} MB, a third of it new, to {options.store}, medians of "
        f"{options.repetitions}:\n"
        f"  alone      {alone / MB:6.1f} MB/s of new data\n"
        f"  beside gc  {with_gc / MB:6.1f} MB/s: {with_gc / alone:.2f}x (target >= 0.80x)\n"
        f"  meanwhile {runs[0]} collections condemned {runs[2] / MB:,.0f} MB and freed "
        f"{runs[1] / MB:,.0f} MB"
    )


class _Tree:
    """A directory of files, half random and half text, of which ``change`` rewrites a third."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._each = size // _FILES
        self._random = random.Random(7)
        self._turn = 0
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for number in range(_FILES):
            self._write(number)

    def change(self) -> None:
        for number in range(self._turn % 3, _FILES, 3):
            self._write(number)
        self._turn += 1

    def _write(self, number: int) -> None:
        if number % 2:
            data = self._random.randbytes(self._each)
        else:
            data = self._random.randbytes(self._each // 2).hex().encode()
        (self.path / f"{number:03d}").write_bytes(data)


class _Collections:
    """How many collections ended, and what they did."""

    def __init__(self) -> None:
        self.runs = self.freed = self.condemned = 0
        self.failed: list[str] = []


@contextmanager
def _collecting(client: Envstore) -> Iterator[_Collections]:
    """Collect garbage over and over; what is begun at the end is waited for."""
    found = _Collections()
    first, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            first.set()
            try:
                done = client.call("gc", "--grace", "0s")
            except (CommandError, subprocess.SubprocessError) as error:
                found.failed.append(str(error))
                return
            found.runs += 1
            found.freed += done["freed_bytes"]
            found.condemned += done["condemned_bytes"]

    worker = threading.Thread(target=work)
    worker.start()
    first.wait()
    try:
        yield found
    finally:
        stop.set()
        worker.join()
    if found.failed:
        raise CommandError(found.failed[0])
