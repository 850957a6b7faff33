"""``repack``: laying what a start reads side by side in the store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import ref_argument
from envstore.cli.progress import progress

if TYPE_CHECKING:
    from envstore.store.repack import Repacked


@click.command(
    cls=Command,
    examples="""
        envstore repack analysis                      after `envstore profile analysis -- ...`
        envstore repack analysis --profile train      by another profile than `start`
    """,
)
@ref_argument()
@click.option(
    "--profile",
    metavar="NAME",
    help="The profile to go by; `start` unless given, else all that there are.",
)
@click.pass_obj
def repack(settings: Settings, ref: str, profile: str | None) -> None:
    """Store side by side what a profile of REF names.

    A later start then needs a few large requests. The snapshot and its digest stay the same,
    and so do the old packs, which other snapshots may use: what was repacked is stored twice
    until a garbage collection. Trees that are pushed when their REF has a profile already are
    laid out so from the start.
    """
    from envstore.store.repack import repack as repack_snapshot

    with settings.open() as repository:
        snapshot = repository.resolve(ref)
        with progress(settings) as report:
            done = repack_snapshot(
                repository,
                snapshot,
                profile,
                progress=lambda at, total: report("storing", at, total),
            )
    if settings.json:
        output.result(
            {
                "ref": ref,
                **asdict(done),
                "snapshot": done.snapshot.hex(),
                "manifest": done.manifest.hex(),
            }
        )
        return
    _print(settings, ref, done)


def _print(settings: Settings, ref: str, done: Repacked) -> None:
    what = (
        f"{ref} @{output.short(done.snapshot)} by profile {done.profile!r}: "
        f"{output.counted(done.chunks, 'chunk')}, {output.size(done.raw_bytes)}"
    )
    if done.unchanged:
        output.summary(settings, f"nothing to do for {what}")
    else:
        output.summary(settings, f"repacked {what}, stored as {output.size(done.stored_bytes)}")
        output.summary(
            settings,
            f"  a start took {output.counted(done.before.requests, 'request')} for "
            f"{output.size(done.before.bytes)}, and takes {done.after.requests:,} for "
            f"{output.size(done.after.bytes)}",
        )
