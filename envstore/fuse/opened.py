"""Open stores, kept for whoever needs them next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from envstore.store.repository import Repository

_Key = TypeVar("_Key", bound=Hashable)


class Opened(Generic[_Key]):
    """Stores by whatever tells them apart. Every method may be called from any thread."""

    def __init__(self, most: int) -> None:
        """Keep ``most`` of them: the one that nobody has wanted for longest goes first."""
        self._most = most
        self._lock = threading.Lock()
        self._opening: dict[_Key, threading.Lock] = {}
        self._found: dict[_Key, Repository] = {}

    def get(self, key: _Key, opened: Callable[[], Repository]) -> Repository:
        """Return the store under ``key``; ``opened`` opens it, once for all who wait for it."""
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # a store that does not answer keeps nobody from opening another
            try:
                found = self._known(key)
                if found is None:
                    found = opened()
                    with self._lock:
                        self._found[key] = found
                        # Not closed: somebody may be in the middle of a request.
                        while len(self._found) > self._most:
                            del self._found[next(iter(self._found))]
                return found
            finally:
                with self._lock:
                    self._opening.pop(key, None)

    def forget(self, key: _Key) -> None:
        """Let go of a store that is of no more use."""
        with self._lock:
            self._found.pop(key, None)

    def _known(self, key: _Key) -> Repository | None:
        with self._lock:
            found = self._found.pop(key, None)
            if found is not None:
                self._found[key] = found
            return found
