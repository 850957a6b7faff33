"""Shows warm use beside local disk, and whether it is what it has to be."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.measure import middle
from benchmarks.results import Metric, Result
from benchmarks.targets import MB, Target

TOTAL = Metric("mount and command", "s")
MOUNT = Metric("the mount", "s")
COMMAND = Metric("the command", "s")
WALK = Metric("find", "s")
READ = Metric("reading it", "s")

SIZE = "bytes of the file"
LOCAL = "local"

_FAST = "envstore-fast"


def show(console: Console, result: Result) -> None:
    """Print the figures of one part with their spread and their ratio to local disk."""
    table = Table(title=result.title, title_justify="left")
    table.add_column("")
    for heading in ("median", "spread", "x local"):
        table.add_column(heading, justify="right")
    size = result.facts.get(SIZE)
    for metric, by_system in result.values.items():
        table.add_section()
        table.add_row(f"[bold]{metric.name}[/]")
        local = result.median(metric, LOCAL)
        for system, found in by_system.items():
            seconds = middle(found)
            rate = f" ({size / seconds / MB:,.0f} MB/s)" if size else ""
            table.add_row(
                f"  {system}",
                f"{seconds:.3f} s{rate}",
                f"{min(found):.3f} - {max(found):.3f}" if len(found) > 1 else "",
                f"{seconds / local:.2f}" if local else "",
            )
    console.print(table)
    for system, why in result.absent.items():
        console.print(f"  [yellow]{system}: not measured: {why}[/]")
    console.print()


def judge(results: Mapping[str, Result]) -> list[Target]:
    """Return the targets that ``results`` (by scenario) say something about."""
    found: list[Target] = []
    for scenario, result in results.items():
        if scenario.startswith("warm pod"):
            found += _beside_local(result, TOTAL, 1.1, 1.1)
            found += _mounts(result)
        elif scenario.startswith("warm import"):
            found += _beside_local(result, COMMAND, 1.1, 1.03)
        elif scenario == "warm walk":
            found += _beside_local(result, WALK, 4.0, 1.2)
        elif scenario == "warm read":
            found += _reads(result)
    return found


def _ours(result: Result, metric: Metric) -> list[tuple[str, float]]:
    found = [(name, result.median(metric, name)) for name in result.values.get(metric, {})]
    return [(name, value) for name, value in found if name.startswith("envstore") and value]


def _beside_local(result: Result, metric: Metric, plain: float, fast: float) -> list[Target]:
    local = result.median(metric, LOCAL)
    if local is None:
        return []
    found = []
    for name, seconds in _ours(result, metric):
        limit = fast if name == _FAST else plain
        measured = f"{seconds:.3f} s against {local:.3f} s: {seconds / local:.2f}x"
        title = f"{result.title}: {name}"
        found.append(Target(title, f"<= {limit:g}x local disk", measured, seconds <= limit * local))
    return found


def _mounts(result: Result) -> list[Target]:
    return [
        Target(
            f"{result.title}: {name}, mount",
            "<= 50 ms",
            f"{1000 * seconds:.0f} ms",
            seconds <= 0.05,
        )
        for name, seconds in _ours(result, MOUNT)
    ]


def _reads(result: Result) -> list[Target]:
    local, size = result.median(READ, LOCAL), result.facts[SIZE]
    if local is None:
        return []
    found = []
    for name, seconds in _ours(result, READ):
        rate, disk = size / seconds, size / local
        measured = f"{rate / MB:,.0f} MB/s against {disk / MB:,.0f} MB/s: {rate / disk:.2f}x"
        met = rate >= 0.8 * disk or rate >= 1500 * MB
        title = f"{result.title}: {name}"
        found.append(Target(title, ">= 0.8x local disk or 1,500 MB/s", measured, met))
    return found
