"""A store in memory, of as few objects as a target wants to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from envstore.errors import NotFoundError
from envstore.store.objects.base import ObjectInfo


class Memory:
    """What readers of small objects ask for; anything else a store can do is missing."""

    url = "memory:"

    def __init__(self, objects: Mapping[str, bytes] | None = None, default: bytes | None = None):
        """Hold ``objects``; every other key has ``default``, unless that is ``None``."""
        self.objects = dict(objects or {})
        self.default = default

    def get(self, key: str) -> bytes:
        found = self.objects.get(key, self.default)
        if found is None:
            raise NotFoundError(f"there is no {key}", hint="look elsewhere")
        return found

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        return self.get(key), "1"

    def size(self, key: str) -> int | None:
        found = self.objects.get(key, self.default)
        return None if found is None else len(found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for key, data in list(self.objects.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(data))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)
