"""``gc``: freeing what nothing needs."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import ShareType
from envstore.cli.progress import progress

if TYPE_CHECKING:
    from envstore.store.gc.report import Collected

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_MOST_SECONDS = 10 * 365 * 86_400
_SHOWN = 5
_NICE = 19


class DurationType(click.ParamType[float]):
    """A time such as ``90s``, ``30m``, ``24h`` or ``7d``, in seconds."""

    name = "TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds, or fail."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", value)
        seconds = float(match[1]) * _UNITS[match[2]] if match else _MOST_SECONDS + 1
        if seconds > _MOST_SECONDS:
            self.fail(f"{value!r} is not a time such as 90s, 30m, 24h or 7d", param, ctx)
        return seconds


@click.command(
    cls=Command,
    examples="""
        envstore gc                       what is dead for a day, and remember what died since
        envstore gc --dry-run             only say what that would free
        envstore gc --grace 0s            all of it at once, if nobody is writing
    """,
)
@click.option("--dry-run", is_flag=True, help="Change nothing, say what would be freed.")
@click.option(
    "--grace",
    default="24h",
    show_default=True,
    type=DurationType(),
    metavar="TIME",
    help="How long what was found dead can still be taken back, for example 7d.",
)
@click.option(
    "--max-unused",
    default="5%",
    show_default=True,
    type=ShareType(),
    metavar="SHARE",
    help="How much of the live bytes may be dead within packs that are live in part.",
)
@click.pass_obj
def gc(settings: Settings, dry_run: bool, grace: float, max_unused: float) -> None:
    """Free what no ref, checkpoint, draft or mount needs.

    What is found dead is remembered, and deleted by the first run after the grace period that
    still finds it dead, unless a writer is at work that began before: so run it regularly, from
    cron for example. Until then `envstore tag @DIGEST REF` takes a snapshot back. It may run
    beside anything. If another collector is at work it says so and does nothing.

    Exit status: 0 done, or another is doing it; 1 something live is damaged, so that nothing can
    be said to be dead, or the store failed; 2 wrong usage.
    """
    # Whoever pushes, trains or serves on this machine goes first; threads begun later inherit it.
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
    from envstore.store.gc.collecting import collect

    with settings.open(cached=False) as repository, progress(settings, unit_bytes=False) as report:
        done = collect(
            repository, grace=grace, dry_run=dry_run, max_unused=max_unused, progress=report
        )
    if settings.json:
        output.result(as_json(done))
    else:
        _print(settings, done)


def as_json(done: Collected) -> dict[str, Any]:
    """Return an outcome as plain data."""
    return {**asdict(done), "kept_bytes": done.kept_bytes}


def _print(settings: Settings, done: Collected) -> None:
    from envstore.store.gc.report import KINDS
    from envstore.store.hosts import describe

    if done.busy is not None:
        where = output.printable(describe(done.busy.host))
        output.summary(settings, f"another collection is at work ({where}); nothing was done")
        return

    def say(text: str) -> None:
        output.summary(settings, output.printable(text))

    freed, condemned = ("would free", "would condemn") if done.dry_run else ("freed", "condemned")
    say(
        f"{freed} {output.size(done.freed_bytes)}: {output.counted(done.freed_objects, 'object')}, "
        f"{output.counted(done.freed_packs, 'pack')} among them"
    )
    if done.repacked_packs:
        say(
            f"repacked {output.counted(done.repacked_packs, 'pack')}, live in part, "
            f"storing {output.size(done.written_bytes)}"
        )
    if done.condemned_objects:
        say(
            f"{condemned} {output.size(done.condemned_bytes)}: "
            f"{output.counted(done.condemned_objects, 'object')}, for later runs to delete"
        )
    say(
        f"live {output.size(done.live_bytes)}: {output.counted(done.snapshots, 'snapshot')}, "
        f"{output.counted(done.packs, 'pack')}"
    )
    for reason, size in sorted(done.kept.items(), key=lambda item: -item[1]):
        say(f"kept {output.size(size)}: {KINDS[reason]}")
    if "writers" in done.kept:
        for writer in done.writers[:_SHOWN]:
            say(f"  {writer.what}, heard of {writer.silent:.0f} s ago ({describe(writer.host)})")
        if len(done.writers) > _SHOWN:
            say(f"  and {len(done.writers) - _SHOWN} more")
    if done.undeletable_objects:
        say(
            f"{output.counted(done.undeletable_objects, 'object')} could not be deleted: "
            "see the bucket's object lock and its policies"
        )
    if done.no_space:
        say(f"not all could be repacked: {done.no_space}; run it again when there is room")
    for key in done.damaged[:_SHOWN]:
        say(f"damaged, and not repacked: {key}; see `envstore repair`")
