"""What envstore has to show, and whether it does: every target from the scenarios' results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import mount, push, read, store
from benchmarks.measure import middle, run
from benchmarks.releases import NUMPY_SCIPY, TORCH
from benchmarks.results import OURS, Metric, Result
from examples.client import envstore_command

MB = 1_000_000
_HELP_RUNS = 9


@dataclass(frozen=True, slots=True)
class Target:
    """One target; ``met`` is None when it could not be measured, ``measured`` then says why."""

    name: str
    goal: str
    measured: str
    met: bool | None

    def as_json(self) -> dict[str, object]:
        """Return it as plain data."""
        return {"name": self.name, "goal": self.goal, "measured": self.measured, "met": self.met}


def measure_help() -> list[float]:
    """Return the seconds that ``envstore --help`` takes, several times."""
    command = [*envstore_command(), "--help"]
    return [run(command).seconds for _ in range(_HELP_RUNS)]


def judge(results: Mapping[str, Result]) -> list[Target]:
    """Return all targets, with what ``results`` (by scenario) say about each."""
    found = []
    if "push" in results:
        found += _push(results["push"])
    if "store" in results:
        found += _store(results["store"])
    if "mount" in results:
        found += _mount(results["mount"])
    if "read" in results:
        found += _read(results["read"])
    seconds = middle(measure_help())
    found.append(_at_most("envstore --help", seconds, 0.25, "s"))
    return found


def _push(result: Result) -> list[Target]:
    found = [_beside(result, push.FIRST, "restic", "first push, wall time", "restic's")]
    first, again = result.median(push.FIRST), result.median(push.AGAIN)
    if first is not None and again is not None:
        found.append(
            Target(
                "push of the unchanged tree",
                "<= 1 s or 1/30 of the first",
                f"{again:.2f} s, 1/{first / again:.0f} of the first",
                again <= max(1.0, first / 30),
            )
        )
    uploaded = result.facts[push.AGAIN_UPLOADED]
    found.append(Target("data uploaded by it", "0 bytes", f"{uploaded:,.0f} bytes", uploaded == 0))
    requests, files = result.facts[push.SMALL_REQUESTS], result.facts[push.SMALL_FILES]
    found.append(_at_most(f"requests to push {files:,.0f} small files to S3", requests, 30, ""))
    return found


def _store(result: Result) -> list[Target]:
    found = [_beside(result, store.STORED, "restic", "stored bytes of the tree", "restic's")]
    for pair in (NUMPY_SCIPY, TORCH):
        metric = store.new_bytes(pair)
        own, whole = result.median(metric), result.median(metric, store.WHOLE_FILES)
        if own is None or whole is None:
            continue
        large = pair is TORCH
        measured = f"{own / MB:.1f} of {whole / MB:.1f} MB: 1/{whole / own:.1f}"
        goal = "<= 1/8 of whole-file dedup" if large else "(for comparison)"
        met = own <= whole / 8 if large else None
        found.append(Target(f"new stored bytes, {pair.name}", goal, measured, met))
    return found


def _mount(result: Result) -> list[Target]:
    files = result.facts["files"]
    memory = result.median(mount.RESIDENT)
    return [
        _at_most("mount until the first ls, empty cache", result.median(mount.FIRST_LS), 1.0, "s"),
        _at_most(
            f"memory of the server, {files:,.0f} files",
            None if memory is None else memory / MB,
            120,
            "MB",
        ),
    ]


def _read(result: Result) -> list[Target]:
    fetched, requests = result.median(read.FETCHED), result.median(read.REQUESTS)
    size, opened = result.facts[read.OPENED_COMPRESSED], result.facts[read.OPENED]
    warm, disk = result.median(read.WARM), result.median(read.WARM_DISK)
    found = []
    if fetched is not None and requests is not None:
        found += [
            Target(
                f"cold import of {read.MODULES}: bytes fetched",
                "<= 1.5x compressed size of what is read",
                f"{fetched / MB:.1f} of {size / MB:.1f} MB: {fetched / size:.2f}x",
                fetched <= 1.5 * size,
            ),
            Target(
                f"cold import of {read.MODULES}: requests",
                "<= 1/20 of the files opened",
                f"{requests:.0f} for {opened:.0f} files: 1/{opened / requests:.1f}",
                requests <= opened / 20,
            ),
        ]
    if warm is not None and disk is not None:
        found.append(
            Target(
                f"warm import of {read.MODULES}",
                "<= 1.15x local disk",
                f"{warm:.3f} s against {disk:.3f} s: {warm / disk:.2f}x",
                warm <= 1.15 * disk,
            )
        )
    return found


def _beside(result: Result, metric: Metric, tool: str, name: str, whose: str) -> Target:
    own, other = result.median(metric), result.median(metric, tool)
    if own is None or other is None:
        why = result.absent.get(tool) or result.absent.get(OURS) or "not measured"
        return Target(name, f"<= {whose}", why, None)
    if metric.unit == "B":
        measured = f"{own / MB:.1f} of {other / MB:.1f} MB: {own / other:.3f}x"
    else:
        measured = f"{own:.2f} of {other:.2f} s: {own / other:.2f}x"
    return Target(name, f"<= {whose}", measured, own <= other)


def _at_most(name: str, value: float | None, limit: float, unit: str) -> Target:
    goal = f"<= {limit:g} {unit}".strip()
    if value is None:
        return Target(name, goal, "not measured", None)
    digits = 0 if not unit else (1 if unit == "MB" else 2)
    return Target(name, goal, f"{value:.{digits}f} {unit}".strip(), value <= limit)
