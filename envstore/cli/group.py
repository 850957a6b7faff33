"""The command group: which commands there are, and what `envstore --help` says."""

from __future__ import annotations

import click

from envstore import __version__
from envstore.cli.base import LazyGroup
from envstore.cli.context import PROGRAM

_COMMANDS = {
    "init": "store",
    "lock": "lock",
    "push": "push",
    "update": "update",
    "pull": "transfer",
    "hydrate": "hydrate",
    "mount": "mounts",
    "umount": "mounts",
    "mounts": "mounts",
    "stats": "stats",
    "remount": "mounts",
    "node": "node",
    "fdstore": "fdstore",
    "csi": "csi",
    "k8s": "k8s",
    "run": "run",
    "checkpoint": "checkpoint",
    "activate": "activate",
    "profile": "profile",
    "repack": "repack",
    "ls": "refs",
    "show": "refs",
    "log": "refs",
    "diff": "refs",
    "explain": "explain",
    "check": "check",
    "tag": "moving",
    "rm": "moving",
    "du": "store",
    "verify": "verify",
    "repair": "verify",
    "rebuild-index": "verify",
    "gc": "gc",
    "cache": "cache",
    "doctor": "doctor",
    "completion": "completion",
}
"""Each command and the module of this package that defines it."""


@click.group(
    PROGRAM,
    cls=LazyGroup,
    modules={name: f"envstore.cli.{module}" for name, module in _COMMANDS.items()},
    invoke_without_command=True,
    examples="""
        envstore push analysis .venv              store an environment
        envstore run analysis -- python job.py    mount it somewhere, run in it, unmount
        envstore mount analysis /mnt/analysis     mount it until `envstore umount`
        envstore --store s3://bucket/team ls      look into another store
    """,
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Push an environment once, mount it anywhere.

    REF is [NAMESPACE/]NAME[:TAG], the tag being `latest` unless given, or @ and the first digits
    of a snapshot's digest. Global options may stand before or after the command.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
