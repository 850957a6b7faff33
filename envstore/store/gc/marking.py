"""Marking: which chunks of which packs live snapshots lead to.

One pass over the locations of all live manifests, each once however many snapshots have it. A
live chunk is a number of 64 bits: its pack's, then a hash of its frame's place in the pack, then
its place in the frame. Two frames whose hashes are equal keep each other's chunks, which costs a
few bytes and loses none. As numbers ascend by pack, which are numbered in the order of their
digests, a pack's chunks are one slice of one sorted run, and merging works by digest prefix.

Cost model: 8 bytes for each live chunk, in memory up to ``runs.LIMIT`` and else on disk; 200 bytes
for each pack; 600 for each live snapshot; while a manifest is looked at, 8 bytes for each of its
references and 200 for each of its frames. Downloads: every live snapshot and its locations, about
8 bytes for each reference before compression. Half a microsecond for each reference on one core.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import or_

from envstore.errors import EnvstoreError, NotFoundError
from envstore.store.gc.ahead import read_ahead
from envstore.store.gc.columns import Columns, open_columns
from envstore.store.gc.runs import LIMIT, Runs
from envstore.store.gc.survey import PackTable, Survey
from envstore.store.locations import locations_key
from envstore.store.locks import lock_key
from envstore.store.manifest import manifest_key
from envstore.store.repository import Repository
from envstore.store.roots import Root
from envstore.store.snapshots import load_snapshot, snapshot_key
from envstore.store.verify import DAMAGE

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and how much there is."""

LASTING, DRAFTS, LEASES, WRITERS = range(1, 5)
"""Why a pack is live: the first of these that holds."""

_PLACE_BITS = 23
_PLACES = (1 << _PLACE_BITS) - 1
_NUMBER_BITS = 64 - _PLACE_BITS
_SPREAD = 0x9E3779B1  # odd, so that with 32 bits of hash no two places share one
_SHOWN = 3


class BrokenRootError(EnvstoreError):
    """Something live leads to what is missing or damaged, so nobody can say what is dead."""


@dataclass(frozen=True, slots=True)
class Live:
    """A live snapshot's facts, as far as a collection needs them."""

    manifest: bytes
    parent: bytes | None
    lock: bytes | None


@dataclass(slots=True)
class Marks:
    """What is live. ``why``, ``anchors`` and ``whole`` have a byte for each pack, by number.

    ``why`` is 0 for a dead pack; ``anchors`` says that frames elsewhere are differences to frames
    in this one, ``whole`` that a writer may need any part of it.
    """

    packs: PackTable
    chunks: Runs
    why: bytearray
    anchors: bytearray
    whole: bytearray
    snapshots: dict[bytes, Live] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    """Keys of the live small objects; those of profiles are not among them."""
    manifests: dict[bytes, int] = field(default_factory=dict)
    """Live manifests, and why."""
    references: int = 0
    """How many references were looked at."""

    @property
    def hash_bits(self) -> int:
        """How many bits of a number tell frames of one pack apart."""
        return min(32, _NUMBER_BITS - max(1, len(self.packs).bit_length()))

    def frame(self, number: int, offset: int) -> int:
        """Return the number of the first place in a frame; the others follow it."""
        spread = (offset * _SPREAD & 0xFFFFFFFF) >> 32 - self.hash_bits
        return (number << self.hash_bits | spread) << _PLACE_BITS

    def of_pack(self, number: int) -> Sequence[int]:
        """Return the numbers of the live chunks of a pack, ascending."""
        shift = self.hash_bits + _PLACE_BITS
        return self.chunks.between(number << shift, (number + 1) << shift)

    def is_live(self, key: str) -> bool:
        """Whether the object ``key``, a pack or one that live snapshots name, is live."""
        if key.startswith("packs/"):
            return bool(self.why[self.packs.number_of(key)])
        if key.startswith("profiles/") and f"manifests/{key.split('/')[1]}" in self.keys:
            return True
        return key in self.keys


def frame_of(chunk: int) -> int:
    """Return the number of the first place in the frame of the chunk with this number."""
    return chunk >> _PLACE_BITS << _PLACE_BITS


def mark(
    repository: Repository,
    found: Survey,
    roots: Iterable[Root],
    kept: Iterable[str] = (),
    *,
    limit: int = LIMIT,
    progress: Progress = lambda what, done, total: None,
) -> Marks:
    """Follow ``roots`` in a store of which ``found`` says what it holds; see above for the cost.

    ``kept`` are objects that count as live whatever leads to them.

    Raises ``BrokenRootError`` naming what cannot be followed, once all has been looked at, and
    the errors of the store.
    """
    size = len(found.packs) + 1
    flags = bytearray(size), bytearray(size), bytearray(size)
    marks = Marks(found.packs, Runs(limit), *flags)
    wanted: dict[bytes, tuple[int, str]] = {}
    for root in roots:
        why = _why(root.key)
        if why < wanted.get(root.snapshot, (WRITERS + 1, ""))[0]:
            wanted[root.snapshot] = why, root.key
    broken = _mark_snapshots(repository, marks, wanted, progress)
    broken += _mark_manifests(repository, marks, found, progress)
    if broken:
        raise _refusal(broken)
    for key in kept:
        number = found.packs.number_of(key)
        if number:
            marks.why[number] = marks.why[number] or WRITERS
            marks.whole[number] = 1
        marks.keys.add(key)
    marks.chunks.finish()
    return marks


def _why(key: str) -> int:
    kind, _, rest = key.partition("/")
    if kind == "leases" or (kind == "runs" and rest.split("/")[2:3] == ["leases"]):
        return LEASES
    return {"sessions": WRITERS, "drafts": DRAFTS}.get(kind, LASTING)


def _mark_snapshots(
    repository: Repository,
    marks: Marks,
    wanted: dict[bytes, tuple[int, str]],
    progress: Progress,
) -> list[tuple[str, str]]:
    """Read the snapshots and note what they name; returns pairs of a root and what is wrong."""
    broken: list[tuple[str, str]] = []
    objects = repository.objects

    def read(name: bytes) -> Live | EnvstoreError:
        try:
            found = load_snapshot(objects, name)
        except DAMAGE as error:
            return error
        parent = found.parents[0] if found.parents else None
        return Live(found.manifest, parent, found.lock)

    for at, (name, live) in enumerate(read_ahead(list(wanted), read)):
        progress("reading snapshots", at, len(wanted))
        why, key = wanted[name]
        if isinstance(live, EnvstoreError):
            # Who was about to name it, or read it, has lost nothing that could still be kept.
            if not (isinstance(live, NotFoundError) and why in (LEASES, WRITERS)):
                broken.append((key, live.message))
            continue
        marks.snapshots[name] = live
        marks.manifests[live.manifest] = min(why, marks.manifests.get(live.manifest, why))
        marks.keys |= {snapshot_key(name), manifest_key(live.manifest)}
        marks.keys.add(locations_key(live.manifest))
        if live.lock is not None:
            marks.keys.add(lock_key(live.lock))
    return broken


def _mark_manifests(
    repository: Repository, marks: Marks, found: Survey, progress: Progress
) -> list[tuple[str, str]]:
    """Mark what the locations of all manifests name; returns the manifests that have none."""
    broken: list[tuple[str, str]] = []
    ordered = sorted(marks.manifests, key=lambda name: marks.manifests[name])

    def read(manifest: bytes) -> bytes | EnvstoreError:
        key = manifest_key(manifest)
        # It may have been stored since the listing.
        if key not in found.small and repository.objects.size(key) is None:
            return NotFoundError(f"manifest {manifest.hex()} is missing")
        try:
            return repository.objects.get(locations_key(manifest))
        except DAMAGE as error:
            return error

    def weigh(manifest: bytes) -> int:
        return found.small.get(locations_key(manifest), 0)

    for at, (manifest, data) in enumerate(read_ahead(ordered, read, weigh=weigh)):
        progress("marking", at, len(ordered))
        try:
            if isinstance(data, EnvstoreError):
                raise data
            _mark_columns(marks, open_columns(data, manifest), marks.manifests[manifest])
        except DAMAGE as error:
            name = next(n for n, live in marks.snapshots.items() if live.manifest == manifest)
            broken.append((f"snapshot {name.hex()}", error.message))
    return broken


def _mark_columns(marks: Marks, columns: Columns, why: int) -> None:
    """Mark every chunk and anchor that some locations name."""
    table, bits = marks.packs, marks.hash_bits
    numbers = [table.number(pack) for pack in columns.packs]
    for number in numbers:
        marks.why[number] = marks.why[number] or why
    bases = [number << bits for number in numbers]
    down = 32 - bits
    frames = [
        (bases[pack] | (offset * _SPREAD & 0xFFFFFFFF) >> down) << _PLACE_BITS
        for pack, offset in zip(columns.numbers, columns.offsets, strict=True)
    ]
    anchors = columns.anchors()
    for at in anchors:
        marks.anchors[numbers[columns.numbers[at]]] = 1
    if anchors:
        marks.chunks.add(array("Q", sorted({frames[at] for at in anchors})))
    for found, places in columns.blocks():
        marks.references += len(found)
        if max(places, default=0) > _PLACES:
            # Beyond the end of any frame, so no reader can have it.
            places = array("I", (place & _PLACES for place in places))
        # In order already for the most part, which a dictionary keeps and sorting is quick at.
        chunks = dict.fromkeys(map(or_, map(frames.__getitem__, found), places))
        marks.chunks.add(array("Q", sorted(chunks)))


def _refusal(broken: list[tuple[str, str]]) -> BrokenRootError:
    shown = "; ".join(f"{key}: {reason}" for key, reason in broken[:_SHOWN])
    more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return BrokenRootError(
        f"nothing was collected, as what is live cannot be followed: {shown}{more}",
        hint="run `envstore repair`, or remove what is lost with `envstore rm`",
    )
