"""``fdstore``: what keeps a node server's mounts while none of its processes lives."""

from __future__ import annotations

from typing import NoReturn

import click

from envstore.cli.base import Command


@click.command(
    cls=Command,
    examples="""
        envstore fdstore --socket /run/envstore/fdstore.sock
        envstore node --fdstore /run/envstore/fdstore.sock     and again whenever that has ended
    """,
)
@click.option(
    "--socket",
    metavar="PATH",
    envvar="ENVSTORE_FDSTORE_SOCKET",
    default="/run/envstore/fdstore.sock",
    show_default=True,
    help="Where it listens, for this user alone.",
)
def fdstore(socket: str) -> NoReturn:
    """Keep a node server's mounts when all of it is killed.

    Run it beside `envstore node --fdstore PATH`, in a container or service of its own: it has
    copies of what the node server has open, and gives them to the next one that is started.
    Whoever reads waits meanwhile, and goes on then. If only this ends, nothing happens; start it
    again, and it gets everything anew. On SIGTERM, while no node server lives, it waits until one
    has taken what it keeps; a second signal ends it, and the mounts with it.
    """
    import os
    import sys

    from envstore.fuse import fdstore as program

    script = os.path.abspath(program.__file__)
    # Begun anew without all that a command line takes: it is to be small, and live long.
    argv = [sys.executable, "-E", "-P", "-S", script, os.path.abspath(socket)]
    os.execv(sys.executable, argv)  # noqa: S606 - no shell meant
