"""Files that are put together of chunks that others brought: stored, verified, pulled, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.fuse.content import load_content
from envstore.store.diff import diff
from envstore.store.entries import composed_digest
from tests.composing import store_composed
from tests.store.independent_reader import Tree
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.usefixtures("_no_fsync")

MIB = 1 << 20
PARTS = {b"one": noise(1, 2 * MIB + 5), b"small": b"header", b"two": noise(2, MIB), b"zero": b""}
WHOLE = {
    b"all": [b"small", b"one", b"zero", b"two"],
    b"copy": [b"two"],
    b"nothing": [b"zero", b"zero"],
    b"twice": [b"two", b"two"],
}


def _content(path: bytes) -> bytes:
    return b"".join(PARTS[part] for part in WHOLE.get(path, [path]))


@pytest.fixture
def snapshot(store: Store) -> bytes:
    return store_composed(store, PARTS, WHOLE)


def test_composed_files_are_sound_and_can_be_pulled(
    store: Store, snapshot: bytes, tmp_path: Path
) -> None:
    store.assert_sound()
    store.pull(tmp_path / "copy", "composed")
    names = {*PARTS, *WHOLE}
    assert {path.name.encode() for path in (tmp_path / "copy").iterdir()} == names
    for name in names:
        assert (tmp_path / "copy" / name.decode()).read_bytes() == _content(name)
    entries = {
        entry.path: entry for entry in store.repository.entries(store.snapshot("composed").manifest)
    }
    assert {path for path, entry in entries.items() if entry.composed} == {b"all", b"twice"}
    assert entries[b"all"].digest == composed_digest(entries[b"all"].refs)
    assert entries[b"copy"].digest == entries[b"two"].digest
    assert list(diff(entries.values(), entries.values())) == []


@pytest.mark.usefixtures("snapshot")
def test_a_stranger_can_read_composed_files(store: Store) -> None:
    tree = Tree(store.root / "objects", "refs/default/composed/latest")
    for name in (*PARTS, *WHOLE):
        assert bytes(tree.items[name].content) == _content(name)
    manifest = store.snapshot("composed").manifest
    for entry in store.repository.entries(manifest):
        item = tree.items[entry.path]
        assert (item.digest, item.composed) == (entry.digest, entry.composed)


def test_a_mount_knows_composed_files_by_their_chunks(store: Store, snapshot: bytes) -> None:
    tree = load_content(store.repository, snapshot).tree
    nodes = {name: tree.lookup(1, name) for name in (*PARTS, *WHOLE)}
    for name, node in nodes.items():
        assert node is not None
        refs = [(tree.chunk_digest(ref), tree.chunk_size(ref)) for ref in tree.file_refs(node)]
        assert sum(size for _, size in refs) == tree.size(node) == len(_content(name))
    two, copy = nodes[b"two"], nodes[b"copy"]
    assert two is not None
    assert copy is not None
    assert tree.inode(two) == tree.inode(copy)


@pytest.mark.usefixtures("snapshot")
def test_a_lost_chunk_harms_the_composed_file_too(store: Store) -> None:
    key = max(store.object_keys("packs/"), key=lambda key: store.path(key).stat().st_size)
    data = bytearray(store.path(key).read_bytes())
    data[MIB] ^= 1
    store.path(key).write_bytes(data)
    assert not store.verify().ok
    assert store.verify(read_data=False).ok
