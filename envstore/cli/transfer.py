"""``pull``: whole trees out of the store."""

from __future__ import annotations

import os
from pathlib import Path

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import PathType, PrefixType, ref_argument
from envstore.cli.progress import progress


@click.command(
    cls=Command,
    examples="""
        envstore pull analysis ./analysis        write the tree to a new directory
        envstore pull @3f2a9c1b ./as-it-was      a snapshot by its digest
        envstore pull analysis ./env --prefix /opt/env    for an image that has it in /opt/env
    """,
)
@ref_argument()
@click.argument("directory", metavar="DIR", type=PathType(path_type=Path, file_okay=False))
@click.option(
    "--prefix",
    type=PrefixType(),
    help="Where the tree will be used, if not in DIR: files that hold its path are made for there.",
)
@click.pass_obj
def pull(settings: Settings, ref: str, directory: Path, prefix: str | None) -> None:
    """Write the whole tree of REF to a new directory.

    DIR must be absent or empty. It appears when it is complete; until then the tree
    grows in a hidden directory beside it. Scripts and other files that hold the path of their
    environment are written for DIR, or for --prefix.
    """
    import time

    from envstore.store.pull import pull as pull_tree

    started = time.monotonic()
    with settings.open() as repository:
        snapshot = repository.resolve(ref)
        with progress(settings) as report:
            done = pull_tree(
                repository,
                snapshot,
                directory,
                lambda at, total: report("writing", at, total),
                prefix=os.fsencode(prefix or ""),
            )
    seconds = time.monotonic() - started
    if settings.json:
        output.result(
            {
                "ref": ref,
                "digest": snapshot.hex(),
                "path": os.path.abspath(directory),
                "files": done.files,
                "logical_bytes": done.logical_bytes,
                "fetched_bytes": done.fetched_bytes,
                "requests": done.requests,
                "seconds": round(seconds, 3),
            }
        )
        return
    output.summary(
        settings,
        f"pulled {ref} @{output.short(snapshot)} to {output.printable(str(directory))}: "
        f"{output.counted(done.files, 'file')}, {output.size(done.logical_bytes)}; fetched "
        f"{output.size(done.fetched_bytes)} in {output.counted(done.requests, 'request')}, "
        f"{seconds:.1f} s",
    )
