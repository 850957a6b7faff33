"""What live snapshots still use of dead ones, and small things that nobody takes away otherwise."""

from __future__ import annotations

import contextlib

from envstore.errors import ConflictError, NotFoundError
from envstore.store.gc.marking import Marks
from envstore.store.gc.survey import PROFILES, Survey
from envstore.store.objects.base import ObjectStore
from envstore.store.profiles import MAX_ANCESTORS
from envstore.store.repository import Repository
from envstore.store.roots import parse_root
from envstore.store.sessions import writing
from envstore.store.snapshots import load_snapshot, snapshot_key
from envstore.store.verify import DAMAGE

_LEASE_SECONDS = 86_400.0


def carry_profiles(repository: Repository, found: Survey, marks: Marks) -> int:
    """Copy the profiles that live snapshots use of ancestors beyond a dead one; returns how many.

    Their line ends where the dead snapshot was, once that is gone. A snapshot with a profile of
    its own needs none. No request unless there are profiles at all; else up to three for each live
    snapshot whose parent is dead and still there, and two for each copy.
    """
    profiles: dict[bytes, list[str]] = {}
    for key in found.small:
        if key.startswith(PROFILES):
            _, manifest, name = key.split("/")
            profiles.setdefault(bytes.fromhex(manifest), []).append(name)
    copies: dict[str, str] = {}
    for live in marks.snapshots.values() if profiles else ():
        parent = live.parent
        if parent is None or parent in marks.snapshots or live.manifest in profiles:
            continue
        if snapshot_key(parent) in found.small:
            used = _used(repository.objects, parent, profiles)
            if used is None:
                continue
            for name in profiles[used]:
                source = f"{PROFILES}{used.hex()}/{name}"
                copies[f"{PROFILES}{live.manifest.hex()}/{name}"] = source
    if copies:
        with writing(repository, "gc") as (_, inside):
            for target, source in copies.items():
                _copy(inside.objects, source, target)
    return len(copies)


def _used(objects: ObjectStore, parent: bytes, profiles: dict[bytes, list[str]]) -> bytes | None:
    """Return the manifest of the nearest snapshot that has profiles, ``parent`` or before it."""
    name: bytes | None = parent
    for _ in range(MAX_ANCESTORS - 1):
        if name is None:
            return None
        try:
            snapshot = load_snapshot(objects, name)
        except DAMAGE:
            return None
        if snapshot.manifest in profiles:
            return snapshot.manifest
        name = snapshot.parents[0] if snapshot.parents else None
    return None


def _copy(objects: ObjectStore, source: str, target: str) -> None:
    # It was removed, or somebody has recorded one of their own.
    with contextlib.suppress(NotFoundError, ConflictError):
        objects.put_if(target, objects.get(source), None)


def remove_old_leases(objects: ObjectStore) -> None:
    """Remove the leases that ran out a day ago: whoever held them is gone.

    One listing, and a request for each lease.
    """
    now = objects.now()
    for info in objects.list("leases/"):
        try:
            root = parse_root(info.key, objects.get(info.key))
        except DAMAGE:
            continue
        if root.until is not None and root.until + _LEASE_SECONDS < now:
            objects.delete(info.key)
