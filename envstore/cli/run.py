"""``run``: a command in a stored environment, without anything installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import PROGRAM, Settings
from envstore.cli.params import ref_argument

if TYPE_CHECKING:
    from envstore.fuse.run import Ran


@click.command(
    cls=Command,
    examples="""
        envstore run analysis -- python job.py --fast
        envstore run --stats analysis -- python -c 'import torch'
        envstore run @3f2a9c1b -- sh -c 'ls $ENVSTORE_PREFIX'
    """,
)
@ref_argument()
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--stats", is_flag=True, help="Say on stderr what was fetched, when CMD has ended.")
@click.option(
    "--profile",
    metavar="NAME",
    default="",
    help="Start profile to fetch ahead; `none` for none. Default: the one that fits.",
)
@click.pass_obj
def run(settings: Settings, ref: str, command: tuple[str, ...], stats: bool, profile: str) -> None:
    """Run a command in an environment, mounted meanwhile.

    REF is mounted in a private directory and unmounted when CMD has ended. CMD finds the
    environment's `bin` first in PATH, where it is mounted in ENVSTORE_PREFIX, and whatever
    activating it would set: CONDA_PREFIX or VIRTUAL_ENV if it is such an environment, the
    variables of its packages, and what the scripts in etc/conda/activate.d set. Only the files
    that CMD uses are fetched. Signals are passed on to it.

    The exit status is that of CMD, or 128 + N if signal N ended it; 127 if there is no such
    command, 126 if it cannot be executed. CMD has stdout to itself: --json makes the line of
    --stats, on stderr, one of JSON.
    """
    from envstore.fuse.run import run as run_command

    settings.export_cache()
    settings.require_store()
    ran = run_command(settings.url, ref, command, surroundings(ref), profile=profile)
    if ran.stats is None:
        output.note(settings, f"the mount's server was killed meanwhile; its log is {ran.log}")
    elif ran.stats["errors"]:
        failed = output.counted(ran.stats["errors"], "read")
        output.note(settings, f"{failed} from the mount failed; why is in {ran.log}")
    if stats or settings.json:
        click.echo(_json_line(ran) if settings.json else _stats_line(ran), err=True)
    raise click.exceptions.Exit(ran.status)


def surroundings(ref: str) -> Callable[[Path], dict[str, str]]:
    """Return what says which environment variables a command gets in ``ref``, mounted at a path."""
    from envstore.resolver.activation import activated, read_activation

    def found(prefix: Path) -> dict[str, str]:
        return activated(read_activation(prefix, ref, os.environ), os.environ)

    return found


def _facts(ran: Ran) -> dict[str, Any]:
    store = ran.stats["store"] if ran.stats else {"bytes": None, "requests": None}
    return {
        "ref": ran.record.name,
        "digest": ran.record.snapshot,
        "exit_code": ran.status,
        "mount_seconds": round(ran.mount_seconds, 3),
        "run_seconds": round(ran.run_seconds, 3),
        "logical_bytes": ran.logical_bytes,
        "fetched_bytes": store["bytes"],
        "requests": store["requests"],
    }


def _json_line(ran: Ran) -> str:
    return json.dumps({**_facts(ran), "mount": ran.stats})


def _stats_line(ran: Ran) -> str:
    text = (
        f"{PROGRAM}: {output.printable(ran.record.name)}: mounted in {ran.mount_seconds:.2f} s, "
        f"ran {ran.run_seconds:.2f} s"
    )
    if ran.stats is None:
        return text
    fetched, requests = ran.stats["store"]["bytes"], ran.stats["store"]["requests"]
    share = fetched / max(1, ran.logical_bytes)
    return (
        f"{text}; fetched {output.size(fetched)} ({share:.1%} of {output.size(ran.logical_bytes)}) "
        f"in {output.counted(requests, 'request')}"
    )
