"""One writer's session for the files that are written at the same time."""

from __future__ import annotations

import threading
import time

from envstore.store.repository import Repository
from envstore.store.sessions import Session, SessionLostError, within

MAX_SECONDS = 3600.0
"""Age from which nobody joins a session: one that never ended would keep all that dies later."""


class _Shared:
    """A session and how many hold it."""

    def __init__(self, repository: Repository) -> None:
        self.session = Session.begin(repository, "envstore:// files")
        self.repository = within(repository, self.session)
        self.holders = 0
        self.began = time.monotonic()


class Hold:
    """A part in a shared session: ``repository`` is to be written to until ``release``."""

    def __init__(self, sharing: Sharing, shared: _Shared) -> None:
        self._sharing = sharing
        self._shared: _Shared | None = shared
        self.repository = shared.repository
        self.session = shared.session

    def release(self) -> None:
        """Give it up; the last one ends the session. Idempotent."""
        shared, self._shared = self._shared, None
        if shared is not None:
            self._sharing._release(shared)


class Sharing:
    """Begins a session when somebody writes, and ends it when nobody does. Safe for threads."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._shared: _Shared | None = None

    def hold(self) -> Hold:
        """Take part in the session, or begin one: seven requests with those that end it.

        Nobody takes part in one that was lost, or began long ago. Raises the errors of the store.
        """
        with self._lock:
            if self._shared is not None and time.monotonic() - self._shared.began > MAX_SECONDS:
                self._shared = None
            if self._shared is not None:
                try:
                    self._shared.session.check()
                except SessionLostError:
                    self._shared = None
            if self._shared is None:
                self._shared = _Shared(self._repository)
            self._shared.holders += 1
            return Hold(self, self._shared)

    def _release(self, shared: _Shared) -> None:
        with self._lock:
            shared.holders -= 1
            if shared.holders:
                return
            if self._shared is shared:
                self._shared = None
        shared.session.end()
