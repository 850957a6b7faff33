"""What is in the store: every object that a collection may concern, from one listing."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from envstore.store.digest import parse_hex
from envstore.store.objects.base import ObjectInfo
from envstore.store.packs import pack_key

SMALL = ("snapshots/", "manifests/", "locations/", "locks/")
"""Objects that live as long as a live snapshot names them, by their digest alone."""
PROFILES = "profiles/"
PROBES = "probe/"
"""What a test of conditional writes has left over."""
CACHES = ("packages/", "index/", "samples/")
"""What only speeds a push up: it goes with the packs that it names."""


class PackTable:
    """The packs of a listing, numbered from 1 in the order of their digests, and their sizes.

    About 200 bytes of memory for each. Number 0 stands for every pack that is not among them.
    """

    def __init__(self, packs: Iterable[tuple[bytes, int]]) -> None:
        found = sorted(packs)
        self.names = [b"", *(name for name, _ in found)]
        self.sizes = array("Q", [0, *(size for _, size in found)])
        self._numbers = {name: number for number, name in enumerate(self.names) if number}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, name: bytes) -> int:
        """Return the number of a pack, 0 if it was not listed."""
        return self._numbers.get(name, 0)

    def number_of(self, key: str) -> int:
        """Return the number of the pack with this object key, 0 if there is none."""
        name = parse_hex(key.rpartition("/")[2]) if key.startswith("packs/") else None
        return 0 if name is None else self.number(name)


@dataclass(slots=True)
class Survey:
    """Sizes of objects in bytes: of packs, of small objects by key, of all there is.

    ``small`` has the keys that are condemned when nothing needs them, but for packs: those of
    ``SMALL``, profiles and probes, where they are well formed. ``caches`` has those of ``CACHES``.
    """

    packs: PackTable
    small: dict[str, int] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=dict)
    objects: int = 0
    bytes: int = 0

    def size(self, key: str) -> int:
        """Return the size of an object, 0 if it was not listed."""
        return (
            self.packs.sizes[self.packs.number_of(key)]
            or self.small.get(key, 0)
            or self.caches.get(key, 0)
        )

    def holds(self, key: str) -> bool:
        """Whether an object that may be condemned was listed."""
        return key in self.small or bool(self.packs.number_of(key))


def survey(listing: Iterable[ObjectInfo]) -> Survey:
    """Sort a listing of the whole store; keys that no collector understands are only counted."""
    packs: list[tuple[bytes, int]] = []
    found = Survey(PackTable(()))
    for info in listing:
        found.objects += 1
        found.bytes += info.size
        kind, _, rest = info.key.partition("/")
        prefix = f"{kind}/"
        if prefix == "packs/":
            name = parse_hex(rest.rpartition("/")[2])
            if name is not None and pack_key(name) == info.key:
                packs.append((name, info.size))
        elif prefix in SMALL:
            if parse_hex(rest) is not None:
                found.small[info.key] = info.size
        elif prefix == PROFILES:
            manifest, _, name_text = rest.partition("/")
            if parse_hex(manifest) is not None and name_text and "/" not in name_text:
                found.small[info.key] = info.size
        elif prefix == PROBES:
            found.small[info.key] = info.size
        elif prefix in CACHES:
            found.caches[info.key] = info.size
    found.packs = PackTable(packs)
    return found
