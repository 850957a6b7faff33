from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.checkpoint import trees
from envstore.checkpoint.layout import Tree, Want
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import CorruptError, NotFoundError, UnavailableError
from envstore.store.cache import BlobCache
from envstore.store.config import init_store
from envstore.store.frames import Codec
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, Locations, locations_key
from envstore.store.objects import open_objects
from envstore.store.packing import PackWriter
from envstore.store.packs import pack_key
from envstore.store.push import push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from tests.faulty import FaultyStore
from tests.s3server import S3Server
from tests.scattering import (
    MIB,
    OTHER,
    TENSORS,
    FarStore,
    fill,
    no_thread_left,
    some_ranges,
    tensor_start,
)
from tests.stores import Store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tree"
    fill(root)
    return root


@pytest.fixture(scope="module")
def pushed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("pushed") / "store") as store:
        store.push(source, kind="checkpoint", normalise=True)
        yield store


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Iterator[Store]:
    """A store to be changed."""
    with Store(tmp_path / "store", wrap=FaultyStore) as store:
        store.push(source, kind="checkpoint", normalise=True)
        yield store


@pytest.fixture(scope="module")
def server_url(
    source: Path, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The same in a bucket."""
    top = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        url = s3_server.url(s3_server.new_bucket(), "store")
        with closing(open_objects(url, create=True)) as objects:
            config, _ = init_store(objects)
            with (
                closing(StatCache(top / "stat.sqlite")) as stat_cache,
                closing(DirectorySource(source, kind="checkpoint", normalise=True)) as tree,
            ):
                ref = RefName.parse("tree")
                push(Repository(objects, config, None), tree, ref, stat_cache, state=top / "state")
        yield url


def opened(store: Store) -> SnapshotTree:
    return SnapshotTree(store.repository, store.repository.resolve("tree"))


def read(tree: Tree, wanted: list[tuple[str, int, int]]) -> list[bytes]:
    buffers = [bytearray(length) for _, _, length in wanted]
    tree.read_into(
        [
            Want(path, start, memoryview(buffer))
            for (path, start, _), buffer in zip(wanted, buffers, strict=True)
        ]
    )
    return list(map(bytes, buffers))


def contents(source: Path, wanted: list[tuple[str, int, int]]) -> list[bytes]:
    return [(source / path).read_bytes()[at : at + length] for path, at, length in wanted]


def everything(tree: Tree) -> list[tuple[str, int, int]]:
    return [(path, 0, size) for path, size in tree.sizes.items()]


def test_the_files_of_a_snapshot(source: Path, pushed: Store) -> None:
    tree = opened(pushed)
    files = [path for path in source.rglob("*") if path.is_file()]
    expected = {str(path.relative_to(source)): path.stat().st_size for path in files}
    assert dict(tree.sizes) == expected
    assert {path: entry.size for path, entry in tree.entries.items()} == expected
    assert tree.snapshot.kind == "checkpoint"
    for path in expected:
        assert tree.read(path) == (source / path).read_bytes()
    for ask in (tree.read, lambda path: read(tree, [(path, 0, 1)])):
        for path in ("ranks", "nothing", "state.json/", ""):
            with pytest.raises(NotFoundError, match="not in the checkpoint"):
                ask(path)
    tree.close()
    tree.close()


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_any_ranges(source: Path, pushed: Store, rng: random.Random) -> None:
    tree = opened(pushed)
    wanted = some_ranges(rng, dict(tree.sizes))
    assert read(tree, wanted) == contents(source, wanted)


def test_views_of_any_format_are_filled(source: Path, pushed: Store) -> None:
    tree = opened(pushed)
    start = tensor_start(source, "a")
    view = memoryview(bytearray(TENSORS["a"])).cast("f")
    square = memoryview(bytearray(MIB)).cast("B", (1024, 1024))
    nothing = memoryview(bytearray(8)).cast("B", (2, 4))[:0]
    tree.read_into(
        [
            Want("model.safetensors", start, view),
            Want("text", 5, square),
            Want("text", 2 * MIB, nothing),
        ]
    )
    assert view.tobytes() == contents(source, [("model.safetensors", start, TENSORS["a"])])[0]
    assert square.tobytes() == contents(source, [("text", 5, MIB)])[0]


def test_few_round_trips(pushed: Store, tmp_path: Path) -> None:
    far = FarStore(pushed.repository.objects)
    cache = BlobCache(tmp_path / "cache")
    repository = Repository(far, pushed.repository.config, cache)
    snapshot = repository.resolve("tree")
    far.clear()
    tree = SnapshotTree(repository, snapshot)
    tree.read("state.json")
    asked = [(call.operation, call.key.partition("/")[0]) for call in far.calls]
    assert sorted(asked) == [
        ("get", "locations"),
        ("get", "manifests"),
        ("get", "snapshots"),
        ("get_range", "packs"),
        ("get_range", "packs"),
    ]
    far.clear()
    SnapshotTree(repository, snapshot).read("state.json")
    assert sorted(call.key.partition("/")[0] for call in far.calls) == ["locations", "manifests"]


def test_weights_alone_cost_what_they_weigh(source: Path, pushed: Store) -> None:
    tree = opened(pushed)
    traffic = pushed.repository.objects.traffic
    before = traffic.bytes_in
    names = ("embed", "b", "d")
    wanted = [("model.safetensors", tensor_start(source, name), TENSORS[name]) for name in names]
    assert read(tree, wanted) == contents(source, wanted)
    assert traffic.bytes_in - before <= 1.02 * sum(TENSORS[name] for name in names)


def test_prefetch_and_then_without_the_store(source: Path, pushed: Store, tmp_path: Path) -> None:
    far = FarStore(pushed.repository.objects)
    repository = Repository(far, pushed.repository.config, BlobCache(tmp_path / "cache"))
    tree = SnapshotTree(repository, repository.resolve("tree"))
    size = tree.sizes["model.safetensors"]
    assert 0.9 * size < tree.prefetch(["model.safetensors"]) < 1.1 * size
    far.clear()
    wanted = [("model.safetensors", 0, size), (OTHER, tensor_start(source, "a", OTHER), 2 * MIB)]
    assert read(tree, wanted) == contents(source, wanted)
    assert far.calls == []
    assert tree.prefetch() > 0
    assert tree.prefetch() == 0
    far.clear()
    assert read(tree, everything(tree)) == contents(source, everything(tree))
    assert far.calls == []
    with pytest.raises(NotFoundError):
        tree.prefetch(["nothing"])


def test_closing_ends_a_prefetch(source: Path, pushed: Store, tmp_path: Path) -> None:
    far = FarStore(pushed.repository.objects)
    repository = Repository(far, pushed.repository.config, BlobCache(tmp_path / "cache"))
    tree = SnapshotTree(repository, repository.resolve("tree"), threads=1)
    fault = far.fail("get_range", UnavailableError("gone"), key="packs/")
    with pytest.raises(UnavailableError, match="gone"):
        tree.prefetch()
    fault.remove()
    gate = far.gate("get_range", key="packs/", skip=1)
    fetched: list[int] = []
    other = threading.Thread(target=lambda: fetched.append(tree.prefetch()))
    with no_thread_left():
        other.start()
        gate.wait_entered()
        tree.close()
        gate.open()
        other.join()
    assert 0 < fetched[0] < sum(tree.sizes.values()) // 2
    # What is there of it is not fetched again.
    far.clear()
    traffic = far.traffic
    before = traffic.bytes_in
    assert read(tree, everything(tree)) == contents(source, everything(tree))
    assert traffic.bytes_in - before < sum(tree.sizes.values()) - fetched[0] // 2


def test_what_is_prefetched_meanwhile_is_not_fetched(
    source: Path, pushed: Store, tmp_path: Path
) -> None:
    far = FarStore(pushed.repository.objects)
    repository = Repository(far, pushed.repository.config, BlobCache(tmp_path / "cache"))
    tree = SnapshotTree(repository, repository.resolve("tree"), threads=1)
    other = SnapshotTree(repository, repository.resolve("tree"))
    far.clear()
    gate = far.gate("get_range", key="packs/", times=1)
    found: list[list[bytes]] = []
    reader = threading.Thread(target=lambda: found.append(read(tree, everything(tree))))
    with no_thread_left():
        reader.start()
        gate.wait_entered()
        assert other.prefetch() > 0
        before = far.traffic.bytes_in
        gate.open()
        reader.join()
    assert found == [contents(source, everything(tree))]
    assert far.traffic.bytes_in - before < sum(tree.sizes.values()) // 2


@pytest.mark.parametrize("cached", [False, True])
def test_a_real_server(source: Path, server_url: str, tmp_path: Path, cached: bool) -> None:
    cache = BlobCache(tmp_path / "cache") if cached else None
    rng = random.Random(7)
    with no_thread_left(), Repository.open(server_url, cache) as repository:
        tree = SnapshotTree(repository, repository.resolve("tree"))
        traffic = repository.objects.traffic
        before = traffic.bytes_in
        wanted = [("model.safetensors", tensor_start(source, "embed"), TENSORS["embed"])]
        assert read(tree, wanted) == contents(source, wanted)
        assert traffic.bytes_in - before <= 1.02 * TENSORS["embed"]
        for _ in range(10):
            wanted = some_ranges(rng, dict(tree.sizes))
            assert read(tree, wanted) == contents(source, wanted)
        assert read(tree, everything(tree)) == contents(source, everything(tree))
        before = traffic.requests
        assert read(tree, everything(tree)) == contents(source, everything(tree))
        assert cached == (traffic.requests == before)


def test_many_trees_at_once_share_a_cache(source: Path, server_url: str, tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 9 * MIB)  # so that some push out what others need
    wrong: list[object] = []
    with Repository.open(server_url, cache) as repository:
        snapshot = repository.resolve("tree")

        def restore(seed: int) -> None:
            try:
                tree = SnapshotTree(repository, snapshot, threads=2)
                wanted = everything(tree)
                random.Random(seed).shuffle(wanted)
                if read(tree, wanted) != contents(source, wanted):
                    wrong.append("bytes")
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                wrong.append(error)

        threads = [threading.Thread(target=restore, args=(seed,)) for seed in range(4)]
        with no_thread_left():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


def test_packs_may_move_while_a_tree_is_open(source: Path, own: Store) -> None:
    tree = opened(own)
    repository = own.repository
    manifest = tree.snapshot.manifest
    old = repository.located(manifest)[1]
    index = DedupIndex()
    moved = Locations()
    with closing(PackWriter(repository.objects, index, codec=Codec.RAW)) as writer:
        places = []
        for frame in old.frames:
            raw = repository.load_frames([frame])[frame.digest]
            # In frames of their own, so that everything lies elsewhere.
            places.append(writer.add(frame.digest, raw))
            writer.end_frame()
        writer.flush()
        moved.frames = [index.frames[number] for number, _ in places]
    moved.part_frames, moved.part_offsets = old.part_frames, old.part_offsets
    moved.ref_frames, moved.ref_offsets = old.ref_frames, old.ref_offsets
    own.path(locations_key(manifest)).write_bytes(moved.seal())
    for pack in {frame.pack for frame in old.frames}:
        own.path(pack_key(pack)).unlink()
    assert read(tree, everything(tree)) == contents(source, everything(tree))
    # If they have not moved, they are lost.
    number = next(number for number in moved.ref_frames if number != NOWHERE)
    own.path(pack_key(moved.frames[number].pack)).unlink()
    with pytest.raises(NotFoundError, match="packs/"):
        read(tree, everything(tree))


def test_damage_is_named_and_an_outage_passes(source: Path, own: Store) -> None:
    tree = opened(own)
    objects = own.faults
    fault = objects.corrupt("get_range", key="packs/", at=-1)
    with pytest.raises(CorruptError, match=r"text: .*frame .*pack "), no_thread_left():
        tree.read("text")
    fault.remove()
    fault = objects.fail("get_range", UnavailableError("gone"), key="packs/", skip=1)
    with pytest.raises(UnavailableError, match="gone"), no_thread_left():
        read(tree, everything(tree))
    fault.remove()
    assert read(tree, everything(tree)) == contents(source, everything(tree))


def test_a_file_that_claims_to_be_huge_is_not_read_whole(
    pushed: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "MAX_READ", 29_999)
    with pytest.raises(CorruptError, match=r"state\.json has 30000 bytes"):
        opened(pushed).read("state.json")


def test_a_snapshot_that_is_not_there(pushed: Store) -> None:
    with pytest.raises(NotFoundError, match="snapshot"):
        SnapshotTree(pushed.repository, b"x" * 32)
