"""What keeps things alive: the objects that make a snapshot reachable, and what it leads to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store import canonical
from envstore.store.digest import parse_hex
from envstore.store.locations import locations_key, open_locations
from envstore.store.locks import lock_key
from envstore.store.manifest import manifest_key, open_root
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import pack_key
from envstore.store.repository import Repository
from envstore.store.session_records import Stored, read_sessions
from envstore.store.snapshots import load_snapshot, snapshot_key

PREFIXES = ("refs/", "runs/", "drafts/", "leases/")
"""Where roots lie, besides those in ``sessions/``."""
LEASE_SLACK = 300.0
"""Seconds for which a lease counts after it has run out."""

_ROOT = re.compile(
    r"(?:refs/.+|runs/[^/]+/[^/]+/(?:parts|commits|leases)/.+|drafts/.+|leases/.+)", re.DOTALL
)
_PARALLEL = 16


@dataclass(frozen=True, slots=True)
class Root:
    """An object that keeps a snapshot alive: for good, or ``until`` (seconds since 1970)."""

    key: str
    snapshot: bytes
    until: float | None = None


def is_root(key: str) -> bool:
    """Return whether an object of this key makes the snapshot reachable that it names."""
    return _ROOT.fullmatch(key) is not None


def parse_root(key: str, data: bytes) -> Root:
    """Return what the root ``key`` keeps alive. Raises ``CorruptError``."""
    value = canonical.decode(data, key)
    snapshot = parse_hex(canonical.field(value, "snapshot", str, key))
    if snapshot is None:
        raise CorruptError(f"{key} holds a malformed digest")
    if key.startswith("leases/") or (key.startswith("runs/") and key.split("/")[3] == "leases"):
        until = canonical.field(value, "until", int, key)
        if not 0 <= until < 1 << 53:
            raise CorruptError(f"{key} has no valid 'until'")
        return Root(key, snapshot, until + LEASE_SLACK)
    return Root(key, snapshot)


def read_roots(objects: ObjectStore, sessions: Iterable[Stored] | None = None) -> Iterator[Root]:
    """Yield every root: what ``sessions`` declared first, then all else.

    Without ``sessions`` they are read here. They come first because a writer's session ends only
    once its ref is there: whoever reads in this order meets one of the two. What has run out by
    the store's clock is left out. Five listings and a request for each root, 16 at a time.

    Raises ``CorruptError`` for a root that cannot be read, because nobody knows what it keeps.
    """
    now = objects.now()
    for stored in read_sessions(objects) if sessions is None else sessions:
        until = stored.record.kept_until
        if until is None or until >= now:
            for snapshot in stored.record.roots:
                yield Root(stored.key, snapshot, until)

    def read(key: str) -> Root | None:
        try:
            return parse_root(key, objects.get(key))
        except NotFoundError:
            return None  # removed since it was listed
        except CorruptError as error:
            raise CorruptError(error.message, hint="run `envstore repair`") from None

    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="roots") as pool:
        for prefix in PREFIXES:
            keys = [info.key for info in objects.list(prefix) if is_root(info.key)]
            for root in pool.map(read, keys):
                if root is not None and (root.until is None or root.until >= now):
                    yield root


def closure(repository: Repository, snapshot: bytes) -> set[str]:
    """Return the keys of all that a snapshot needs: itself, manifest, locations, lock, packs.

    As it is in the store, whatever a cache holds. Three requests. Raises ``NotFoundError``,
    ``CorruptError``.
    """
    keys, error = reachable(repository.objects, snapshot)
    if error is not None:
        raise error
    return keys


def reachable(objects: ObjectStore, name: bytes) -> tuple[set[str], EnvstoreError | None]:
    """Return what ``closure`` does, or as much of it as can be found, and what is in the way."""
    keys = {snapshot_key(name)}
    try:
        snapshot = load_snapshot(objects, name)
        manifest = snapshot.manifest
        keys |= {manifest_key(manifest), locations_key(manifest)}
        if snapshot.lock is not None:
            keys.add(lock_key(snapshot.lock))
        root = open_root(objects.get(manifest_key(manifest)), manifest)
        refs = sum(part.refs for part in root.parts)
        data = objects.get(locations_key(manifest))
        locations = open_locations(data, manifest, parts=len(root.parts), refs=refs)
    except (CorruptError, NotFoundError) as error:
        return keys, error
    keys.update(pack_key(pack) for pack in {frame.pack for frame in locations.frames})
    return keys, None
