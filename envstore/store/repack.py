"""Repack: stores the chunks of a profile once more, side by side and in its order.

A profile of a tree that was pushed before anybody knew of it names frames all over the packs.
Afterwards a few large requests bring exactly what a start reads. Nothing is named anew: manifest
and snapshot stay, only the locations lead elsewhere. The old packs stay too, as other snapshots
use them. Order of writes: packs, segment, locations; whoever dies in between has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from envstore.errors import CorruptError, NotFoundError
from envstore.store import frames
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.entries import HOLE, Entry
from envstore.store.fetch import MAX_GAP
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, FrameRef, Locations, open_locations, replace_locations
from envstore.store.manifest import Root, read_entries
from envstore.store.packing import PackWriter
from envstore.store.packs import TARGET_SIZE
from envstore.store.parts import Part
from envstore.store.profiles import Range, find_profile
from envstore.store.repository import Repository
from envstore.store.sessions import writing

BATCH = 64 << 20
"""Raw bytes of frames that are held at once."""

_WORTH = 1.1


@dataclass(frozen=True, slots=True)
class Layout:
    """What it takes to fetch some chunks: requests, and stored bytes with what lies between."""

    requests: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Repacked:
    """What a repack did for the profile ``profile`` of a snapshot.

    ``chunks`` and ``raw_bytes`` are what the profile touches; ``stored_bytes`` went into new
    packs. ``unchanged`` means that it lay well already, and nothing was written.
    """

    snapshot: bytes
    manifest: bytes
    profile: str
    chunks: int
    raw_bytes: int
    stored_bytes: int
    before: Layout
    after: Layout
    unchanged: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk that a profile touches, and the first reference to it in the manifest."""

    name: bytes
    size: int
    ref: int


def repack(
    repository: Repository,
    snapshot: bytes,
    profile: str | None = None,
    *,
    level: int = frames.LEVEL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repacked:
    """Lay what ``profile`` names of ``snapshot`` side by side; see ``find_profile`` for which.

    ``progress`` is told raw bytes stored and to be stored. Memory: ``BATCH``, what ``PackWriter``
    holds, and the snapshot's metadata. May run beside pushes and other repacks.

    Raises ``NotFoundError`` if there is no profile, ``CorruptError``, ``ConflictError``, and the
    errors of the store.
    """
    manifest = repository.snapshot(snapshot).manifest
    found = find_profile(repository, snapshot, profile)
    if found is None:
        what = f"profile {profile!r}" if profile else "profile"
        raise NotFoundError(
            f"there is no {what} of this snapshot", hint="record one with: envstore profile"
        )
    root, locations = repository.located(manifest)
    names = bytearray()
    entries = read_entries(_noting(repository.parts(root, locations), names))
    chunks = touched_chunks(entries, found.profile.ranges)
    raw = sum(chunk.size for chunk in chunks)
    before = _layout(repository, chunks, locations)
    if _is_good(before, chunks, locations):
        return Repacked(
            snapshot, manifest, found.name, len(chunks), raw, 0, before, before, unchanged=True
        )
    index = DedupIndex()
    with writing(repository, f"repack {snapshot.hex()}") as (_, inside):
        writer = PackWriter(inside.objects, index, level=level)
        try:
            done = 0
            for chunk, data in _read(inside, chunks, locations):
                writer.add(chunk.name, data)
                done += chunk.size
                progress(done, raw)
            writer.flush()
        finally:
            writer.close()
        locations = _replace(inside, manifest, root, bytes(names), index)
    after = _layout(repository, chunks, locations)
    return Repacked(
        snapshot, manifest, found.name, len(chunks), raw, writer.stored_bytes, before, after,
        unchanged=False,
    )  # fmt: skip


def _noting(parts: Iterable[Part], names: bytearray) -> Iterator[Part]:
    """Pass ``parts`` on, collecting the digests of all references."""
    for part in parts:
        names += part.ref_digests
        yield part


def touched_chunks(entries: Iterable[Entry], ranges: Sequence[Range]) -> list[_Chunk]:
    """Return the chunks that ``ranges`` touch, each once, in the order of the ranges."""
    of_file: dict[bytes, list[tuple[int, Range]]] = {}
    for turn, item in enumerate(ranges):
        of_file.setdefault(item.path, []).append((turn, item))
    turns: dict[bytes, tuple[int, int, int]] = {}
    number = 0
    for entry in entries:
        wanted = sorted(of_file.get(entry.path, ()), key=lambda item: item[1].offset)
        if not wanted:
            number += len(entry.refs)
            continue
        at = first = 0
        for name, size in entry.refs:
            while first < len(wanted) and wanted[first][1].offset + wanted[first][1].length <= at:
                first += 1
            last = first
            while last < len(wanted) and wanted[last][1].offset < at + size:
                last += 1
            if name != HOLE and last > first:
                place = min(turn for turn, _ in wanted[first:last]), number, size
                turns[name] = min(place, turns.get(name, place))
            at += size
            number += 1
    ordered = sorted((place, name) for name, place in turns.items())
    return [_Chunk(name, size, ref) for (_, ref, size), name in ordered]


def _frame(locations: Locations, chunk: _Chunk) -> FrameRef:
    number = locations.ref_frames[chunk.ref]
    if number == NOWHERE:
        raise CorruptError(f"locations: chunk {chunk.name.hex()} is nowhere")
    return locations.frames[number]


def _layout(repository: Repository, chunks: Sequence[_Chunk], locations: Locations) -> Layout:
    groups = repository.fetcher.plan(_frame(locations, chunk) for chunk in chunks)
    spans = (group[-1].offset + group[-1].stored - group[0].offset for group in groups)
    return Layout(len(groups), sum(spans))


def _is_good(layout: Layout, chunks: Sequence[_Chunk], locations: Locations) -> bool:
    """Whether a layout is about as good as a repack would make it."""
    need = 0.0
    for chunk in chunks:
        frame = _frame(locations, chunk)
        need += frame.stored * chunk.size / max(1, frame.raw)
    # A pack takes three requests; what one of them costs may be spent on bytes as well.
    return (
        layout.requests <= 3 * (need // TARGET_SIZE + 1) and layout.bytes <= _WORTH * need + MAX_GAP
    )


def _read(
    repository: Repository, chunks: Sequence[_Chunk], locations: Locations
) -> Iterator[tuple[_Chunk, memoryview]]:
    """Yield the chunks with their bytes, checked, in their order."""
    for batch in _batches(chunks, locations):
        wanted = {_frame(locations, chunk): None for chunk in batch}
        raw = repository.load_frames(list(wanted))
        for chunk in batch:
            start = locations.ref_offsets[chunk.ref]
            data = memoryview(raw[_frame(locations, chunk).digest])[start : start + chunk.size]
            if digest(data) != chunk.name:
                raise CorruptError(f"chunk {chunk.name.hex()} is not where its locations say")
            yield chunk, data


def _batches(chunks: Sequence[_Chunk], locations: Locations) -> Iterator[list[_Chunk]]:
    """Cut ``chunks`` where their frames would take more than ``BATCH``."""
    batch: list[_Chunk] = []
    held: set[int] = set()
    size = 0
    for chunk in chunks:
        number = locations.ref_frames[chunk.ref]
        if number not in held:
            raw = _frame(locations, chunk).raw
            if batch and size + raw > BATCH:
                yield batch
                batch, held, size = [], set(), 0
            held.add(number)
            size += raw
        batch.append(chunk)
    if batch:
        yield batch


def _replace(
    repository: Repository, manifest: bytes, root: Root, names: bytes, index: DedupIndex
) -> Locations:
    """Let a manifest's locations lead to the places in ``index``; returns the new ones.

    Whatever others make of them at the same time stays: what is replaced is what is there now.
    """
    refs = sum(part.refs for part in root.parts)

    def change(data: bytes) -> tuple[bytes | None, Locations]:
        old = open_locations(data, manifest, parts=len(root.parts), refs=refs)
        new = _moved(old, names, index)
        return new.seal(), new

    return replace_locations(repository.objects, manifest, change)


def _moved(old: Locations, names: bytes, index: DedupIndex) -> Locations:
    """Return ``old`` with the chunks that ``index`` knows where it says."""
    new = Locations()
    numbers: dict[tuple[bytes, int], int] = {}

    def number(frame: FrameRef) -> int:
        found = numbers.setdefault((frame.pack, frame.offset), len(new.frames))
        if found == len(new.frames):
            new.frames.append(frame)
            if frame.anchor is not None:
                new.frames.append(frame.anchor)
        return found

    new.part_frames.extend(number(old.frames[at]) for at in old.part_frames)
    new.part_offsets.extend(old.part_offsets)
    for ref, (at, offset) in enumerate(zip(old.ref_frames, old.ref_offsets, strict=True)):
        place = index.find(names[ref * DIGEST_SIZE : (ref + 1) * DIGEST_SIZE])
        if place is not None:
            new.ref_frames.append(number(index.frames[place[0]]))
            new.ref_offsets.append(place[1])
        else:
            new.ref_frames.append(at if at == NOWHERE else number(old.frames[at]))
            new.ref_offsets.append(offset)
    return new
