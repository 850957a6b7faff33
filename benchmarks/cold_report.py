"""Shows cold starts: a table for each link and command, the targets, a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.link import SHAPED, UNSHAPED
from benchmarks.measure import middle
from benchmarks.report import amount
from benchmarks.results import Metric, Result
from benchmarks.targets import MB, Target

TOTAL = Metric("in total", "s")
READY = Metric("until it is there", "s")
COMMAND = Metric("the command", "s")
FETCHED = Metric("fetched", "B")
REQUESTS = Metric("requests", "requests")
NEEDED = Metric("stored bytes that the command needs", "B")
WARM = Metric("the command on local disk, warm", "s")

BANDWIDTH = "bytes in a second"
LOCAL = "local"

_OURS = "envstore"
_UNPROFILED = ("envstore", "envstore-none")
_PROFILED = ("envstore-profile", "envstore-repacked", "envstore-fast", "envstore-node")


def floor(result: Result) -> float | None:
    """Return the seconds below which no start over this link can be, None if it has no limit.

    That is: the stored bytes that the command needs at the link's bandwidth, then the command as
    fast as it is on local disk with everything in memory.
    """
    bandwidth, warm = result.facts.get(BANDWIDTH), result.median(WARM, LOCAL)
    # The fast path reads without its server, which then does not count it.
    asked = (result.median(NEEDED, name) for name in (*_UNPROFILED, *_PROFILED))
    needed = max(filter(None, asked), default=None)
    if bandwidth is None or warm is None or needed is None:
        return None
    return needed / bandwidth + warm


def show(console: Console, result: Result) -> None:
    """Print one link's and command's figures, the fastest system first."""
    table = Table(title=result.title, title_justify="left")
    table.add_column("")
    for heading in ("in total", "spread", "x local", "ready", "command", "fetched", "requests"):
        table.add_column(heading, justify="right")
    totals = result.values.get(TOTAL, {})
    local = result.median(TOTAL, LOCAL)
    for system in sorted(totals, key=lambda system: middle(totals[system])):
        found = totals[system]
        total = middle(found)
        table.add_row(
            f"[bold]{system}[/]" if system.startswith(_OURS) else system,
            f"{total:.2f} s",
            f"{min(found):.2f} - {max(found):.2f}" if len(found) > 1 else "",
            f"{total / local:.2f}" if local else "",
            *(_cell(result, metric, system) for metric in (READY, COMMAND, FETCHED, REQUESTS)),
        )
    console.print(table)
    warm, lowest = result.median(WARM, LOCAL), floor(result)
    if warm is not None:
        console.print(f"  the command on local disk, warm: {warm:.2f} s", highlight=False)
    for system, needed in result.values.get(NEEDED, {}).items():
        text = f"  stored bytes that it needs, by {system}: {amount(middle(needed), 'B')}"
        console.print(text, highlight=False)
    if lowest is not None:
        console.print(f"  floor (needed bytes at 1 Gbit/s + warm): {lowest:.2f} s", highlight=False)
    for system, why in result.absent.items():
        console.print(f"  [yellow]{system}: not measured: {why}[/]")
    console.print()


def _cell(result: Result, metric: Metric, system: str) -> str:
    value = result.median(metric, system)
    return "" if value is None else amount(value, metric.unit)


def judge(results: Mapping[str, Result]) -> list[Target]:
    """Return the targets that ``results`` (by scenario) say something about."""
    found: list[Target] = []
    for result in results.values():
        _, link, workload = result.scenario.split(" ")
        if workload == "pandas" and link == UNSHAPED:
            found += _against_local(result)
        if workload == "torch" and link == SHAPED:
            found += _against_peers(result)
    return found


def _against_local(result: Result) -> list[Target]:
    found = []
    local = result.median(TOTAL, LOCAL)
    for system in (*_UNPROFILED, *_PROFILED):
        total, fetched = result.median(TOTAL, system), result.median(FETCHED, system)
        requests = result.median(REQUESTS, system)
        if total is None or fetched is None or requests is None or local is None:
            continue
        ratio = total / local
        found.append(
            Target(
                f"{result.title}: {system}",
                "<= 1.55x local, 45 MB, 40 requests",
                f"{total:.2f} s: {ratio:.2f}x, {fetched / MB:.1f} MB, {requests:.0f} requests",
                ratio <= 1.55 and fetched <= 45 * MB and requests <= 40,
            )
        )
    return found


def _against_peers(result: Result) -> list[Target]:
    totals = {name: middle(found) for name, found in result.values.get(TOTAL, {}).items()}
    peers = {
        name: total
        for name, total in totals.items()
        if name != LOCAL and not name.startswith(_OURS)
    }
    lowest = floor(result)
    if not peers or lowest is None:
        return []
    best = min(peers, key=lambda name: peers[name])
    found = []
    for system in filter(totals.__contains__, (*_UNPROFILED, *_PROFILED)):
        total, ratio = totals[system], totals[system] / lowest
        profiled = system in _PROFILED
        goal = "fastest of all, <= 1.3x the floor" if profiled else "<= the fastest peer"
        met = total < peers[best] and ratio <= 1.3 if profiled else total <= peers[best]
        measured = f"{total:.2f} s: {total / peers[best]:.2f}x {best}, {ratio:.2f}x the floor"
        found.append(Target(f"{result.title}: {system}", goal, measured, met))
    return found


def plot(folder: Path, results: Mapping[str, Result]) -> Path | None:
    """Draw every table as bars into one picture; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [result for result in results.values() if result.values.get(TOTAL)]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (7 * columns, 3.6 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, result in zip(axes.flat, panels, strict=False):
        _bars(axis, result)
    figure.tight_layout()
    path = folder / "cold-start.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axis: Any, result: Result) -> None:
    """Draw one table: what goes by before the command can begin, and the command."""
    totals = {name: middle(found) for name, found in result.values[TOTAL].items()}
    systems = sorted(totals, key=lambda name: -totals[name])
    ready = [result.median(READY, name) or 0.0 for name in systems]
    rest = [max(0.0, totals[name] - before) for name, before in zip(systems, ready, strict=True)]
    ours = [name.startswith(_OURS) for name in systems]
    axis.barh(systems, ready, color=["#e39774" if own else "#bcc5d3" for own in ours])
    colours = ["#c1440e" if own else "#7f8fa6" for own in ours]
    bars = axis.barh(systems, rest, left=ready, color=colours)
    labels = [f"{totals[name]:.2f} s" for name in systems]
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
    lowest = floor(result)
    if lowest is not None:
        axis.axvline(lowest, color="black", linewidth=0.8, linestyle="--")
    if max(totals.values()) > 10 * min(totals.values()):
        axis.set_xscale("symlog", linthresh=max(1.0, min(totals.values())))
    axis.margins(x=0.2)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{result.title} (s; pale: until it is there)", fontsize=9, loc="left")
