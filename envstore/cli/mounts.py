"""``mount``, ``umount``, ``mounts`` and ``remount``: snapshots as directories."""

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
from envstore.cli.holding import hold_here, metrics_option, patience_option
from envstore.cli.params import PathType, PrefixType, ref_argument

if TYPE_CHECKING:
    from envstore.fuse.records import MountRecord

_DIRECTORY = PathType(path_type=Path, file_okay=False, resolve_path=False)


@click.command(
    cls=Command,
    examples="""
        envstore mount analysis /mnt/analysis                in the background
        envstore mount --allow-other llama:8b /srv/llama     for every user of the machine
        envstore mount --profile serve llama:8b /srv/llama   fetch ahead what serving reads
        envstore mount --foreground analysis ./env           until Ctrl-C, log on the terminal
        envstore mount analysis /srv/pods/7/env --prefix /opt/env    where a container sees it
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
@click.option(
    "--profile",
    metavar="NAME",
    default="",
    help="Start profile to fetch ahead; `none` for none. Default: the one that fits.",
)
@click.option(
    "--fast-path",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    show_default=True,
    help="Let the kernel serve names and local files by itself. Needs root, and lets other users"
    " in; auto does it for hydrated snapshots and with --allow-other.",
)
@click.option(
    "--node",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    show_default=True,
    help="Use the node server, which shares memory and cache between mounts. Needs root, and lets"
    " other users in.",
)
@click.option(
    "--prefix",
    type=PrefixType(),
    help="Where users of the mount see it: files that hold the path of their environment are made"
    " for there. Default: DIR as it is given, made absolute; links in it are not followed.",
)
@patience_option
@metrics_option
@click.pass_obj
def mount(
    settings: Settings,
    ref: str,
    directory: Path,
    foreground: bool,
    allow_other: bool,
    profile: str,
    fast_path: str,
    node: str,
    prefix: str | None,
    patience: float,
    metrics: str,
) -> None:
    """Mount REF, read-only, on an empty directory.

    Returns when the mount answers. Files are fetched when they are read, verified, and kept in
    the cache. The mount is of the snapshot that REF points at now; it stays the same if REF
    moves. It outlives the process that serves it: see `envstore mounts`. Through the node server
    the node's --timeout holds; with --metrics the mount has a server of its own.
    """
    settings.export_cache()
    if not ref.startswith("@"):  # a hydrated snapshot needs no store
        settings.require_store()
    started = time.monotonic()
    from envstore.fuse.keeping import MountRequest

    request = MountRequest(
        settings.url,
        ref,
        str(directory),
        allow_other,
        profile=profile,
        fast_path=fast_path,
        patience=patience,
        metrics=metrics,
        prefix=prefix or "",
    )
    if foreground:
        raise SystemExit(
            hold_here(settings, request, lambda record: _print_mounted(settings, record, started))
        )
    from envstore.fuse.background import start_mount

    _print_mounted(settings, start_mount(request, node), started)


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
        envstore --json mounts      with processes, log file and sockets
    """,
)
@click.pass_obj
def mounts(settings: Settings) -> None:
    """List your mounts, and how each fares.

    Whether it is served, how often its server was replaced, what was fetched from the store, and
    the share of reads that the cache could serve.
    """
    from envstore.fuse.overview import overview

    found = overview()
    if settings.json:
        output.result({"mounts": [asdict(one) for one in found]})
        return
    if not found:
        output.note(settings, "nothing is mounted")
        return
    output.table(
        ("MOUNT POINT", "REF", "DIGEST", "SINCE", "STATE", "RESTARTS", "FETCHED", "HITS"),
        [
            (
                output.printable(one.mountpoint),
                output.printable(one.ref),
                f"@{one.digest[:12]}",
                output.age(one.started),
                one.state if one.state != "dead" else "dead: envstore umount it",
                str(one.restarts),
                output.size(one.bytes_fetched),
                "-" if one.hit_rate is None else f"{one.hit_rate:.0%}",
            )
            for one in found
        ],
    )
    for one in found:
        if one.lease_problem:
            where, why = output.printable(one.mountpoint), output.printable(one.lease_problem)
            output.note(settings, f"{where} is not leased in its store: {why}")


@click.command(
    cls=Command,
    examples="""
        envstore remount --upgrade /mnt/analysis      after pip install --upgrade envstore
    """,
)
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.option(
    "--upgrade", is_flag=True, required=True, help="Replace the code that serves the mount."
)
@click.pass_obj
def remount(settings: Settings, directory: Path, upgrade: bool) -> None:
    """Have a live mount served by this version of envstore.

    Nothing is unmounted: open files stay open, and whoever reads meanwhile waits for
    milliseconds.
    """
    from envstore.fuse.upgrade import upgrade_mount

    started = time.monotonic()
    found = upgrade_mount(directory)
    seconds = time.monotonic() - started
    where = output.printable(os.path.abspath(directory))
    if settings.json:
        output.result({"mountpoint": where, **found, "seconds": round(seconds, 3)})
        return
    output.summary(
        settings, f"{where} is served by version {found['version']}, process {found['server_pid']}"
    )
