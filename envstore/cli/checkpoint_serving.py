"""``checkpoint watch`` and ``persister``: what goes on until it is told to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.checkpoint_params import run_argument
from envstore.cli.context import Settings
from envstore.cli.params import PathType

if TYPE_CHECKING:
    from envstore.checkpoint.adapters.watching import Event


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint watch ./output team/llm             until Ctrl-C
        envstore checkpoint watch ./output team/llm --last 3    keep three
        envstore --json checkpoint watch ./output team/llm      a line of JSON for each event
    """,
)
@click.argument("directory", metavar="DIR", type=PathType(path_type=Path, file_okay=False))
@run_argument()
@click.option(
    "--quiet-for",
    "rest",
    type=click.FloatRange(0.1, 86_400),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long nothing in a checkpoint must have changed before it is taken for whole.",
)
@click.option(
    "--last",
    "last",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the last N [all]. Pinned ones always stay.",
)
@click.pass_obj
def watch(settings: Settings, directory: Path, run: str, rest: float, last: int | None) -> None:
    """Save checkpoints of RUN as another program writes them to DIR.

    For programs that nobody may change. Taken for checkpoints are directories and files in DIR
    whose names hold a step, such as checkpoint-500, step-500, global_step500, epoch=1-step=500.ckpt
    or model_500.pt. Those of PyTorch's DCP, of Hugging Face and DeepSpeed are whole when their own
    last file is there. What is removed from DIR stays in RUN.
    """
    from envstore.checkpoint import policies
    from envstore.checkpoint.adapters.directory import DirectoryRun
    from envstore.checkpoint.adapters.watching import watch as events

    settings.require_store()
    settings.export_cache()
    keep = None if last is None else policies.last(last)
    with DirectoryRun(run, settings.url, keep=keep) as opened:
        for event in events(directory, opened, quiet=rest):
            _tell(settings, event)


def _tell(settings: Settings, event: Event) -> None:
    where = output.printable(str(event.path))
    if settings.json:
        found = {"event": event.kind, "path": where, "step": event.step}
        if event.commit is not None:
            found["digest"] = event.commit.snapshot.hex()
        if event.message:
            found["message"] = output.printable(event.message)
        output.result(found)
    elif event.kind == "saved":
        output.line(f"saved step {event.step}: {where}")
    elif event.kind == "present":
        output.note(settings, f"step {event.step} is there already: {where}")
    elif event.kind == "waiting":
        output.note(settings, f"waiting for {output.printable(event.message)} of {where}")
    else:
        output.note(settings, f"{event.kind}: {where}: {output.printable(event.message)}")
    sys.stdout.flush()


@click.command(
    cls=Command,
    examples="""
        envstore checkpoint persister /slots                        in a sidecar
        envstore checkpoint persister /slots --allow-store 's3://bucket/team*'
        envstore checkpoint persister /slots --bandwidth 200M       no faster than that
    """,
)
@click.argument("root", metavar="ROOT", type=PathType(path_type=Path, file_okay=False))
@click.option(
    "--bandwidth", metavar="SIZE", help="Upload at most so much a second, for example 200M."
)
@click.option(
    "--linger",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long to keep a state in memory for a trainer that comes back "
    "[env ENVSTORE_SLOTS_LINGER; else 600].",
)
@click.option(
    "--allow-store",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Only upload to stores whose URL matches; may be repeated.",
)
def persister(
    root: Path, bandwidth: str | None, linger: float | None, patterns: tuple[str, ...]
) -> None:
    """Upload what trainers stage below ROOT, until SIGTERM.

    For a sidecar, or a service of the node, that outlives the trainer's container: ROOT is a
    volume in memory that both mount, and the trainer's ENVSTORE_SLOTS. Without one, each trainer
    starts a persister of its own. Credentials are this process's own. On SIGTERM what is staged
    is uploaded first.
    """
    from envstore.checkpoint.persister import main

    arguments = [
        "--watch",
        str(root.absolute()),
        *(f"--allow-store={pattern}" for pattern in patterns),
    ]
    if bandwidth is not None:
        from envstore.store.cache import parse_size

        arguments.append(f"--bandwidth={parse_size(bandwidth)}")
    if linger is not None:
        arguments.append(f"--linger={linger}")
    raise click.exceptions.Exit(main(arguments))
