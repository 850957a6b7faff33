"""``checkpoint pin``, ``unpin`` and ``rm``: what is kept, and what is not."""

from __future__ import annotations

import sys

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.checkpoint_params import find, run_argument, step_option
from envstore.cli.context import Settings
from envstore.errors import EnvstoreError, UsageError


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint pin team/llm --step 500 --reason "released as 1.0"
        envstore checkpoint pin team/llm                        the newest
    """,
)
@run_argument()
@step_option()
@click.option("--reason", default="", help="Shown by ls.")
@click.pass_obj
def pin(settings: Settings, run: str, step: int | None, reason: str) -> None:
    """Keep a checkpoint of RUN, whatever its retention policy says."""
    with settings.open() as repository:
        runs, commit = find(repository, run, step)
        runs.pin(commit, reason)
    if settings.json:
        output.result({"run": str(runs.run), "step": commit.step, "pinned": True})
        return
    output.summary(settings, f"pinned step {commit.step} of {runs.run}")


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint unpin team/llm --step 500
    """,
)
@run_argument()
@step_option()
@click.pass_obj
def unpin(settings: Settings, run: str, step: int | None) -> None:
    """Let the policy of RUN decide about a checkpoint again."""
    with settings.open() as repository:
        runs, commit = find(repository, run, step)
        runs.unpin(commit.checkpoint)
    if settings.json:
        output.result({"run": str(runs.run), "step": commit.step, "pinned": False})
        return
    output.summary(settings, f"no longer pinned: step {commit.step} of {runs.run}")


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint rm team/llm 100 200        asks first
        envstore checkpoint rm --yes team/llm 100      does not
    """,
)
@run_argument()
@click.argument("steps", metavar="STEP...", nargs=-1, required=True, type=click.IntRange(0))
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def rm(settings: Settings, run: str, steps: tuple[int, ...], yes: bool) -> None:
    """Remove checkpoints of RUN.

    Pinned ones, and such as are being restored, are refused. Their bytes stay in the store until
    a garbage collection frees what nothing leads to.
    """
    with settings.open() as repository:
        found = [find(repository, run, step) for step in dict.fromkeys(steps)]
        if not yes and not _agreed([f"step {commit.step} of {runs.run}" for runs, commit in found]):
            output.note(settings, "nothing was removed")
            raise click.exceptions.Exit(1)
        kept = [commit.step for runs, commit in found if not runs.remove(commit)]
        removed = [commit.step for _, commit in found if commit.step not in kept]
    if settings.json:
        output.result({"run": run, "removed": removed, "kept": kept})
    else:
        for step in removed:
            output.summary(settings, f"removed step {step} of {run}")
    if kept:
        raise EnvstoreError(
            f"pinned or being restored, and so not removed: {', '.join(map(str, kept))}",
            hint="envstore checkpoint unpin RUN --step N",
        )


def _agreed(names: list[str]) -> bool:
    if not output.is_terminal(sys.stdin):
        raise UsageError(
            "there is no terminal to ask on", hint="add --yes to remove without asking"
        )
    return click.confirm(f"remove {', '.join(names)}?", err=True)
