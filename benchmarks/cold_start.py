"""Cold starts: from a node that has nothing of an environment to the end of a command in it.

``python -m benchmarks cold-start`` measures envstore and its peers over loopback and over a link
like a data centre's. Each run has an empty cache and begins with an empty page cache; systems take
turns. The total is what a user waits: mounting, fetching or installing, and the command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import cold_report, report
from benchmarks.artefacts import Bench, Shelf
from benchmarks.cold_report import (
    BANDWIDTH,
    COMMAND,
    FETCHED,
    LOCAL,
    NEEDED,
    READY,
    REQUESTS,
    TOTAL,
    WARM,
)
from benchmarks.link import LINKS, Link, opened
from benchmarks.measure import BenchmarkError, drop_caches, interleave
from benchmarks.mounted import Available
from benchmarks.peers_mount import Starter, starters
from benchmarks.results import Result
from benchmarks.starts import Start
from benchmarks.workloads import WORKLOADS, Environment, Workload, build, environment
from examples.client import CommandError
from examples.seaweed import S3Server


@dataclass(frozen=True, slots=True)
class Choice:
    """What one run is to measure, and where things are kept."""

    work: Path
    trees: dict[str, Path]
    wheels: Path | None
    links: tuple[str, ...]
    systems: tuple[str, ...]
    workloads: tuple[Workload, ...]
    rounds: int
    again: tuple[str, ...]
    out: Path
    say: Callable[[str], None]
    absent: dict[str, str] = field(default_factory=dict)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    known = starters()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cold-start", description="Measure cold starts."
    )
    parser.add_argument("step", nargs="?", choices=["prepare"], help="only make what is missing")
    parser.add_argument("--link", default=",".join(LINKS), help="some of: %(default)s")
    parser.add_argument("--system", default=",".join(known), help="some of: %(default)s")
    parser.add_argument("--command", default=",".join(WORKLOADS), help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--again", default="", help="systems whose artefacts are made again")
    parser.add_argument("--small", type=Path, help="a venv with pandas and scipy [one is built]")
    parser.add_argument("--large", type=Path, help="a venv with torch as well [one is built]")
    parser.add_argument("--wheels", type=Path, help="their wheels [they are downloaded]")
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    parser.add_argument("--out", type=Path, help="where results go [cold-start in --work]")
    options = parser.parse_args(arguments)
    for name, allowed in (("link", LINKS), ("system", known), ("command", WORKLOADS)):
        wanted = tuple(filter(None, getattr(options, name).split(",")))
        unknown = set(wanted) - set(allowed)
        if unknown or not wanted:
            parser.error(f"--{name}: choose from {', '.join(allowed)}")
        setattr(options, name, wanted)
    options.again = tuple(filter(None, options.again.split(",")))
    if set(options.again) - set(known):
        parser.error(f"--again: choose from {', '.join(known)}")
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def chosen(options: argparse.Namespace, say: Callable[[str], None]) -> Choice:
    """Return what the options ask for, with the environments there."""
    work = options.work.expanduser().resolve()
    workloads = tuple(WORKLOADS[name] for name in options.command)
    trees = {}
    for name in dict.fromkeys(workload.environment for workload in workloads):
        trees[name] = getattr(options, name) or build(name, work, say)
    out = options.out or work / "cold-start"
    return Choice(
        work,
        trees,
        options.wheels,
        options.link,
        options.system,
        workloads,
        options.rounds,
        options.again,
        out,
        say,
    )


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Make what is missing, measure, print and write."""
    options = parse(arguments)
    choice = chosen(options, say)
    load = os.getloadavg()
    known = starters()
    systems = [known[name] for name in choice.systems]
    places = {name: environment(name, tree) for name, tree in choice.trees.items()}
    prepare(choice, systems, places)
    if options.step == "prepare":
        for name, why in choice.absent.items():
            console.print(f"[yellow]{name}: not prepared: {why}[/]")
        return 0
    if os.geteuid() != 0:
        raise BenchmarkError("only root can empty the page cache, without which no start is cold")
    results = {}
    for result in measure(choice, systems, places):
        cold_report.show(console, result)
        results[result.scenario] = result
    judged = cold_report.judge(results)
    report.show_targets(console, judged)
    tree = next(iter(choice.trees.values()))
    console.print(f"written: {report.save(choice.out, tree, results, judged, load)}")
    picture = cold_report.plot(choice.out, results)
    console.print(f"plot: {picture}" if picture else "no plot: matplotlib is not installed")
    return 0


def prepare(choice: Choice, systems: list[Starter], places: dict[str, Environment]) -> None:
    """Make every artefact that is missing; whatever cannot be made is left out, with the reason."""
    shelf = Shelf(choice.work)
    missing: list[tuple[Starter, Environment]] = []
    for system in systems:
        if why := system.lacking():
            choice.absent[system.name] = why
        elif system.artefact is not None:
            for place in places.values():
                again = system.name in choice.again
                if again or shelf.record(place.name, system.artefact) is None:
                    missing.append((system, place))
    if not missing:
        return
    made = set()
    with shelf.making() as server:
        for system, place in missing:
            assert system.artefact is not None
            if (place.name, system.artefact) in made:
                continue  # another system shares it
            made.add((place.name, system.artefact))
            choice.say(f"preparing {system.artefact} of the {place.name} environment")
            home = shelf.home(place.name, system.artefact)
            bench = Bench(place, server, home, choice.wheels, choice.say)
            started = time.monotonic()
            try:
                shelf.make(bench, system.artefact, system.maker())
            except (BenchmarkError, CommandError) as error:
                choice.absent[system.name] = str(error)
            choice.say(f"{system.artefact}: {time.monotonic() - started:.0f} s")


def measure(
    choice: Choice, systems: list[Starter], places: dict[str, Environment]
) -> Iterator[Result]:
    """Yield the figures of every link and command, each after all its rounds."""
    shelf = Shelf(choice.work)
    artefacts = [system.artefact for system in systems if system.artefact is not None]
    with shelf.measuring(shelf.buckets(places, artefacts)) as server:
        for name in choice.links:
            with opened(name, server.endpoint) as link:
                for workload in choice.workloads:
                    yield _all(
                        choice, systems, places[workload.environment], workload, server, link
                    )


def _all(
    choice: Choice,
    systems: list[Starter],
    place: Environment,
    workload: Workload,
    server: S3Server,
    link: Link,
) -> Result:
    title = f"Cold start, {link.name} link: {workload.name}"
    result = Result(f"cold-start {link.name} {workload.name}", title)
    if link.bytes_per_second:
        result.facts[BANDWIDTH] = link.bytes_per_second
    shelf = Shelf(choice.work)
    steps = {}
    for system in systems:
        if system.name in choice.absent:
            result.absent[system.name] = choice.absent[system.name]
            continue
        record = shelf.record(place.name, system.artefact) if system.artefact else {}
        assert record is not None
        once = partial(_once, choice.work, system, place, workload, server, link, record, result)
        steps[system.name] = once
    for _ in range(choice.rounds):
        _warm_floor(place, workload, result)
    failed = interleave(choice.rounds, steps, lambda text: choice.say(f"{workload.name}: {text}"))
    result.absent |= failed
    return result


def _warm_floor(place: Environment, workload: Workload, result: Result) -> None:
    """Take the command's time on local disk when everything is in memory."""
    command = place.command(place.tree, workload.code)
    if WARM not in result.values:
        timed(command)
    result.add(WARM, LOCAL, timed(command))


def _once(
    work: Path,
    system: Starter,
    place: Environment,
    workload: Workload,
    server: S3Server,
    link: Link,
    record: dict[str, str],
    result: Result,
) -> None:
    """Start once on an empty node and note what it took."""
    with empty_directory(work) as scratch:
        start = Start(place, workload, server, link, record, scratch)
        bucket = record.get("bucket")
        try:
            with system.laid_out(start):
                before = server.served(bucket) if bucket else None
                drop_caches()
                started = time.perf_counter()
                with system.available(start) as available:
                    ready = time.perf_counter() - started
                    seconds = timed(place.command(available.root, workload.code))
                    result.add(TOTAL, system.name, time.perf_counter() - started)
                    result.add(READY, system.name, ready)
                    result.add(COMMAND, system.name, seconds)
                    if bucket and before is not None:
                        served = server.served(bucket) - before
                        result.add(FETCHED, system.name, served.sent)
                        result.add(REQUESTS, system.name, served.requests)
                    _note_needed(system, available, result)
        except CommandError as error:
            raise BenchmarkError(str(error)) from error


def _note_needed(system: Starter, available: Available, result: Result) -> None:
    # A node server counts for all its mounts together.
    if available.mount is not None and available.mount.stats_socket:
        used = available.mount.stats()["used"]
        result.add(NEEDED, system.name, used["stored_bytes"])


@contextmanager
def empty_directory(work: Path) -> Iterator[Path]:
    """Yield a new directory in ``work``, gone afterwards; its path is short, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def timed(command: Sequence[str]) -> float:
    """Return the seconds that a command takes. Raises ``BenchmarkError`` with why it failed."""
    started = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BenchmarkError(f"the command failed: {' '.join(said)}")
    return seconds
