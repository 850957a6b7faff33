"""What the tests of garbage collection share."""

from __future__ import annotations

from typing import Any

from envstore.store.catalog import remove_refs
from envstore.store.gc.collecting import collect
from envstore.store.gc.report import Collected
from envstore.store.refs import RefName
from tests.stores import Store

DAY = 86_400.0
OWN = ("gc/", "sessions/", "envstore.json")


def gc(store: Store, grace: float = 0, **options: Any) -> Collected:
    """Collect the garbage of ``store``."""
    return collect(store.repository, grace=grace, **options)


def remove(store: Store, *names: str) -> None:
    """Remove refs."""
    remove_refs(store.repository, [RefName.parse(name) for name in names])


def keys(store: Store, prefix: str = "") -> set[str]:
    """Return the keys of all objects but those of collectors and sessions."""
    return {key for key in store.object_keys(prefix) if not key.startswith(OWN)}


def size(store: Store) -> int:
    """Return the bytes of those."""
    listed = store.repository.objects.list("")
    return sum(info.size for info in listed if not info.key.startswith(OWN))
