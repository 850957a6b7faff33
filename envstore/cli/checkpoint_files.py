"""``checkpoint restore``, ``verify`` and ``prefetch``: the bytes of checkpoints."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.checkpoint_params import find, no_checkpoint, run_argument, step_option
from envstore.cli.context import Settings
from envstore.cli.params import PathType
from envstore.cli.progress import progress
from envstore.errors import CorruptError

if TYPE_CHECKING:
    from envstore.store.verify import Problem


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint restore team/llm ./ckpt               the newest
        envstore checkpoint restore team/llm ./ckpt --step 500
    """,
)
@run_argument()
@click.argument("directory", metavar="DIR", type=PathType(path_type=Path, file_okay=False))
@step_option()
@click.pass_obj
def restore(settings: Settings, run: str, directory: Path, step: int | None) -> None:
    """Write the files of a checkpoint of RUN to a new directory.

    DIR must be absent or empty, and appears when it is complete. Tensors are in safetensors
    files that any loader reads; what a directory was saved of comes back as it was.
    """
    from envstore.store.pull import pull

    started = time.monotonic()
    with settings.open() as repository:
        runs, commit = find(repository, run, step)
        with runs.lease(commit), progress(settings) as report:
            done = pull(
                repository,
                commit.snapshot,
                directory,
                lambda at, total: report("writing", at, total),
            )
    seconds = time.monotonic() - started
    if settings.json:
        output.result(
            {
                "run": str(runs.run),
                "step": commit.step,
                "digest": commit.snapshot.hex(),
                "path": os.path.abspath(directory),
                "files": done.files,
                "logical_bytes": done.logical_bytes,
                "fetched_bytes": done.fetched_bytes,
                "seconds": round(seconds, 3),
            }
        )
        return
    output.summary(
        settings,
        f"restored step {commit.step} of {runs.run} to {output.printable(str(directory))}: "
        f"{output.counted(done.files, 'file')}, {output.size(done.logical_bytes)}, {seconds:.1f} s",
    )


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint verify team/llm                 every checkpoint: is all there?
        envstore checkpoint verify team/llm --read-data     read and hash every byte, too
        envstore checkpoint verify team/llm --step 500
    """,
)
@run_argument()
@step_option("The checkpoint of this step [all of them].")
@click.option("--read-data", is_flag=True, help="Read every pack and hash every frame and chunk.")
@click.pass_obj
def verify(settings: Settings, run: str, step: int | None, read_data: bool) -> None:
    """Look for damage in what the checkpoints of RUN are made of.

    Names the damaged objects and the steps that they harm. The cache is not used. Exits with 1 if
    anything is damaged.
    """
    from envstore.checkpoint.layout import RunName
    from envstore.checkpoint.protocol import RunStore
    from envstore.cli.verify import print_report
    from envstore.store.verify import Problem
    from envstore.store.verify import verify as check

    with settings.open(cached=False) as repository:
        runs = RunStore(repository, RunName.parse(run))
        commits = runs.commits() if step is None else [runs.find(step)]
        if not commits and not runs.warnings:
            raise no_checkpoint(runs)
        broken: list[Problem] = [Problem(str(runs.run), why, ()) for why in runs.warnings]
        targets = [(f"{runs.run}:step-{commit.step}", commit.snapshot) for commit in commits]
        with progress(settings, unit_bytes=read_data) as draw:
            report = check(
                repository,
                targets,
                read_data=read_data,
                progress=lambda done, total: draw("checking packs", done, total),
            )
    report.problems[:0] = broken
    print_report(settings, report)
    if not report.ok:
        raise CorruptError(
            f"{output.counted(len(report.problems), 'problem')} found in {runs.run}",
            hint="restore another step: envstore checkpoint ls RUN",
        )


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint prefetch team/llm                in an init container, say
        envstore checkpoint prefetch team/llm --only model   what evaluating it takes
    """,
)
@run_argument()
@step_option()
@click.option(
    "--only", "items", multiple=True, metavar="ITEM", help="An item of the state; may be repeated."
)
@click.pass_obj
def prefetch(settings: Settings, run: str, step: int | None, items: tuple[str, ...]) -> None:
    """Bring a checkpoint of RUN into this node's cache."""
    from envstore.checkpoint.errors import StateMismatchError
    from envstore.checkpoint.trees import SnapshotTree

    started = time.monotonic()
    with settings.open() as repository:
        runs, commit = find(repository, run, step)
        with runs.lease(commit):
            tree = SnapshotTree(repository, commit.snapshot)
            paths = None
            if items:
                wanted = {f"{item}.safetensors" for item in items}
                paths = [path for path in tree.sizes if path.rpartition("/")[2] in wanted]
                missing = wanted - {path.rpartition("/")[2] for path in paths}
                if missing:
                    raise StateMismatchError(
                        f"step {commit.step} of {runs.run} has no {', '.join(sorted(missing))}",
                        hint=f"it has: {', '.join(sorted(tree.sizes)[:20])}",
                    )
                paths += [path for path in tree.sizes if path.endswith("state.json")]
            fetched = tree.prefetch(paths)
    seconds = time.monotonic() - started
    if settings.json:
        found = {"run": str(runs.run), "step": commit.step, "fetched_bytes": fetched}
        output.result({**found, "seconds": round(seconds, 3)})
        return
    output.summary(
        settings,
        f"step {commit.step} of {runs.run} is in the cache: fetched {output.size(fetched)}, "
        f"{seconds:.1f} s",
    )
