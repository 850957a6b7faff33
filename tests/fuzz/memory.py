"""A store in memory, of as many objects as a target wants to be read, and forged snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from envstore.errors import ConflictError, CorruptError, NotFoundError
from envstore.store.chunking import CHUNKER_ID
from envstore.store.config import CODEC_ID, StoreConfig
from envstore.store.digest import HASH_ID, digest
from envstore.store.entries import HOLE
from envstore.store.frames import encode_frame
from envstore.store.locations import NOWHERE, FrameRef, Locations, locations_key
from envstore.store.manifest import PartInfo, Root, decode_part, manifest_key
from envstore.store.objects.base import ObjectInfo, Traffic, ignore
from envstore.store.objects.body import Body
from envstore.store.packs import PackBuilder, pack_key
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot, save_snapshot

CHUNK = b"chunk of twenty bytes"
"""The one chunk of file content that forged snapshots may lead to."""


class Memory:
    """An object store. What is not there is ``default``, unless that is ``None``."""

    url = "memory:"

    def __init__(
        self, objects: Mapping[str, bytes] | None = None, default: bytes | None = None
    ) -> None:
        self.objects = dict(objects or {})
        self.default = default
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
        self.objects[key] = (
            bytes(data) if isinstance(data, (bytes, bytearray, memoryview)) else b"".join(data)
        )

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
        for key, data in list(self.objects.items()):
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
        return 1_800_000_000.0

    def close(self) -> None:
        """Nothing is open."""


def repository(objects: Memory) -> Repository:
    """Return a repository over ``objects``, without a cache."""
    identity = "6a5c6b0e-8f0e-4e1c-9d7b-0f3f2a1b4c5d"
    return Repository(objects, StoreConfig(1, identity, HASH_ID, CHUNKER_ID, CODEC_ID), None)


def root_of(raws: Sequence[bytes], mode: int = 0, mtime_ns: int = 0) -> Root:
    """Return a root that says of parts what they say of themselves."""
    parts = [decode_part(raw) for raw in raws]
    infos = tuple(
        PartInfo(digest(raw), len(raw), len(part.kinds), len(part.ref_sizes))
        for raw, part in zip(raws, parts, strict=True)
    )
    entries = sum(len(part.kinds) - part.continued for part in parts)
    files = sum(len(part.sizes) - part.continued for part in parts)
    logical = sum(sum(part.ref_sizes) for part in parts)
    return Root(infos, entries, files, logical, mode, mtime_ns)


def forge(raws: Sequence[bytes], root: Root) -> tuple[Memory, bytes]:
    """Return a store with a snapshot of these parts, and its name; every chunk is ``CHUNK``."""
    builder = PackBuilder()
    for raw in (CHUNK, *raws):
        builder.add(*encode_frame([(digest(raw), raw)]))
    made = builder.finish()
    assert made is not None
    pack, data = made
    locations = Locations(
        [
            FrameRef(pack.digest, at, row.stored, row.raw, row.codec, row.digest)
            for row, at in zip(pack.frames, pack.offsets(), strict=True)
        ]
    )
    for number, raw in enumerate(raws):
        locations.part_frames.append(number + 1)
        locations.part_offsets.append(0)
        names = decode_part(raw).ref_digests
        for at in range(0, len(names), len(HOLE)):
            hole = names[at : at + len(HOLE)] == HOLE
            locations.ref_frames.append(NOWHERE if hole else 0)
            locations.ref_offsets.append(0)
    objects = Memory({manifest_key(root.digest): root.seal()})
    objects.put(locations_key(root.digest), locations.seal())
    objects.put(pack_key(pack.digest), data)
    return objects, save_snapshot(
        objects, Snapshot("dir", root.digest, root.files, root.logical, "now")
    )
