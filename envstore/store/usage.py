"""How much refs and the whole store take: logical, unique and stored bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envstore.errors import CorruptError, NotFoundError
from envstore.store.locations import NOWHERE
from envstore.store.manifest import HOLE
from envstore.store.refs import RefName, list_refs, read_ref, try_read
from envstore.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes in bytes.

    ``logical`` sums the files; ``unique`` counts each distinct chunk once, raw; ``stored`` is
    what those chunks take compressed (a frame's size shared out by raw bytes); ``exclusive`` is
    the part of ``stored`` that no other of the measured refs uses. What a frame is a difference to
    counts like a chunk.
    """

    logical: int
    unique: int
    stored: int
    exclusive: int


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Usage of each ref, of all of them together, and the bytes of all objects in the store."""

    refs: dict[RefName, Usage]
    total: Usage
    objects: int
    object_bytes: int


@dataclass(slots=True)
class _Tally:
    logical: int
    chunks: dict[bytes, tuple[int, float]]


def measure(repository: Repository, names: Sequence[RefName] = ()) -> StoreUsage:
    """Measure ``names``, or all refs that are there and are not removed or moved meanwhile.

    Costs each one's metadata, one listing, and about 200 bytes a chunk. Raises ``NotFoundError``.
    """
    tallies: dict[bytes, _Tally] = {}
    manifests = {}
    for name in names or sorted(list_refs(repository.objects)):
        manifest = _tallied(repository, name, tallies)
        if manifest is not None:
            manifests[name] = manifest
        elif names:
            read_ref(repository.objects, name)  # says that there is no such ref
    users: dict[bytes, int] = {}
    for manifest in manifests.values():
        for chunk in tallies[manifest].chunks:
            users[chunk] = users.get(chunk, 0) + 1
    found = {}
    for name, manifest in manifests.items():
        tally = tallies[manifest]
        alone = sum(stored for chunk, (_, stored) in tally.chunks.items() if users[chunk] == 1)
        found[name] = _usage(tally, alone)
    everything = _Tally(sum(tallies[m].logical for m in manifests.values()), {})
    for tally in tallies.values():
        everything.chunks.update(tally.chunks)
    sizes = [info.size for info in repository.objects.list("")]
    total = _usage(everything, sum(stored for _, stored in everything.chunks.values()))
    return StoreUsage(found, total, len(sizes), sum(sizes))


def _tallied(repository: Repository, name: RefName, tallies: dict[bytes, _Tally]) -> bytes | None:
    """Tally what ``name`` points at; returns its manifest, ``None`` if there is no such ref."""
    before = None
    while found := try_read(repository.objects, name):
        try:
            manifest = repository.snapshot(found[0].snapshot).manifest
            if manifest not in tallies:
                tallies[manifest] = _tally(repository, manifest)
            return manifest
        except NotFoundError:
            if found == before:
                raise
            before = found  # collected, if the ref was moved since it was read
    return None


def _usage(tally: _Tally, exclusive: float) -> Usage:
    return Usage(
        tally.logical,
        sum(raw for raw, _ in tally.chunks.values()),
        round(sum(stored for _, stored in tally.chunks.values())),
        round(exclusive),
    )


def _tally(repository: Repository, manifest: bytes) -> _Tally:
    root, locations = repository.located(manifest)
    chunks: dict[bytes, tuple[int, float]] = {}
    number = 0
    for part in repository.parts(root, locations):
        names = part.ref_digests
        for i, size in enumerate(part.ref_sizes):
            name = names[32 * i : 32 * i + 32]
            if name != HOLE and name not in chunks:
                if locations.ref_frames[number] == NOWHERE:
                    raise CorruptError(f"locations: chunk {name.hex()} is nowhere")
                frame = locations.frames[locations.ref_frames[number]]
                chunks[name] = size, frame.stored * size / max(1, frame.raw)
                if frame.anchor is not None:
                    # Almost always a chunk of an earlier tree: its frame then has its digest.
                    chunks.setdefault(frame.anchor.digest, (frame.anchor.raw, frame.anchor.stored))
            number += 1
    return _Tally(root.logical, chunks)
