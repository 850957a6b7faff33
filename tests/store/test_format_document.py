"""docs/format.md is right: what envstore stores can be read with that document alone."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from envstore.store import parts, samples
from envstore.store.config import init_store
from envstore.store.index import open_segment
from envstore.store.objects import open_objects
from envstore.store.push import PushOptions, push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource, Source
from envstore.store.statcache import StatCache
from tests.relocating import RelocatingSource, sample
from tests.store import independent_packs as packs
from tests.store.independent_reader import DIRECTORY, FILE, HOLE, LINK, Tree, digest
from tests.store.independent_relocation import package_of, relocate

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
MIB = 1 << 20
NS = 1_000_000_000
MESSAGE = 'one "two"\\\t\n\r\b\f\x01\x1f\x7fü\u2028🙂'


def _noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _safetensors(*tensors: bytes, gap: int = 0) -> bytes:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for i, tensor in enumerate(tensors):
        header[f"layer.{i}"] = {
            "dtype": "U8",
            "shape": [len(tensor)],
            "data_offsets": [at + gap, at + gap + len(tensor)],
        }
        at += len(tensor)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors)


def _contents() -> Iterator[tuple[bytes, bytes]]:
    """Yield files that between them meet every rule of sections 5 and 9."""
    yield b"empty", b""
    yield b"byte", b"x"
    yield b"16KiB", _noise(16384, 1)
    yield b"16KiB+1", _noise(16385, 2)
    yield b"noise", _noise(700_001, 3)
    yield b"copy of noise", _noise(700_001, 3)
    yield b"nearly noise", b"shifted" + _noise(700_001, 3)
    yield b"text", b"".join(b"line %d\n" % n for n in range(60_000))
    yield b"zero block", bytes(MIB)
    yield b"zeros", bytes(2 * MIB + 70_000)
    yield b"sparse", bytes(MIB) + _noise(300_000, 4) + bytes(3 * MIB) + b"end"
    yield b"no hole", b"x" + bytes(MIB)
    tensors = _noise(5 * MIB, 5), b"", bytes(2 * MIB), _noise(3, 6)
    yield b"m.safetensors", _safetensors(*tensors)
    yield b"reordered.safetensors", _safetensors(*reversed(tensors))
    yield b"gap.safetensors", _safetensors(_noise(90_000, 7), gap=1)
    yield b"cut.safetensors", _safetensors(_noise(90_000, 7))[:-1]
    yield b"not.safetensors", _noise(100_000, 8)
    for path in (b"a", b"a/b", b"a-b", b"a.b", b"a0", b"a/b-", b"a/b/c", b"a\x01"):
        yield b"order/" + path + b"/leaf", path
    yield b"names/\xff\xfe not UTF-8", b"raw"
    yield b"names/new\nline", b"n"
    yield b"names/" + b"l" * 255, b"long"
    for n in range(1500):
        yield b"many/%d/%d" % (n % 7, n), b"%d" % n


def _make_tree(root: Path) -> None:
    base = os.fsencode(root)
    for path, content in _contents():
        full = os.path.join(base, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as file:
            file.write(content)
    os.makedirs(base + b"/hollow/deep/er")
    os.symlink(b"../byte", base + b"/order/link")
    os.symlink(b"/nowhere/\xff at all", base + b"/dangling")
    os.symlink(b"order", base + b"/to a directory")
    os.link(base + b"/noise", base + b"/again noise")
    os.link(base + b"/noise", base + b"/order/noise")
    os.link(base + b"/empty", base + b"/names/empty")
    for path, mode, mtime in (
        (b"/byte", 0o755, 1_600_000_000_123_456_789),
        (b"/text", 0o400, -5 * NS + 1),
        (b"/noise", 0o2711, 0),
        (b"/hollow", 0o1777, 4_000_000_000 * NS),
        (b"/order", 0o700, 17),
        (b"", 0o2750, 1_234_567_890_000_000_007),
    ):
        os.chmod(base + path, mode)
        os.utime(base + path, ns=(mtime, mtime))


def _push(store: Path, source: Source, ref: str, message: str = "") -> None:
    with Repository.open(str(store)) as repository:
        cache = StatCache(store.parent / "stat.db")
        try:
            push(
                repository, source, RefName.parse(ref), cache, options=PushOptions(message=message)
            )
        finally:
            cache.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tree"
    _make_tree(root)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    root = tmp_path_factory.mktemp("store") / "store"
    objects = open_objects(str(root), create=True)
    init_store(objects)
    objects.close()
    _push(root, DirectorySource(tree), "dir", MESSAGE)
    _push(root, DirectorySource(tree, kind="model", normalise=True), "zoo/model:v1")
    return root


def _compare(found: Tree, root: Path, *, normalised: bool = False) -> None:
    base = os.fsencode(root)
    expected = {}
    for folder, folders, files in os.walk(base):
        for name in folders + files:
            full = os.path.join(folder, name)
            expected[os.path.relpath(full, base)] = os.lstat(full)
    assert set(found.items) == set(expected)
    first: dict[int, bytes] = {}
    for path, item in found.items.items():
        st = expected[path]
        full = os.path.join(base, path)
        kind = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}
        assert item.kind == kind[stat.S_IFMT(st.st_mode)], path
        assert item.executable == (item.kind == FILE and bool(st.st_mode & 0o111)), path
        assert item.target == (os.readlink(full) if item.kind == LINK else b""), path
        if item.kind == FILE:
            with open(full, "rb") as file:
                assert item.content == file.read(), path
        if normalised:
            assert (item.mode, item.mtime_ns, item.link) == (None, None, b""), path
            continue
        mode = 0o777 if item.kind == LINK else stat.S_IMODE(st.st_mode)
        assert (item.mode, item.mtime_ns) == (mode, st.st_mtime_ns), path
        name = first.setdefault(st.st_ino, path)
        assert item.link == (b"" if name == path or item.kind != FILE else name), path


def test_every_byte_mode_time_and_link(store: Path, tree: Path) -> None:
    found = Tree(store, "refs/default/dir/latest")
    _compare(found, tree)
    st = tree.stat()
    assert (found.mode, found.mtime_ns) == (stat.S_IMODE(st.st_mode), st.st_mtime_ns)
    assert sum(1 for item in found.items.values() if item.link) == 3
    assert found.snapshot["kind"] == "dir"
    assert found.snapshot["message"] == MESSAGE
    assert found.snapshot["parents"] == []
    assert found.ref["sequence"] == 1


def test_a_normalised_tree(store: Path, tree: Path) -> None:
    found = Tree(store, "refs/zoo/model/v1")
    _compare(found, tree, normalised=True)
    assert (found.mode, found.mtime_ns, found.snapshot["kind"]) == (0, 0, "model")


@pytest.mark.parametrize("prefix", [b"/mnt/x", b"/a blank/y", b"/" + b"z" * 79])
def test_relocated_files(store: Path, tmp_path: Path, prefix: bytes) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    files = sample()
    _push(copy, RelocatingSource(files), "relocated")
    found = Tree(copy, "refs/default/relocated/latest")
    assert found.starts == [b"bin"]
    for path, made in files.items():
        item = found.items[path]
        if made.link:
            assert item.relocation in (made.placeholder, b"")
            assert item.target.startswith(item.relocation)
            target = prefix + item.target[len(item.relocation) :] if item.relocation else None
            assert (target or item.target) == made.at(prefix)
        elif item.relocation:
            assert item.content == made.data
            assert package_of(item.relocation) == made.package
            assert relocate(item.relocation, bytes(item.content), prefix) == made.at(prefix)
        else:
            assert item.content == made.at(prefix)
    assert sum(bool(item.relocation) for item in found.items.values()) == 7


def test_small_objects_are_canonical(store: Path) -> None:
    small = [path for path in store.rglob("*") if path.is_file() and "refs" in path.parts]
    small += [*(store / "snapshots").iterdir(), store / "envstore.json"]
    assert len(small) == 5
    for path in small:
        data = path.read_bytes()
        assert packs.canonical(json.loads(data)).encode() == data


def test_cut_points(store: Path) -> None:
    found = Tree(store, "refs/default/dir/latest")
    holes = 0
    for path, content in _contents():
        refs = [(size, name == HOLE) for name, size in found.items[path].refs]
        assert refs == list(packs.cut(path, content)), path
        holes += sum(hole for _, hole in refs)
    assert holes == 4


@pytest.mark.parametrize("ref", ["refs/default/dir/latest", "refs/zoo/model/v1"])
def test_where_parts_begin(store: Path, ref: str) -> None:
    found = Tree(store, ref)
    rows = [
        (path, len(item.refs), len(item.target) + len(item.link))
        for path, item in found.items.items()
    ]
    assert len(found.starts) > 2
    assert found.starts == packs.part_starts(rows)


def test_packs_segments_and_samples(store: Path) -> None:
    stored, tables = set(), {}
    for path in store.glob("packs/*/*"):
        data = path.read_bytes()
        assert path.parent.name == path.name[:2]
        tables[path.name], chunks = packs.read_pack(data, bytes.fromhex(path.name))
        stored |= set(chunks)
    listed = {}
    for path in store.glob("index/*"):
        name = bytes.fromhex(path.name)
        hooks = set()
        for pack, (size, frames) in packs.read_segment(path.read_bytes(), name).items():
            assert size == (store / "packs" / pack.hex()[:2] / pack.hex()).stat().st_size
            listed[pack.hex()] = frames
            hooks |= {c for frame in frames for c, _ in frame.chunks if c[0] < 2}
        sample = samples.build_sample([(name, open_segment(path.read_bytes(), name))])
        encoded = packs.read_sample(*reversed(sample.encode()))
        assert encoded == {int.from_bytes(hook[:8], "big"): name for hook in hooks}
    assert listed == tables
    used = {
        name for item in Tree(store, "refs/zoo/model/v1").items.values() for name, _ in item.refs
    }
    assert used - {HOLE} <= stored
    assert any(chunk[0] < 2 for chunk in stored)


def test_a_file_over_several_parts(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    source = tmp_path / "tree"
    source.mkdir()
    for number, size in enumerate((100_000, 9 * MIB, 0, 5, 4 * MIB, 5 * MIB)):
        (source / f"file {number}").write_bytes(_noise(size, 50 + number))
    # What 16,384 references would take is a quarter of a gigabyte.
    monkeypatch.setattr(parts, "MAX_PART_REFS", 32)
    _push(copy, DirectorySource(source), "long")
    found = Tree(copy, "refs/default/long/latest")
    _compare(found, source)
    assert found.starts.count(b"file 1") > 2


def test_the_next_push_builds_on_the_first(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    source = tmp_path / "tree"
    source.mkdir()
    data = bytearray(_noise(700_001, 3))
    data[350_000] ^= 1
    (source / "noise").write_bytes(data)
    _push(copy, DirectorySource(source), "dir")
    before, after = (Tree(where, "refs/default/dir/latest") for where in (store, copy))
    _compare(after, source)
    assert after.ref["sequence"] == 2
    assert after.snapshot["parents"] == [before.ref["snapshot"]]
    assert {row[0] for row in after.table} & {row[0] for row in before.table}


@pytest.mark.parametrize("kind", ["packs", "manifests", "locations", "snapshots"])
def test_damage_is_noticed(store: Path, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    for path in (path for path in (copy / kind).rglob("*") if path.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    with pytest.raises((ValueError, zstandard.ZstdError)):
        Tree(copy, "refs/default/dir/latest")


def _documented() -> Iterator[tuple[str, str | int, str]]:
    table = DOCUMENT.read_text().partition("## 20. Constants")[2]
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for line in table.splitlines():
        row = re.fullmatch(r"\| (.+) \| (?:`(.+)`|([\d,]+) ?(\w*)) \| `([\w.]+)` \|", line)
        if row:
            name, text, number, unit, code = row.groups()
            yield name, text or int(number.replace(",", "")) * units[unit], code


@pytest.mark.parametrize(("value", "code"), [row[1:] for row in _documented()])
def test_constants(value: str | int, code: str) -> None:
    module, *path = code.split(".")
    if module == "gc":
        module = f"gc.{path.pop(0)}"
    found = importlib.import_module(f"envstore.store.{module}")
    for name in path:
        found = getattr(found, name)
    assert (found.decode() if isinstance(found, bytes) else found) == value


def test_the_table_of_constants_is_read() -> None:
    rows = list(_documented())
    lines = DOCUMENT.read_text().partition("## 20. Constants")[2].count("\n| ")
    assert len(rows) == lines - 1  # its heading


def test_columns() -> None:
    text = DOCUMENT.read_text().partition("### Parts")[2].partition("**Order.**")[0]
    rows = re.findall(r"^\| (\d+) \| ([a-z ]+) \|", text, re.MULTILINE)
    documented = {
        name.replace("reference", "ref").upper().replace(" ", "_"): int(number)
        for number, name in rows
    }
    columns = {name: value for name, value in vars(parts._Column).items() if name.isupper()}
    assert columns.pop("OPTIONAL") == 0x8000
    assert documented == columns


def test_digest_is_plain_blake3() -> None:
    known = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest(b"").hex() == known
