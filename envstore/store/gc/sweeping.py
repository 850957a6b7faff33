"""Sweeping: what is due is moved from the condemned list to the deleting one, and deleted.

In batches, so that a writer who needs one of these keys waits for seconds only. Snapshots go
first and packs last: what is left of a collection that died leads to nothing that is gone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from envstore.errors import AccessDeniedError, EnvstoreError
from envstore.store.doomed import DELETION_SECONDS, Condemned, Doomed
from envstore.store.gc.marking import Progress
from envstore.store.gc.owner import Change, Ownership
from envstore.store.objects.base import ObjectStore, TooLateError
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
        _delete(owner, objects, rows, swept)
    return swept


def sweep(
    owner: Ownership,
    objects: ObjectStore,
    due: Iterable[Condemned],
    swept: Swept,
    progress: Progress,
) -> None:
    """Delete the keys of ``due`` that nobody has claimed meanwhile, noting them in ``swept``.

    They stay on the condemned list, from which the caller takes them in the end, as writing that
    anew for each batch would take longer than the deletions. Interrupted at any moment it leaves
    nothing half done. Raises ``LostOwnershipError`` and the errors of the store, but for
    ``AccessDeniedError``: such keys stay.
    """
    rows = sorted(due, key=lambda row: (order_of(row.key), row.key))
    listed = _Listed()
    for at in range(0, len(rows), BATCH):
        progress("deleting", at, len(rows))
        batch = rows[at : at + BATCH]
        moved = owner.change(partial(_to_deleting, batch, listed)).deleting
        _delete(owner, objects, moved, swept)


class _Listed:
    """The keys of a list, looked up once for as long as it stays the same."""

    def __init__(self) -> None:
        self._list: Sequence[Condemned] = ()
        self._keys: frozenset[str] = frozenset()

    def keys(self, rows: Sequence[Condemned]) -> frozenset[str]:
        if rows is not self._list:
            self._list, self._keys = rows, frozenset(row.key for row in rows)
        return self._keys


def _same(found: Doomed) -> Change:
    return Change(found.state.epoch, found.condemned, found.deleting)


def _to_deleting(batch: Sequence[Condemned], listed: _Listed, found: Doomed) -> Change:
    keys = listed.keys(found.condemned)
    moved = {row.key: row for row in found.deleting}
    moved |= {row.key: row for row in batch if row.key in keys}
    return Change(found.state.epoch, found.condemned, sorted(moved.values()))


def _delete(
    owner: Ownership,
    objects: ObjectStore,
    rows: Sequence[Condemned],
    swept: Swept,
) -> None:
    """Delete ``rows``, all that is on the deleting list, and take them off it."""
    tried: set[str] = set()
    gone: set[str] = set()
    kept: set[str] = set()
    stopped = threading.Event()

    def delete(row: Condemned) -> None:
        if stopped.is_set():
            return

        def check() -> None:
            owner.check()
            tried.add(row.key)

        try:
            objects.delete_within(row.key, DELETION_SECONDS, check)
        except AccessDeniedError:
            # An object lock or a retention: it may be let go some day.
            kept.add(row.key)
        except TooLateError:
            tried.discard(row.key)
            owner.check()
            raise
        else:
            gone.add(row.key)

    def settle(found: Doomed) -> Change:
        # A deletion whose answer never came may still arrive: nobody may claim such a key.
        unclear = tried - gone - kept
        left = [row for row in rows if row.key in unclear]
        return Change(found.state.epoch, found.condemned, left)

    try:
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="sweep") as pool:
            try:
                for _ in pool.map(delete, rows):
                    pass
            finally:
                stopped.set()
    except BaseException:
        # The next collector, or a writer in need, would finish it; but none should have to.
        with contextlib.suppress(EnvstoreError):
            owner.change(settle)
        raise
    finally:
        swept.deleted |= gone
        swept.undeletable |= kept
    owner.change(settle)
