"""What a push reads, sends and notices when a tree is, or is not, as it was the last time."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from envstore.store.push import PushOptions
from envstore.store.refs import RefName, move_ref, read_ref
from envstore.store.source import DirectorySource, is_settled
from tests import trees
from tests.sources import BlindSource, ListedSource, WatchedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


def test_an_unchanged_tree_sends_nothing_and_reads_nothing(store: Store, tree: Path) -> None:
    first = store.push(tree)
    assert not first.unchanged
    assert first.read_bytes == first.logical_bytes
    keys = store.object_keys()
    source = WatchedSource(tree)
    second = store.push(source)
    assert second.unchanged
    assert (second.snapshot, second.manifest) == (first.snapshot, first.manifest)
    assert (second.files, second.logical_bytes) == (first.files, first.logical_bytes)
    assert (second.uploaded_bytes, second.new_chunk_bytes, second.stored_bytes) == (0, 0, 0)
    assert second.requests <= 3
    assert source.opened == []
    assert store.object_keys() == keys


def test_only_the_changed_file_is_read(store: Store, tree: Path) -> None:
    first = store.push(tree)
    (tree / "folder 1/sub/file 1").write_bytes(trees.prose("new", 12_345))
    source = WatchedSource(tree)
    second = store.push(source)
    assert source.opened == [b"folder 1/sub/file 1"]
    assert second.read_bytes == second.new_chunk_bytes == 12_345
    assert second.uploaded_bytes < 30_000
    assert not second.unchanged
    assert second.requests <= 18 + 7  # of the session
    snapshot = store.snapshot()
    assert snapshot.parents == (first.snapshot,)
    store.assert_sound()


def test_same_size_and_same_time_are_not_enough_to_be_the_same(store: Store, tree: Path) -> None:
    store.push(tree)
    path = tree / "large"
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(5 << 20)
        file.write(b"another byte")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    source = WatchedSource(tree)
    result = store.push(source)
    assert source.opened == [b"large"]
    assert not result.unchanged
    assert 0 < result.new_chunk_bytes < 1 << 20


def test_a_file_replaced_by_one_with_the_same_times(store: Store, tree: Path) -> None:
    store.push(tree)
    path = tree / "large"
    before = path.stat()
    path.rename(tree.parent / "aside")
    path.write_bytes(trees.noise("other", 9 << 20))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not store.push(tree).unchanged


def test_files_changed_a_moment_ago_are_not_trusted(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "blind"
    tree.mkdir()
    (tree / "file").write_bytes(b"one")
    first = store.push(BlindSource(tree))
    (tree / "file").write_bytes(b"two")
    # Nothing that a stat tells is different, and all of it is from a moment ago.
    source = BlindSource(tree)
    second = store.push(source)
    assert source.opened == [b"file"]
    assert second.manifest != first.manifest
    third = store.push(BlindSource(tree))
    assert third.unchanged
    assert third.uploaded_bytes < 2000

    # The same without that suspicion, to see that the test could fail.
    def settled() -> BlindSource:
        source = BlindSource(tree)
        source.settled = True
        return source

    store.push(settled())
    (tree / "file").write_bytes(b"six")
    assert store.push(settled()).unchanged


def test_a_file_is_trusted_once_its_clock_has_ticked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    changed = path.stat().st_ctime_ns
    for later, settled in (
        (0, False),
        (10_000_000, False),
        (49_000_000, False),
        (51_000_000, True),
    ):
        monkeypatch.setattr("time.time_ns", lambda later=later: changed + later)
        (entry,) = DirectorySource(tmp_path).scan()
        assert entry.settled == settled
    # Some file systems keep whole seconds, or two of them.
    for nanoseconds, later, settled in (
        (5_000_000_000, 51_000_000, False),
        (5_000_000_000, 1_999_000_000, False),
        (5_000_000_000, 2_001_000_000, True),
        (5_000_000_001, 51_000_000, True),
    ):
        status = SimpleNamespace(st_ctime_ns=nanoseconds)
        assert is_settled(status, nanoseconds + later) == settled  # type: ignore[arg-type]


def test_a_tree_pushed_right_after_it_was_written(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "fresh"
    tree.mkdir()
    contents = [b"%d" % i for i in range(6)]
    for content in contents:
        # Same size, same inode, and often the same tick of the clock.
        with open(tree / "file", "w+b") as file:
            file.write(content)
        store.push(tree)
        store.pull(tmp_path / content.decode())
        assert (tmp_path / content.decode() / "file").read_bytes() == content


def test_new_times_of_a_normalised_tree_are_no_change(store: Store, tree: Path) -> None:
    first = store.push(tree, kind="env", normalise=True)
    for path in (tree / "large", tree / "file 0", tree):
        os.utime(path, (1, 1))
    trees.settle(tree)
    source = WatchedSource(tree, kind="env", normalise=True)
    second = store.push(source)
    assert sorted(source.opened) == [b"file 0", b"large"]
    assert second.unchanged
    assert second.snapshot == first.snapshot
    assert store.push(tree, kind="env", normalise=True).requests <= 3


def test_times_and_modes_of_a_kept_tree_are_a_change(store: Store, tree: Path) -> None:
    manifests = {store.push(tree).manifest}
    for change in (
        lambda: os.utime(tree / "large", (1, 1)),
        lambda: os.chmod(tree / "large", 0o600),
        lambda: os.utime(tree / "folder 1", (1, 1)),
        lambda: os.utime(tree, (1, 1)),
        lambda: os.chmod(tree, 0o700),
    ):
        change()
        result = store.push(tree)
        assert not result.unchanged
        assert result.new_chunk_bytes == 0
        manifests.add(result.manifest)
    assert len(manifests) == 6


def test_added_removed_and_renamed(store: Store, tree: Path, tmp_path: Path) -> None:
    store.push(tree)
    (tree / "large").rename(tree / "renamed")
    (tree / "file 0").unlink()
    (tree / "empty").mkdir()
    os.symlink("renamed", tree / "link")
    result = store.push(tree)
    assert result.new_chunk_bytes == 0
    store.pull(tmp_path / "copy")
    assert trees.describe(tmp_path / "copy") == trees.describe(tree)


def test_without_a_stat_cache_all_is_read_and_nothing_sent(store: Store, tree: Path) -> None:
    first = store.push(tree)
    store.forget()
    packs_before = store.object_keys("packs/")
    second = store.push(tree)
    assert second.unchanged
    assert second.read_bytes == first.logical_bytes
    assert second.new_chunk_bytes == second.stored_bytes == 0
    assert store.object_keys("packs/") == packs_before
    assert store.push(tree).read_bytes == 0


def test_a_stat_cache_knows_nothing_of_another_store(
    store: Store, tree: Path, tmp_path: Path
) -> None:
    store.push(tree)
    with Store(tmp_path / "other") as other:
        other.stat_cache.close()
        other.stat_cache = store.stat_cache
        result = other.push(tree)
        assert result.new_chunk_bytes > 9 << 20
        other.assert_sound()
        assert store.push(tree).unchanged


def test_a_ref_that_was_moved_elsewhere_is_moved_back(store: Store, tree: Path) -> None:
    first = store.push(tree)
    other = store.push(ListedSource({b"x": b"y"}), "other")
    name = RefName.parse("tree")
    objects = store.repository.objects
    move_ref(objects, name, other.snapshot, (read_ref(objects, name), _version(store, name)))
    result = store.push(tree)
    assert not result.unchanged
    assert result.manifest == first.manifest
    assert result.new_chunk_bytes == 0
    assert store.snapshot().parents == (other.snapshot,)


def _version(store: Store, name: RefName) -> str:
    return store.repository.objects.get_versioned(name.key)[1]


def test_a_removed_ref_is_made_again(store: Store, tree: Path) -> None:
    store.push(tree)
    store.repository.objects.delete("refs/default/tree/latest")
    result = store.push(tree)
    assert not result.unchanged
    assert result.new_chunk_bytes == 0
    assert store.snapshot().parents == ()
    store.assert_sound()


def test_another_kind_is_another_snapshot(store: Store, tree: Path) -> None:
    one = store.push(tree, kind="model")
    two = store.push(tree, kind="env")
    assert one.manifest == two.manifest
    assert not two.unchanged
    assert store.snapshot().kind == "env"


def test_message_and_attributes_are_kept(store: Store) -> None:
    store.push(ListedSource({b"a": b"1"}), options=PushOptions(message="why"))
    snapshot = store.snapshot()
    assert (snapshot.message, snapshot.attributes) == ("why", {"listed": "yes"})
