"""``hydrate``: whole snapshots on this machine, to mount without a store."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import ref_argument
from envstore.cli.progress import progress
from envstore.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from envstore.fuse.hydrated import Hydrated


@click.command(
    cls=Command,
    examples="""
        envstore hydrate analysis                    all of it, to stay
        envstore hydrate analysis --rate 50M         at most 50 MiB a second
        envstore hydrate analysis --background       returns at once
        envstore hydrate --list                      what is hydrated, and what is on its way
        envstore hydrate @3f2a9c1b --drop            let it go again
    """,
)
@ref_argument(required=False)
@click.option("--rate", metavar="BYTES", help="Fetch at most this much a second, for example 50M.")
@click.option("--background", is_flag=True, help="Return at once; see --list, and the log.")
@click.option("--drop", is_flag=True, help="Let its files go again when the cache needs room.")
@click.option("--list", "listing", is_flag=True, help="List what is hydrated.")
@click.pass_obj
def hydrate(
    settings: Settings,
    ref: str | None,
    rate: str | None,
    background: bool,
    drop: bool,
    listing: bool,
) -> None:
    """Fetch all of REF to this machine, and keep it.

    From then on root can mount it by its @digest without the store, and the kernel reads its
    files without a server. Runs with low priority. What is interrupted goes on with the next run.
    Its files count towards ENVSTORE_CACHE_SIZE and stay until --drop; unmount first.
    """
    if listing + drop > 1 or ((listing or drop) and (background or rate is not None)):
        raise UsageError("--list and --drop go by themselves")
    if listing:
        if ref is not None:
            raise UsageError("--list takes no REF")
        _list(settings)
    elif ref is None:
        raise UsageError("REF is missing", hint="see: envstore hydrate --help")
    elif drop:
        _drop(settings, ref)
    elif background:
        _start(settings, ref, _speed(rate))
    else:
        _hydrate(settings, ref, _speed(rate))


def _speed(rate: str | None) -> int | None:
    from envstore.store.cache import parse_size

    speed = None if rate is None else parse_size(rate)
    if speed == 0:
        raise UsageError("--rate 0 would never end")
    return speed


def _start(settings: Settings, ref: str, speed: int | None) -> None:
    """Go on in another process, once it is known what it will be about."""
    import subprocess

    from envstore.fuse.hydrated import claim, log_path

    settings.export_cache()
    with settings.open() as repository:
        snapshot = repository.resolve(ref)
    cache = settings.cache()
    with claim(cache, snapshot):  # fails here, not in a log, if another is at it
        pass
    command = [sys.executable, "-m", "envstore", "hydrate", "--", ref]
    if speed is not None:
        command[4:4] = ["--rate", str(speed)]
    log = log_path(cache, snapshot)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, "ENVSTORE_URL": settings.url},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    process.returncode = 0  # nobody waits for it
    if settings.json:
        output.result(
            {
                "ref": ref,
                "digest": snapshot.hex(),
                "pid": process.pid,
                "log": output.printable(str(log)),
            }
        )
        return
    output.summary(
        settings,
        f"hydrating {ref} @{output.short(snapshot)} in process {process.pid}; "
        f"log: {output.printable(str(log))}",
    )


def _hydrate(settings: Settings, ref: str, speed: int | None) -> None:
    from envstore.fuse.hydrate import hydrate as hydrate_snapshot
    from envstore.fuse.hydrate import step_back

    started = time.monotonic()
    step_back()
    with settings.open() as repository:
        snapshot = repository.resolve(ref)
        with progress(settings) as report:
            done = hydrate_snapshot(
                repository,
                snapshot,
                ref=ref,
                rate=speed,
                progress=lambda at, total: report("hydrating", at, total),
            )
    seconds = time.monotonic() - started
    if settings.json:
        output.result(
            {
                **_fields(done.hydrated),
                "missing_files": done.missing_files,
                "missing_bytes": done.missing_bytes,
                "fetched_bytes": done.fetched_bytes,
                "requests": done.requests,
                "seconds": round(seconds, 3),
            }
        )
        return
    record = done.hydrated.record
    output.summary(
        settings,
        f"hydrated {ref} @{record.snapshot[:12]}: {output.counted(record.files, 'file')}, "
        f"{output.size(record.bytes)}; fetched {output.size(done.fetched_bytes)} in "
        f"{output.counted(done.requests, 'request')}, {seconds:.1f} s",
    )


def _drop(settings: Settings, ref: str) -> None:
    from envstore.fuse.hydrated import drop_hydrated, find_hydrated
    from envstore.fuse.mount import active_mounts

    cache = settings.cache()
    found = find_hydrated(cache, ref)
    if found is not None:
        snapshot = found.snapshot
    else:
        with settings.open() as repository:
            snapshot = repository.resolve(ref)
    for record, _ in active_mounts():
        if record.snapshot == snapshot.hex() and not record.served:
            raise UsageError(
                f"{ref} is mounted without a server on {output.printable(record.mountpoint)}",
                hint=f"envstore umount {output.printable(record.mountpoint)}",
            )
    if not drop_hydrated(cache, snapshot):
        raise NotFoundError(
            f"{ref} @{output.short(snapshot)} is not hydrated", hint="see: envstore hydrate --list"
        )
    if settings.json:
        output.result({"digest": snapshot.hex(), "dropped": True})
        return
    output.summary(settings, f"dropped {ref} @{output.short(snapshot)}")


def _list(settings: Settings) -> None:
    from envstore.fuse.hydrated import list_hydrated, list_unfinished

    cache = settings.cache()
    found, unfinished = list_hydrated(cache), list_unfinished(cache)
    if settings.json:
        begun = [{"digest": name.hex(), "running": running} for name, running in unfinished]
        output.result({"hydrated": [_fields(item) for item in found], "unfinished": begun})
        return
    for name, running in unfinished:
        state = "is on its way" if running else "is not whole: hydrate it again, or --drop it"
        output.note(settings, f"@{output.short(name)} {state}")
    if not found:
        output.note(settings, "nothing is hydrated")
        return
    output.table(
        ("REF", "DIGEST", "FILES", "SIZE", "SINCE"),
        [
            (
                output.printable(item.record.ref),
                f"@{item.record.snapshot[:12]}",
                str(item.record.files),
                output.size(item.record.bytes),
                output.age(item.record.at),
            )
            for item in found
        ],
    )


def _fields(item: Hydrated) -> dict[str, object]:
    fields = asdict(item.record)
    return {
        "ref": output.printable(fields.pop("ref")),
        "digest": fields.pop("snapshot"),
        **fields,
        "directory": output.printable(str(item.directory)),
    }
