"""Verify: walks from refs to bytes and reports every object that is not as it should be.

Structure: ref -> snapshot -> manifest -> parts -> locations -> packs present, long enough, and
listing the very frames and chunks the locations name. With data: every pack used is read whole,
and its name, every frame and every chunk are hashed. Of the whole store also the index and stored
packages are checked, and every pack they name: the next push will rely on them. So are profiles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store.anchors import anchor_of, decode
from envstore.store.digest import digest, parse_hex
from envstore.store.frames import Codec, Frame
from envstore.store.locations import FrameRef, Locations
from envstore.store.locks import load_lock_bytes
from envstore.store.manifest import HOLE, Entry, Root, read_entries
from envstore.store.packages import decode_package
from envstore.store.packs import FOOTER_SIZE, Pack, frame_bytes, pack_key, parse_pack, read_table
from envstore.store.profiles import open_profile
from envstore.store.repository import PARALLEL, Repository
from envstore.store.samples import open_sample, sample_key
from envstore.store.snapshots import Snapshot

_TAIL = 256 << 10
DAMAGE = (CorruptError, NotFoundError, UnsupportedFormatError)
"""What is wrong with one object, and does not keep the others from being looked at."""
_Load = Callable[[FrameRef], bytes]


@dataclass(frozen=True, slots=True)
class Problem:
    """One damaged or missing object, why, and which refs or snapshots it harms."""

    object: str
    reason: str
    harms: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """What was checked: counts of objects, and bytes of packs read."""

    snapshots: int = 0
    packs: int = 0
    frames: int = 0
    chunks: int = 0
    bytes_read: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(slots=True)
class _Plan:
    """What the snapshots and the index expect of a pack: frames, chunks and anchors of them.

    The last two by the offset of their frame.
    """

    frames: set[FrameRef] = field(default_factory=set)
    chunks: dict[int, set[tuple[int, int, bytes]]] = field(default_factory=dict)
    anchors: dict[int, FrameRef] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)


def verify(
    repository: Repository,
    targets: Sequence[tuple[str, bytes]],
    *,
    read_data: bool = False,
    whole: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check ``targets``, pairs of a name for the report and a snapshot digest.

    ``whole`` adds what no target leads to: profiles, index segments, samples, and their packs.
    Damage is collected, not raised; ``UnavailableError`` and ``AccessDeniedError`` are raised.
    ``progress`` is told packs done and packs in all. Memory: about 200 bytes a chunk.
    """
    # What is cached here says nothing about what is in the store.
    repository = Repository(repository.objects, repository.config, None)
    report = Report()
    plans: dict[bytes, _Plan] = defaultdict(_Plan)
    damaged: dict[bytes, tuple[str, str]] = {}
    harmed: dict[bytes, list[str]] = defaultdict(list)
    for name, snapshot in targets:
        if snapshot not in harmed:
            report.snapshots += 1
            problem = _check_metadata(repository, snapshot, name, plans)
            if problem is not None:
                damaged[snapshot] = problem
        harmed[snapshot].append(name)
    for snapshot, (object_, reason) in damaged.items():
        report.problems.append(Problem(object_, reason, tuple(harmed[snapshot])))
    if whole:
        report.problems += _check_index(repository, plans)
    names = {name: tuple(users) for users in harmed.values() for name in users[:1]}
    sizes = {
        parse_hex(info.key.rpartition("/")[2]): info.size
        for info in repository.objects.list("packs/")
    }
    work = sorted(plans)
    with ThreadPoolExecutor(PARALLEL if not read_data else 4) as pool:

        def check(pack: bytes) -> tuple[list[str], int]:
            return _check_pack(repository, pack, sizes.get(pack), plans[pack], read_data)

        for i, (pack, (reasons, read)) in enumerate(zip(work, pool.map(check, work), strict=True)):
            report.packs += 1
            report.frames += len(plans[pack].frames)
            report.chunks += sum(len(chunks) for chunks in plans[pack].chunks.values())
            report.bytes_read += read
            users = tuple(sorted({user for n in plans[pack].users for user in names[n]}))
            report.problems += [Problem(f"pack {pack.hex()}", why, users) for why in reasons]
            progress(i + 1, len(work))
    return report


def _check_metadata(
    repository: Repository, name: bytes, user: str, plans: dict[bytes, _Plan]
) -> tuple[str, str] | None:
    """Walk one snapshot's metadata and add what it needs to ``plans``; returns the damage."""
    what = f"snapshot {name.hex()}"
    try:
        snapshot = repository.snapshot(name)
        what = f"manifest {snapshot.manifest.hex()}"
        root, locations = repository.located(snapshot.manifest)
        entries = read_entries(repository.parts(root, locations))
        _expect(plans, user, root, locations, entries, snapshot)
        if snapshot.lock is not None:
            what = f"lock {snapshot.lock.hex()}"
            load_lock_bytes(repository.objects, snapshot.lock)
    except DAMAGE as error:
        return what, error.message
    return None


def _check_index(repository: Repository, plans: dict[bytes, _Plan]) -> list[Problem]:
    """Read what no snapshot leads to, and add the packs listed to ``plans``; returns the damage."""
    found: list[Problem] = []
    objects = repository.objects

    def each(prefix: str, read: Callable[[bytes], object]) -> None:
        for info in objects.list(prefix):
            name = parse_hex(info.key.removeprefix(prefix))
            try:
                if name is None:
                    raise CorruptError(f"{info.key} is not a digest")
                read(name)
            except DAMAGE as error:
                found.append(Problem(info.key, error.message, ()))

    def segment(name: bytes) -> None:
        for pack in repository.segment(name):
            plan = plans[pack.digest]
            for offset, frame in zip(pack.offsets(), pack.frames, strict=True):
                facts = frame.stored, frame.raw, frame.codec, frame.digest
                plan.frames.add(FrameRef(pack.digest, offset, *facts))

    each("index/", segment)

    def package(data: bytes, key: str) -> None:
        for frame in decode_package(data, key).locations.frames:
            plans[frame.pack].frames.add(frame)

    each("samples/", lambda name: open_sample(objects.get(sample_key(name)), name))
    each("locks/", lambda name: load_lock_bytes(objects, name))
    for prefix, check in (("profiles/", open_profile), ("packages/", package)):
        for info in objects.list(prefix):
            try:
                check(objects.get(info.key), info.key)
            except NotFoundError:
                continue  # removed since it was listed
            except DAMAGE as error:
                found.append(Problem(info.key, error.message, ()))
    return found


def _expect(
    plans: dict[bytes, _Plan],
    user: str,
    root: Root,
    locations: Locations,
    entries: Iterable[Entry],
    snapshot: Snapshot,
) -> None:
    planned: set[int] = set()

    def need(number: int, offset: int, size: int, name: bytes) -> None:
        if number >= len(locations.frames):
            raise CorruptError(f"chunk {name.hex()} is nowhere")
        frame = locations.frames[number]
        if offset + size > frame.raw:
            raise CorruptError(f"chunk {name.hex()} reaches beyond its frame")
        plan = plans[frame.pack]
        if number not in planned:
            planned.add(number)
            plan.users.add(user)
            plan.frames.add(frame)
            if frame.anchor is not None:
                plan.anchors[frame.offset] = frame.anchor
                plans[frame.anchor.pack].users.add(user)
                plans[frame.anchor.pack].frames.add(frame.anchor)
        plan.chunks.setdefault(frame.offset, set()).add((offset, size, name))

    for i, info in enumerate(root.parts):
        need(locations.part_frames[i], locations.part_offsets[i], info.size, info.digest)
    number = count = files = logical = 0
    for entry in entries:
        count += 1
        files += entry.kind == 0
        logical += entry.size
        for name, size in entry.refs:
            if name != HOLE:
                need(locations.ref_frames[number], locations.ref_offsets[number], size, name)
            number += 1
    if (count, files, logical) != (root.entries, root.files, root.logical):
        raise CorruptError("the entries do not add up to what the manifest's root says")
    if (files, logical) != (snapshot.files, snapshot.logical_bytes):
        raise CorruptError("the entries do not add up to what the snapshot says")


def _check_pack(
    repository: Repository, name: bytes, size: int | None, plan: _Plan, read_data: bool
) -> tuple[list[str], int]:
    """Return what is wrong with one pack and the bytes read to find out."""
    if size is None:
        return ["it is missing"], 0
    data = b""
    try:
        if read_data:
            data = repository.objects.get(pack_key(name))
            pack = parse_pack(data, name)
            load = repository.fetcher.load
            return _check_table(pack, plan) + _check_frames(pack, plan, data, load), len(data)
        frames, read = _read_tail(repository, name, size)
        return _check_table(Pack(name, size, frames), plan), read
    except DAMAGE as error:
        salvaged = _salvage(data, plan, repository.fetcher.load) if data else []
        return [error.message, *salvaged], len(data)


def _read_tail(repository: Repository, name: bytes, size: int) -> tuple[tuple[Frame, ...], int]:
    length = min(size, _TAIL)
    for _ in range(2):
        if length < FOOTER_SIZE:
            break
        tail = repository.objects.get_range(pack_key(name), size - length, length)
        found = read_table(tail, size, name)
        if not isinstance(found, int):
            return found, length
        length = found
    raise CorruptError(f"pack {name.hex()} is truncated to {size} bytes")


def _check_table(pack: Pack, plan: _Plan) -> list[str]:
    """Compare what the snapshots expect with what the pack says of itself."""
    reasons = []
    present = dict(zip(pack.offsets(), pack.frames, strict=True))
    for ref in sorted(plan.frames, key=lambda ref: ref.offset):
        frame = present.get(ref.offset)
        facts = (ref.stored, ref.raw, ref.codec, ref.digest)
        if frame is None or (frame.stored, frame.raw, frame.codec, frame.digest) != facts:
            reasons.append(f"it has no frame {ref.digest.hex()} at byte {ref.offset}")
    for offset, wanted in sorted(plan.chunks.items()):
        frame = present.get(offset)
        held = {(start, size, name) for name, start, size in frame.chunks()} if frame else wanted
        missing = wanted - held
        if missing:
            reasons.append(f"frame at byte {offset} lacks {len(missing)} chunks it should hold")
    return reasons


def _check_frames(pack: Pack, plan: _Plan, data: bytes, load: _Load) -> list[str]:
    reasons = []
    for (frame, stored), offset in zip(frame_bytes(pack, data), pack.offsets(), strict=True):
        facts = frame.stored, frame.raw, frame.codec, frame.digest
        ref = FrameRef(pack.digest, offset, *facts)
        try:
            raw = memoryview(decode(ref, stored, load))
            if frame.codec == Codec.XOR:
                anchor = anchor_of(ref, stored)
                if plan.anchors.get(offset, anchor) != anchor:
                    reasons.append(f"frame {frame.digest.hex()} has another anchor than is said")
        except DAMAGE as error:
            reasons.append(error.message)
            continue
        if len(frame.sizes) == 1 and frame.digests == frame.digest:
            continue
        for chunk, start, size in frame.chunks():
            if digest(raw[start : start + size]) != chunk:
                reasons.append(f"chunk {chunk.hex()} does not match its digest")
    return reasons


def _salvage(data: bytes, plan: _Plan, load: _Load) -> list[str]:
    """Name the frames that a damaged pack can no longer give."""
    reasons = []
    view = memoryview(data)
    for ref in sorted(plan.frames, key=lambda ref: ref.offset):
        stored = view[ref.offset : ref.offset + ref.stored]
        try:
            decode(ref, stored, load)
        except DAMAGE as error:
            reasons.append(f"{error.message} (byte {ref.offset})")
    return reasons
