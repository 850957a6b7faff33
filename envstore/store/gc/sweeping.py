"""Sweeping: what is due is moved from the condemned list to the deleting one, and deleted.

In batches, so that a writer who needs one of these keys waits for seconds only. Snapshots go
first and packs last: what is left of a collection that died leads to nothing that is gone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from envstore.errors import AccessDeniedError, EnvstoreError
from envstore.store.doomed import Condemned, Doomed
from envstore.store.gc.marking import Progress
from envstore.store.gc.owner import Change, Ownership
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import PARALLEL

BATCH = 1000
_ORDER = ("snapshots/", "manifests/", "locations/", "profiles/", "locks/")


@dataclass(slots=True)
class Swept:
    """What a sweep deleted, and the keys that the store would not let go."""

    deleted: set[str] = field(default_factory=set)
    undeletable: set[str] = field(default_factory=set)


def order_of(key: str) -> int:
    """Return the place of a key in the order of deletion."""
    for at, prefix in enumerate(_ORDER):
        if key.startswith(prefix):
            return at
    return len(_ORDER)


def finish(owner: Ownership, objects: ObjectStore) -> Swept:
    """Delete what a collector that died was deleting: it had seen that nothing needs it."""
    swept = Swept()
    rows = owner.change(_same).deleting
    if rows:
        _delete(owner, objects, rows, swept, lambda: None)
    return swept


def sweep(
    owner: Ownership,
    objects: ObjectStore,
    due: Iterable[Condemned],
    swept: Swept,
    progress: Progress,
) -> None:
    """Delete the keys of ``due`` that nobody has claimed meanwhile, noting them in ``swept``.

    Interrupted at any moment it puts the others back. Raises ``LostOwnershipError`` and the
    errors of the store, but for ``AccessDeniedError``: such keys stay condemned.
    """
    rows = sorted(due, key=lambda row: (order_of(row.key), row.key))
    done = 0
    for batch in _batched(rows):
        wanted = {row.key for row in batch}
        moved = owner.change(partial(_to_deleting, wanted)).deleting

        def tell(done: int = done) -> None:
            progress("deleting", done + len(swept.deleted), len(rows))

        _delete(owner, objects, moved, swept, tell)
        done += len(batch) - len(moved)


def _batched(rows: Sequence[Condemned]) -> Iterable[Sequence[Condemned]]:
    return (rows[at : at + BATCH] for at in range(0, len(rows), BATCH))


def _same(found: Doomed) -> Change:
    return Change(found.state.epoch, found.condemned, found.deleting)


def _to_deleting(wanted: set[str], found: Doomed) -> Change:
    moved = [row for row in found.condemned if row.key in wanted]
    left = [row for row in found.condemned if row.key not in wanted]
    return Change(found.state.epoch, left, sorted([*found.deleting, *moved]))


def _delete(
    owner: Ownership,
    objects: ObjectStore,
    rows: Sequence[Condemned],
    swept: Swept,
    tell: Callable[[], None],
) -> None:
    """Delete ``rows``, all that is on the deleting list; what is left is condemned again."""
    tried: set[str] = set()
    gone: set[str] = set()
    kept: set[str] = set()
    stopped = threading.Event()

    def delete(row: Condemned) -> None:
        if stopped.is_set():
            return
        owner.check()
        tried.add(row.key)
        try:
            objects.delete(row.key)
        except AccessDeniedError:
            # An object lock or a retention: it may be let go some day.
            kept.add(row.key)
        else:
            gone.add(row.key)

    def restore(found: Doomed) -> Change:
        # A deletion whose answer never came may still arrive: nobody may claim such a key.
        unclear = tried - gone - kept
        back = {row.key: row for row in rows if row.key not in gone and row.key not in unclear}
        condemned = {row.key: row for row in found.condemned} | back
        left = [row for row in rows if row.key in unclear]
        return Change(found.state.epoch, sorted(condemned.values()), left)

    try:
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="sweep") as pool:
            try:
                for _ in pool.map(delete, rows):
                    tell()
            finally:
                stopped.set()
    except BaseException:
        # The next collector, or a writer in need, would finish it; but none should have to.
        with contextlib.suppress(EnvstoreError):
            owner.change(restore)
        raise
    finally:
        swept.deleted |= gone
        swept.undeletable |= kept
    owner.change(restore)
