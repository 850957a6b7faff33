"""Sealed objects and what packs are made of.

All but ``envelope`` and ``pack`` are given the *body*, which is sealed again, as a digest would
stop every changed byte otherwise.
"""

from __future__ import annotations

import struct
from array import array

from envstore.store import index, locations, locks, manifest, packages, packs, profiles, samples
from envstore.store.anchors import decode as decode_difference
from envstore.store.binary import inflate, seal, unseal
from envstore.store.codecs import split, xor
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry
from envstore.store.frames import (
    Codec,
    Frame,
    decode_frame,
    decode_table,
    encode_frame,
    encode_table,
)
from envstore.store.locations import FrameRef, Locations
from envstore.store.packs import Pack, PackBuilder, parse_pack, read_table
from envstore.store.source import Kind
from tests.fuzz.harness import expect, target

_MAGIC = b"ESTEST01"
_TEXT = b"all work and no play makes Jack a dull boy\n" * 40


def _frames() -> list[tuple[Frame, bytes]]:
    chunks = [(digest(data), data) for data in (b"one", _TEXT, bytes(5000))]
    found = [encode_frame(chunks[:1]), encode_frame(chunks), encode_frame(chunks[2:])]
    found.append(encode_frame([(digest(_TEXT * 3), _TEXT * 3)], codec=Codec.SPLIT))
    return [(frame, bytes(data)) for frame, data in found]


def some_pack() -> tuple[Pack, bytes]:
    builder = PackBuilder()
    for frame, data in _frames():
        builder.add(frame, data)
    found = builder.finish()
    assert found is not None
    return found[0], b"".join(map(bytes, found[1]))


def some_entries() -> list[Entry]:
    """Return a small tree with one of everything."""
    name = digest(b"chunk")
    refs = ((digest(b"a"), 10), (HOLE, 1 << 20), (name, 7))
    whole = digest(b"whole")
    both = {"mode": 0o755, "mtime_ns": 1_700_000_000_123_456_789}
    return [
        Entry(b"bin", Kind.DIRECTORY, **both),
        Entry(b"bin/tool", Kind.FILE, True, 5, name, ((name, 5),), **both),
        Entry(b"bin/same", Kind.FILE, True, 5, name, ((name, 5),), link=b"bin/tool", **both),
        Entry(b"data", Kind.FILE, False, (1 << 20) + 17, whole, refs, **both),
        Entry(b"empty", Kind.FILE, **both),
        Entry(b"link", Kind.SYMLINK, target=b"../bin/tool", **both),
    ]


def _sorted_entries() -> list[Entry]:
    return sorted(some_entries(), key=lambda entry: manifest.sort_key(entry.path))


def body_of(magic: bytes, sealed: bytes) -> bytes:
    return unseal(magic, sealed, limit=1 << 30, what="a seed")[0]


def _no_seeds() -> list[bytes]:
    return [seal(_MAGIC, _TEXT), seal(_MAGIC, b""), seal(_MAGIC, bytes(100_000))]


@target("envelope", _no_seeds, words=(_MAGIC, b"ESTEST02", b"\x28\xb5\x2f\xfd"))
def envelope(data: bytes) -> None:
    body, name = unseal(_MAGIC, data, limit=1 << 20, what="an object")
    expect(digest(body) == name, "a body of another digest")
    expect(unseal(_MAGIC, seal(_MAGIC, body), limit=1 << 20, what="again")[0] == body, "sealing")


def _zstd_seeds() -> list[bytes]:
    bodies = (_TEXT, b"", bytes(70_000))
    return [len(body).to_bytes(4, "little") + seal(_MAGIC, body)[44:] for body in bodies]


@target("zstd", _zstd_seeds, words=(b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"))
def zstd(data: bytes) -> None:
    """Four bytes for the length that is announced, then what should be one zstd frame."""
    size = int.from_bytes(data[:4], "little")
    expect(len(inflate(data[4:], size, "it")) == size, "more or less than was announced")


@target("frame-table", lambda: [encode_table([frame for frame, _ in _frames()]), encode_table([])])
def frame_table(data: bytes) -> None:
    frames = decode_table(data)
    expect(encode_table(frames) == data, "the table is not what its frames make")
    for frame in frames:
        expect(sum(size for *_, size in frame.chunks()) == frame.raw, "chunks beside the frame")


def _frame_seeds() -> list[bytes]:
    return [
        bytes((frame.codec, 0, 0)) + frame.raw.to_bytes(4, "little") + d for frame, d in _frames()
    ]


@target("frame", _frame_seeds)
def frame_of_any_codec(data: bytes) -> None:
    """A byte for the codec, two of nothing, four for the raw length, then the stored bytes."""
    codec, raw = data[0] if data else 0, int.from_bytes(data[3:7], "little")
    stored = data[7:]
    # A digest cannot be made to fit before the frame is decoded; that comes last.
    try:
        decode_frame(stored, codec, raw, bytes(32))
    finally:
        if codec == Codec.RAW:
            expect(
                decode_frame(stored, codec, len(stored), digest(stored)) == stored, "a raw frame"
            )


def _difference_seeds() -> list[bytes]:
    one, other = bytes(range(256)) * 8, bytes(range(255, -1, -1)) * 8
    place = struct.pack("<32sIIIB32s", bytes(32), 8, 2048, 2048, Codec.RAW, digest(one))
    return [place + split(xor(one, other), 4), place + split(bytes(2048), 2)]


@target("frame-difference", _difference_seeds)
def frame_difference(data: bytes) -> None:
    """The stored bytes of a frame of codec 3 that holds 2048 bytes."""
    raw = bytes(range(256)) * 8
    frame = FrameRef(bytes(32), 8, len(data), len(raw), Codec.XOR, digest(raw))
    decode_difference(frame, data, lambda ref: raw)


@target("segment", lambda: [body_of(index.MAGIC, index.encode_segment([some_pack()[0]] * 2)[1])])
def segment(data: bytes) -> None:
    found = index.open_segment(seal(index.MAGIC, data), digest(data))
    name, again = index.encode_segment(found)
    expect(name == digest(data), "a segment of another name")
    expect(index.open_segment(again, name) == found, "a segment is not read as written")
    known = index.DedupIndex()
    known.add_packs(found)


def _sample_seeds() -> list[bytes]:
    made = samples.Sample((digest(b"1"), digest(b"2")), array("Q", (1, 5)), array("I", (0, 1)))
    return [body_of(samples.MAGIC, made.encode()[1])]


@target("sample", _sample_seeds)
def sample(data: bytes) -> None:
    found = samples.open_sample(seal(samples.MAGIC, data), digest(data))
    expect(found.encode()[0] == digest(data), "a sample of another name")
    for head in found.heads[:100]:
        found.find(head.to_bytes(8, "big") + bytes(24))
    samples.merge_samples([found, found])


@target("pack-table", lambda: [encode_table([frame for frame, _ in _frames()])])
def pack_table(data: bytes) -> None:
    """The body of a table, at the end of a pack that is as long as the first frame fills it."""
    table = seal(packs.TABLE_MAGIC, data)
    tail = table + len(table).to_bytes(4, "little") + packs.FOOTER
    for size in (len(tail) + 8, len(tail) + 8 + 20_000):
        frames = read_table(tail, size, digest(data))
        expect(not isinstance(frames, int), "more of a tail that is whole")


@target("pack", lambda: [some_pack()[1]], words=(packs.HEADER, packs.FOOTER, packs.OLD_FOOTER))
def pack(data: bytes) -> None:
    read_table(data[-64:], len(data), bytes(32))
    parse_pack(data, digest(data))


def _root() -> manifest.Root:
    parts = tuple(info for info, _ in manifest.build_parts(_sorted_entries()))
    return manifest.Root(parts, 6, 4, (1 << 20) + 27, 0o755, 1_700_000_000_000_000_000)


@target("manifest-root", lambda: [_root().encode(), manifest.Root((), 0, 0, 0).encode()])
def manifest_root(data: bytes) -> None:
    root = manifest.open_root(seal(manifest.ROOT_MAGIC, data), digest(data))
    expect(root.encode() == data, "a root is not what it was read from")


def part_seeds() -> list[bytes]:
    from tests.fuzz.targets.relocations import some_plans

    found = [raw for _, raw in manifest.build_parts(_sorted_entries())]
    plain = [Entry(entry.path, entry.kind, entry.executable, entry.size, entry.digest, entry.refs,
                   entry.target, link=entry.link) for entry in _sorted_entries()]  # fmt: skip
    found += [raw for _, raw in manifest.build_parts(plain)]
    placed = [
        Entry(b"%02d" % number, Kind.FILE, False, plan.size, digest(b"x"),
              ((digest(b"x"), plan.size),), relocation=plan.encode())
        for number, plan in enumerate(some_plans())
    ]  # fmt: skip
    placed.append(Entry(b"ln", Kind.SYMLINK, target=b"/old/lib", relocation=b"/old"))
    return found + [raw for _, raw in manifest.build_parts(placed)]


@target("manifest-part", part_seeds)
def manifest_part(data: bytes) -> None:
    part = manifest.decode_part(data)
    entries = list(manifest.read_entries([part]))
    for entry in entries:
        path = entry.path.split(b"/")
        expect(not {b"", b".", b".."} & set(path), f"a path that escapes: {entry.path!r}")
        expect(b"\0" not in entry.path, "a zero byte in a path")
    again = [manifest.decode_part(raw) for _, raw in manifest.build_parts(entries)]
    expect(list(manifest.read_entries(again)) == entries, "entries are not read as written")
    # The same part twice, as a root may list it.
    list(manifest.read_entries([part, part]))


def _some_locations() -> Locations:
    frame = FrameRef(digest(b"p"), 8, 100, 200, Codec.ZSTD, digest(b"f"))
    anchor = FrameRef(digest(b"q"), 8, 300, 300, Codec.RAW, digest(b"a"))
    xored = FrameRef(digest(b"p"), 108, 90, 300, Codec.XOR, digest(b"x"), anchor)
    return Locations(
        [frame, xored, anchor], array("I", (0,)), array("I", (0,)),
        array("I", (0, 1, locations.NOWHERE)), array("I", (7, 0, 0)),
    )  # fmt: skip


@target("locations", lambda: [body_of(locations.MAGIC, _some_locations().seal())])
def some_locations(data: bytes) -> None:
    found = locations.open_locations(seal(locations.MAGIC, data), digest(b"m"), parts=1, refs=3)
    again = locations.open_locations(found.seal(), digest(b"m"), parts=1, refs=3)
    expect(again == found, "locations are not read as written")
    for number in (*found.part_frames, *found.ref_frames):
        expect(number == locations.NOWHERE or number < len(found.frames), "a frame of no number")


def _profile_seeds() -> list[bytes]:
    ranges = (profiles.Range(b"bin/tool", 0, 4096, 2), profiles.Range(b"lib/x", 100, 5))
    made = profiles.Profile((*ranges, profiles.Range(b"bin/tool", 8192, 1)), 1, (b"python", b"-V"))
    return [
        body_of(profiles.MAGIC, made.seal()),
        body_of(profiles.MAGIC, profiles.Profile((), 5).seal()),
    ]


@target("profile", _profile_seeds)
def profile(data: bytes) -> None:
    found = profiles.open_profile(seal(profiles.MAGIC, data), "a profile")
    expect(
        profiles.open_profile(found.seal(), "again") == found, "a profile is not read as written"
    )
    merged = profiles.merge(found, profiles.Profile((profiles.Range(b"bin/tool", 1, 2),), 3))
    expect(profiles.open_profile(merged.seal(), "merged") == merged, "a merged profile")
    profiles.file_ranks(found, {b"bin/tool": 4096})


def _package_seeds() -> list[bytes]:
    frame = FrameRef(digest(b"p"), 8, 1000, 5000, Codec.ZSTD, digest(b"f"))
    entries = tuple(_sorted_entries())
    count = sum(len(entry.refs) for entry in entries)
    holes = [name == HOLE for entry in entries for name, _ in entry.refs]
    found = Locations(
        [frame], ref_frames=array("I", (locations.NOWHERE if hole else 0 for hole in holes)),
        ref_offsets=array("I", [0] * count),
    )  # fmt: skip
    facts = {"name": "x", "elf": [], "prefix": {"a": [1, 2]}}
    made = packages.encode_package(packages.StoredPackage(entries, found, facts))
    return [body_of(packages.MAGIC, made)]


@target("package", _package_seeds, words=(b'{"a":', b"[[[[[["))
def package(data: bytes) -> None:
    found = packages.decode_package(seal(packages.MAGIC, data), "a package")
    again = packages.decode_package(packages.encode_package(found), "again")
    expect(again.entries == found.entries, "a package is not read as written")
    found.learn(index.DedupIndex())


@target("lock-object", lambda: [b'{"version":1}'])
def lock_object(data: bytes) -> None:
    class _One:
        url = "memory:"

        def get(self, key: str) -> bytes:
            return seal(locks.MAGIC, data)

    expect(locks.load_lock_bytes(_One(), digest(data)) == data, "another lock")  # type: ignore[arg-type]
