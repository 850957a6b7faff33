"""Turns: of those who work on the same thing, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from envstore.csi.refusal import RefusedError

_LONGEST = 3600.0


class Turns:
    """Locks by name, which exist as long as somebody holds them. Safe for many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[str] = set()

    @contextmanager
    def take(self, name: str, within: float = 0.0) -> Iterator[None]:
        """Hold a name, after waiting at most ``within`` seconds for who holds it now.

        Raises ``RefusedError`` with ``ABORTED`` (specification, "Error Scheme").
        """
        with self._changed:
            free = self._changed.wait_for(lambda: name not in self._held, min(within, _LONGEST))
            if not free:
                raise RefusedError(
                    grpc.StatusCode.ABORTED, "another operation on the same volume is under way"
                )
            self._held.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(name)
                self._changed.notify_all()
