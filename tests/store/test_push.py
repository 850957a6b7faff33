from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store import known, packing, packs, samples
from envstore.store.index import DedupIndex
from envstore.store.packing import PackWriter
from envstore.store.push import PushOptions, PushResult
from envstore.store.refs import RefName, move_ref, read_ref
from envstore.store.source import ChangedError, DirectorySource, access_error, is_settled
from tests import trees
from tests.faulty import FaultyStore
from tests.sources import BlindSource, ListedSource, WatchedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An everyday tree that was written a while ago."""
    root = tmp_path / "tree"
    trees.plain(root, "tree")
    (root / "large").write_bytes(trees.noise("large", 9 << 20))
    trees.settle(root)
    return root


def _faults(store: Store) -> FaultyStore:
    objects = store.repository.objects
    assert isinstance(objects, FaultyStore)
    return objects


def _sound(store: Store) -> None:
    report = store.verify()
    assert report.problems == []


# Unchanged and changed trees.


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
    assert second.requests <= 16
    snapshot = store.snapshot()
    assert snapshot.parents == (first.snapshot,)
    _sound(store)


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
        _sound(other)
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
    _sound(store)


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


# What is stored.


def test_everything_legal_can_be_pushed_and_pushed_again(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "nasty"
    trees.fill(tree)
    trees.settle(tree)
    first = store.push(tree)
    facts = trees.describe(tree)
    assert first.files == sum(item.kind == "file" for item in facts.values())
    assert first.logical_bytes == sum(item.size for item in facts.values())
    assert store.push(tree).unchanged
    store.forget()
    assert store.push(tree).manifest == first.manifest
    _sound(store)


def test_copies_cost_nothing(store: Store, tmp_path: Path) -> None:
    data = trees.noise(1, 3 << 20)
    result = store.push(ListedSource({b"a": data, b"b": data, b"c": data[1 << 20 :]}))
    assert result.new_chunk_bytes < 1.2 * len(data)
    again = store.push(ListedSource({b"elsewhere": data}), "other")
    assert again.new_chunk_bytes == 0


def test_one_chunk_over_and_over(store: Store, tmp_path: Path) -> None:
    block = trees.noise(1, 256 << 10)
    data = (b"\1" * (256 << 10)) * 20 + block * 3
    result = store.push(ListedSource({b"a": data, b"b": data}))
    assert result.new_chunk_bytes < 2 << 20
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy/a").read_bytes() == data


def test_hard_links_are_read_once(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "b").write_bytes(trees.noise(1, 100_000))
    for name in "acd":
        os.link(tree / "b", tree / name)
    source = WatchedSource(tree)
    result = store.push(source)
    assert source.opened == [b"a"]
    assert (result.files, result.logical_bytes, result.read_bytes) == (4, 400_000, 100_000)


def test_holes_and_zeros_are_the_same(store: Store, tmp_path: Path) -> None:
    content = {"zeros": bytes(5 << 20), "mixed": bytes(2 << 20) + b"x" * 999 + bytes(4 << 20)}
    manifests = set()
    for sparse in (False, True):
        tree = tmp_path / f"tree {sparse}"
        tree.mkdir()
        for name, data in content.items():
            with open(tree / name, "wb") as file:
                if not sparse:
                    file.write(data)
                else:
                    file.truncate(len(data))
                    file.seek(2 << 20)
                    file.write(data[2 << 20 : 3 << 20] if any(data) else b"")
        assert ((tree / "zeros").stat().st_blocks == 0) == sparse
        result = store.push(tree, f"sparse-{sparse}", kind="model", normalise=True)
        manifests.add(result.manifest)
    assert len(manifests) == 1


def test_the_same_content_has_the_same_manifest_anywhere(store: Store, tmp_path: Path) -> None:
    manifests = set()
    for number, umask in enumerate((0o022, 0o077, 0o002)):
        tree = tmp_path / f"place {number}" / ("x" * (1 + 40 * number))
        tree.parent.mkdir()
        old = os.umask(umask)
        try:
            trees.plain(tree, "same", files=200, size=5000)
            (tree / "program").write_text("#!/bin/sh\n")
            os.chmod(tree / "program", (0o755, 0o700, 0o711)[number])
            if number:
                os.link(tree / "file 0", tree / "file 0 twin")
            else:
                (tree / "file 0 twin").write_bytes((tree / "file 0").read_bytes())
            os.symlink("program", tree / "link")
        finally:
            os.umask(old)
        for i, path in enumerate(sorted(tree.rglob("*"))):
            os.utime(path, (i * number, i * number), follow_symlinks=False)
        with Store(tmp_path / f"store {number}") as own:
            manifests.add(own.push(tree, kind="env", normalise=True).manifest)
        manifests.add(store.push(tree, kind="env", normalise=True).manifest)
    assert len(manifests) == 1


def test_time_stamps_beyond_the_format_are_kept_as_near_as_can_be(
    store: Store, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "late").write_text("x")
    os.utime(tree / "late", (0, 13_000_000_000))  # in 2381: more nanoseconds than 63 bits hold
    if (tree / "late").stat().st_mtime != 13_000_000_000:
        pytest.skip("this file system has no such times")
    trees.settle(tree)
    result = store.push(tree)
    assert len(result.warnings) == 1
    assert "late" in result.warnings[0]
    assert store.push(tree).unchanged
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy/late").stat().st_mtime_ns == (1 << 63) - 1


def test_fifty_thousand_small_files_take_few_requests(store: Store) -> None:
    files = {
        b"lib/%03d/%05d.py" % (i % 500, i): b"# %d\n" % i + trees.noise(i % 97, i % 1500)
        for i in range(50_000)
    }
    result = store.push(ListedSource(files))
    assert result.files == 50_000
    assert result.requests <= 30
    again = store.push(ListedSource({**files, b"lib/000/new": b"x"}))
    assert again.requests <= 30
    assert again.new_chunk_bytes == 1


def test_memory_is_not_filled_by_a_slow_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 1 << 20)
    gate = _faults(store).gate("put", key="packs/")
    source = ListedSource({b"%03d" % i: trees.noise(i, 4 << 20) for i in range(60)})
    done: list[PushResult] = []
    thread = threading.Thread(
        target=_in_own_store, args=(store, lambda: done.append(store.push(source)))
    )
    thread.start()
    gate.wait_entered(packing.UPLOADS)
    thread.join(0.5)  # it gets all the time it could want to read on
    assert len(source.opened) < 45
    gate.open()
    thread.join()
    assert done[0].files == len(source.opened) == 60


# Trees that cannot be pushed.


@pytest.mark.parametrize("what", ["socket", "fifo", "device"])
def test_what_is_no_file_is_refused_by_name(store: Store, tree: Path, what: str) -> None:
    before = store.push(tree).snapshot
    path = tree / "folder 1" / what
    if what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif what == "fifo":
        os.mkfifo(path)
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    else:
        pytest.skip("only root can make a device")
    with pytest.raises(UsageError) as caught:
        store.push(tree)
    assert str(path) in str(caught.value)
    assert ("socket" if what == "socket" else "device or FIFO") in str(caught.value)
    assert store.repository.resolve("tree") == before


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such path"):
        DirectorySource(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither"):
        DirectorySource(tmp_path / "fifo")


def test_errors_of_the_tree_name_the_path() -> None:
    import errno

    for code, kind in (
        (errno.EACCES, AccessDeniedError),
        (errno.EPERM, AccessDeniedError),
        (errno.ENOENT, ChangedError),
        (errno.ENOTDIR, ChangedError),
        (errno.ELOOP, ChangedError),
        (errno.EIO, EnvstoreError),
    ):
        error = access_error(OSError(code, os.strerror(code)), b"some/caf\xe9")
        assert type(error) is kind
        assert os.fsdecode(b"some/caf\xe9") in error.message


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _cut_off(path: Path) -> None:
    os.truncate(path, 5 << 20)


def _overwrite(path: Path) -> None:
    """The hardest to see: same size, and the old time put back."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    (path.parent.parent / "new").write_bytes(path.read_bytes())
    (path.parent.parent / "new").rename(path)


def _remove(path: Path) -> None:
    path.unlink()


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_link(path: Path) -> None:
    path.rename(path.parent.parent / "aside")
    path.symlink_to("../aside")


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("event", ["scanned", "opening", "piece"])
@pytest.mark.parametrize(
    "change",
    [
        _append, _cut_off, _overwrite, _replace, _remove, _make_directory, _make_link, _make_fifo,
    ],
)  # fmt: skip
def test_a_file_that_changes_meanwhile_is_noticed_and_named(
    store: Store, tree: Path, event: str, change: Callable[[Path], None]
) -> None:
    before = store.push(ListedSource({b"old": b"content"}))
    changed = []

    def act(now: str, path: bytes) -> None:
        if now == event and path in (b"large", b"") and not changed:
            changed.append(path)
            change(tree / "large")

    with pytest.raises(ChangedError, match="large changed while it was being read") as caught:
        store.push(WatchedSource(tree, act))
    assert changed
    assert caught.value.hint
    assert store.repository.resolve("tree") == before.snapshot
    assert threading.active_count() == 1
    if change is not _make_fifo:
        store.push(tree)
        _sound(store)


def test_a_small_file_that_changes_meanwhile(store: Store, tree: Path) -> None:
    def act(event: str, path: bytes) -> None:
        if event == "piece" and path == b"file 0":
            _overwrite(tree / "file 0")

    with pytest.raises(ChangedError, match="file 0 changed"):
        store.push(WatchedSource(tree, act))
    with pytest.raises(NotFoundError):
        store.repository.resolve("tree")


def test_a_directory_that_vanishes_meanwhile(store: Store, tree: Path) -> None:
    def act(event: str, path: bytes) -> None:
        if event == "scanned":
            (tree / "folder 1").rename(tree.parent / "away")

    with pytest.raises(ChangedError, match="folder 1/"):
        store.push(WatchedSource(tree, act))


# Stores that fail.


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("put", "packs/"), ("put", "index/"), ("put", "locations/"), ("put", "manifests/"),
        ("put", "snapshots/"), ("put_if", "refs/"), ("get_versioned", "refs/"), ("list", "index/"),
        ("get", "snapshots/"), ("get", "index/"),
    ],
)  # fmt: skip
def test_a_failure_anywhere_leaves_the_ref_and_the_next_push_goes_on(
    store: Store,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    key: str,
    skip: int,
    after: bool,
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 2 << 20)
    monkeypatch.setattr(packing, "SEGMENT_PACKS", 2)
    old = store.push(ListedSource({b"old": b"content"}))
    error = UnavailableError("the wire was cut")
    fault = _faults(store).fail(operation, error, key=key, times=1, skip=skip, after=after)
    try:
        store.push(tree)
    except UnavailableError:
        assert store.repository.resolve("tree") == old.snapshot
    else:
        # Not met so often, or a ref that was written although the answer was lost.
        assert not fault.hits or (operation == "put_if" and after)
    assert threading.active_count() == 1
    fault.remove()
    assert store.verify().ok
    arrived = len(store.object_keys("packs/")) > 1
    result = store.push(tree)
    assert (result.new_chunk_bytes < result.logical_bytes) == arrived
    _sound(store)
    assert store.snapshot().manifest == result.manifest


@pytest.mark.parametrize("error", [NoSpaceError("disk full"), AccessDeniedError("no")])
def test_errors_of_uploads_reach_the_caller(store: Store, tree: Path, error: EnvstoreError) -> None:
    _faults(store).fail("put", error, key="packs/")
    with pytest.raises(type(error), match=error.message):
        store.push(tree)
    assert threading.active_count() == 1


def test_what_leads_to_something_is_written_after_it(
    store: Store, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 2 << 20)
    monkeypatch.setattr(packing, "SEGMENT_PACKS", 2)
    _faults(store).clear()
    store.push(tree)
    written = [
        (call.key.partition("/")[0], call.key)
        for call in _faults(store).calls
        if call.operation in ("put", "put_if")
    ]
    kinds = [kind for kind, _ in written]
    assert kinds[-4:] == ["locations", "manifests", "snapshots", "refs"]
    assert set(kinds[:-4]) == {"packs", "index"}
    assert kinds.count("index") >= 2
    assert kinds[-5] == "index"
    seen: set[str] = set()
    for kind, key in written:
        if kind == "index":
            listed = store.repository.segment(bytes.fromhex(key.partition("/")[2]))
            assert {packs.pack_key(pack.digest) for pack in listed} <= seen
        seen.add(key)


def test_the_ref_that_moved_meanwhile_is_a_conflict(store: Store, tree: Path) -> None:
    gate = _faults(store).gate("put_if", key="refs/", times=1)
    caught: list[BaseException] = []

    def lose() -> None:
        try:
            store.push(ListedSource({b"loser": trees.noise(1, 100_000)}))
        except ConflictError as error:
            caught.append(error)

    # SQLite objects stay in the thread that made them.
    with Store(store.root) as winner:
        thread = threading.Thread(target=_in_own_store, args=(store, lose))
        thread.start()
        gate.wait_entered()
        result = winner.push(ListedSource({b"winner": b"1"}))
        gate.open()
        thread.join()
    assert len(caught) == 1
    assert store.repository.resolve("tree") == result.snapshot
    # What the loser had stored is reused when he tries again.
    again = store.push(ListedSource({b"loser": trees.noise(1, 100_000)}))
    assert again.new_chunk_bytes == 0
    assert store.snapshot().parents == (result.snapshot,)


def _in_own_store(store: Store, work: Callable[[], None]) -> None:
    old = store.stat_cache
    store.stat_cache = type(old)(store.root / "stat.sqlite")
    try:
        work()
    finally:
        store.stat_cache.close()
        store.stat_cache = old


@pytest.mark.parametrize("damage", ["missing", "altered"])
@pytest.mark.parametrize("kind", ["snapshots", "manifests", "locations", "index", "packs"])
def test_a_damaged_ancestor_is_replaced_by_a_sound_snapshot(
    store: Store, tmp_path: Path, kind: str, damage: str
) -> None:
    files = {b"lib/" + trees.noise(i, 5).hex().encode(): b"%d" % i for i in range(1500)}
    files[b"noise"] = trees.noise("noise", 1 << 20)
    store.push(ListedSource(files))
    root, locations = store.repository.located(store.snapshot().manifest)
    assert len(root.parts) > 1
    part = locations.frames[locations.part_frames[0]]
    for key in store.object_keys(f"{kind}/"):
        path = store.path(key)
        if damage == "missing":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[part.offset + 50 if kind == "packs" else len(data) // 2] ^= 0xFF
            path.write_bytes(data)
    store.forget()
    files[b"zzz"] = b"new"
    result = store.push(ListedSource(files))
    if (kind, damage) != ("index", "missing"):
        assert any("damaged" in warning for warning in result.warnings)
    # Only packs need to be stored again: all else is found some other way.
    assert (result.new_chunk_bytes > 1 << 20) == (kind == "packs")
    assert store.verify(whole=False).problems == []
    store.pull(tmp_path / "copy")
    for path, data in files.items():
        assert (tmp_path / "copy" / path.decode()).read_bytes() == data


def test_packs_that_vanished_are_stored_again(store: Store, tree: Path, tmp_path: Path) -> None:
    store.push(tree, "one")
    for key in store.object_keys("packs/"):
        store.path(key).unlink()
    # The index promises every chunk of it, and so does the stat cache.
    result = store.push(tree, "two")
    assert any("missing or cut short" in warning for warning in result.warnings)
    assert result.new_chunk_bytes == result.logical_bytes
    store.pull(tmp_path / "copy", "two")
    assert trees.describe(tmp_path / "copy") == trees.describe(tree)
    assert store.verify(whole=False).problems == []


def test_what_cannot_be_remembered_is_a_warning(
    store: Store, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise NoSpaceError("the stat cache is full")

    monkeypatch.setattr(store.stat_cache, "save", full)
    result = store.push(tree)
    assert result.warnings == ("the stat cache is full",)
    assert store.repository.resolve("tree") == result.snapshot
    monkeypatch.undo()
    assert store.push(tree).unchanged


# Many pushes.


def test_old_segments_are_found_again_through_samples(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 3)
    monkeypatch.setattr(known, "MERGE", 2)
    monkeypatch.setattr(samples, "RATE", 4)
    data = [trees.noise(i, 3 << 20) for i in range(14)]
    for i, content in enumerate(data):
        store.push(ListedSource({b"file": content}), f"ref-{i}")
    assert 1 <= len(store.object_keys("samples/")) <= 3
    assert len(store.object_keys("index/")) == 14
    store.forget()
    # The cost of knowing stays bounded, and nearly everything is found.
    result = store.push(ListedSource({b"file": data[0] + data[5]}), "again")
    assert result.new_chunk_bytes < 0.2 * (6 << 20)
    assert result.requests < 14 + 6
    _sound(store)


def test_a_damaged_sample_or_segment_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 2)
    monkeypatch.setattr(samples, "RATE", 4)
    for i in range(6):
        store.push(ListedSource({b"file": trees.noise(i, 1 << 20)}), f"ref-{i}")
    assert store.object_keys("samples/")
    for key in (*store.object_keys("samples/"), *store.object_keys("index/")):
        data = bytearray(store.path(key).read_bytes())
        data[len(data) // 2] ^= 0xFF
        store.path(key).write_bytes(data)
    result = store.push(ListedSource({b"file": trees.noise(0, 1 << 20)}), "again")
    assert result.new_chunk_bytes == 1 << 20
    assert len(result.warnings) >= 2


def test_a_manifest_stays_in_few_places_however_often_it_changes(store: Store) -> None:
    files = {
        b"lib/" + trees.noise(i % 60, 3).hex().encode() + b"/%d" % i: b"%d" % (i % 7)
        for i in range(6000)
    }
    sent = []
    for number in range(25):
        files[sorted(files)[number * 239]] = b"changed"
        sent.append(store.push(ListedSource(files)).stored_bytes)
        root, locations = store.repository.located(store.snapshot().manifest)
        frames = (locations.frames[number] for number in locations.part_frames)
        assert len(store.repository.fetcher.plan(frames)) <= 3
    assert len(root.parts) > 8
    # Nor is all of it written each time.
    assert sum(sent[1:]) < 0.3 * sent[0] * len(sent)
    assert store.verify().problems == []


def test_packs_of_an_interrupted_push_are_adopted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 1 << 20)
    data = trees.noise(1, 6 << 20)
    _faults(store).fail("put", UnavailableError("cut"), key="packs/", skip=3)
    with pytest.raises(UnavailableError):
        store.push(ListedSource({b"file": data}))
    arrived = len(store.object_keys("packs/"))
    assert arrived == 3
    assert store.object_keys("index/") == []
    _faults(store).clear()
    result = store.push(ListedSource({b"file": data}))
    assert result.new_chunk_bytes <= len(data) - arrived * (900 << 10)
    assert os.listdir(store.state) == []
    _sound(store)
    # Listed now, so that other machines find them too.
    store.forget()
    assert store.push(ListedSource({b"file": data}), "other").new_chunk_bytes == 0


def test_notes_of_packs_that_are_gone_are_forgotten(store: Store) -> None:
    writer = PackWriter(store.repository.objects, DedupIndex(), pending=store.state)
    writer.add(b"n" * 32, trees.noise(1, 100_000))
    writer.end_frame()
    while writer._encoding:
        writer._collect()
    writer._end_pack()
    while writer._uploading:
        writer._reap(block=True)
    writer.close()
    (note,) = os.listdir(store.state)
    (store.state / ("0" * 64)).write_bytes(b"half a note")
    assert len(known.find_orphans(store.repository, store.state)) == 1
    assert os.listdir(store.state) == [note]
    (key,) = store.object_keys("packs/")
    os.truncate(store.path(key), 1000)
    assert known.find_orphans(store.repository, store.state) == []
    assert os.listdir(store.state) == []
