"""The writer's session of the part that a persister stores, from its first wave to its COMMIT."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

from envstore.checkpoint.stores import OpenStore
from envstore.store.repository import Repository
from envstore.store.sessions import writing

Key = tuple[int, int]


class PartSession:
    """At most one session at a time, kept between the waves of one part. Use from one thread."""

    def __init__(self) -> None:
        self._key: Key | None = None
        self._store: OpenStore | None = None
        self._stack = ExitStack()
        self._inside: Repository | None = None

    def enter(self, key: Key, store: OpenStore, what: str) -> Repository:
        """Return the repository to store the part ``key`` in, in its session.

        Begins it if need be, and has the knowledge of ``store`` forget what it must not reuse.
        Seven requests with those that end it.
        """
        if self._inside is None or self._key != key or self._store is not store:
            self.leave()
            _, self._inside = self._stack.enter_context(writing(store.repository, what))
            self._key, self._store = key, store
            store.knowledge.use(self._inside)
        return self._inside

    def leave(self) -> None:
        """End the session, if there is one."""
        if self._store is not None:
            self._store.knowledge.use(self._store.repository)
        self._key = self._store = self._inside = None
        self._stack.close()

    def leave_unless(self, keys: Collection[Key]) -> None:
        """End the session of a part that is none of ``keys``: nobody goes on with it."""
        if self._key is not None and self._key not in keys:
            self.leave()
