"""Moving: live parts of packs that are largely dead go into new packs, so that the old ones can go.

Frames that are live as a whole are copied as they are stored, once their bytes were checked; of
others the live chunks become a new frame of the same kind. The order stays, so that what a start
reads side by side is read so still. Packs that hold anchors of differences are left alone: the
differences name their places.

In batches of ``BATCH`` bytes, each in a writer's session of its own: new packs, segments that list
them, the list of moves, then the locations by compare-and-swap. Whoever dies before the list has
changed nothing; whoever dies behind it is finished by the next collector. Cost: what is needed of
the packs is read and written once, and the locations of all live manifests are read once for each
batch. Memory: a pack and its upload, and 700 bytes for each frame of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from envstore.errors import CorruptError, NotFoundError
from envstore.store.anchors import decode
from envstore.store.damage import damaged_packs
from envstore.store.digest import digest, parse_hex
from envstore.store.fetch import FrameFetcher
from envstore.store.frames import Codec, Frame, encode_frame
from envstore.store.gc.marking import Marks, Progress
from envstore.store.gc.moves import KEY, Move, encode_moves, open_moves
from envstore.store.gc.relinking import by_place, relink
from envstore.store.gc.survey import Survey
from envstore.store.gc.usage import live_chunks, read_pack_table
from envstore.store.index import MAX_CHUNKS, encode_segment, segment_key
from envstore.store.locations import FrameRef, locations_key
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.body import Buffer
from envstore.store.packing import SEGMENT_PACKS
from envstore.store.packs import Pack, PackBuilder, pack_key
from envstore.store.repository import Repository
from envstore.store.sessions import Session, writing
from envstore.store.verify import DAMAGE

BATCH = 1 << 30
MAX_MOVED = 0.25
"""How much a run moves at most, as a share of the live bytes, unless that is below ``BATCH``."""
_MAX_FRAMES = 100_000


@dataclass(slots=True)
class Moved:
    """What was moved: numbers of the packs that nobody needs now, bytes written, and damage."""

    packs: list[int] = field(default_factory=list)
    written: int = 0
    damaged: list[str] = field(default_factory=list)


def choose(
    found: Survey, marks: Marks, needed: Sequence[int], max_unused: float, avoid: Collection[bytes]
) -> list[int]:
    """Return the packs to move: the least live first, until what stays dead is little enough."""
    packs = found.packs
    live = [number for number in range(1, len(packs) + 1) if marks.why[number]]
    total = sum(needed[number] for number in live)
    # One that was cut holds less than is needed of it.
    unused = sum(max(0, packs.sizes[number] - needed[number]) for number in live)
    candidates = [
        number
        for number in live
        if needed[number] < packs.sizes[number]
        and not marks.anchors[number]
        and not marks.whole[number]
        and packs.names[number] not in avoid
    ]
    candidates.sort(key=lambda number: (needed[number] / packs.sizes[number], number))
    chosen: list[int] = []
    moved = 0
    for number in candidates:
        if unused <= max_unused * total:
            break
        moved += needed[number]
        if chosen and moved > max(BATCH, MAX_MOVED * total):
            break
        chosen.append(number)
        unused -= packs.sizes[number] - needed[number]
    return sorted(chosen)


def move(
    repository: Repository,
    found: Survey,
    marks: Marks,
    needed: Sequence[int],
    max_unused: float,
    progress: Progress,
) -> Moved:
    """Move the live parts of packs until at most ``max_unused`` of the live bytes are dead in them.

    May run beside pushes and other repacks. Raises ``SessionLostError``, ``ConflictError`` and the
    errors of the store; damaged packs stay where they are, and are told of.
    """
    result = Moved()
    avoid = damaged_packs(repository.objects)
    chosen = choose(found, marks, needed, max_unused, avoid)
    manifests = [
        (manifest, found.small.get(locations_key(manifest), 0)) for manifest in marks.manifests
    ]
    done, total = 0, sum(needed[number] for number in chosen)
    for batch in _batches(chosen, needed):
        with writing(repository, "gc") as (_, inside):
            copier = _Copier(inside, marks)
            for number in batch:
                progress("moving", done >> 20, total >> 20)
                name, size = found.packs.names[number], found.packs.sizes[number]
                try:
                    copier.copy(number, read_pack_table(inside.objects, name, size))
                except DAMAGE as error:
                    copier.forget(name)
                    result.damaged.append(f"{pack_key(name)}: {error.message}")
                done += needed[number]
            moves = copier.finish()
            result.written += copier.written
            if not moves:
                continue
            inside.objects.put(KEY, encode_moves(moves))
            stuck = relink(inside.objects, manifests, by_place(moves), progress)
            inside.objects.delete(KEY)
            gone = {move.old.pack for move in moves} - stuck
            result.packs += [number for number in batch if found.packs.names[number] in gone]
    return result


def resume(repository: Repository, progress: Progress) -> None:
    """Finish the batch of a collector that died while it changed locations. One request if none."""
    try:
        moves = open_moves(repository.objects.get(KEY))
    except NotFoundError:
        return
    except DAMAGE:
        # Then nothing was moved by it, or what was is where it leads.
        repository.objects.delete(KEY)
        return
    with writing(repository, "gc") as (session, inside):
        objects = inside.objects
        if _are_there(session, objects, {move.new.pack for move in moves}):
            manifests = [
                (name, info.size)
                for info in objects.list("locations/")
                if (name := parse_hex(info.key.removeprefix("locations/"))) is not None
                and not session.is_doomed(info.key)
            ]
            relink(objects, manifests, by_place(moves), progress)
        objects.delete(KEY)


def _are_there(session: Session, objects: ObjectStore, packs: set[bytes]) -> bool:
    """Claim ``packs``; returns whether all of them are in the store."""
    session.claim([pack_key(pack) for pack in packs])
    return all(objects.size(pack_key(pack)) is not None for pack in sorted(packs))


def _batches(chosen: Sequence[int], needed: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for number in chosen:
        if batch and size + needed[number] > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += needed[number]
    if batch:
        yield batch


class _Copier:
    """Fills new packs with what is live of old ones. Use from one thread."""

    def __init__(self, repository: Repository, marks: Marks) -> None:
        self._objects = repository.objects
        self._fetcher = FrameFetcher(repository.objects, None)
        self._marks = marks
        self._builder = PackBuilder()
        self._building: list[Move] = []
        self._moves: list[Move] = []
        self._listed: list[Pack] = []
        self.written = 0

    def copy(self, number: int, pack: Pack) -> None:
        """Take over what is live of one pack. Raises one of ``DAMAGE``."""
        alive = set(self._marks.of_pack(number))
        wanted: dict[FrameRef, tuple[Frame, list[tuple[bytes, int, int]]]] = {}
        for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
            chunks = live_chunks(frame, self._marks.frame(number, offset), alive)
            if chunks:
                facts = frame.stored, frame.raw, frame.codec, frame.digest
                wanted[FrameRef(pack.digest, offset, *facts)] = frame, chunks
        for group in self._fetcher.plan(wanted):
            start = group[0].offset
            length = group[-1].offset + group[-1].stored - start
            data = memoryview(self._objects.get_range(pack_key(pack.digest), start, length))
            for ref in group:
                frame, chunks = wanted[ref]
                stored = data[ref.offset - start : ref.offset - start + ref.stored]
                self._take(ref, frame, chunks, stored)

    def forget(self, pack: bytes) -> None:
        """Take none of the frames of ``pack`` for moved."""
        self._moves = [move for move in self._moves if move.old.pack != pack]
        self._building = [
            replace(move, old=replace(move.old, pack=b"")) if move.old.pack == pack else move
            for move in self._building
        ]

    def finish(self) -> list[Move]:
        """Store what is left and list it; returns where everything lies."""
        self._end_pack()
        self._write_segment()
        return self._moves

    def _take(
        self,
        ref: FrameRef,
        frame: Frame,
        chunks: list[tuple[bytes, int, int]],
        stored: memoryview,
    ) -> None:
        raw = decode(ref, stored, self._fetcher.load)
        if len(chunks) == len(frame.sizes):
            self._add(ref, frame, bytes(stored), None)
            return
        view = memoryview(raw)
        parts = [(name, view[start : start + size]) for name, start, size in chunks]
        if frame.codec == Codec.XOR or any(digest(data) != name for name, data in parts):
            raise CorruptError(f"frame {frame.digest.hex()} holds other chunks than its table says")
        made, data = encode_frame(parts, codec=Codec(frame.codec))
        places = dict(
            zip((start for _, start, _ in chunks), (at for _, at, _ in made.chunks()), strict=True)
        )
        self._add(ref, made, bytes(data), places)

    def _add(
        self, ref: FrameRef, frame: Frame, data: Buffer, places: dict[int, int] | None
    ) -> None:
        new = FrameRef(b"", self._builder.size, frame.stored, frame.raw, frame.codec, frame.digest)
        self._builder.add(frame, data)
        self._building.append(Move(ref, new, places))
        if self._builder.full or len(self._building) >= _MAX_FRAMES:
            self._end_pack()

    def _end_pack(self) -> None:
        finished = self._builder.finish()
        if finished is None:
            return
        pack, data = finished
        self._objects.put(pack_key(pack.digest), data)
        self.written += pack.size
        self._moves += [
            replace(move, new=replace(move.new, pack=pack.digest))
            for move in self._building
            if move.old.pack
        ]
        self._builder, self._building = PackBuilder(), []
        self._listed.append(pack)
        chunks = sum(len(frame.sizes) for listed in self._listed for frame in listed.frames)
        if len(self._listed) >= SEGMENT_PACKS or chunks >= MAX_CHUNKS:
            self._write_segment()

    def _write_segment(self) -> None:
        if self._listed:
            name, data = encode_segment(self._listed)
            self._objects.put(segment_key(name), data)
            self.written += len(data)
            self._listed = []
