"""``ls``, ``show``, ``log`` and ``diff``: looking at refs and at what they lead to."""

from __future__ import annotations

import os
import posixpath
import stat
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF, ref_argument
from envstore.errors import CorruptError, NotFoundError, UsageError

if TYPE_CHECKING:
    from envstore.store.catalog import Listed
    from envstore.store.diff import Change
    from envstore.store.manifest import Entry
    from envstore.store.repository import Repository
    from envstore.store.snapshots import Snapshot

_TYPES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
_KINDS = ("file", "directory", "symlink")


@click.command(
    cls=Command,
    examples="""
        envstore ls                              every ref of the store
        envstore ls team/                        the refs of one namespace
        envstore ls analysis                     the top of what analysis:latest holds
        envstore ls analysis:/lib/python3.12     a directory in it
        envstore ls -R team/llama:8b:/           everything, in a namespace, with a tag
    """,
)
@click.argument("what", metavar="[REF[:/PATH]]", required=False, type=REF)
@click.option("--recursive", "-R", is_flag=True, help="Everything below, not just the directory.")
@click.pass_obj
def ls(settings: Settings, what: str | None, recursive: bool) -> None:
    """List the refs of the store, or the files of one.

    A path begins with `:/` after REF, so that it cannot be taken for a tag: NAME:/PATH,
    NAME:TAG:/PATH, @DIGEST:/PATH. A NAMESPACE/ lists the refs in it.
    """
    if what is None or (what.endswith("/") and ":" not in what):
        _list_refs(settings, what or "", recursive)
        return
    ref, path = _split(what)
    from envstore.store.catalog import entries_at

    with settings.open() as repository:
        snapshot = repository.resolve(ref)
        entries = repository.entries(repository.snapshot(snapshot).manifest)
        shown = entries_at(entries, path, recursive=recursive)
        if settings.json:
            found = [_entry_fields(entry) for entry in shown]
            where = output.printable(b"/" + path)
            output.result({"ref": ref, "digest": snapshot.hex(), "path": where, "entries": found})
            return
        above = len(path) + 1 if path else 0
        for entry in shown:
            output.line(_entry_line(entry, entry.path[above:] or entry.path))


def _split(what: str) -> tuple[str, bytes]:
    ref, colon, path = what.partition(":/")
    if not colon and what.count(":") > 1:
        raise UsageError(f"{what!r} is not a valid ref", hint="a path begins with :/")
    normal = posixpath.normpath(f"/{path}").strip("/")
    return ref, os.fsencode(normal)


def _list_refs(settings: Settings, prefix: str, recursive: bool) -> None:
    from envstore.store.catalog import describe_refs
    from envstore.store.refs import RefName

    if prefix:
        RefName.parse(f"{prefix}name")
        if prefix.count("/") != 1:
            raise UsageError(f"{prefix!r} is not a namespace", hint="write NAMESPACE/")
    if recursive:
        raise UsageError("-R needs a REF", hint="envstore ls -R REF")
    with settings.open() as repository:
        listed = describe_refs(repository, prefix)
        url = repository.objects.url
    damaged = [item for item in listed if item.error is not None]
    if settings.json:
        output.result({"store": url, "refs": [_ref_fields(item) for item in listed]})
    elif listed:
        headings = ("REF", "DIGEST", "KIND", ">FILES", ">SIZE", "MOVED")
        output.table(headings, [_ref_row(item) for item in listed])
    else:
        output.note(settings, "there are no refs yet")
    if damaged:
        first = damaged[0]
        raise CorruptError(
            f"{output.counted(len(damaged), 'ref')} cannot be read: {first.name}: {first.error}",
            hint="see: envstore verify",
        )


def _ref_row(item: Listed) -> tuple[str, ...]:
    if item.ref is None or item.snapshot is None:
        digest = f"@{output.short(item.ref.snapshot)}" if item.ref else "?"
        return str(item.name), digest, "damaged", "?", "?", "?"
    return (
        str(item.name),
        f"@{output.short(item.ref.snapshot)}",
        item.snapshot.kind,
        f"{item.snapshot.files:,}",
        output.size(item.snapshot.logical_bytes),
        output.age(item.ref.updated),
    )


def _ref_fields(item: Listed) -> dict[str, Any]:
    found: dict[str, Any] = {"ref": str(item.name)}
    if item.ref is not None:
        found |= {"digest": item.ref.snapshot.hex(), "updated": item.ref.updated}
    if item.snapshot is not None:
        found |= {
            "kind": item.snapshot.kind,
            "files": item.snapshot.files,
            "logical_bytes": item.snapshot.logical_bytes,
            "created": item.snapshot.created,
        }
    if item.error is not None:
        found["error"] = str(item.error)
    return found


def _entry_line(entry: Entry, name: bytes) -> str:
    mode = entry.mode
    if mode is None:
        mode = 0o777 if entry.kind == 2 else 0o755 if entry.executable or entry.kind else 0o644
    # Normalised trees have one time stamp for all, which tells nothing.
    moment = "" if entry.mtime_ns is None else f"{_moment(entry.mtime_ns)}  "
    target = f" -> {output.printable(entry.target)}" if entry.target else ""
    permissions = stat.filemode(_TYPES[entry.kind] | mode)
    return f"{permissions}  {entry.size:>15,}  {moment}{output.printable(name)}{target}"


def _moment(nanoseconds: int) -> str:
    try:
        moment = datetime.fromtimestamp(nanoseconds / 1e9, UTC).astimezone()
    except (OverflowError, ValueError, OSError):
        return f"{nanoseconds // 1_000_000_000:>16}"  # a year that no calendar has
    return moment.strftime("%Y-%m-%d %H:%M")


def _entry_fields(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": output.exact(entry.path),
        "kind": _KINDS[entry.kind],
        "size": entry.size,
        "executable": entry.executable,
    }
    if entry.target:
        found["target"] = output.exact(entry.target)
    if entry.link:
        found["hard_link_to"] = output.exact(entry.link)
    if entry.mode is not None:
        found["mode"] = f"{entry.mode:04o}"
    if entry.mtime_ns is not None:
        found["mtime_ns"] = entry.mtime_ns
    return found


@click.command(
    cls=Command,
    examples="""
        envstore show analysis               where the ref points and what that is
        envstore show analysis --packages    the packages it was composed of
        envstore show analysis --lock > envstore.lock
        envstore --json show team/llama:8b   the same for a script
    """,
)
@ref_argument()
@click.option("--packages", is_flag=True, help="List the packages of an environment instead.")
@click.option("--lock", is_flag=True, help="Print the lock of an environment instead.")
@click.pass_obj
def show(settings: Settings, ref: str, packages: bool, lock: bool) -> None:
    """Show what REF points at, and how it was made."""
    from envstore.store.refs import RefName, read_ref

    with settings.open() as repository:
        digest = repository.resolve(ref)
        snapshot = repository.snapshot(digest)
        if packages or lock:
            _show_lock(settings, repository, ref, snapshot, whole=lock)
            return
        moved = None if "@" in ref else read_ref(repository.objects, RefName.parse(ref))
    name = ref if moved is None else str(RefName.parse(ref))
    if settings.json:
        found = {"ref": name, **_snapshot_fields(digest, snapshot)}
        if moved is not None:
            found |= {"updated": moved.updated, "sequence": moved.sequence}
        output.result(found)
        return
    output.fields(
        [
            ("ref", name),
            ("digest", digest.hex()),
            ("kind", snapshot.kind),
            ("files", f"{snapshot.files:,}"),
            ("size", f"{output.size(snapshot.logical_bytes)} ({snapshot.logical_bytes:,} bytes)"),
            ("created", f"{output.printable(snapshot.created)}, {output.age(snapshot.created)}"),
            ("moved", f"{output.printable(moved.updated)}, move {moved.sequence}" if moved else ""),
            ("message", output.printable(snapshot.message)),
            ("parents", " ".join(f"@{output.short(parent)}" for parent in snapshot.parents)),
            ("manifest", snapshot.manifest.hex()),
            ("lock", snapshot.lock.hex() if snapshot.lock else ""),
            *(
                (output.printable(key), output.printable(value))
                for key, value in sorted(snapshot.attributes.items())
            ),
        ]
    )


def _show_lock(
    settings: Settings, repository: Repository, ref: str, snapshot: Snapshot, *, whole: bool
) -> None:
    from envstore.resolver.lock import CondaPackage, LocalPython
    from envstore.resolver.lockfile import parse_lock
    from envstore.store.locks import load_lock_bytes

    if snapshot.lock is None:
        raise NotFoundError(
            f"{ref} has no lock: it was pushed as a tree",
            hint="push a specification or a lock to have one",
        )
    data = load_lock_bytes(repository.objects, snapshot.lock)
    lock = parse_lock(data, f"the lock of {ref}")
    if whole:
        lines = data.decode().rstrip("\n").split("\n")
        # Into a file it goes as it is; a terminal would obey what no field but an unknown one has.
        shown = map(output.printable, lines) if output.is_terminal(sys.stdout) else lines
        output.line("\n".join(shown))
        return
    rows = []
    for package in lock.packages:
        kind = "conda" if isinstance(package, CondaPackage) else "pypi"
        if isinstance(package, LocalPython):
            rows.append({"name": "python", "version": package.version, "kind": "local"})
        else:
            rows.append({"name": package.name, "version": package.version, "kind": kind})
        rows[-1] |= {"sha256": package.sha256}
    if settings.json:
        output.result({"ref": ref, "packages": rows})
        return
    output.table(
        ["name", "version", "kind", "sha256"],
        [[row["name"], row["version"], row["kind"], row["sha256"][:12]] for row in rows],
    )


def _snapshot_fields(digest: bytes, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "digest": digest.hex(),
        "kind": snapshot.kind,
        "files": snapshot.files,
        "logical_bytes": snapshot.logical_bytes,
        "created": snapshot.created,
        "parents": [parent.hex() for parent in snapshot.parents],
        "manifest": snapshot.manifest.hex(),
        "lock": snapshot.lock.hex() if snapshot.lock else None,
        "message": snapshot.message,
        "attributes": snapshot.attributes,
    }


@click.command(
    cls=Command,
    examples="""
        envstore log analysis           how it came to be, newest first
        envstore log -n 3 analysis      the last three
    """,
)
@ref_argument()
@click.option("--limit", "-n", type=click.IntRange(1), metavar="N", help="At most N snapshots.")
@click.pass_obj
def log(settings: Settings, ref: str, limit: int | None) -> None:
    """List the snapshots that REF pointed at.

    Newest first, each the parent of the one above it.
    """
    with settings.open() as repository:
        found, lost = _history(repository, repository.resolve(ref), limit)
    if settings.json:
        shown = [_snapshot_fields(digest, snapshot) for digest, snapshot in found]
        output.result({"ref": ref, "snapshots": shown, "complete": lost is None})
        return
    headings = ("DIGEST", "CREATED", "KIND", ">FILES", ">SIZE", "MESSAGE")
    output.table(
        headings,
        [
            (
                f"@{output.short(digest)}",
                output.age(snapshot.created),
                snapshot.kind,
                f"{snapshot.files:,}",
                output.size(snapshot.logical_bytes),
                output.printable(snapshot.message),
            )
            for digest, snapshot in found
        ],
    )
    if lost is not None:
        output.note(settings, f"older snapshots are gone, the first of them @{lost.hex()}")


def _history(
    repository: Repository, digest: bytes, limit: int | None
) -> tuple[list[tuple[bytes, Snapshot]], bytes | None]:
    """Return the history as far as the store still has it, and the snapshot it breaks off before.

    Snapshots that no ref names are collected as garbage, also those that others came of.
    """
    found = list(repository.history(digest, limit))
    parents = found[-1][1].parents
    return found, parents[0] if parents and len(found) != limit else None


@click.command(
    cls=Command,
    examples="""
        envstore diff analysis@3f2a9c1b analysis     what a push changed
        envstore diff --stat torch:2.5.0 torch:2.5.1 only how much
    """,
)
@ref_argument("old")
@ref_argument("new")
@click.option("--stat", "only_stat", is_flag=True, help="Only the sums, no files.")
@click.pass_obj
def diff(settings: Settings, old: str, new: str, only_stat: bool) -> None:
    """List the files that differ between two REFs.

    A is for added, D for removed, M for changed. Each comes with its size (A, D) or by how much
    that grew (M). Content, kind, permissions and link targets count; time stamps do not.
    """
    from envstore.store.diff import diff as differences

    counts = {"added": 0, "removed": 0, "changed": 0}
    grown = 0
    changes: list[dict[str, Any]] = []
    with settings.open() as repository:
        digests = [repository.resolve(ref) for ref in (old, new)]
        trees = [repository.snapshot(digest).manifest for digest in digests]
        sides = [repository.entries(manifest) for manifest in trees]
        # Equal manifests need not be read to know.
        for change in differences(*sides) if trees[0] != trees[1] else ():
            counts[change.status] += 1
            grown += change.bytes
            if only_stat:
                continue
            if settings.json:
                changes.append(_change_fields(change))
            else:
                output.line(_change_line(change))
    if settings.json:
        found: dict[str, Any] = {
            "old": {"ref": old, "digest": digests[0].hex()},
            "new": {"ref": new, "digest": digests[1].hex()},
            **counts,
            "logical_bytes": grown,
        }
        output.result(found if only_stat else {**found, "changes": changes})
        return
    output.summary(
        settings,
        f"{counts['added']:,} added, {counts['removed']:,} removed, {counts['changed']:,} changed; "
        f"{'+' if grown >= 0 else ''}{output.size(grown)}",
    )


_LETTERS = {"added": ("A", "green"), "removed": ("D", "red"), "changed": ("M", "yellow")}


def _change_line(change: Change) -> str:
    letter, colour = _LETTERS[change.status]
    amount = output.size(change.bytes)
    if change.bytes >= 0:
        amount = f"+{amount}"
    styled = click.style(letter, fg=colour)
    return f"{styled}  {amount:>11}  {output.printable(change.path)}"


def _change_fields(change: Change) -> dict[str, Any]:
    return {
        "path": output.exact(change.path),
        "status": change.status,
        "old_size": change.old.size if change.old else None,
        "new_size": change.new.size if change.new else None,
    }
