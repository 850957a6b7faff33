"""The command: ``python -m benchmarks [push|store|mount|read|targets ...]``.

``beside``, ``checkpoints``, ``cold-start``, ``environments``, ``survive``, ``volumes`` and
``warm`` are commands of their own, with their own options.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks import (
    beside,
    checkpoints,
    cold_start,
    environments,
    garbage,
    mount,
    push,
    read,
    report,
    store,
    survive,
    targets,
    volumes,
    warm,
)
from benchmarks.context import Context
from benchmarks.measure import BenchmarkError, machine
from benchmarks.node import prepared
from benchmarks.results import Result
from benchmarks.tree import large_tree, small_tree
from examples.client import CommandError
from examples.prefix import BuildError
from examples.seaweed import ServerError

SCENARIOS = ("push", "store", "mount", "read")
APART = {
    "beside": beside.main,
    "checkpoints": checkpoints.main,
    "cold-start": cold_start.main,
    "environments": environments.main,
    "garbage": garbage.main,
    "survive": survive.main,
    "volumes": volumes.main,
    "warm": warm.main,
}
_WIDTH = 120
_BUSY_LOAD = 0.5
"""Load for each processor, before we start, above which times say little."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    # Both end it through every `finally`, even where a shell has it ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def say(text: str) -> None:
        console.print(f"  … {text}", style="dim", markup=False, highlight=False, soft_wrap=True)

    try:
        if words and words[0] in APART:
            return APART[words[0]](words[1:], console, say)
        return measure(console, parse(words), say)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left mounted or running")
        return 130
    except (BenchmarkError, CommandError, BuildError, ServerError, OSError) as error:
        console.print(Text("benchmark failed: ", "bold red").append(str(error), "not bold default"))
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure envstore beside its peers."
    )
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help=f"{', '.join(SCENARIOS)}, or targets for all that the targets need [all]; "
        f"{' and '.join(APART)} are commands of their own: see their --help",
    )
    parser.add_argument("--tree", type=Path, help="the environment to store [one is built]")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--quick", action="store_true", help="once, with the demo's environment and fewer files"
    )
    parser.add_argument(
        "--tools", default="", help="only those whose names start so, for example envstore,restic"
    )
    parser.add_argument(
        "--torch-pair", action="store_true", help="also torch 2.5.0 and 2.5.1: 1.8 GB to download"
    )
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    parser.add_argument("--out", type=Path, help="where results go [results in --work]")
    options = parser.parse_args(arguments)
    unknown = set(options.scenarios) - {*SCENARIOS, "targets"}
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if options.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    if options.tree is not None and not options.tree.is_dir():
        parser.error(f"--tree: {options.tree} is not a directory")
    return options


def measure(console: Console, options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run the chosen scenarios."""
    work = options.work.expanduser().resolve()
    tree = options.tree or (small_tree if options.quick else large_tree)(work, say)
    wanted = set(options.scenarios) or set(SCENARIOS)
    all_targets = "targets" in wanted
    if all_targets:
        wanted |= set(SCENARIOS)
    context = Context(
        tree=tree.resolve(),
        work=work,
        repetitions=1 if options.quick else options.repetitions,
        small_files=5_000 if options.quick else 50_000,
        torch_pair=options.torch_pair or (all_targets and not options.quick),
        tools=tuple(filter(None, options.tools.split(","))),
        say=say,
    )
    load = os.getloadavg()
    cpus = machine()["cpus"]
    if load[0] > _BUSY_LOAD * int(str(cpus)):
        console.print(f"[yellow]the machine is busy (load {load[0]:.1f}): times say little[/]")
    results = run_scenarios(context, wanted, console)
    judged = targets.judge(results)
    report.show_targets(console, judged)
    out = options.out or work / "results"
    console.print(f"written: {report.save(out, context.tree, results, judged, load)}")
    picture = report.plot(out, results)
    console.print(f"plot: {picture}" if picture else "no plot: matplotlib is not installed")
    missed = [target for target in judged if target.met is False]
    return 3 if all_targets and missed else 0


def run_scenarios(context: Context, wanted: set[str], console: Console) -> dict[str, Result]:
    """Measure each wanted scenario and show it at once; mount and read share what they prepare."""
    results: dict[str, Result] = {}

    def done(result: Result) -> None:
        results[result.scenario] = result
        report.show(console, result)

    if "push" in wanted:
        done(push.measure(context))
    if "store" in wanted:
        done(store.measure(context))
    shared = [module for name, module in (("mount", mount), ("read", read)) if name in wanted]
    if shared:
        with prepared(context) as node:
            for module in shared:
                done(module.measure(context, node))
    return results


if __name__ == "__main__":
    sys.exit(main())
