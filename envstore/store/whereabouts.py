"""Where the chunks of one manifest lie now: locations that are read again when packs have moved.

Garbage collection and repacking store live frames anew, rewrite the locations, and delete the old
packs later. Who reads for long holds places that are no more: it asks here before it speaks of
damage. As long as nothing has moved this costs nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from envstore.errors import CorruptError, NotFoundError
from envstore.store.locations import Located, Locations, locations_key, open_locations
from envstore.store.manifest import Root, manifest_key, open_root
from envstore.store.objects.base import ObjectStore

ATTEMPTS = 3
"""How often one place is looked up again, as what was moved may move once more meanwhile."""


class Whereabouts:
    """The newest locations that are known of a manifest. Safe to share between threads."""

    def __init__(self, locations: Located, look: Callable[[], Locations]) -> None:
        """Begin with ``locations``; ``look`` reads those that the store has now."""
        self._locations = locations
        self._look = look
        self._lock = threading.Lock()
        self._begun = 0

    @property
    def locations(self) -> Located:
        """The newest that are known."""
        return self._locations

    def again(self, stale: Located) -> Located | None:
        """Return newer locations than ``stale``, or ``None`` if the store has no others.

        Call when something is not where ``stale`` says. However many do so at once, the store is
        asked once, or twice if some came while the first answer was on its way; not at all if
        newer ones are known already. Raises ``UnavailableError``, ``AccessDeniedError``.
        """
        begun = self._begun
        with self._lock:
            if self._locations is stale and self._begun == begun:
                self._begun += 1
                # Without locations that can be read there is no better place to be had: then what
                # the caller has met is the error to tell.
                with contextlib.suppress(NotFoundError, CorruptError):
                    fresh = self._look()
                    if fresh != stale:
                        self._locations = fresh
            return None if self._locations is stale else self._locations


def look_up(objects: ObjectStore, manifest: bytes) -> Locations:
    """Return the locations that a store has of a manifest. Two requests.

    Raises ``NotFoundError``, ``CorruptError`` and the errors of the store.
    """
    root = open_root(objects.get(manifest_key(manifest)), manifest)
    return look_up_of(objects, manifest, root)


def look_up_of(objects: ObjectStore, manifest: bytes, root: Root) -> Locations:
    """Return the locations that a store has of a manifest whose root is known. One request."""
    data = objects.get(locations_key(manifest))
    refs = sum(part.refs for part in root.parts)
    return open_locations(data, manifest, parts=len(root.parts), refs=refs)
