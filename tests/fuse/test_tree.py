"""The tree against a model of dictionaries, and what must not become a tree."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError
from envstore.fuse.build import build_tree
from envstore.fuse.columns import NAME_MAX
from envstore.fuse.tree import ROOT
from envstore.store.digest import EMPTY, digest
from envstore.store.entries import HOLE, NORMAL_MTIME_NS, Entry
from envstore.store.parts import MAX_PART_REFS
from envstore.store.source import Kind
from tests.manifests import file, folder, inode_of, manifest, must_find, tree_of, trees


@given(trees())
def test_a_tree_says_what_its_manifest_says(entries: dict[bytes, Entry]) -> None:
    kept = any(entry.mode is not None for entry in entries.values())
    tree = tree_of(entries.values(), mode=0o700 if kept else 0, mtime_ns=5 if kept else 0)
    assert len(tree) == len(entries) + 1
    assert tree.totals.entries == len(entries)
    assert tree.totals.logical == sum(entry.size for entry in entries.values())
    nodes = {path: must_find(tree, path) for path in entries}
    assert len(set(nodes.values())) == len(entries)
    for path, entry in entries.items():
        node = nodes[path]
        assert node in tree
        assert tree.path(node) == path
        assert tree.kind(node) is entry.kind
        attributes = tree.attributes(node)
        assert attributes.mtime_ns == (
            NORMAL_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
        )
        if entry.mode is not None:
            assert attributes.mode & 0o7777 == entry.mode
        elif entry.kind is Kind.FILE:
            assert attributes.mode & 0o7777 == (0o755 if entry.executable else 0o644)
        if entry.kind is Kind.FILE:
            assert attributes.size == tree.size(node) == entry.size
            assert attributes.stored == sum(size for name, size in entry.refs if name != HOLE)
            refs = tree.file_refs(node)
            found = [(tree.chunk_digest(ref), tree.chunk_size(ref)) for ref in refs]
            assert found == list(entry.refs)
            assert [tree.is_hole(ref) for ref in refs] == [name == HOLE for name, _ in entry.refs]
        elif entry.kind is Kind.SYMLINK:
            assert tree.target(node) == entry.target
            assert attributes.size == len(entry.target)


@given(trees())
def test_directories_list_what_lookup_finds(entries: dict[bytes, Entry]) -> None:
    tree = tree_of(entries.values())
    for path in [b"", *(p for p, entry in entries.items() if entry.kind is Kind.DIRECTORY)]:
        node = must_find(tree, path)
        names = sorted(p.rpartition(b"/")[2] for p in entries if p.rpartition(b"/")[0] == path)
        assert tree.child_count(node) == len(names)
        children = [tree.child(node, position) for position in range(len(names))]
        assert [tree.name(child) for child in children] == names
        assert [tree.lookup(node, name) for name in names] == children
        for absent in (b"", b"\0", b"zz", b"a.", *(name + b"x" for name in names)):
            assert (tree.lookup(node, absent) is None) == (absent not in names)
    for path, entry in entries.items():
        if entry.kind is not Kind.DIRECTORY:
            assert tree.lookup(must_find(tree, path), b"a") is None


@given(trees())
def test_equal_files_and_only_those_are_one_inode(entries: dict[bytes, Entry]) -> None:
    tree = tree_of(entries.values())
    for path in entries:
        first = inode_of(entries, path)
        attributes = tree.attributes(must_find(tree, path))
        assert attributes.inode == must_find(tree, first) == tree.inode(must_find(tree, path))
        assert attributes.links == 1 + sum(other.link == first for other in entries.values())


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    offset=st.integers(0, 120),
    size=st.integers(0, 120),
)
def test_pieces_cover_exactly_the_range(sizes: list[int], offset: int, size: int) -> None:
    refs = tuple((digest(b"%d" % number), length) for number, length in enumerate(sizes))
    before = file(b"a", b"something before it")
    entry = Entry(
        b"b", Kind.FILE, size=sum(sizes), digest=digest(b"all") if refs else EMPTY, refs=refs
    )
    if len(refs) == 1:
        entry = replace(entry, digest=refs[0][0])
    tree = tree_of([before, entry])
    node = must_find(tree, b"b")
    first = tree.file_refs(node).start
    starts = list(accumulate(sizes, initial=0))
    covered = [
        position
        for piece in tree.pieces(node, offset, size)
        for position in range(
            starts[piece.ref - first] + piece.offset,
            starts[piece.ref - first] + piece.offset + piece.length,
        )
    ]
    assert covered == list(range(offset, min(offset + size, sum(sizes))))
    for piece in tree.pieces(node, offset, size):
        assert 0 < piece.length <= tree.chunk_size(piece.ref) - piece.offset


def test_a_file_that_goes_on_over_several_parts() -> None:
    rng = random.Random(1)
    refs = tuple((rng.randbytes(32), 3) for _ in range(2 * MAX_PART_REFS + 7))
    large = Entry(b"m", Kind.FILE, size=3 * len(refs), digest=rng.randbytes(32), refs=refs)
    others = [file(name, name * 9) for name in (b"a", b"n", b"z")]
    root, parts = manifest([large, *others])
    assert len(parts) > 2
    assert any(part.continued for part in parts)
    tree = build_tree(root, parts)
    node = must_find(tree, b"m")
    assert [tree.chunk_digest(ref) for ref in tree.file_refs(node)] == [name for name, _ in refs]
    assert tree.size(node) == large.size
    for entry in others:
        at = tree.file_refs(must_find(tree, entry.path))
        assert [tree.chunk_digest(ref) for ref in at] == [name for name, _ in entry.refs]


def test_hard_links_share_an_inode_and_count_their_names() -> None:
    kept = {"mode": 0o640, "mtime_ns": 7}
    entries = [
        folder(b"d", mode=0o755, mtime_ns=1),
        file(b"d/first", b"content", **kept),
        file(b"d/second", b"content", link=b"d/first", **kept),
        file(b"another", b"content", **kept),
        file(b"yet another", b"content", **kept),
        file(b"third", b"content", link=b"d/first", **kept),
    ]
    tree = tree_of(entries, mode=0o755, mtime_ns=1)
    inode = {e.path: tree.attributes(must_find(tree, e.path)) for e in entries}
    first = must_find(tree, b"d/first")
    for name in (b"d/first", b"d/second", b"third"):
        assert (inode[name].inode, inode[name].links) == (first, 3)
    # Independent files of equal content share an inode too, but never with the linked ones.
    assert inode[b"another"].inode == inode[b"yet another"].inode != first
    assert inode[b"another"].links == 1


def test_a_hundred_thousand_files_take_little_memory() -> None:
    rng = random.Random(2)
    entries = []
    for number in range(1000):
        entries.append(folder(b"directory %04d" % number))
        for name in range(100):
            chunk = rng.randbytes(32)
            path = b"directory %04d/module_%03d.py" % (number, name)
            entries.append(Entry(path, Kind.FILE, size=99, digest=chunk, refs=((chunk, 99),)))
    assert tree_of(entries).memory() < 110 * 100_000


@pytest.mark.parametrize(
    ("target", "content"),
    [
        (b"nowhere", b"content"),
        (b"d", b"content"),
        (b"first", b"other"),
        (b"second", b"content"),
        (b"third", b"content"),
        (b"d/first", b"content"),
        (b"", b"content"),
    ],
)
def test_hard_links_that_lead_astray_are_refused(target: bytes, content: bytes) -> None:
    kept = {"mode": 0o644, "mtime_ns": 0}
    entries = [
        folder(b"d", **kept),
        file(b"first", b"content", **kept),
        file(b"second", content, link=target or b"/", **kept),
        file(b"third", b"content", link=b"first", **kept),
    ]
    with pytest.raises(CorruptError):
        tree_of(entries)


def _broken(entries: list[Entry], **changes: object) -> None:
    """Build a tree from parts that no push would write; ``changes`` apply to the last part."""
    root, parts = manifest(entries)
    parts[-1] = replace(parts[-1], **changes)  # type: ignore[arg-type]
    with pytest.raises(CorruptError):
        build_tree(root, parts)


def test_manifests_that_contradict_themselves_are_refused() -> None:
    entries = [folder(b"d"), file(b"d/x", b"12345678"), file(b"e", b"1234")]
    _broken(entries, names=[b"d", b"x", b"d"])
    _broken(entries, names=[b"d", b"x", b"a"])
    _broken(entries, names=[b"d", b"x" * (NAME_MAX + 1), b"e"])
    _broken(entries, sizes=array("Q", [9, 4]))
    _broken(entries, sizes=array("Q", [8, 5]))
    _broken(entries, counts=array("I", [1, 2]))
    _broken(entries, ref_sizes=array("I", [8, 0, 4]))
    _broken(entries, file_digests=b"")
    _broken(entries, depths=array("H", [0, 2, 0]))
    _broken(entries, base=b"d")
    _broken(entries, links={1: b"e"})
    _broken(entries, modes=array("H", [1, 2]), mtimes=array("q", [1, 2]))


def test_parts_must_follow_each_other() -> None:
    entries = [file(b"%05d" % number, b"%d" % number) for number in range(9000)]
    root, parts = manifest(entries)
    assert len(parts) > 2
    build_tree(root, parts)
    for wrong in (parts[:-1], parts[1:], parts[::-1], [*parts, parts[-1]], [parts[0], *parts]):
        with pytest.raises(CorruptError):
            build_tree(root, wrong)
    with pytest.raises(CorruptError):
        build_tree(replace(root, entries=root.entries + 1), parts)
    with pytest.raises(CorruptError):
        build_tree(replace(root, logical=root.logical - 1), parts)
    zeros = array("H", bytes(2 * len(parts[1].kinds))), array("q", bytes(8 * len(parts[1].kinds)))
    mixed = replace(parts[1], modes=zeros[0], mtimes=zeros[1])
    with pytest.raises(CorruptError):
        build_tree(root, [parts[0], mixed, *parts[2:]])


def test_modes_are_permission_bits() -> None:
    root, parts = manifest([], mode=0o100644)
    with pytest.raises(CorruptError):
        build_tree(root, parts)


def test_an_empty_tree() -> None:
    tree = tree_of([])
    assert len(tree) == 1
    assert tree.child_count(ROOT) == 0
    assert tree.attributes(ROOT).mode & 0o7777 == 0o755
    kept = tree_of([], mode=0o711, mtime_ns=-5)
    assert kept.attributes(ROOT).mode & 0o7777 == 0o711
    assert kept.attributes(ROOT).mtime_ns == -5
    assert 0 not in kept
    assert 2 not in kept
