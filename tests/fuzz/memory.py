"""A store in memory, of as many objects as a target wants to be read, and forged snapshots."""

from __future__ import annotations

from collections.abc import Sequence

from envstore.store.chunking import CHUNKER_ID
from envstore.store.config import CODEC_ID, StoreConfig
from envstore.store.digest import HASH_ID, digest
from envstore.store.entries import HOLE
from envstore.store.frames import encode_frame
from envstore.store.locations import NOWHERE, FrameRef, Locations, locations_key
from envstore.store.manifest import PartInfo, Root, decode_part, manifest_key
from envstore.store.packs import PackBuilder, pack_key
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot, save_snapshot
from tests.memory import Memory

CHUNK = b"chunk of twenty bytes"
"""The one chunk of file content that forged snapshots may lead to."""


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
