"""Tree images: what they answer, that they outlive their maker, and which are refused."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, NoSpaceError, UnsupportedFormatError
from envstore.fuse.content import content_from_image, load_content
from envstore.fuse.image import Image, make_image, open_image
from envstore.fuse.keys import list_key
from envstore.fuse.sections import TYPES
from envstore.fuse.tree import ROOT, Tree
from envstore.store.digest import EMPTY, digest
from envstore.store.entries import HOLE, NORMAL_MTIME_NS, Entry, sort_key
from envstore.store.locations import NOWHERE, FrameRef, Locations
from envstore.store.source import Kind
from tests.manifests import file, folder, manifest, must_find, tree_of, trees
from tests.stores import Store

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def _frame(number: int) -> FrameRef:
    pack = digest(b"pack %d" % (number % 3))
    return FrameRef(pack, 8 + number, 100 + number, 2**23, number % 2, digest(b"%d" % number))


def _locations(refs: int, frames: int = 5) -> Locations:
    return Locations(
        [_frame(number) for number in range(frames)],
        ref_frames=array("I", (NOWHERE if n % 7 == 6 else n % frames for n in range(refs))),
        ref_offsets=array("I", (n * 1000 for n in range(refs))),
    )


@contextmanager
def _image(entries: Iterable[Entry]) -> Iterator[int]:
    root, parts = manifest(entries)
    fd = make_image(root.digest, root, parts, _locations(sum(part.refs for part in root.parts)))
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _copy(data: bytes, seals: int = _SEALS) -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def _bytes(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _some() -> list[Entry]:
    return [
        folder(b"d"),
        file(b"d/long", b"12345678"),
        Entry(b"d/link", Kind.SYMLINK, target=b"long"),
        file(b"e", b"1234"),
    ]


def _key(entry: Entry) -> bytes:
    if not entry.refs:
        return EMPTY
    if len(entry.refs) == 1 and entry.refs[0][0] != HOLE:
        return entry.refs[0][0]
    return _list_key(entry.refs)


def _list_key(refs: Sequence[tuple[bytes, int]]) -> bytes:
    return list_key(b"".join(name for name, _ in refs), array("Q", (size for _, size in refs)))


@given(trees())
def test_every_content_is_found_by_its_key(entries: dict[bytes, Entry]) -> None:
    tree = tree_of(entries.values())
    files = {path: entry for path, entry in entries.items() if entry.kind is Kind.FILE}
    firsts: dict[bytes, bytes] = {}
    for path in sorted(files, key=sort_key):
        firsts.setdefault(_key(files[path]), path)
    for path, entry in files.items():
        key = tree.content_key(must_find(tree, path))
        assert key == _key(entry)
        assert tree.find_content(key) == must_find(tree, firsts[key])
        unknown = bytes([*key[:-1], key[-1] ^ 1])
        assert (tree.find_content(unknown) is None) == (unknown not in firsts)
        assert tree.find_content(key[:-1]) is None
    assert (tree.find_content(EMPTY) is None) == (EMPTY not in firsts)
    assert tree.find_content(bytes(32)) is None


@given(trees())
def test_an_image_says_the_same_to_everybody(entries: dict[bytes, Entry]) -> None:
    with _image(entries.values()) as fd:
        one, two = open_image(fd), open_image(fd)
    assert one.manifest == two.manifest == manifest(entries.values())[0].digest
    assert _answers(one.tree) == _answers(two.tree)
    refs = sum(len(entry.refs) for entry in entries.values())
    expected = _locations(refs)
    for image in (one, two):
        found = image.locations
        assert list(found.frames) == found.frames[:] == expected.frames
        assert [found.frames[number] for number in range(5)] == expected.frames
        assert list(found.ref_frames) == list(expected.ref_frames)
        assert list(found.ref_offsets) == list(expected.ref_offsets)
        with pytest.raises(IndexError):
            found.frames[5]
        with pytest.raises(IndexError):
            found.frames[-1]


def _answers(tree: Tree) -> list[object]:
    """Return what every public method says of every node."""
    found: list[object] = [len(tree), tree.totals, tree.refs, tree.memory()]
    for node in range(ROOT, len(tree) + 1):
        assert node in tree
        found += [tree.kind(node), tree.attributes(node), tree.inode(node), tree.name(node)]
        found += [tree.path(node), tree.lineage(node)]
        assert type(tree.name(node)) is type(tree.path(node)) is bytes
        match tree.kind(node):
            case Kind.SYMLINK:
                found.append(tree.target(node))
                assert type(tree.target(node)) is bytes
            case Kind.DIRECTORY:
                children = [tree.child(node, at) for at in range(tree.child_count(node))]
                assert [tree.lookup(node, tree.name(child)) for child in children] == children
                found.append(children)
            case Kind.FILE:
                refs = tree.file_refs(node)
                found += [tree.size(node), refs, tree.pieces(node, 1, 7), tree.content_key(node)]
                found += [(tree.chunk_digest(r), tree.chunk_size(r), tree.is_hole(r)) for r in refs]
                assert all(type(tree.chunk_digest(ref)) is bytes for ref in refs)
    return found


def test_a_content_is_found_whatever_its_mode() -> None:
    kept = {"mtime_ns": 1}
    entries = [
        file(b"a", b"12345678", mode=0o600, **kept),
        file(b"b", b"12345678", mode=0o755, **kept),
        file(b"c", b"one", mode=0o644, **kept),
        file(b"d", b"one", mode=0o644, link=b"c", **kept),
        file(b"e", b"one", mode=0o644, **kept),
    ]
    tree = tree_of(entries, mode=0o755, mtime_ns=1)
    nodes = {entry.path: must_find(tree, entry.path) for entry in entries}
    inodes = {path: tree.inode(node) for path, node in nodes.items()}
    assert inodes == {path: nodes[b"c" if path == b"d" else path] for path in nodes}
    for path, first in ((b"a", b"a"), (b"b", b"a"), (b"c", b"c"), (b"d", b"c"), (b"e", b"c")):
        assert tree.find_content(tree.content_key(nodes[path])) == nodes[first]


def test_many_times_of_one_content_do_not_make_it_slow_to_join() -> None:
    entries = [file(b"%05d" % at, b"same", mode=0o644, mtime_ns=at // 2) for at in range(30_000)]
    tree = tree_of(entries, mode=0o755, mtime_ns=1)
    assert {tree.inode(node) for node in range(2, len(tree) + 1)} == set(range(2, 30_002, 2))


def test_content_keys_are_what_they_are() -> None:
    """Caches and images go by them: another version must make the same."""
    chunks = [(bytes(range(32)), 5), (HOLE, 1 << 31), (b"\xff" * 32, 1)]
    assert _list_key(chunks).hex() == (
        "7d99f6d57dc7f15d7ba073c0d8fa11ea2d6d93d508edb71ba532ca44ec068864"
    )
    assert _list_key([(HOLE, 5)]).hex() == (
        "bd7234677452c33fe277755b276b226ff85109172f68e5b025e3c9d8237e8b64"
    )
    entry = file(b"f", b"12345678")
    tree = tree_of([entry, file(b"one", b"1234"), file(b"empty")])
    assert tree.content_key(must_find(tree, b"f")) == _list_key(entry.refs)
    assert tree.content_key(must_find(tree, b"one")) == digest(b"1234")
    assert tree.content_key(must_find(tree, b"empty")) == digest(b"")


def test_a_stored_list_does_not_take_the_name_of_its_content() -> None:
    entry = file(b"f", b"12345678")
    encoded = b"".join(name for name, _ in entry.refs) + struct.pack("<2Q", 4, 4)
    assert digest(encoded) != _list_key(entry.refs)


def test_equal_digests_of_other_sizes_are_other_files() -> None:
    one = file(b"a", b"1234")
    two = replace(one, path=b"b", size=5, refs=((one.digest, 5),))
    tree = tree_of([one, two])
    assert tree.attributes(must_find(tree, b"a"))[2:] != tree.attributes(must_find(tree, b"b"))[2:]
    assert tree.inode(must_find(tree, b"b")) == must_find(tree, b"b")


def _alike(number: int) -> Entry:
    """Return a file whose digest begins as those of others of its kind do."""
    name = b"the same" + digest(b"%d" % number)[8:]
    return Entry(b"%04d" % number, Kind.FILE, size=5, digest=name, refs=((name, 5),))


def test_digests_that_begin_alike_are_told_apart() -> None:
    entries = [_alike(number) for number in range(10)]
    tree = tree_of(entries)
    for entry in entries:
        node = must_find(tree, entry.path)
        assert tree.find_content(entry.digest) == tree.inode(node) == node


def test_many_digests_that_begin_alike_are_refused() -> None:
    with pytest.raises(CorruptError, match="begin alike"):
        tree_of([_alike(number) for number in range(1000)])


def test_a_tree_that_was_a_single_file() -> None:
    tree = tree_of([file(b"only", b"1234", mode=0o600, mtime_ns=9)])
    assert tree.attributes(ROOT)[1:3] == (0o040755, 1)
    assert tree.attributes(ROOT).mtime_ns == NORMAL_MTIME_NS
    node = must_find(tree, b"only")
    assert (tree.attributes(node).mode, tree.attributes(node).mtime_ns) == (0o100600, 9)


def test_an_image_serves_another_process_without_the_store(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "d").mkdir(parents=True)
    (source / "d" / "file").write_bytes(b"content" * 1000)
    (source / "link").symlink_to("d/file")
    store = Store(tmp_path / "store")
    store.push(source)
    repository = store.repository
    content = load_content(repository, repository.resolve("tree"), "tree")
    try:
        again = content_from_image(content.fd, "tree", content.snapshot)
        assert replace(again, tree=content.tree, locations=content.locations) == content
        assert _answers(again.tree) == _answers(content.tree)
        assert list(again.locations.frames) == list(content.locations.frames)
        assert content_from_image(content.fd, "", content.snapshot).name.startswith("@")
        program = (
            "import sys; from envstore.fuse.image import open_image;"
            "tree = open_image(int(sys.argv[1])).tree;"
            "print(tree.target(tree.lookup(1, b'link')).decode())"
        )
        command = [sys.executable, "-c", program, str(content.fd)]
        output = subprocess.run(command, pass_fds=[content.fd], check=True, capture_output=True)
        assert output.stdout == b"d/file\n"
    finally:
        os.close(content.fd)


def test_an_image_cannot_be_changed() -> None:
    with _image(_some()) as fd:
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 1 << 20),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
        ):
            with pytest.raises(PermissionError):
                change()


def test_kernels_that_do_not_know_files_without_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & 8:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    with _image(_some()) as fd:
        assert len(open_image(fd).tree) == 5


@pytest.mark.parametrize("call", ["memfd_create", "pwrite"])
def test_memory_that_is_short_is_said_plainly(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(NoSpaceError, match="tree image"), _image(_some()):
        pass
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "missing", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE]
)
def test_images_that_could_be_changed_are_refused(missing: int) -> None:
    with _image(_some()) as fd:
        data = _bytes(fd)
    with _copy(data, _SEALS & ~missing) as fd, pytest.raises(CorruptError, match="not sealed"):
        open_image(fd)


def test_files_and_pipes_are_refused(tmp_path: Path) -> None:
    with _image(_some()) as fd:
        (tmp_path / "image").write_bytes(_bytes(fd))
    with (tmp_path / "image").open("rb") as stream, pytest.raises(CorruptError, match="not sealed"):
        open_image(stream.fileno())
    ends = os.pipe()
    try:
        with pytest.raises(CorruptError, match="not sealed"):
            open_image(ends[0])
    finally:
        for end in ends:
            os.close(end)


def test_images_of_other_versions_are_refused() -> None:
    with _image(_some()) as fd:
        data = _bytes(fd)
    with _copy(b"ESTREE99" + data[8:]) as fd, pytest.raises(UnsupportedFormatError):
        open_image(fd)
    with _copy(b"ESPACK01" + data[8:]) as fd, pytest.raises(CorruptError):
        open_image(fd)


@given(st.data())
def test_images_cut_short_or_too_long_are_refused(data: st.DataObject) -> None:
    with _image(_some()) as fd:
        whole = _bytes(fd)
    size = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:size], whole + bytes(data.draw(st.integers(1, 100)))):
        with _copy(wrong) as fd, pytest.raises(CorruptError):
            open_image(fd)


_SIZES = st.one_of(st.integers(0, 600), st.integers(0, 2**64 - 1))


@given(section=st.integers(0, len(TYPES) - 1), size=_SIZES, trees=trees())
def test_sections_of_another_size_are_refused(
    section: int, size: int, trees: dict[bytes, Entry]
) -> None:
    with _image(trees.values()) as fd:
        data = bytearray(_bytes(fd))
    before = struct.unpack_from("=Q", data, 40 + 8 * section)[0]
    struct.pack_into("=Q", data, 40 + 8 * section, size)
    with _copy(bytes(data)) as fd:
        if size == before:
            assert isinstance(open_image(fd), Image)
        else:
            with pytest.raises(CorruptError):
                open_image(fd)


@given(st.binary(max_size=2000), st.booleans())
def test_nonsense_is_refused(noise: bytes, marked: bool) -> None:
    with _copy(b"ESTREE01" * marked + noise) as fd, pytest.raises(CorruptError):
        open_image(fd)
