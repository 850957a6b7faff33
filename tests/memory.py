"""An object store in memory, for tests that make thousands of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from envstore.errors import ConflictError, CorruptError, NotFoundError
from envstore.store.digest import digest
from envstore.store.objects.base import ObjectInfo, Traffic, ignore
from envstore.store.objects.body import Body, joined


class Memory:
    """An object store, whose clock stands still at ``time``.

    What is not there is ``default``, unless that is ``None``.
    """

    url = "memory://store"

    def __init__(
        self, objects: Mapping[str, bytes] | None = None, default: bytes | None = None
    ) -> None:
        self.objects = dict(objects or {})
        self.default = default
        self.time = 1_800_000_000.0
        self.traffic = Traffic()

    def get(self, key: str) -> bytes:
        found = self.objects.get(key, self.default)
        if found is None:
            raise NotFoundError(f"there is no {key}", hint="look elsewhere")
        return found

    def get_range(self, key: str, start: int, length: int) -> bytes:
        found = self.get(key)[start : start + length]
        if len(found) != length:
            raise CorruptError(f"{key} is too short")
        return found

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        for view in views:
            view[:] = self.get_range(key, start, len(view))
            start += len(view)
            arrived(len(view))

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        yield self.get_range(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        found = self.get(key)
        return found, digest(found).hex()

    def put(self, key: str, data: Body) -> None:
        self.objects[key] = joined(data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        there = self.objects.get(key)
        if (None if there is None else digest(there).hex()) != version:
            raise ConflictError(f"{key} was moved")
        self.objects[key] = data
        return digest(data).hex()

    def size(self, key: str) -> int | None:
        found = self.objects.get(key, self.default)
        return None if found is None else len(found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key, data in sorted(self.objects.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(data))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        check()
        self.delete(key)

    def settle(self, seconds: float) -> None:
        """Nothing is on its way."""

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        """Nothing is open."""
