"""``checkpoint``: what training runs saved, and what may be done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Group
from envstore.cli.checkpoint_files import prefetch, restore, verify
from envstore.cli.checkpoint_keeping import pin, rm, unpin
from envstore.cli.checkpoint_params import run_argument, step_option
from envstore.cli.checkpoint_serving import persister, watch
from envstore.cli.context import Settings

if TYPE_CHECKING:
    from envstore.checkpoint.records import Commit


@click.group(
    cls=Group,
    examples="""
        envstore checkpoint ls                        the runs of the store
        envstore checkpoint ls team/llm               the checkpoints of one
        envstore checkpoint restore team/llm ./ckpt   the files of the newest
        envstore mount team/llm:step-500 /mnt/ckpt    or mount one
    """,
)
def checkpoint() -> None:
    """Look at, keep, check and restore checkpoints of runs.

    RUN is [NAMESPACE/]NAME. Training scripts save and restore with the Python package
    envstore.checkpoint. Only checkpoints that every rank has finished are shown.
    """


@checkpoint.command(
    examples="""
        envstore checkpoint ls                 the runs of the store
        envstore checkpoint ls team/llm        the checkpoints of one
        envstore checkpoint ls --all team/llm  those that a newer start of the run left behind, too
    """,
)
@run_argument(required=False)
@click.option("--all", "everything", is_flag=True, help="Also what no longer counts.")
@click.pass_obj
def ls(settings: Settings, run: str | None, everything: bool) -> None:
    """List runs, or the checkpoints of RUN.

    A start of a run that goes on from an earlier step leaves the later steps of the start before
    behind: they no longer count, and are shown with --all.
    """
    from envstore.checkpoint.layout import RunName
    from envstore.checkpoint.protocol import RunStore

    if run is None:
        _list_runs(settings)
        return
    name = RunName.parse(run)
    with settings.open() as repository:
        runs = RunStore(repository, name)
        found = [(commit, True) for commit in runs.commits()]
        if everything:
            found += [(commit, False) for commit in runs.commits(fenced=True)]
        pins = runs.pins()
    found.sort(key=lambda pair: pair[0].checkpoint)
    _warn(settings, runs.warnings)
    if settings.json:
        shown = [fields_of(commit, counts, pins.get(commit.checkpoint)) for commit, counts in found]
        output.result({"run": str(name), "checkpoints": shown})
        return
    if not found:
        output.note(settings, f"{name} has no checkpoints")
        return
    headings = (">STEP", ">EPOCH", "SAVED", ">RANKS", ">SIZE", "METRICS", "")
    output.table(headings, [_row(commit, counts, pins) for commit, counts in found])


def _row(commit: Commit, counts: bool, pins: dict[Any, str]) -> tuple[str, ...]:
    notes = [] if counts else ["left behind"]
    if commit.checkpoint in pins:
        reason = pins[commit.checkpoint]
        notes.append(f"pinned: {output.printable(reason)}" if reason else "pinned")
    return (
        f"{commit.step:,}",
        str(commit.checkpoint.epoch),
        output.age(commit.created),
        str(commit.world_size),
        output.size(commit.size),
        metrics_of(commit),
        ", ".join(notes),
    )


def metrics_of(commit: Commit) -> str:
    """Return the metrics in one line."""
    shown = sorted(commit.metrics.items())
    return " ".join(f"{output.printable(name)}={value:.6g}" for name, value in shown)


def fields_of(commit: Commit, counts: bool, pin: str | None) -> dict[str, Any]:
    """Return what scripts are told of a checkpoint."""
    return {
        "step": commit.step,
        "epoch": commit.checkpoint.epoch,
        "attempt": commit.checkpoint.attempt,
        "counts": counts,
        "created": commit.created,
        "world_size": commit.world_size,
        "bytes": commit.size,
        "digest": commit.snapshot.hex(),
        # JSON has no NaN; `best` does not take one either.
        "metrics": {
            name: value if value - value == 0 else str(value)
            for name, value in commit.metrics.items()
        },
        "lineage": dict(commit.lineage),
        "pinned": pin is not None,
        **({"pin_reason": pin} if pin else {}),
    }


def _list_runs(settings: Settings) -> None:
    from envstore.checkpoint.listing import list_runs

    with settings.open() as repository:
        found = list_runs(repository.objects)
        url = repository.objects.url
    if settings.json:
        runs = [
            {"run": str(run.name), "commits": run.commits, "last_step": run.last_step}
            for run in found
        ]
        output.result({"store": url, "runs": runs})
    elif found:
        rows = [(str(run.name), f"{run.commits:,}", f"{run.last_step:,}") for run in found]
        output.table(("RUN", ">CHECKPOINTS", ">LAST STEP"), rows)
    else:
        output.note(settings, "there are no runs yet")


def _warn(settings: Settings, warnings: list[str]) -> None:
    for warning in warnings:
        output.note(settings, f"warning: {output.printable(warning)}")


@checkpoint.command(
    examples="""
        envstore checkpoint latest team/llm      prints 500, say
        envstore --json checkpoint latest team/llm
    """,
)
@run_argument()
@click.pass_obj
def latest(settings: Settings, run: str) -> None:
    """Print the step that RUN would go on from.

    Exits with 1 if it has no checkpoint.
    """
    from envstore.cli.checkpoint_params import find

    with settings.open() as repository:
        runs, commit = find(repository, run, None)
    if settings.json:
        output.result({"run": str(runs.run), **fields_of(commit, True, None)})
        return
    output.line(str(commit.step))


@checkpoint.command(
    examples="""
        envstore checkpoint show team/llm              the newest
        envstore checkpoint show team/llm --step 500
    """,
)
@run_argument()
@step_option()
@click.pass_obj
def show(settings: Settings, run: str, step: int | None) -> None:
    """Show a checkpoint of RUN: its parts, metrics and lineage."""
    from envstore.cli.checkpoint_params import find

    with settings.open() as repository:
        runs, commit = find(repository, run, step)
        pinned = runs.pins().get(commit.checkpoint)
        entries = [
            entry
            for entry in repository.entries(repository.snapshot(commit.snapshot).manifest)
            if entry.kind == 0
        ]
    if settings.json:
        files = [{"path": output.exact(entry.path), "bytes": entry.size} for entry in entries]
        shown = {**fields_of(commit, True, pinned), "files": files}
        output.result({"run": str(runs.run), **shown})
        return
    output.fields(
        [
            ("run", str(runs.run)),
            ("step", f"{commit.step:,}"),
            ("epoch", f"{commit.checkpoint.epoch}, attempt {commit.checkpoint.attempt}"),
            ("saved", f"{output.printable(commit.created)}, {output.age(commit.created)}"),
            ("size", f"{output.size(commit.size)} ({commit.size:,} bytes)"),
            ("ranks", str(commit.world_size)),
            ("digest", commit.snapshot.hex()),
            ("metrics", metrics_of(commit)),
            ("pinned", "" if pinned is None else output.printable(pinned) or "yes"),
            *(
                (output.printable(key), output.printable(value))
                for key, value in sorted(commit.lineage.items())
            ),
            ("files", ", ".join(output.printable(entry.path) for entry in entries[:20])),
        ]
    )


for command in (restore, pin, unpin, rm, verify, prefetch, watch, persister):
    checkpoint.add_command(command)
