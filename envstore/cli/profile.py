"""``profile``: recording what a command reads as it starts, and looking at such recordings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import ref_argument
from envstore.errors import EnvstoreError, UsageError

if TYPE_CHECKING:
    from envstore.fuse.run import Ran
    from envstore.store.profiles import Profile
    from envstore.store.repository import Repository


@click.command(
    cls=Command,
    examples="""
        envstore profile analysis -- python -c 'import torch, pandas'
        envstore profile analysis --name train -- python train.py --steps 1
        envstore profile analysis --replace -- python app.py --check
        envstore profile analysis --list
        envstore profile analysis --show train
        envstore profile analysis --remove train
    """,
)
@ref_argument()
@click.argument("command", metavar="[-- CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--name",
    default="start",
    metavar="NAME",
    show_default=True,
    help="Which profile to record; a mount follows this one unless told otherwise.",
)
@click.option(
    "--merge/--replace",
    "merge",
    default=True,
    help="Add to what was recorded before (as is usual), or forget that.",
)
@click.option("--keep-failed", is_flag=True, help="Store the recording of a CMD that fails, too.")
@click.option("--list", "listed", is_flag=True, help="List the profiles of REF.")
@click.option("--show", metavar="NAME", help="Print what a profile holds, in order.")
@click.option("--remove", metavar="NAME", help="Forget a profile.")
@click.pass_obj
def profile(
    settings: Settings,
    ref: str,
    command: tuple[str, ...],
    name: str,
    merge: bool,
    keep_failed: bool,
    listed: bool,
    show: str | None,
    remove: str | None,
) -> None:
    """Record what a command reads of an environment as it starts.

    CMD is run as by `envstore run`, in a mount of its own, and which ranges of which files it
    reads, in what order, is stored beside the snapshot, which stays the same. Mounts of REF then
    fetch that ahead in few large requests; so do mounts of snapshots that are pushed on top of
    it, for the files they share. Recordings of one name are merged. `envstore repack` lays what
    was recorded side by side.

    The exit status is that of CMD; if it is not 0, nothing is stored. CMD has stdout to itself:
    --json makes what is said on stderr one line of JSON.
    """
    asked = sum((bool(command), listed, show is not None, remove is not None))
    if asked != 1:
        raise UsageError(
            "name one thing to do: -- CMD, --list, --show or --remove",
            hint="see: envstore profile --help",
        )
    settings.require_store()
    if command:
        _record(settings, ref, command, name, merge, keep_failed)
        return
    with settings.open() as repository:
        manifest = repository.snapshot(repository.resolve(ref)).manifest
        if show is not None:
            _show(settings, repository, manifest, show)
        elif remove is not None:
            _remove(settings, repository, manifest, remove)
        else:
            _list(settings, repository, manifest)


def _record(
    settings: Settings,
    ref: str,
    command: Sequence[str],
    name: str,
    merge: bool,
    keep_failed: bool,
) -> None:
    from envstore.cli.run import surroundings
    from envstore.fuse.recorder import read_recording
    from envstore.fuse.run import run
    from envstore.store.profiles import new_profile, profile_key, save_profile
    from envstore.store.sessions import writing

    profile_key(bytes(32), name)  # a typing error shows before CMD has run
    settings.export_cache()
    ran = run(settings.url, ref, command, surroundings(ref), record=True)
    if ran.stats is None or "recording" not in ran.stats:
        raise EnvstoreError(
            "the mount's server was killed meanwhile: nothing is stored", hint=f"see {ran.log}"
        )
    recording = ran.stats["recording"]
    if ran.stats.get("restarts"):
        raise EnvstoreError(
            "the mount's server was restarted meanwhile, and the recording is not whole",
            hint="try again",
        )
    if not recording["complete"]:
        output.note(settings, "more was read than a profile holds: the last reads are left out")
    recorded = new_profile(read_recording(recording), command)
    stored = None
    if recorded.ranges and (ran.status == 0 or keep_failed):
        manifest = bytes.fromhex(ran.record.manifest)
        with settings.open() as repository, writing(repository, "profile") as (_, inside):
            stored = save_profile(inside.objects, manifest, name, recorded, replace=not merge)
    facts = {
        "ref": ran.record.name,
        "digest": ran.record.snapshot,
        "name": name,
        "exit_code": ran.status,
        "stored": stored is not None,
        **_sizes(recorded),
        "frames": recording["frames"],
        "stored_bytes": recording["stored_bytes"],
        "logical_bytes": ran.logical_bytes,
        "recordings": stored.recordings if stored else 0,
    }
    if settings.json:
        click.echo(json.dumps(facts), err=True)
    else:
        _say(settings, ran, facts)
    raise click.exceptions.Exit(ran.status)


def _say(settings: Settings, ran: Ran, facts: dict[str, Any]) -> None:
    share = facts["bytes"] / max(1, ran.logical_bytes)
    output.note(
        settings,
        f"{facts['ref']}: read {output.counted(facts['files'], 'file')} in "
        f"{output.counted(facts['ranges'], 'range')}, {output.size(facts['bytes'])} "
        f"({share:.1%} of {output.size(ran.logical_bytes)}): "
        f"{output.counted(facts['frames'], 'frame')}, {output.size(facts['stored_bytes'])} stored",
    )
    if facts["stored"]:
        merged = facts["recordings"]
        of = f", {merged} recordings by now" if merged > 1 else ""
        output.note(settings, f"stored as profile {facts['name']!r}{of}")
    elif ran.status and facts["ranges"]:
        output.note(
            settings,
            f"the command failed with {ran.status}: not stored (--keep-failed stores it)",
        )
    else:
        output.note(settings, "nothing was read, nothing is stored")


def _sizes(recorded: Profile) -> dict[str, int]:
    return {
        "files": len({item.path for item in recorded.ranges}),
        "ranges": len(recorded.ranges),
        "bytes": sum(item.length for item in recorded.ranges),
    }


def _created(recorded: Profile) -> str:
    try:
        return datetime.fromtimestamp(recorded.created, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(recorded.created)


def _command(recorded: Profile) -> str:
    return " ".join(map(output.printable, recorded.command))


def _facts(name: str, recorded: Profile) -> dict[str, Any]:
    return {
        "name": name,
        "created": _created(recorded),
        "command": [os.fsdecode(word) for word in recorded.command],
        "recordings": recorded.recordings,
        **_sizes(recorded),
    }


def _list(settings: Settings, repository: Repository, manifest: bytes) -> None:
    from envstore.store.profiles import list_profiles, load_profile

    objects = repository.objects
    names = list_profiles(objects, manifest)
    found = {name: load_profile(objects, manifest, name) for name in names}
    if settings.json:
        output.result({"profiles": [_facts(name, one) for name, one in found.items()]})
        return
    if not found:
        output.note(settings, "no start of this snapshot was recorded yet")
        return
    output.table(
        ("NAME", ">RECORDINGS", ">FILES", ">SIZE", "LAST", "COMMAND"),
        [
            (
                name,
                str(one.recordings),
                f"{_sizes(one)['files']:,}",
                output.size(_sizes(one)["bytes"]),
                output.age(_created(one)),
                _command(one),
            )
            for name, one in found.items()
        ],
    )


def _show(settings: Settings, repository: Repository, manifest: bytes, name: str) -> None:
    from envstore.store.profiles import load_profile

    found = load_profile(repository.objects, manifest, name)
    if settings.json:
        ranges = [
            {
                "path": output.exact(item.path),
                "offset": item.offset,
                "length": item.length,
                "seen": item.seen,
            }
            for item in found.ranges
        ]
        output.result({**_facts(name, found), "read": ranges})
        return
    output.table(
        (">OFFSET", ">LENGTH", ">SEEN", "FILE"),
        [
            (str(item.offset), str(item.length), str(item.seen), output.printable(item.path))
            for item in found.ranges
        ],
    )


def _remove(settings: Settings, repository: Repository, manifest: bytes, name: str) -> None:
    from envstore.store.profiles import remove_profile

    remove_profile(repository.objects, manifest, name)
    if settings.json:
        output.result({"removed": name})
        return
    output.summary(settings, f"removed profile {name!r}")
