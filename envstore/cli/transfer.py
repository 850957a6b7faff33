"""``push`` and ``pull``: whole trees into and out of the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF, PathType, PrefixType, ref_argument
from envstore.cli.progress import progress

if TYPE_CHECKING:
    from envstore.store.push import PushResult

_PHASES = {
    "scan": "looking for files",
    "read": "reading",
    "store": "storing",
    "commit": "committing",
}


@click.command(
    cls=Command,
    examples="""
        envstore push analysis .venv                 a virtual environment
        envstore push team/llama:8b ./llama-3-8b     a model, in a namespace, with a tag
        envstore push backup ./data --kind dir       any directory, every bit of it
        envstore push analysis .venv -m "numpy 2.3"  with a message for `envstore log`
        envstore --json push analysis .venv          what it cost, for a script
    """,
)
@ref_argument()
@click.argument("path", type=PathType(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["env", "model", "dir"]),
    help="What PATH is; found out by itself unless given. An env is stored without what makes "
    "two equal installations differ; a dir with every byte, permission and time stamp.",
)
@click.option("--message", "-m", default="", help="A note for `envstore log`.")
@click.option(
    "--parent",
    "parents",
    metavar="REF",
    type=REF,
    multiple=True,
    help="Another snapshot that PATH resembles, to store only what differs from it (repeatable).",
)
@click.option(
    "--level",
    type=click.IntRange(1, 19),
    default=3,
    show_default=True,
    help="zstd level: higher is smaller and slower.",
)
@click.pass_obj
def push(
    settings: Settings,
    ref: str,
    path: Path,
    kind: str | None,
    message: str,
    parents: tuple[str, ...],
    level: int,
) -> None:
    """Store the tree at PATH and point REF at it.

    Only what the store does not hold yet is sent; an unchanged tree is not even read. If REF
    exists it moves on, and the snapshot it pointed at becomes the parent of the new one. The ref
    moves last: a push that is interrupted changes nothing, and the next one uses what it sent.

    Without --store and ENVSTORE_URL the store is one of your own, made by the first push.
    """
    from envstore.resolver.kinds import open_source
    from envstore.store.push import PushOptions
    from envstore.store.push import push as push_tree
    from envstore.store.refs import RefName

    name = RefName.parse(ref)
    # The path is looked at first: a typing error must not make a store.
    source = open_source(path, kind)
    try:
        repository, created = settings.open_for_push()
        with repository, settings.stat_cache() as stat_cache:
            if created:
                output.note(settings, f"made a store in {settings.url}; --store names another")
            bases = tuple(repository.resolve(parent) for parent in parents)
            with progress(settings) as report:
                done = push_tree(
                    repository,
                    source,
                    name,
                    stat_cache,
                    state=settings.pending(repository),
                    options=PushOptions(message, bases, level),
                    progress=lambda phase, at, total: report(_PHASES[phase], at, total),
                )
    finally:
        source.close()
    _print_push(settings, done)


def _print_push(settings: Settings, done: PushResult) -> None:
    for warning in done.warnings:
        output.note(settings, f"warning: {warning}")
    if settings.json:
        output.result(_push_fields(done))
        return
    what = (
        f"{done.ref} @{output.short(done.snapshot)} ({done.kind}): "
        f"{output.counted(done.files, 'file')}, {output.size(done.logical_bytes)}"
    )
    if done.unchanged:
        output.summary(settings, f"unchanged {what} ({done.seconds:.1f} s)")
        return
    output.summary(settings, f"pushed {what}")
    output.summary(
        settings,
        f"  new {output.size(done.new_chunk_bytes)}, stored as {output.size(done.stored_bytes)}; "
        f"sent {output.size(done.uploaded_bytes)} in "
        f"{output.counted(done.requests, 'request')}, {done.seconds:.1f} s",
    )


def _push_fields(done: PushResult) -> dict[str, Any]:
    return {
        "ref": done.ref,
        "digest": done.snapshot.hex(),
        "manifest": done.manifest.hex(),
        "kind": done.kind,
        "files": done.files,
        "logical_bytes": done.logical_bytes,
        "read_bytes": done.read_bytes,
        "new_chunk_bytes": done.new_chunk_bytes,
        "stored_bytes": done.stored_bytes,
        "uploaded_bytes": done.uploaded_bytes,
        "requests": done.requests,
        "seconds": round(done.seconds, 3),
        "unchanged": done.unchanged,
        "warnings": [output.printable(warning) for warning in done.warnings],
    }


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
    default="",
    help="Where the tree will be used, if not in DIR: files that hold its path are made for there.",
)
@click.pass_obj
def pull(settings: Settings, ref: str, directory: Path, prefix: str) -> None:
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
                prefix=os.fsencode(prefix),
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
