"""What a persister has to tell: to the trainer as it happens, to whoever asks, and to its log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envstore.errors import EnvstoreError

_MAX_WARNINGS = 8

_log = logging.getLogger(__name__)


class News:
    """Counts and passes on. Safe for many threads; ``tell`` is called from that of the caller."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._saving = ""
        self._last = ""
        self._waiting: tuple[str, ...] = ()
        self._failing: dict[str, str] = {}
        self._durable = self._failed = self._sent = 0
        self._warnings: list[str] = []

    @property
    def waiting(self) -> bool:
        """Whether a part in the store waits for those of other ranks."""
        with self._lock:
            return bool(self._waiting)

    def will_come(self, id: str) -> bool:
        """Whether the outcome of ``id`` is about to be told, or was told last."""
        with self._lock:
            return id in (self._saving, self._last)

    def status(self) -> dict[str, Any]:
        """Return ids of checkpoints, counts, bytes sent, the last warnings."""
        with self._lock:
            return {
                "saving": self._saving,
                "waiting": list(self._waiting),
                "failing": dict(self._failing),
                "last": self._last,
                "durable": self._durable,
                "failed": self._failed,
                "sent": self._sent,
                "warnings": list(self._warnings),
            }

    def saving(self, id: str) -> None:
        """Say which part is being stored; ``""`` for none."""
        with self._lock:
            self._saving = id

    def stored(self, sent: int) -> None:
        """Say that a part is in the store, for so many bytes."""
        with self._lock:
            self._sent += sent

    def wait_for(self, ids: Sequence[str]) -> bool:
        """Say which checkpoints lack parts of other ranks; returns whether these are others now."""
        with self._lock:
            changed = self._waiting != tuple(ids)
            self._waiting = tuple(ids)
            return changed

    def failing(self, why: Mapping[str, str]) -> None:
        """Say which parts could not be stored yet, and why."""
        with self._lock:
            self._failing = dict(why)

    def durable(self, id: str, snapshot: bytes, sent: int) -> None:
        """Tell that a checkpoint is committed."""
        _log.info("%s is durable: %s, %d bytes sent", id, snapshot.hex(), sent)
        with self._lock:
            self._last = id
            self._durable += 1
        self._tell({"say": "durable", "id": id, "snapshot": snapshot.hex(), "sent": sent})

    def failed(self, id: str, error: Exception, *, final: bool) -> None:
        """Tell that a part has to wait, or with ``final`` that it is lost."""
        said = described(error)
        if isinstance(error, EnvstoreError):
            _log.warning("%s %s: %s", id, "is lost" if final else "has to wait", error)
        else:
            _log.error("%s has to wait", id, exc_info=error)
        with self._lock:
            self._failed += final
        self._tell(
            {
                "say": "failed",
                "id": id,
                "error": said.message,
                "hint": said.hint,
                "kind": type(said).__name__,
                "final": final,
            }
        )

    def warn(self, text: str) -> None:
        """Take note of what harms nothing."""
        _log.warning("%s", text)
        with self._lock:
            self._warnings = [*self._warnings, text][-_MAX_WARNINGS:]

    def take_warnings(self, *lists: list[str]) -> None:
        """Take note of all that is in ``lists``, and empty them."""
        for found in lists:
            for text in found:
                self.warn(text)
            found.clear()


def described(error: Exception) -> EnvstoreError:
    """Return ``error`` as one that can be told to a user."""
    if isinstance(error, EnvstoreError):
        return error
    return EnvstoreError(f"the persister met {error!r}", hint="see its log; it tries again")
