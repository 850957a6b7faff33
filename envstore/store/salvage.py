"""Stores again what can be had of what lay in damaged packs, and leads manifests there.

The sources, in this order: copies that other packs have; what of the damaged packs can still be
read; frames in this machine's cache. Locations that are lost are made anew of the manifest, which
says what chunks there are, and of the index, which says where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from envstore.errors import ConflictError, NotFoundError
from envstore.store.cache import BlobCache
from envstore.store.copies import cached_chunk, find_copies
from envstore.store.digest import DIGEST_SIZE
from envstore.store.entries import HOLE
from envstore.store.examining import Examiner, Place
from envstore.store.harm import in_packs, places_of_files, places_of_parts
from envstore.store.healing import harmed_manifests, reference_names
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, FrameRef, Locations, locations_key
from envstore.store.manifest import Root, read_entries
from envstore.store.packing import PackWriter
from envstore.store.parts import Part
from envstore.store.problems import DAMAGE
from envstore.store.redirecting import redirect
from envstore.store.repository import Repository


@dataclass(slots=True)
class Salvaged:
    """What was done: manifests led elsewhere, locations made anew, and chunks stored again, of how
    many bytes.
    """

    manifests: int = 0
    locations: int = 0
    chunks: int = 0
    stored_bytes: int = 0


@dataclass(slots=True)
class _Patient:
    """A manifest whose chunks lie in damaged packs, or whose ``locations`` are lost (``None``)."""

    manifest: bytes
    root: Root
    locations: Locations | None
    parts: list[Part] = field(default_factory=list)
    moved: int = 0


def salvage(
    repository: Repository,
    cache: BlobCache | None,
    damaged: Collection[bytes],
    lost: Collection[bytes],
    without: Collection[bytes] = (),
) -> Salvaged:
    """Heal what has chunks in the packs ``damaged``, and manifests whose locations are ``lost``.

    Nothing in the packs ``without`` is relied on. ``repository`` is without a cache, and that of
    a session. The index should be whole. Two passes over it. Memory: in the number of chunks that
    are to be found. What cannot be healed is left as it is. Raises the errors of the store.
    """
    work = _Salvage(repository, cache, frozenset(damaged), frozenset(without))
    work.admit(lost)
    try:
        work.heal_parts()
        work.heal_files()
    finally:
        work.writer.close()
    work.done.stored_bytes = work.writer.stored_bytes
    return work.done


class _Salvage:
    def __init__(
        self,
        repository: Repository,
        cache: BlobCache | None,
        damaged: frozenset[bytes],
        without: frozenset[bytes],
    ) -> None:
        self.repository = repository
        self.cache = cache
        self.damaged = damaged
        self.avoided = damaged | without
        self.examiner = Examiner(repository.fetcher)
        self.index = DedupIndex()
        self.writer = PackWriter(repository.objects, self.index)
        self.copies: dict[bytes, tuple[FrameRef, int]] = {}
        self.patients: list[_Patient] = []
        self.done = Salvaged()

    def admit(self, lost: Collection[bytes]) -> None:
        """Take up every manifest that something can be done for."""
        for manifest in sorted(lost):
            try:
                self.patients.append(_Patient(manifest, self.repository.root(manifest), None))
            except DAMAGE:
                continue
        for manifest in harmed_manifests(self.repository, self.damaged):
            if manifest in lost:
                continue
            try:
                self.patients.append(_Patient(manifest, *self.repository.located(manifest)))
            except DAMAGE:
                continue

    def find(self, name: bytes) -> tuple[FrameRef, int] | None:
        """Return where a chunk can be had from, not in damaged packs."""
        place = self.index.find(name)
        if place is not None:
            return self.index.frames[place[0]], place[1]
        return self.copies.get(name)

    def heal_parts(self) -> None:
        """Make the parts readable: they say what the files are made of."""
        wanted: set[Place] = set()
        names: set[bytes] = set()
        for patient in self.patients:
            if patient.locations is None:
                names.update(info.digest for info in patient.root.parts)
            else:
                parts = places_of_parts(patient.root, patient.locations)
                wanted.update(place for place in parts if in_packs(place[0], self.damaged))
        self._obtain(wanted, names)
        for patient in self.patients:
            if patient.locations is None:
                continue
            done = redirect(
                self.repository.objects,
                patient.manifest,
                patient.root,
                self.damaged,
                self.find,
            )
            if done.moved:
                patient.moved += done.moved
                patient.locations = self.repository.locations(patient.manifest, patient.root)

    def heal_files(self) -> None:
        """Find or store the chunks of files, and lead the manifests there."""
        wanted: set[Place] = set()
        names: set[bytes] = set()
        able: list[_Patient] = []
        for patient in self.patients:
            try:
                if patient.locations is None:
                    names |= self._names_of_lost(patient)
                else:
                    places = self._places(patient, patient.locations)
                    wanted.update(place for place in places if in_packs(place[0], self.damaged))
            except DAMAGE:
                self._count(patient)
                continue
            able.append(patient)
        self._obtain(wanted, names)
        for patient in able:
            if patient.locations is None:
                self._store_locations(patient)
                continue
            named = reference_names(self.repository, patient.root, patient.locations)
            done = redirect(
                self.repository.objects,
                patient.manifest,
                patient.root,
                self.damaged,
                self.find,
                named,
            )
            patient.moved += done.moved
            self._count(patient)

    def _count(self, patient: _Patient) -> None:
        self.done.manifests += patient.moved > 0

    def _places(self, patient: _Patient, locations: Locations) -> Iterable[Place]:
        entries = read_entries(self.repository.parts(patient.root, locations))
        return (place for _, place in places_of_files(locations, entries))

    def _names_of_lost(self, patient: _Patient) -> set[bytes]:
        """Read the parts of a manifest without locations; returns the chunks that it names."""
        locations = Locations()
        for info in patient.root.parts:
            found = self.find(info.digest)
            if found is None:
                raise NotFoundError(f"manifest part {info.digest.hex()} is nowhere")
            locations.part_frames.append(len(locations.frames))
            locations.part_offsets.append(found[1])
            locations.frames.append(found[0])
        patient.parts = list(self.repository.parts(patient.root, locations))
        data = b"".join(part.ref_digests for part in patient.parts)
        return {data[at : at + DIGEST_SIZE] for at in range(0, len(data), DIGEST_SIZE)} - {HOLE}

    def _obtain(self, wanted: Collection[Place], names: set[bytes]) -> None:
        """Have the chunks of ``wanted``, and those called ``names``, in sound packs if possible."""
        every = {place[3] for place in wanted} | names
        fresh = {name for name in every if self.find(name) is None}
        self.copies |= find_copies(self.repository, self.examiner, fresh, self.avoided)
        missing = [place for place in sorted(wanted, key=_order) if self.find(place[3]) is None]
        self.examiner.examine(missing, self._store)
        for place in missing:
            if self.find(place[3]) is None:
                data = cached_chunk(self.cache, place)
                if data is not None:
                    self._store(place[3], memoryview(data))
        self.writer.flush()

    def _store(self, name: bytes, data: memoryview) -> None:
        if self.index.find(name) is None:
            self.writer.add(name, bytes(data))
            self.done.chunks += 1

    def _store_locations(self, patient: _Patient) -> None:
        """Store locations made anew, if every chunk was found."""
        new = Locations()
        numbers: dict[tuple[bytes, int], int] = {}

        def number(frame: FrameRef) -> int:
            found = numbers.setdefault((frame.pack, frame.offset), len(new.frames))
            if found == len(new.frames):
                new.frames.append(frame)
            return found

        for info in patient.root.parts:
            found = self.find(info.digest)
            if found is None:
                return
            new.part_frames.append(number(found[0]))
            new.part_offsets.append(found[1])
        for part in patient.parts:
            for at in range(0, len(part.ref_digests), DIGEST_SIZE):
                name = part.ref_digests[at : at + DIGEST_SIZE]
                found = None if name == HOLE else self.find(name)
                if found is None and name != HOLE:
                    return
                new.ref_frames.append(NOWHERE if found is None else number(found[0]))
                new.ref_offsets.append(0 if found is None else found[1])
        key = locations_key(patient.manifest)
        try:
            version: str | None = self.repository.objects.get_versioned(key)[1]
        except NotFoundError:
            version = None
        try:
            self.repository.objects.put_if(key, new.seal(), version)
        except ConflictError:
            return  # a push of the same tree was faster
        self.done.locations += 1


def _order(place: Place) -> tuple[bytes, int, int, bytes]:
    return place[0].pack, place[0].offset, place[1], place[3]
