"""Finds the chunks of a mounted snapshot again when their packs have moved.

A mount lives for weeks, and its locations are as old as it is. When one leads nowhere the store is
asked for those it has now, once for everybody who waits, and the mount goes on with them: they are
put into a new tree image, which the next server gets too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from math import inf

import trio

from envstore.errors import CorruptError, NotFoundError, UnavailableError
from envstore.fuse.complaints import Complaints
from envstore.fuse.image import moved_image, open_image
from envstore.store.locations import Located
from envstore.store.objects.base import ObjectStore
from envstore.store.whereabouts import look_up

_APART = 1.0
"""Seconds between two questions, whatever is missing."""
_LOST = 30.0
"""Seconds for which a pack that was found nowhere else is not asked for again."""
_REMEMBERED = 10_000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 4.0


class Moved:
    """Looks for one snapshot. Belongs to one trio run."""

    def __init__(
        self,
        locations: Located,
        objects: ObjectStore,
        manifest: bytes,
        complaints: Complaints,
        patience: float,
        image: Callable[[], int | None],
        found: Callable[[int, Located], None],
    ) -> None:
        """Begin with ``locations`` of ``manifest``.

        ``image`` opens the image they are from, or returns ``None`` once that is served no longer.
        ``found`` is given a new image, which it owns, and the locations in it. A store that
        cannot be reached is tried again for ``patience`` seconds.
        """
        self._locations = locations
        self._objects = objects
        self._manifest = manifest
        self._complaints = complaints
        self._patience = patience
        self._image = image
        self._found = found
        self._turn = trio.Lock()
        self._begun = 0
        self._asked = -inf
        self._lost: dict[bytes, float] = {}

    @property
    def locations(self) -> Located:
        """The newest that are known."""
        return self._locations

    async def again(self, stale: Located, pack: bytes) -> Located | None:
        """Return newer locations than ``stale``, ``None`` if there are none.

        Call when something is not in ``pack``, where ``stale`` says; waits until the store is
        asked again, unless that pack was found nowhere else a moment ago. Raises
        ``UnavailableError``, ``AccessDeniedError``, ``NoSpaceError``.
        """
        begun = self._begun
        async with self._turn:
            if self._locations is stale and self._begun == begun and not self._is_lost(pack):
                await trio.sleep_until(self._asked + _APART)
                self._begun += 1
                try:
                    fresh = await self._look()
                finally:
                    self._asked = trio.current_time()
                if fresh is not None:
                    self._lost.clear()
                    self._locations = fresh
                    self._complaints.say("packs have moved: going on where they are now")
            if self._locations is not stale:
                return self._locations
            if len(self._lost) >= _REMEMBERED:
                self._lost.clear()
            self._lost.setdefault(pack, trio.current_time())
            return None

    def _is_lost(self, pack: bytes) -> bool:
        since = self._lost.get(pack)
        if since is not None and trio.current_time() - since > _LOST:
            del self._lost[pack]
            since = None
        return since is not None

    async def _look(self) -> Located | None:
        """Read the locations that the store has now; ``None`` if they are the same, or none."""
        deadline = trio.current_time() + self._patience
        pause = _FIRST_PAUSE
        while True:
            # One of this look's own: what is served may be given up meanwhile.
            image = self._image()
            if image is None:
                return None
            try:
                fd = await trio.to_thread.run_sync(self._moved_image, image)
            except UnavailableError as error:
                if trio.current_time() >= deadline:
                    raise
                self._complaints.say(f"trying again: {error}")
            except (NotFoundError, CorruptError) as error:
                # What was met at first is the error to tell; this is why there is no way round.
                self._complaints.say(f"no other locations: {error}")
                return None
            else:
                if fd is None:
                    return None
                locations = open_image(fd).locations
                self._found(fd, locations)
                return locations
            finally:
                os.close(image)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _moved_image(self, image: int) -> int | None:
        return moved_image(image, look_up(self._objects, self._manifest))
