"""The format of today is the format of the golden files, byte for byte.

What zstd makes of a body may change with its version, and with it the names of packs; so bodies
are compared unpacked. See ``tests/golden/generate.py``.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.store import canonical
from envstore.store.anchors import decode
from envstore.store.binary import unseal
from envstore.store.digest import digest
from envstore.store.frames import Codec, decode_frame, encode_table
from envstore.store.index import MAX_BODY, encode_segment
from envstore.store.locations import FrameRef
from envstore.store.manifest import build_parts, decode_part, read_entries
from envstore.store.packs import (
    FOOTER_SIZE,
    TABLE_MAGIC,
    Pack,
    frame_bytes,
    parse_pack,
    read_table,
)
from envstore.store.pull import pull
from envstore.store.refs import RefName, read_ref
from envstore.store.repository import Repository
from envstore.store.samples import open_sample
from envstore.store.source import Kind
from envstore.store.verify import verify
from tests import trees
from tests.golden import generate
from tests.golden.content import (
    NS,
    GoldenSource,
    cut_files,
    difference,
    frames,
    noise,
    split_frames,
)
from tests.store.independent_reader import Tree, open_frame
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def golden(tmp_path: Path) -> Iterator[Repository]:
    """A copy of the golden store: reading one makes no files, but a test that fails might."""
    shutil.copytree(generate.STORE, tmp_path / "golden")
    with Repository.open(f"file://{tmp_path}/golden") as repository:
        yield repository


def _only(root: Path, folder: str) -> Path:
    (found,) = (path for path in (root / folder).rglob("*") if path.is_file())
    return found


def _body(path: Path) -> bytes:
    data = path.read_bytes()
    body, name = unseal(data[:8], data, limit=MAX_BODY, what=str(path))
    if path.parent.name != "locations":
        assert name.hex() == path.name
    return body


def test_cut_points() -> None:
    expected = json.loads(generate.CUTS.read_text())
    files = cut_files()
    assert set(expected) == set(files)
    for name, data in files.items():
        assert generate.cut(name, data) == expected[name], name


def test_the_golden_pack_decodes() -> None:
    data = generate.PACK_1.read_bytes()
    pack = parse_pack(data, digest(data))
    assert [frame.codec for frame in pack.frames] == [Codec.RAW, Codec.ZSTD, Codec.ZSTD]
    for contents, (frame, stored) in zip(frames(), frame_bytes(pack, data), strict=True):
        raw = decode_frame(stored, frame.codec, frame.raw, frame.digest)
        assert raw == b"".join(contents)
        names = [(digest(content), len(content)) for content in contents]
        assert [(name, size) for name, _, size in frame.chunks()] == names


@pytest.mark.parametrize(("path", "digit"), [(generate.PACK_1, b"1"), (generate.PACK_2, b"2")])
def test_the_layout_of_packs(path: Path, digit: bytes) -> None:
    data = path.read_bytes()
    assert data[:8] == b"ESPACK0" + digit
    assert data[-8:] == b"ESPKEND" + digit
    pack = _parsed(data)
    (length,) = struct.unpack("<I", data[-12:-8])
    sealed = data[-12 - length : -12]
    body, _ = unseal(TABLE_MAGIC, sealed, limit=MAX_BODY, what="table")
    assert sealed[:8] == b"ESTABL01"
    assert body == encode_table(pack.frames)
    assert pack.digest == digest(data if digit == b"1" else body)
    assert length + FOOTER_SIZE == read_table(data[-12:], len(data), pack.digest)
    assert data[8 : 8 + 3000] == frames()[0][0]


def _parsed(data: bytes) -> Pack:
    """Parse a pack that is not known by its name."""
    (length,) = struct.unpack("<I", data[-12:-8])
    body, _ = unseal(TABLE_MAGIC, data[-12 - length : -12], limit=MAX_BODY, what="table")
    return parse_pack(data, digest(data if data[:8] == b"ESPACK01" else body))


@pytest.mark.parametrize("path", [generate.PACK_1, generate.PACK_2])
def test_todays_frames_are_those_of_the_golden_packs(path: Path) -> None:
    old = _parsed(path.read_bytes())
    new = _parsed(generate.pack())
    for one, two in zip(old.frames, new.frames, strict=True):
        assert (one.codec, one.raw, one.digest) == (two.codec, two.raw, two.digest)
        assert (one.sizes, one.digests) == (two.sizes, two.digests)


def test_the_golden_pack_of_a_checkpoint_decodes() -> None:
    data = generate.CHECKPOINT_PACK.read_bytes()
    pack = _parsed(data)
    assert [frame.codec for frame in pack.frames] == [0, 0, 2, 2, 2, 2, 3]
    assert data[8:3008] == noise("large", 3_000)
    rows = list(zip(pack.frames, pack.offsets(), strict=True))
    assert [data[at] for _, at in rows[2:6]] == [1, 2, 4, 8]
    later, base = difference()

    def load(wanted: FrameRef) -> bytes:
        assert wanted == generate.anchor()
        return base

    expected = [noise("large", 3_000), noise("a", 300) + noise("b", 1) + noise("c", 40)]
    for content, (frame, at) in zip([*expected, *split_frames(), later], rows, strict=True):
        ref = FrameRef(pack.digest, at, frame.stored, frame.raw, frame.codec, frame.digest)
        assert decode(ref, data[at : at + frame.stored], load) == content
        if frame.codec != Codec.XOR:
            stored = data[at : at + frame.stored]
            assert open_frame(frame.codec, stored, frame.raw, frame.digest) == content
    today = _parsed(generate.checkpoint_pack()).frames
    for one, two in zip(pack.frames, today, strict=True):
        assert (one.codec, one.raw, one.digest) == (two.codec, two.raw, two.digest)


def test_the_golden_composed_part() -> None:
    raw = generate.COMPOSED.read_bytes()
    assert generate.composed_part() == raw
    entries = {entry.path: entry for entry in read_entries([decode_part(raw)])}
    assert [entry.path for entry in entries.values() if entry.composed] == [
        b"all",
        b"run",
        b"zeros",
    ]
    assert {path.decode(): entries[path].digest.hex() for path in (b"all", b"run", b"zeros")} == {
        "all": "3cccd1dd3223b9a82d414be53fe0b359e30120ba99c7a90c4e595a79eaa07008",
        "run": "ab228136261bf652ba835d90e13ac87a26a59feea852ac86091508fd8541c588",
        "zeros": "ba442bd474d78c2b87d66dbcb0b0e12e09131d36d13d4eb9e40c008bff0ddc78",
    }


def test_the_golden_store_is_sound(golden: Repository) -> None:
    name = golden.resolve(generate.REF)
    assert verify(golden, [("golden", name)], read_data=True, whole=True).problems == []


def test_the_golden_store_reads_as_what_was_pushed(golden: Repository) -> None:
    source = GoldenSource()
    expected = {entry.path: entry for entry in source.scan()}
    snapshot = golden.snapshot(golden.resolve(generate.REF))
    entries = list(golden.entries(snapshot.manifest))
    assert {entry.path for entry in entries} == set(expected)
    for entry in entries:
        was = expected[entry.path]
        assert (entry.kind, entry.mode, entry.mtime_ns) == (was.kind, was.mode, was.mtime_ns)
        assert entry.target == was.target
        if entry.kind is Kind.FILE:
            content = source.contents.get(entry.path, source.contents[b"twin"])
            assert (entry.size, entry.digest) == (len(content), digest(content))
            assert entry.executable == bool(was.mode & 0o111)
            assert entry.link == (b"twin" if entry.path == b"zz/twin" else b"")
    root = golden.root(snapshot.manifest)
    assert (root.mode, root.mtime_ns) == (0o751, 1_234_567_890 * NS + 1)
    assert (snapshot.kind, snapshot.message) == ("dir", generate.MESSAGE)
    ref = read_ref(golden.objects, RefName.parse(generate.REF))
    assert (ref.sequence, ref.nonce, ref.updated) == (1, "5a" * 16, generate.CREATED)
    assert golden.config.id == "01234567-89ab-4cde-8f01-23456789abcd"


def test_the_golden_store_can_be_pulled(golden: Repository, tmp_path: Path) -> None:
    pull(golden, golden.resolve(generate.REF), tmp_path / "copy")
    facts = trees.describe(tmp_path / "copy")
    assert facts[b"."].mode == 0o751
    assert facts[b"zz/twin"].names == (b"twin", b"zz/twin")
    assert facts[b"names/dangling"].target == b"../no\xffwhere"
    for path, content in GoldenSource().contents.items():
        assert facts[path].digest == digest(content).hex()


def test_a_stranger_can_read_the_golden_store() -> None:
    tree = Tree(generate.STORE, f"refs/{generate.REF.replace(':', '/')}")
    contents = GoldenSource().contents
    assert {path: bytes(tree.items[path].content) for path in contents} == contents


def test_todays_writers_make_the_golden_bodies(golden: Repository, tmp_path: Path) -> None:
    """Decoded and encoded again, every object is what it was."""
    root = generate.STORE
    snapshot_path = _only(root, "snapshots")
    snapshot = golden.snapshot(bytes.fromhex(snapshot_path.name))
    assert snapshot.encode() == snapshot_path.read_bytes()
    manifest, locations = golden.located(snapshot.manifest)
    assert manifest.encode() == _body(_only(root, "manifests"))
    (tmp_path / "locations").mkdir()
    (tmp_path / "locations" / "again").write_bytes(locations.seal())
    assert _body(tmp_path / "locations" / "again") == _body(_only(root, "locations"))
    rows = build_parts(read_entries(golden.parts(manifest, locations)))
    assert tuple(info for info, _ in rows) == manifest.parts
    segment = _only(root, "index")
    name, data = encode_segment(golden.segment(bytes.fromhex(segment.name)))
    assert name.hex() == segment.name
    assert unseal(b"ESINDX01", data, limit=MAX_BODY, what="it")[0] == _body(segment)
    sample = _only(root, "samples")
    found = open_sample(sample.read_bytes(), bytes.fromhex(sample.name))
    assert len(found.heads) > 1
    name, data = found.encode()
    assert name.hex() == sample.name
    assert unseal(b"ESSAMP01", data, limit=MAX_BODY, what="it")[0] == _body(sample)
    ref = root / "refs" / generate.REF.replace(":", "/")
    name = RefName.parse(generate.REF)
    encoded = canonical.decode(read_ref(golden.objects, name).encode(name), "it")
    assert encoded.pop("ref") == f"{name.namespace}/{name.name}/{name.tag}"
    assert encoded == canonical.decode(ref.read_bytes(), "it")


def test_a_push_of_today_is_the_golden_one(golden: Repository, tmp_path: Path) -> None:
    generate.store(tmp_path / "new")
    old, new = generate.STORE, tmp_path / "new"
    for name in ("envstore.json", "refs/" + generate.REF.replace(":", "/")):
        # Those of today have a check besides, and refs say which they are.
        written = canonical.decode((new / name).read_bytes(), name)
        written.pop("ref", None)
        assert written == canonical.decode((old / name).read_bytes(), name)
    for folder in ("snapshots", "manifests"):
        assert _only(new, folder).name == _only(old, folder).name
    assert _only(new, "snapshots").read_bytes() == _only(old, "snapshots").read_bytes()
    assert _body(_only(new, "manifests")) == _body(_only(old, "manifests"))
    # Where things lie may depend on how well they were compressed, but not what lies where.
    with Repository.open(f"file://{new}") as repository:
        manifest = bytes.fromhex(_only(new, "manifests").name)
        (_, one), (_, two) = golden.located(manifest), repository.located(manifest)
        assert [(f.raw, f.digest) for f in one.frames] == [(f.raw, f.digest) for f in two.frames]
        assert (one.part_frames, one.part_offsets) == (two.part_frames, two.part_offsets)
        assert (one.ref_frames, one.ref_offsets) == (two.ref_frames, two.ref_offsets)


def test_todays_push_finds_what_the_golden_store_holds(tmp_path: Path) -> None:
    with Store(tmp_path / "work") as store:
        shutil.rmtree(tmp_path / "work/objects")
        shutil.copytree(generate.STORE, tmp_path / "work/objects")
        # Whose one segment would only be looked into for a hook, and there may be none.
        shutil.rmtree(tmp_path / "work/objects/samples")
        result = store.push(GoldenSource(), "another")
        assert result.new_chunk_bytes == 0
        assert result.manifest.hex() == _only(generate.STORE, "manifests").name
