"""Warm use: what a node that has everything already still pays for using it.

``python -m benchmarks warm [pod|import|walk|read]``. Everything needed was fetched before what is
timed; systems take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import report, warm_report
from benchmarks.artefacts import Shelf
from benchmarks.cold_start import Choice, empty_directory, prepare, timed
from benchmarks.link import UNSHAPED, Link
from benchmarks.measure import BenchmarkError, drop_caches, interleave
from benchmarks.mounted import Available
from benchmarks.peers_mount import Starter, starters
from benchmarks.results import Result
from benchmarks.starts import Start
from benchmarks.warm_report import COMMAND, LOCAL, MOUNT, READ, TOTAL, WALK
from benchmarks.workloads import BIG, BIG_FILE, LARGE, WORKLOADS, Environment, build, environment
from examples.client import CommandError
from examples.seaweed import S3Server

PARTS = ("pod", "import", "walk", "read")
SYSTEMS = ("envstore", "envstore-none", "envstore-fast", "envstore-node", "juicefs", "squashfs")
"""Those that can be mounted twice on a node and keep what they fetched."""

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Warm:
    """A system that is in use on a node: the start that made it so, and where its files are."""

    system: Starter
    start: Start
    available: Available


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks warm", description="Measure the use of what is there already."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--system", default=",".join(SYSTEMS), help="some of: %(default)s")
    parser.add_argument("--command", default="torch", help=f"some of: {', '.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="[%(default)s]")
    parser.add_argument("--small", type=Path, help="a venv with pandas and scipy [one is built]")
    parser.add_argument("--large", type=Path, help="a venv with torch as well [one is built]")
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    parser.add_argument("--out", type=Path, help="where results go [warm in --work]")
    options = parser.parse_args(arguments)
    options.parts = tuple(options.parts) or PARTS
    for name, allowed in (("system", SYSTEMS), ("command", tuple(WORKLOADS))):
        wanted = tuple(filter(None, getattr(options, name).split(",")))
        if set(wanted) - set(allowed) or not wanted:
            parser.error(f"--{name}: choose from {', '.join(allowed)}")
        setattr(options, name, wanted)
    if set(options.parts) - set(PARTS):
        parser.error(f"choose from {', '.join(PARTS)}")
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Make what is missing, measure, print and write."""
    options = parse(arguments)
    if os.geteuid() != 0:
        raise BenchmarkError("only root can empty the page cache and mount images")
    load = os.getloadavg()
    work = options.work.expanduser().resolve()
    workloads = [WORKLOADS[name] for name in options.command]
    wanted = (
        {workload.environment for workload in workloads}
        if _uses(options, "pod", "import")
        else set()
    )
    wanted |= {LARGE} if _uses(options, "walk") else set()
    places = {
        name: environment(name, getattr(options, name) or build(name, work, say))
        for name in sorted(wanted)
    }
    if _uses(options, "read"):
        places[BIG] = Environment(BIG, build(BIG, work, say), "", "")
    known = starters()
    systems = [known[name] for name in options.system]
    out = options.out or work / "warm"
    trees = {name: place.tree for name, place in places.items()}
    choice = Choice(
        work,
        trees,
        None,
        (UNSHAPED,),
        options.system,
        tuple(workloads),
        options.rounds,
        (),
        out,
        say,
    )
    prepare(choice, systems, places)
    results: dict[str, Result] = {}

    def done(result: Result) -> None:
        results[result.scenario] = result
        result.absent |= choice.absent
        warm_report.show(console, result)

    shelf = Shelf(work)
    artefacts = [system.artefact for system in systems if system.artefact is not None]
    with shelf.measuring(shelf.buckets(places, artefacts)) as server:
        usable = [system for system in systems if system.name not in choice.absent]
        node = Node(choice, usable, server)
        for workload in workloads:
            place = places.get(workload.environment)
            for part, measure in (("pod", node.pods), ("import", node.imports)):
                if part in options.parts and place is not None:
                    done(measure(place, workload.name))
        if "walk" in options.parts:
            done(node.walks(places[LARGE]))
        if "read" in options.parts:
            done(node.reads(places[BIG]))
    judged = warm_report.judge(results)
    report.show_targets(console, judged)
    tree = next(iter(trees.values()))
    console.print(f"written: {report.save(out, tree, results, judged, load)}")
    return 0


def _uses(options: argparse.Namespace, *parts: str) -> bool:
    return bool(set(parts) & set(options.parts))


@dataclass(frozen=True, slots=True)
class Node:
    """A node on which systems are in use, each beside the others."""

    choice: Choice
    systems: list[Starter]
    server: S3Server

    def pods(self, place: Environment, workload: str) -> Result:
        """Measure a second mount of what is mounted already, and a command in it."""
        result = Result(f"warm pod {workload}", f"A second pod on a warm node: {workload}")
        command = WORKLOADS[workload].code
        with self._in_use(place, workload, result) as used:

            def second(warm: Warm) -> None:
                start = replace(warm.start, place="second")
                started = time.perf_counter()
                with _entered(warm.system, start) as available:
                    ready = time.perf_counter() - started
                    seconds = timed(place.command(available.root, command))
                    result.add(TOTAL, warm.system.name, time.perf_counter() - started)
                    result.add(MOUNT, warm.system.name, ready)
                    result.add(COMMAND, warm.system.name, seconds)
                if start.mountpoint.exists():
                    start.mountpoint.rmdir()

            def local() -> None:
                seconds = timed(place.command(place.tree, command))
                result.add(TOTAL, LOCAL, seconds)
                result.add(COMMAND, LOCAL, seconds)

            for warm in used:
                timed(place.command(warm.available.root, command))
            timed(place.command(place.tree, command))
            steps: dict[str, Callable[[], None]] = {
                warm.system.name: partial(second, warm) for warm in used
            }
            self._take_turns(result, steps | {LOCAL: local})
        return result

    def imports(self, place: Environment, workload: str) -> Result:
        """Measure a command in a mount that has run it before."""
        result = Result(f"warm import {workload}", f"Again in the same mount: {workload}")
        command = WORKLOADS[workload].code
        with self._in_use(place, workload, result) as used:
            roots = {warm.system.name: warm.available.root for warm in used} | {LOCAL: place.tree}

            def once(name: str) -> None:
                result.add(COMMAND, name, timed(place.command(roots[name], command)))

            for root in roots.values():
                timed(place.command(root, command))
            self._take_turns(result, {name: partial(once, name) for name in roots})
        return result

    def walks(self, place: Environment) -> Result:
        """Measure asking for every name with its attributes."""
        result = Result("warm walk", "find with the attributes of every file, warm")
        with self._in_use(place, "torch", result) as used:
            roots = {warm.system.name: warm.available.root for warm in used} | {LOCAL: place.tree}

            def once(name: str) -> None:
                result.add(WALK, name, timed(_find(roots[name])))

            for root in roots.values():
                timed(_find(root))
            self._take_turns(result, {name: partial(once, name) for name in roots})
        return result

    def reads(self, place: Environment) -> Result:
        """Measure reading a file of 2 GB once, from what the system has kept of it on disk."""
        result = Result("warm read", "Reading a file of 2 GB from warm caches, page cache empty")
        with self._in_use(place, "torch", result) as used:
            roots = {warm.system.name: warm.available.root for warm in used} | {LOCAL: place.tree}
            result.facts[warm_report.SIZE] = (place.tree / BIG_FILE).stat().st_size

            def once(name: str) -> None:
                drop_caches()
                result.add(READ, name, _read(roots[name]))

            for root in roots.values():
                _read(root)
            self._take_turns(result, {name: partial(once, name) for name in roots})
        return result

    def _take_turns(self, result: Result, steps: dict[str, Callable[[], None]]) -> None:
        say = self.choice.say
        failed = interleave(
            self.choice.rounds, steps, lambda text: say(f"{result.scenario}: {text}")
        )
        result.absent |= failed

    @contextmanager
    def _in_use(self, place: Environment, workload: str, result: Result) -> Iterator[list[Warm]]:
        """Make every system available beside the others; one that fails is left out."""
        shelf = Shelf(self.choice.work)
        link = Link(UNSHAPED, self.server.endpoint)
        with ExitStack() as stack:
            used = []
            for system in self.systems:
                record = shelf.record(place.name, system.artefact or "") or {}
                scratch = stack.enter_context(empty_directory(self.choice.work))
                start = Start(
                    place, WORKLOADS[workload], self.server, link, record, scratch, "first"
                )
                try:
                    stack.enter_context(system.laid_out(start))
                    available = stack.enter_context(_entered(system, start))
                except BenchmarkError as error:
                    result.absent[system.name] = str(error)
                    continue
                used.append(Warm(system, start, available))
            yield used


@contextmanager
def _entered(system: Starter, start: Start) -> Iterator[Available]:
    try:
        with system.available(start) as available:
            yield available
    except CommandError as error:
        raise BenchmarkError(str(error)) from error


def _find(root: Path) -> list[str]:
    return ["find", str(root), "-printf", "%s %m %T@\n"]


def _read(root: Path) -> float:
    """Return the seconds that reading the large file below ``root`` takes, from end to end."""
    path = root / BIG_FILE
    started = time.perf_counter()
    done = subprocess.run(
        ["dd", f"if={path}", "of=/dev/null", f"bs={_BLOCK}"], capture_output=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"dd failed: {done.stderr.decode(errors='replace').strip()}")
    return time.perf_counter() - started
