"""``stats``: what a mount has done so far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import PathType


@click.command(
    cls=Command,
    examples="""
        envstore stats /mnt/analysis              since it was mounted
        envstore stats --watch 2 /mnt/analysis    again every two seconds, until Ctrl-C
        envstore --json stats /mnt/analysis       every count there is
    """,
)
@click.argument(
    "directory",
    metavar="DIR",
    type=PathType(path_type=Path, file_okay=False, resolve_path=False),
)
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Show it again and again; with --json, one object on each line.",
)
@click.pass_obj
def stats(settings: Settings, directory: Path, watch: float | None) -> None:
    """Show what a mount of yours has done so far.

    What was read through it, how much of that the cache held, what was fetched and whether what
    was fetched ahead was used, and for each kind of request how long the kernel waited. Counts go
    on when the server is replaced, and end with the mount.
    """
    from envstore.errors import NotFoundError
    from envstore.fuse.mountinfo import resolve
    from envstore.fuse.overview import mount_stats
    from envstore.fuse.records import RecordFiles

    mountpoint = resolve(directory)
    record = RecordFiles(mountpoint).load()
    if record is None:
        raise NotFoundError(
            f"{output.printable(mountpoint)} is no mount of yours", hint="see: envstore mounts"
        )
    while True:
        found = mount_stats(record)
        if settings.json:
            where = {"mountpoint": output.exact(os.fsencode(mountpoint)), "ref": record.name}
            output.result({**where, "digest": record.snapshot, **found})
        else:
            if watch and output.is_terminal(sys.stdout):
                click.clear()
            _show(record.name, mountpoint, found)
        if watch is None:
            return
        time.sleep(watch)


def _show(name: str, mountpoint: str, found: Mapping[str, Any]) -> None:
    runs, fetched, ahead = found["runs"], found["fetched"], found["prefetch"]
    ranges = sum(runs.values())
    hits = runs["inline"] + runs["waited"]
    damaged = found["damaged_blobs"] + found["corrupt_frames"]
    output.fields(
        [
            ("mount", f"{output.printable(name)} on {output.printable(mountpoint)}"),
            (
                "read",
                f"{output.size(found['bytes_read'])} in "
                f"{output.counted(found['requests'].get('read', 0), 'request')}",
            ),
            (
                "cache",
                f"{hits / ranges:.1%} of {output.counted(ranges, 'range')}" if ranges else "unused",
            ),
            (
                "fetched",
                f"{output.size(fetched['bytes'])} in {output.counted(fetched['frames'], 'frame')}"
                f", {output.counted(fetched['requests'], 'request')}"
                if fetched["requests"]
                else "",
            ),
            # Through a node, which fetches for all: what the reads of this one waited for.
            ("waited for", output.size(found["missed_bytes"]) if runs["missed"] else ""),
            (
                "store",
                f"{output.size(found['store']['bytes'])} in "
                f"{output.counted(found['store']['requests'], 'request')} of any kind"
                if found["store"]["requests"]
                else "",
            ),
            (
                "ahead",
                f"{output.size(ahead['bytes'])} in {output.counted(ahead['frames'], 'frame')}, "
                f"{ahead['used_bytes'] / ahead['bytes']:.0%} read since"
                if ahead["bytes"]
                else "",
            ),
            ("retries", _some(found["retries"])),
            ("damaged", _some(damaged)),
            ("errors", _some(found["errors"])),
            ("restarts", _some(found.get("restarts", 0))),
        ]
    )
    if found["latency"]:
        output.line()
        output.table(
            ("REQUEST", ">COUNT", ">MEDIAN", ">99 %", ">TOTAL"),
            [
                (
                    kind,
                    f"{one['count']:,}",
                    _duration(one["p50"]),
                    _duration(one["p99"]),
                    _duration(one["seconds"]),
                )
                for kind, one in sorted(found["latency"].items())
            ],
        )


def _some(count: int) -> str:
    """Return a count of what there should be none of, nothing if so it is."""
    return f"{count:,}" if count else ""


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"
