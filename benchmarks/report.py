"""Shows results: tables for people, one JSON file, and a plot of the ratios."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine, middle
from benchmarks.results import OURS, Metric, Result
from benchmarks.targets import MB, Target


def _beside(name: str) -> str:
    """Return the path of a program that is installed beside the running interpreter."""
    return str(Path(sys.executable).with_name(name))


_VERSIONS = {
    "restic": ("restic", "version"),
    "borg": ("borg", "--version"),
    "casync": ("casync", "--version"),
    "tar": ("tar", "--version"),
    "zstd": ("zstd", "--version"),
    "squashfuse": ("squashfuse", "--help"),
    "mksquashfs": ("mksquashfs", "-version"),
    "juicefs": (_beside("juicefs"), "version"),
    "rclone": (_beside("rclone"), "version"),
    "uv": (_beside("uv"), "--version"),
    "weed": (_beside("weed"), "version"),
    "curl": ("curl", "--version"),
}


def versions() -> dict[str, str]:
    """Return the first line that each program says about its version, or that it is missing."""
    found = {}
    for name, command in _VERSIONS.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            found[name] = "not installed"
            continue
        said = (done.stdout + done.stderr).strip().splitlines()
        found[name] = said[0] if said else "unknown"
    return found


def show(console: Console, result: Result) -> None:
    """Print one scenario's figures with their spread and their ratio to envstore."""
    table = Table(title=result.title, title_justify="left")
    table.add_column("")
    for heading in ("median", "spread", "times envstore"):
        table.add_column(heading, justify="right")
    for metric, by_tool in result.values.items():
        table.add_section()
        table.add_row(f"[bold]{metric.name}[/]")
        for tool in [tool for tool in result.tools() if tool in by_tool]:
            found = by_tool[tool]
            ratio = result.ratio(metric, tool)
            table.add_row(
                f"  {tool}",
                amount(middle(found), metric.unit),
                _spread(found, metric),
                "" if ratio is None or tool == OURS else f"{ratio:.2f}",
            )
    console.print(table)
    for name, value in result.facts.items():
        console.print(f"  {name}: {value:,.6g}" if value < MB else f"  {name}: {value:,.0f}")
    for tool, why in result.absent.items():
        console.print(f"  [yellow]{tool}: not measured: {why}[/]")
    for note in result.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    console.print()


def _spread(found: Sequence[float], metric: Metric) -> str:
    if len(found) < 2 or min(found) == max(found):
        return ""
    return f"{amount(min(found), metric.unit)} - {amount(max(found), metric.unit)}"


def amount(value: float, unit: str) -> str:
    """Return a figure with its unit: seconds, MB (of a million bytes), or a plain number."""
    if unit == "s":
        return f"{value:.3f} s" if value < 1 else f"{value:.2f} s"
    if unit == "B":
        return f"{value / MB:,.1f} MB"
    return f"{value:,.0f}"


def show_targets(console: Console, targets: Sequence[Target]) -> None:
    """Print what had to be shown, what was measured, and whether that is enough."""
    table = Table(title="Targets", title_justify="left")
    for heading in ("", "target", "measured", "met"):
        table.add_column(heading)
    words = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "-"}
    for target in targets:
        table.add_row(target.name, target.goal, target.measured, words[target.met])
    console.print(table)


def save(
    folder: Path,
    tree: Path,
    results: Mapping[str, Result],
    targets: Sequence[Target],
    load_before: Sequence[float],
) -> Path:
    """Write everything as one JSON file into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    body: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_before": [round(load, 2) for load in load_before]},
        "versions": versions(),
        "tree": str(tree),
        "scenarios": [result.as_json() for result in results.values()],
        "targets": [target.as_json() for target in targets],
    }
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path


def plot(folder: Path, results: Mapping[str, Result]) -> Path | None:
    """Draw each scenario's ratios into one picture; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [
        (result, metric)
        for result in results.values()
        for metric, by_tool in result.values.items()
        if OURS in by_tool and len(by_tool) > 1
    ]
    if not panels:
        return None
    columns = 2
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(13, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (result, metric) in zip(axes.flat, panels, strict=False):
        _bars(axis, result, metric)
    figure.tight_layout()
    path = folder / "results.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axis: Any, result: Result, metric: Metric) -> None:
    """Draw one metric: a bar for each tool, as long as its ratio to envstore."""
    by_tool = result.values[metric]
    tools = [tool for tool in result.tools() if tool in by_tool][::-1]
    ratios = [result.ratio(metric, tool) or 0.0 for tool in tools]
    colours = ["#c1440e" if tool == OURS else "#7f8fa6" for tool in tools]
    bars = axis.barh(tools, ratios, color=colours)
    labels = [amount(middle(by_tool[tool]), metric.unit) for tool in tools]
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.7)
    if max(ratios) > 20 * max(min(ratios), 0.05):
        axis.set_xscale("log")
    axis.margins(x=0.25)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{result.scenario}: {metric.name} (times envstore)", fontsize=9, loc="left")
