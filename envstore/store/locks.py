"""Locks in the store: what an environment was built from, kept so that it can be built again.

The store does not look into a lock. Its digest, that of the bytes themselves, is what a snapshot
names, so the same lock is stored once however many snapshots came of it.
"""

from __future__ import annotations

from envstore.errors import CorruptError, NotFoundError, UsageError
from envstore.store.binary import seal, unseal
from envstore.store.digest import digest
from envstore.store.objects.base import ObjectStore

MAGIC = b"ESLOCK01"
MAX_BODY = 64 << 20


def lock_key(name: bytes) -> str:
    """Return the object key of the lock with the digest ``name``."""
    return f"locks/{name.hex()}"


def save_lock(objects: ObjectStore, data: bytes) -> bytes:
    """Store the bytes of a lock unless they are there, and return their digest.

    Raises ``UsageError`` for more than 64 MiB.
    """
    if len(data) > MAX_BODY:
        raise UsageError(f"a lock of {len(data)} bytes is too long; the limit is {MAX_BODY}")
    name = digest(data)
    if objects.size(lock_key(name)) is None:
        objects.put(lock_key(name), seal(MAGIC, data))
    return name


def load_lock_bytes(objects: ObjectStore, name: bytes) -> bytes:
    """Return the lock with the digest ``name``, verified.

    Raises ``NotFoundError``, ``CorruptError``, ``UnsupportedFormatError``.
    """
    what = f"lock {name.hex()}"
    try:
        data = objects.get(lock_key(name))
    except NotFoundError as error:
        raise NotFoundError(f"{what} is not in {objects.url}", hint=error.hint) from None
    body, found = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    if found != name:
        raise CorruptError(f"{what} does not match its name")
    return body
