"""The list of damaged packs: what ``verify`` found, for writers to read before they reuse anything.

A pack on it is in quarantine. Writers take its chunks for absent, so that the next push that has
the bytes stores them again; readers go on reading its good frames; collectors keep it as long as
something alive leads to it. Each pack has an object of its own, so that notes never race.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from envstore.errors import ConflictError, CorruptError, UnsupportedFormatError
from envstore.store import canonical
from envstore.store.digest import parse_hex
from envstore.store.objects.base import ObjectStore

FORMAT = 1
PREFIX = "damaged/"
MAX_REASON = 4096


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with one pack, and since when that is known: seconds since 1970."""

    pack: bytes
    reason: str
    found: int

    def encode(self) -> bytes:
        """Return the stored JSON."""
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "pack": self.pack.hex(),
                "reason": self.reason[:MAX_REASON],
                "found": self.found,
            }
        )


def damage_key(pack: bytes) -> str:
    """Return the object key of the note about ``pack``."""
    return f"{PREFIX}{pack.hex()}"


def damaged_packs(objects: ObjectStore) -> frozenset[bytes]:
    """Return the packs that nothing may be deduplicated against. One listing.

    The key alone says it: a note that is damaged itself still keeps its pack out.
    """
    return frozenset(_listed(objects))


def _listed(objects: ObjectStore) -> Iterator[bytes]:
    for info in objects.list(PREFIX):
        pack = parse_hex(info.key.removeprefix(PREFIX))
        if pack is not None:
            yield pack


def read_damage(objects: ObjectStore, pack: bytes) -> Damage:
    """Return the note about ``pack``. Raises ``NotFoundError``, ``CorruptError``."""
    key = damage_key(pack)
    value = canonical.decode(objects.get(key), key)
    if canonical.field(value, "format", int, key) > FORMAT:
        raise UnsupportedFormatError(f"{key} is of a newer format", hint="upgrade envstore")
    if canonical.field(value, "pack", str, key) != pack.hex():
        raise CorruptError(f"{key} is about another pack")
    reason = canonical.field(value, "reason", str, key)
    return Damage(pack, reason, canonical.field(value, "found", int, key))


def note_damage(objects: ObjectStore, damage: Damage) -> bool:
    """Put a pack on the list; returns whether it was not there before. One request."""
    try:
        objects.put_if(damage_key(damage.pack), damage.encode(), None)
    except ConflictError:
        return False  # somebody has found it before
    return True


def forget_damage(objects: ObjectStore, pack: bytes) -> None:
    """Take a pack off the list that is whole again, or that is gone and nothing leads to."""
    objects.delete(damage_key(pack))
