"""An object store over another: what is written stays above, for seeing what a change would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from envstore.errors import ConflictError, NotFoundError
from envstore.store.objects.base import ObjectInfo, ObjectStore, ignore
from envstore.store.objects.body import Body

_BELOW = "below "


class OverlayObjects:
    """``below`` as it would be after what is written here, which goes to ``above``.

    See ``ObjectStore``. Both stay open when this is closed. One process only: whoever else writes
    to ``below`` meanwhile is seen, except where something was written here.
    """

    def __init__(self, below: ObjectStore, above: ObjectStore) -> None:
        """Begin with nothing written; ``above`` must be empty."""
        self._below = below
        self._above = above
        self._written: set[str] = set()
        self._removed: set[str] = set()
        self.url = below.url
        self.traffic = below.traffic

    def _of(self, key: str) -> ObjectStore:
        if key in self._written:
            return self._above
        if key in self._removed:
            raise NotFoundError(f"{key} was removed")
        return self._below

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self._of(key).get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``."""
        return self._of(key).get_range(key, start, length)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on."""
        self._of(key).get_range_into(key, start, views, arrived)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield the ``length`` bytes from ``start`` in pieces as they come."""
        return self._of(key).iter_range(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its version."""
        data, version = self._of(key).get_versioned(key)
        return data, version if key in self._written else _BELOW + version

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` above."""
        self._above.put(key, data)
        self._written.add(key)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` above if the object still has ``version``."""
        try:
            found: str | None = self.get_versioned(key)[1]
        except NotFoundError:
            found = None
        if found != version:
            raise ConflictError(f"{key} has changed")
        self.put(key, data)
        return self._above.get_versioned(key)[1]

    def size(self, key: str) -> int | None:
        """Return the object's size."""
        try:
            return self._of(key).size(key)
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield what is below ``prefix``."""
        yield from self._above.list(prefix)
        for info in self._below.list(prefix):
            if info.key not in self._written and info.key not in self._removed:
                yield info

    def delete(self, key: str) -> None:
        """Remove the object, as seen from here."""
        if key in self._written:
            self._above.delete(key)
            self._written.discard(key)
        self._removed.add(key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object, as seen from here, while ``check`` holds."""
        check()
        self.delete(key)

    def settle(self, seconds: float) -> None:
        """Return once nobody who is gone can delete anything any more."""
        self._below.settle(seconds)

    def now(self) -> float:
        """Return the time of the store's clock."""
        return self._below.now()

    def close(self) -> None:
        """Do nothing: both belong to whoever made them."""
