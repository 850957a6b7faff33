"""Is everything there that a store and a cache need? Each check says how to mend what is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envstore.errors import EnvstoreError
from envstore.store.cache import BlobCache
from envstore.store.config import load_config
from envstore.store.digest import digest
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.probe import probe_conditional_put

_SPACE_WANTED = 2 << 30

Verdict = Literal["ok", "note", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, how it went, what was seen and, unless all is well, the mend.

    ``note`` is worth knowing but keeps nothing from working.
    """

    name: str
    verdict: Verdict
    detail: str
    mend: str | None = None


def failed(name: str, error: EnvstoreError) -> Check:
    """Return the failed check that ``error`` amounts to."""
    return Check(name, "failed", error.message, error.hint)


def check_store(url: str, *, may_be_missing: bool, probe: bool = True) -> Iterator[Check]:
    """Yield checks of the store at ``url``: reachable, format, and whether writes race safely.

    The last writes some 90 small objects and removes them. ``may_be_missing`` is for a store
    that the first push makes.
    """
    if may_be_missing and not os.path.exists(url):
        yield _check_future(Path(url))
        return
    try:
        objects = open_objects(url)
    except EnvstoreError as error:
        yield failed("store", error)
        return
    try:
        try:
            found = load_config(objects)
        except EnvstoreError as error:
            yield failed("store", error)
            return
        yield Check("store", "ok", f"{objects.url}: format {found.format}, {found.hash}")
        if probe:
            yield _check_writes(objects)
    finally:
        objects.close()


def _check_future(path: Path) -> Check:
    """See whether a store could be made at ``path``."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if os.access(parent, os.W_OK | os.X_OK):
        return Check("store", "note", f"{path} does not exist yet; the first push makes it")
    mend = "name another store with --store or ENVSTORE_URL"
    return Check("store", "failed", f"{path} cannot be made: {parent} is not writable", mend)


def _check_writes(objects: ObjectStore) -> Check:
    name = "conditional writes"
    try:
        seen = probe_conditional_put(objects)
    except EnvstoreError as error:
        # Whoever may only read can still mount and pull.
        return Check(name, "note", f"not tried: {error.message}", error.hint)
    if seen.ok:
        left = f"; {len(seen.leftovers)} probe objects could not be removed"
        detail = "of 32 writers at once one wins" + (left if seen.leftovers else "")
        return Check(name, "ok", detail)
    bad = next(check for check in seen.checks if not check.ok)
    mend = "let only one process write to this store at a time, or use another server"
    return Check(name, "failed", f"{bad.name}: {bad.detail}", mend)


def check_cache(root: Path, capacity: int) -> Iterator[Check]:
    """Yield checks of the cache at ``root``: whether a blob goes in and comes out, and space."""
    body = os.urandom(64)
    name = digest(body)
    try:
        cache = BlobCache(root, capacity)
        cache.put(name, body)
        back = cache.read(name)
        cache.drop(name)
        used = cache.usage()
        free = shutil.disk_usage(root).free
    except EnvstoreError as error:
        yield failed("cache", error)
        return
    if back != body:
        mend = "set ENVSTORE_CACHE_DIR to a directory on a local disk"
        yield Check("cache", "failed", f"{root} does not give back what was written", mend)
        return
    yield Check("cache", "ok", f"{root}: {_gib(used.bytes)} of {_gib(capacity)} used")
    room = min(capacity - used.bytes, _SPACE_WANTED)
    if free < room:
        mend = "free space, or set ENVSTORE_CACHE_DIR or a smaller ENVSTORE_CACHE_SIZE"
        detail = f"only {_gib(free)} free on the disk of {root}"
        yield Check("cache space", "note", detail, mend)
    else:
        yield Check("cache space", "ok", f"{_gib(free)} free on its disk")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
