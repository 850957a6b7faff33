"""``mount``, ``umount`` and ``mounts``: snapshots as directories."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import PathType, ref_argument

if TYPE_CHECKING:
    from envstore.fuse.records import MountRecord

_DIRECTORY = PathType(path_type=Path, file_okay=False, resolve_path=False)


@click.command(
    cls=Command,
    examples="""
        envstore mount analysis /mnt/analysis                in the background
        envstore mount --allow-other llama:8b /srv/llama     for every user of the machine
        envstore mount --foreground analysis ./env           until Ctrl-C, log on the terminal
    """,
)
@ref_argument()
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.option("--foreground", "-f", is_flag=True, help="Serve until unmounted; log to stderr.")
@click.option(
    "--allow-other",
    is_flag=True,
    help="Let other users in. Needs root, or user_allow_other in /etc/fuse.conf.",
)
@click.pass_obj
def mount(
    settings: Settings, ref: str, directory: Path, foreground: bool, allow_other: bool
) -> None:
    """Mount REF, read-only, on an empty directory.

    Returns when the mount answers. Files are fetched when they are read, verified, and kept in
    the cache. The mount is of the snapshot that REF points at now; it stays the same if REF
    moves.
    """
    settings.export_cache()
    settings.require_store()
    started = time.monotonic()
    if foreground:
        _serve(settings, ref, directory, allow_other, started)
        return
    from envstore.fuse.background import MountRequest, start_background

    record = start_background(MountRequest(settings.url, ref, str(directory), allow_other))
    _print_mounted(settings, record, started)


def _serve(
    settings: Settings, ref: str, directory: Path, allow_other: bool, started: float
) -> None:
    from envstore.fuse.mount import serve

    if not settings.verbose:
        import logging

        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    with settings.open() as repository:
        serve(
            repository,
            repository.resolve(ref),
            directory,
            name=ref,
            allow_other=allow_other,
            ready=lambda record: _print_mounted(settings, record, started),
        )


def _print_mounted(settings: Settings, record: MountRecord, started: float) -> None:
    seconds = time.monotonic() - started
    if settings.json:
        where = {"mountpoint": record.mountpoint}
        output.result(
            {
                "ref": record.name,
                "digest": record.snapshot,
                **asdict(record),
                **where,
                "seconds": round(seconds, 3),
            }
        )
        return
    output.summary(
        settings,
        f"mounted {record.name} @{record.snapshot[:12]} on "
        f"{output.printable(record.mountpoint)} ({seconds:.2f} s)",
    )


@click.command(
    cls=Command,
    examples="""
        envstore umount /mnt/analysis
        envstore umount --lazy /mnt/analysis    also while something still uses it
    """,
)
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.option(
    "--lazy", "-l", is_flag=True, help="Take it away now; whoever uses it may finish first."
)
@click.pass_obj
def umount(settings: Settings, directory: Path, lazy: bool) -> None:
    """Unmount what `envstore mount` mounted.

    Returns when the server of DIR has ended. Also clears away a mount whose server was killed.
    """
    from envstore.fuse.mount import unmount

    unmount(directory, lazy=lazy)
    where = output.printable(os.path.abspath(directory))
    if settings.json:
        output.result({"mountpoint": where, "lazy": lazy})
        return
    output.summary(settings, f"unmounted {where}")


@click.command(
    cls=Command,
    examples="""
        envstore mounts
        envstore --json mounts      with process, log file and statistics socket
    """,
)
@click.pass_obj
def mounts(settings: Settings) -> None:
    """List your mounts and whether their servers live."""
    from envstore.fuse.mount import active_mounts

    found = active_mounts()
    if settings.json:
        listed = [{**asdict(record), "alive": alive} for record, alive in found]
        output.result({"mounts": listed})
        return
    if not found:
        output.note(settings, "nothing is mounted")
        return
    output.table(
        ("MOUNT POINT", "REF", "DIGEST", "SINCE", "SERVER"),
        [
            (
                output.printable(record.mountpoint),
                output.printable(record.name),
                f"@{record.snapshot[:12]}",
                output.age(record.started),
                f"process {record.pid}" if alive else "dead: envstore umount it",
            )
            for record, alive in found
        ],
    )
