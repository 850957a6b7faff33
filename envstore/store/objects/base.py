"""The one small interface every object backend implements."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from envstore.errors import EnvstoreError
from envstore.store.objects.body import Body


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object: its key and its size in bytes."""

    key: str
    size: int


class Traffic:
    """Counts what crossed the wire: requests sent, bytes received and bytes sent.

    Safe to update from many threads. A retried request counts each time it is sent.
    """

    __slots__ = ("_lock", "bytes_in", "bytes_out", "requests")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def add(self, *, requests: int = 0, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Add to the counters."""
        with self._lock:
            self.requests += requests
            self.bytes_in += bytes_in
            self.bytes_out += bytes_out


class TooLateError(EnvstoreError):
    """A deletion came after its deadline and was certainly not done."""


def ignore(_size: int) -> None:
    """Take no notice of what arrived."""


class ObjectStore(Protocol):
    """A flat namespace of immutable-by-convention objects.

    Keys are ASCII, ``/``-separated, without empty, ``.`` or ``..`` components. Every method may
    be called from any thread. Errors, for every method: ``UnavailableError`` (unreachable or
    timed out after retries), ``AccessDeniedError``, ``NoSpaceError``.
    """

    url: str
    traffic: Traffic

    def get(self, key: str) -> bytes:
        """Return the whole object. One request. Raises ``NotFoundError``."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``. One request.

        Raises ``NotFoundError``; ``CorruptError`` if the object is too short.
        """
        ...

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill writable ``views`` of bytes, one after the other, with what is there from ``start``.

        One request; when it is sent again, it begins anew. ``arrived`` is told the size of each
        piece that came, and may raise to give the transfer up. Raises as ``get_range``; the views
        then hold anything.
        """
        ...

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield exactly ``length`` bytes from ``start``, in pieces, as they arrive.

        One request, made at the first step and never repeated: whoever iterates has used what
        came before. Closing the iterator early gives the connection up. Raises as ``get_range``,
        at any step.
        """
        ...

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its opaque version, for ``put_if``. Raises ``NotFoundError``."""
        ...

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key``; atomic, and durable once this returns.

        Of several buffers none is copied where the backend can help it.
        """
        ...

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` only if the object still has ``version`` (``None``: does not exist).

        Returns the new version. Raises ``ConflictError`` when it certainly lost, and
        ``UnavailableError`` when the outcome is unknown: the caller then reads again.
        Small objects only (one PUT, never multipart).
        """
        ...

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None`` if it does not exist. One request."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``, in no particular order."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; not an error if it does not exist."""
        ...

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object as ``delete`` does, but not later than ``seconds`` after ``check``.

        However long this process is stopped, and whatever the network does. ``check`` is called
        right before the request is sent, at each attempt, when the deadline is fixed already; what
        it raises is passed on, and nothing is deleted. A request whose answer is lost is not sent
        again. Raises ``TooLateError`` if certainly nothing was done, ``UnavailableError`` if the
        outcome is unknown or this machine's clock is wrong. A backend that can have another
        process wait in ``settle`` may do so instead of the deadline.
        """
        ...

    def settle(self, seconds: float) -> None:
        """Return once no ``delete_within`` of an owner that is gone can take effect any more.

        That is when the latest one has its deadline in ``seconds``. May wait that long, or until
        a process that is about to delete has done so. Raises ``UnavailableError`` if it does not.
        """
        ...

    def now(self) -> float:
        """Return the seconds since 1970 by the store's own clock, to the second or finer.

        At most one request. What is told may be a little behind, and is never ahead.
        """
        ...

    def close(self) -> None:
        """Release connections and file handles; idempotent."""
        ...
