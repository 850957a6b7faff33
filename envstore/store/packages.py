"""Stored packages: what an archive became when it was first met, so that it never is again.

An object of its own for each package and variant, complete in itself: one request gives the
entries, where their chunks lie, and the facts that composing an environment takes. Like
locations it is trusted for speed only; every chunk it leads to is checked when it is read.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store import canonical
from envstore.store.binary import U32, Cursor, pack_array, seal, unseal
from envstore.store.describing import place_of
from envstore.store.digest import DIGEST_SIZE
from envstore.store.frames import MAX_SIZE
from envstore.store.index import DedupIndex, LocationsBuilder
from envstore.store.locations import NOWHERE, FrameRef, Locations, anchored
from envstore.store.manifest import HOLE, Entry, build_parts, decode_part, read_entries
from envstore.store.objects.base import ObjectStore

MAGIC = b"ESPKGS01"
MAX_BODY = 256 << 20
PARALLEL = 16
"""Requests in flight when the packages of an environment are asked for."""

_NAME = re.compile(r"[0-9a-f]{64}")
_VARIANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class StoredPackage:
    """One package as it is stored: its entries in ``sort_key`` order, and facts as JSON values.

    ``locations`` number the chunk references of all entries in order; they have no parts.
    """

    entries: tuple[Entry, ...]
    locations: Locations
    facts: dict[str, Any] = field(default_factory=dict)

    def learn(self, index: DedupIndex) -> None:
        """Tell ``index`` where the package's chunks lie."""
        frames, offsets = self.locations.ref_frames, self.locations.ref_offsets
        names = (name for entry in self.entries for name, _ in entry.refs)
        places = zip(names, frames, offsets, strict=True)
        index.add_located(self.locations.frames, (row for row in places if row[1] != NOWHERE))

    def chunks(self) -> Iterable[bytes]:
        """Return the digests of all chunks, holes included, some more than once."""
        return (name for entry in self.entries for name, _ in entry.refs)


def package_key(sha256: str, variant: str) -> str:
    """Return the object key of the package whose archive has this SHA-256 (hex)."""
    if not _NAME.fullmatch(sha256) or not _VARIANT.fullmatch(variant):
        raise ValueError(f"no package is called {sha256!r} {variant!r}")
    return f"packages/{sha256}/{variant}"


def describe_package(
    entries: Sequence[Entry], facts: dict[str, Any], index: DedupIndex
) -> StoredPackage:
    """Return what to store of a package whose chunks are all in ``index``, settled."""
    builder = LocationsBuilder(index.frames)
    for entry in entries:
        for name, _ in entry.refs:
            if name == HOLE:
                builder.hole()
            else:
                builder.ref(place_of(index, name))
    return StoredPackage(tuple(entries), builder.result, facts)


def encode_package(package: StoredPackage) -> bytes:
    """Return the object to store."""
    parts = [data for _, data in build_parts(package.entries)]
    locations = package.locations
    frames = locations.frames
    packs = list(dict.fromkeys(frame.pack for frame in frames))
    number = {name: i for i, name in enumerate(packs)}
    facts = json.dumps(package.facts, sort_keys=True, separators=(",", ":")).encode()
    return seal(
        MAGIC,
        b"".join(
            (
                U32.pack(len(facts)),
                facts,
                U32.pack(len(parts)),
                pack_array(array("I", map(len, parts))),
                *parts,
                U32.pack(len(packs)),
                *packs,
                U32.pack(len(frames)),
                pack_array(array("I", (number[frame.pack] for frame in frames))),
                pack_array(array("I", (frame.offset for frame in frames))),
                pack_array(array("I", (frame.stored for frame in frames))),
                pack_array(array("I", (frame.raw for frame in frames))),
                bytes(frame.codec for frame in frames),
                b"".join(frame.digest for frame in frames),
                U32.pack(len(locations.ref_frames)),
                pack_array(locations.ref_frames),
                pack_array(locations.ref_offsets),
            )
        ),
    )


def decode_package(data: bytes, what: str) -> StoredPackage:
    """Decode and check a stored package. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    body, _ = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    cursor = Cursor(body)
    try:
        facts = json.loads(bytes(cursor.take(cursor.u32())))
        canonical.check_text(facts)
    except (ValueError, RecursionError):
        raise CorruptError(f"{what} holds no valid JSON") from None
    if not isinstance(facts, dict):
        raise CorruptError(f"{what} holds no JSON object")
    sizes = cursor.array(cursor.u32(), 4)
    parts = [decode_part(cursor.take(size)) for size in sizes]
    packs = [cursor.digest() for _ in range(cursor.u32())]
    count = cursor.u32()
    numbers, offsets, stored, raw = (cursor.array(count, 4) for _ in range(4))
    codecs = bytes(cursor.take(count))
    names = bytes(cursor.take(count * DIGEST_SIZE))
    refs = cursor.u32()
    locations = Locations(ref_frames=cursor.array(refs, 4), ref_offsets=cursor.array(refs, 4))
    cursor.finish()
    if count and (max(numbers) >= len(packs) or max(raw) > MAX_SIZE or max(stored) > MAX_SIZE):
        raise CorruptError(f"{what}: a frame out of bounds")
    frames = [
        FrameRef(
            packs[numbers[i]], offsets[i], stored[i], raw[i], codecs[i],
            names[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE],
        )
        for i in range(count)
    ]  # fmt: skip
    locations.frames = anchored(frames, what)
    entries = tuple(read_entries(parts))
    chunks = [ref for entry in entries for ref in entry.refs]
    if len(chunks) != refs:
        raise CorruptError(f"{what}: not as many places as chunks")
    places = zip(locations.ref_frames, locations.ref_offsets, strict=True)
    for (name, size), (frame, offset) in zip(chunks, places, strict=True):
        if (name == HOLE) != (frame == NOWHERE):
            raise CorruptError(f"{what}: a chunk in no frame")
        if frame != NOWHERE and (frame >= count or offset + size > raw[frame]):
            raise CorruptError(f"{what}: a chunk beyond its frame")
    return StoredPackage(entries, locations, facts)


def load_packages(
    objects: ObjectStore, keys: Sequence[str], warnings: list[str]
) -> list[StoredPackage | None]:
    """Return the stored packages called ``keys``, ``None`` for those that are not there.

    One request each, ``PARALLEL`` at a time. What is damaged or of another format counts as not
    there, as it can be stored anew; ``warnings`` then gets a line.
    """

    def load(key: str) -> StoredPackage | None:
        try:
            return decode_package(objects.get(key), key)
        except NotFoundError:
            return None
        except (CorruptError, UnsupportedFormatError) as error:
            warnings.append(f"a package is stored again: {error.message}")
            return None

    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="packages") as pool:
        return list(pool.map(load, keys))


def save_packages(objects: ObjectStore, packages: Sequence[tuple[str, StoredPackage]]) -> None:
    """Store packages under their keys, after everything they lead to."""
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="packages") as pool:
        for _ in pool.map(lambda item: objects.put(item[0], encode_package(item[1])), packages):
            pass
