"""Moves what a manifest names into other packs, as garbage collection does, by plain means."""

from __future__ import annotations

import random
from contextlib import closing

from envstore.store.digest import DIGEST_SIZE
from envstore.store.entries import HOLE
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, FrameRef, Located, Locations, locations_key
from envstore.store.manifest import Root
from envstore.store.packing import PackWriter
from envstore.store.packs import PackBuilder, frame_bytes, pack_key, parse_pack
from envstore.store.repository import Repository


def move(repository: Repository, manifest: bytes, *, reframe: bool, delete: bool = True) -> None:
    """Store every chunk of ``manifest`` once more, elsewhere, and rewrite its locations.

    Frames stay what they are but for their place, or with ``reframe`` chunks get other ones. The
    old packs are deleted then.
    """
    root, old = repository.located(manifest)
    new = _reframed(repository, root, old) if reframe else _copied(repository, old)
    key = locations_key(manifest)
    _, version = repository.objects.get_versioned(key)
    repository.objects.put_if(key, new.seal(), version)
    if delete:
        for pack in packs(old) - packs(new):
            repository.objects.delete(pack_key(pack))


def packs(locations: Located) -> set[bytes]:
    """Return the packs that ``locations`` lead to."""
    return {frame.pack for frame in locations.frames}


def drop(repository: Repository, locations: Located) -> None:
    """Delete all packs that ``locations`` lead to."""
    for pack in packs(locations):
        repository.objects.delete(pack_key(pack))


def _order(old: Locations) -> random.Random:
    """Return what puts things into another order than they are in."""
    return random.Random(sorted(packs(old))[0])


def _copied(repository: Repository, old: Locations) -> Locations:
    wanted = {frame.digest: frame for frame in old.frames}
    rows = []
    for name in sorted(packs(old)):
        data = repository.objects.get(pack_key(name))
        rows += [
            row for row in frame_bytes(parse_pack(data, name), data) if row[0].digest in wanted
        ]
    _order(old).shuffle(rows)
    builder = PackBuilder()
    for frame, stored in rows:
        builder.add(frame, bytes(stored))
    finished = builder.finish()
    assert finished is not None
    pack, pieces = finished
    repository.objects.put(pack_key(pack.digest), pieces)
    places = {
        frame.digest: FrameRef(
            pack.digest, offset, frame.stored, frame.raw, frame.codec, frame.digest
        )
        for frame, offset in zip(pack.frames, pack.offsets(), strict=True)
    }
    return Locations(
        [places[frame.digest] for frame in old.frames],
        old.part_frames,
        old.part_offsets,
        old.ref_frames,
        old.ref_offsets,
    )


def _reframed(repository: Repository, root: Root, old: Locations) -> Locations:
    raw = repository.load_frames(list(old.frames))

    def data(number: int, start: int, size: int) -> bytes:
        return raw[old.frames[number].digest][start : start + size]

    refs: list[tuple[bytes, int]] = []
    for part in repository.parts(root, old):
        for at, size in enumerate(part.ref_sizes):
            refs.append((part.ref_digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE], size))
    chunks: dict[bytes, bytes] = {}
    for number, start, (name, size) in zip(old.ref_frames, old.ref_offsets, refs, strict=True):
        if name != HOLE:
            chunks[name] = data(number, start, size)
    index = DedupIndex()
    with closing(PackWriter(repository.objects, index)) as writer:
        order = list(chunks)
        _order(old).shuffle(order)
        for name in order:
            writer.add(name, chunks[name])
        writer.end_frame()
        for info, number, start in zip(root.parts, old.part_frames, old.part_offsets, strict=True):
            writer.add(info.digest, data(number, start, info.size))
        writer.flush()
    new = Locations(list(index.frames))
    for info in root.parts:
        place = index.find(info.digest)
        assert place is not None
        new.part_frames.append(place[0])
        new.part_offsets.append(place[1])
    for name, _ in refs:
        number, start = (NOWHERE, 0) if name == HOLE else index.find(name) or (NOWHERE, 0)
        new.ref_frames.append(number)
        new.ref_offsets.append(start)
    return new
