"""Trees at a prefix: sizes, targets, which files are one, and that nothing else changes."""

from __future__ import annotations

import os
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, UsageError
from envstore.fuse.columns import build_sections
from envstore.fuse.forest import Forest, Plot, told_size
from envstore.fuse.image import Image, make_image, open_image
from envstore.fuse.keys import list_key, placed_key, relocated_key
from envstore.fuse.local import LocalFiles
from envstore.fuse.tree import ROOT, Tree
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.entries import Entry
from envstore.store.locations import Locations
from envstore.store.relocation import Mode, Relocation, link_relocation, plan
from envstore.store.source import Kind
from tests.manifests import file, find, folder, manifest, must_find, tree_of, trees
from tests.relocating import BUILD, installed, sample

_PREFIX = st.sampled_from([b"/m", b"/mnt/there", b"/with a/blank", b"/" + b"l" * 140])


def image_of(entries: dict[bytes, Entry], prefix: bytes) -> Image:
    root, parts = manifest(entries.values())
    refs = sum(part.refs for part in root.parts)
    nowhere = array("I", bytes(4 * refs))
    locations = Locations(ref_frames=nowhere, ref_offsets=nowhere)
    fd = make_image(digest(b"m"), root, parts, locations, prefix)
    try:
        return open_image(fd)
    finally:
        os.close(fd)


def tree_at(entries: dict[bytes, Entry], prefix: bytes) -> Tree:
    return image_of(entries, prefix).tree


def sampled(chunk: int = 70_000) -> dict[bytes, Entry]:
    """The sample as entries."""
    entries = {path: folder(path) for path in (b"bin", b"etc", b"lib", b"share")}
    for path, made in sample().items():
        if made.link:
            relocation = link_relocation(made.data, made.placeholder)
            entries[path] = Entry(path, Kind.SYMLINK, target=made.data, relocation=relocation)
            continue
        entries[path] = file(path, made.data, chunk=chunk, executable=made.executable)
        if made.mode:
            found = plan(made.data, made.placeholder, made.mode, made.package)
            assert found is not None
            entries[path] = replace(entries[path], relocation=found.encode())
    return entries


def nodes(tree: Tree) -> dict[bytes, int]:
    return {tree.path(node): node for node in range(ROOT + 1, len(tree) + 1)}


@pytest.mark.parametrize("prefix", [b"/mnt/x", b"/with a/blank", b"/" + b"l" * 79])
def test_what_is_told_before_anything_is_read(prefix: bytes) -> None:
    tree = tree_at(sampled(), prefix)
    assert tree.prefix == prefix
    assert tree.relocates
    for path, made in sample().items():
        node = must_find(tree, path)
        expected = made.at(prefix)
        found = tree.attributes(node)
        assert (found.size, found.stored) == (len(expected), len(expected))
        if made.link:
            assert tree.target(node) == expected
            continue
        assert tree.size(node) == len(expected)
        assert tree.stored_size(node) == len(made.data)
        assert sum(piece.length for piece in tree.pieces(node, 0, 1 << 30)) == len(made.data)
        assert tree.is_relocated(node) == (made.mode is not None)
        if made.mode:
            relocated = tree.relocated(node)
            data = made.data
            whole = relocated.read(0, relocated.size, lambda at, n, data=data: data[at : at + n])
            assert whole == expected
    relocated_paths = {tree.path(node) for node in tree.relocated_nodes()}
    assert relocated_paths == {path for path, made in sample().items() if made.mode}


def test_as_it_is_stored() -> None:
    image = image_of(sampled(), b"")
    assert image.prefix == b""
    assert not image.tree.relocates
    for path, made in sample().items():
        node = must_find(image.tree, path)
        assert image.tree.attributes(node).size == len(made.data)
        if made.link:
            assert image.tree.target(node) == made.data


@given(trees(), _PREFIX)
def test_trees_without_relocations_are_the_same_anywhere(
    entries: dict[bytes, Entry], prefix: bytes
) -> None:
    image = image_of(entries, prefix)
    assert image.prefix == b""
    assert not image.tree.relocates
    plain = tree_of(entries.values())
    assert nodes(image.tree) == nodes(plain)
    for path, node in nodes(plain).items():
        assert image.tree.attributes(node) == plain.attributes(node), path


def test_only_links_make_a_tree_another_too() -> None:
    link = Entry(b"l", Kind.SYMLINK, target=BUILD + b"/x", relocation=BUILD)
    image = image_of({b"l": link}, b"/mnt")
    assert image.prefix == b"/mnt"
    assert image.tree.target(must_find(image.tree, b"l")) == b"/mnt/x"
    assert not image.tree.relocates


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=12),
    _PREFIX,
)
def test_files_are_one_where_they_become_the_same(
    made: list[tuple[int, bool, bool]], prefix: bytes
) -> None:
    """Content, whether it is relocated, and who says so; several chunks in half of them."""
    entries, shown = {}, {}
    for number, (content, moved, named) in enumerate(made):
        data = b"%d %b\n" % (content, BUILD) * (1 + content % 2)
        path = b"%02d" % number
        entry = file(path, data, chunk=300)
        if moved:
            found = plan(data, BUILD, Mode.TEXT, "one-1" if named else "another-2")
            assert found is not None
            entry = replace(entry, relocation=found.encode())
        entries[path] = entry
        shown[path] = (content, moved)
    tree = tree_at(entries, prefix)
    for one, node in nodes(tree).items():
        first = next(path for path in entries if shown[path] == shown[one])
        assert tree.path(tree.inode(node)) == first
        assert tree.find_content(tree.content_key(node)) == find(tree, first)
    keys = {shown[path]: tree.content_key(node) for path, node in nodes(tree).items()}
    assert len(set(keys.values())) == len(keys)


def test_content_keys() -> None:
    one, two = tree_at(sampled(), b"/one"), tree_at(sampled(), b"/two")
    stored = tree_at(sampled(), b"")
    for path, made in sample().items():
        if made.link:
            continue
        node = must_find(one, path)
        keys = {tree.content_key(node) for tree in (one, two, stored)}
        assert len(keys) == (3 if made.mode else 1)
        assert one.stored_key(node) == stored.content_key(node)
        if made.mode:
            encoded = Relocation.decode(sampled()[path].relocation).nameless()
            expected = relocated_key(stored.content_key(node), encoded, b"/one")
            assert one.content_key(node) == expected
    # Keys of other kinds cannot be made up.
    assert relocated_key(b"a" * 32, b"b", b"/c") != relocated_key(b"a" * 32, b"cb", b"/")
    assert placed_key(b"m" * 32, b"") == b"m" * 32
    assert (
        len({placed_key(b"m" * 32, b"/x"), digest(b"m" * 32 + b"/x"), list_key(b"", array("Q"))})
        == 3
    )


def _plot(tree: Tree) -> Plot:
    return Plot(b"plot", tree, b"store", memoryview(bytearray(told_size(tree))).cast("I"))


def test_several_prefixes_share_what_is_the_same() -> None:
    forest = Forest(b"secret".ljust(32))
    for slot, prefix in ((1, b"/one"), (2, b"/two"), (3, b"/one")):
        forest.plant(slot, _plot(tree_at(sampled(), prefix)))

    def identity(slot: int, path: bytes) -> int:
        node = slot << 32 | ROOT
        for name in path.split(b"/"):
            found = forest.lookup(node, name)
            assert found is not None
            node = found
        return node

    for path, made in sample().items():
        if not made.link:
            ids = [identity(slot, path) for slot in (1, 2, 3)]
            assert ids[0] == ids[2]
            assert (ids[0] == ids[1]) == (made.mode is None)
            assert forest.attributes(ids[1]).size == len(made.at(b"/two"))


def test_a_prefix_without_room_names_the_tightest_package() -> None:
    entries = sampled()
    with pytest.raises(UsageError, match=r"short-0\.1 has room for 80 only \(in lib/libshort\.so"):
        tree_at(entries, b"/" + b"x" * 300)
    del entries[b"lib/libshort.so"]
    with pytest.raises(UsageError, match=r"sample-1\.0 has room for 255 only \(in lib/libsample"):
        tree_at(entries, b"/" + b"x" * 300)
    del entries[b"lib/libsample.so"]
    assert tree_at(entries, b"/" + b"x" * 300).relocates


@pytest.mark.parametrize("prefix", [b"relative", b"/two\nlines"])
def test_what_is_no_prefix(prefix: bytes) -> None:
    with pytest.raises(UsageError, match="no prefix"):
        tree_at(sampled(), prefix)
    assert tree_at({b"f": file(b"f", b"x")}, prefix)  # matters to nobody


def test_hard_links_are_relocated_alike() -> None:
    data = b"#!" + BUILD + b"/bin/sh\n"
    found = plan(data, BUILD, Mode.TEXT)
    assert found is not None
    first = file(b"a", data, mode=0o755, mtime_ns=1, relocation=found.encode())
    entries = {b"a": first, b"b": replace(first, path=b"b", link=b"a")}
    tree = tree_at(entries, b"/x")
    assert tree.inode(must_find(tree, b"b")) == must_find(tree, b"a")
    assert tree.attributes(must_find(tree, b"b")).links == 2
    assert tree.size(must_find(tree, b"b")) == len(data) - len(BUILD) + 2
    with pytest.raises(CorruptError, match="differ"):
        tree_at({**entries, b"b": replace(entries[b"b"], relocation=b"")}, b"/x")


def test_complete_files_are_relocated_when_all_of_them_is_there(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 30)
    local = LocalFiles(cache)
    prefix = b"/mnt/here"
    tree = tree_at(sampled(chunk=50_000), prefix)
    made = {path: one for path, one in sample().items() if not one.link and one.data}
    files = []
    for path, one in made.items():
        node = must_find(tree, path)
        files.append(local.begin(tree, node))
        at = 0
        pieces = []
        for ref in tree.file_refs(node):
            pieces.append((ref, one.data[at : at + tree.chunk_size(ref)]))
            at += tree.chunk_size(ref)
        for ref, data in reversed(pieces):
            files[-1].write(ref, data)
        with pytest.raises(CorruptError, match="not where"):
            files[-1].write(pieces[0][0], one.at(prefix)[: len(pieces[0][1])] + b"!")
    local.keep(files)
    for path, one in made.items():
        node = must_find(tree, path)
        expected = installed(one.data, one.placeholder, one.mode, prefix)
        assert Path(os.fsdecode(local.path(tree.content_key(node)))).read_bytes() == expected
        assert local.contains(tree.content_key(node), tree.size(node))
    used = {path.read_bytes() for path in cache.files.glob("*/*")}
    rounded = sum(-(-len(data) // 4096) * 4096 for data in used)
    assert cache.usage().bytes == rounded


def test_memory_of_relocated_files() -> None:
    count = 5000
    found = Relocation(Mode.TEXT, 255, 4000, (700, 1200), shebang=b"#!\n/bin/python", package="p-1")
    plain = [file(b"%05d" % n, b"%04000d" % n, chunk=4000) for n in range(count)]
    moved = [replace(entry, relocation=found.encode()) for entry in plain]
    sizes = [
        tree_at({entry.path: entry for entry in entries}, b"/mnt/x").memory()
        for entries in (plain, moved)
    ]
    assert (sizes[1] - sizes[0]) / count < 120


def test_sections_of_a_tree_without_relocations_are_empty() -> None:
    root, parts = manifest([file(b"f", b"abc")])
    sections = build_sections(root, parts, 100, b"/mnt")
    assert (sections.prefix, sections.plans, list(sections.relocated)) == (b"", b"", [])
