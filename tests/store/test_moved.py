"""Packs that move, or are lost, while a tree is pulled, hydrated or restored."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from envstore.checkpoint.layout import Want
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.fuse.hydrate import hydrate
from envstore.resolver.abi.reading import _Frames
from envstore.store.cache import BlobCache
from envstore.store.config import init_store
from envstore.store.entries import HOLE
from envstore.store.locations import Locations
from envstore.store.objects import open_objects
from envstore.store.pull import pull
from envstore.store.push import push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from envstore.store.whereabouts import Whereabouts
from tests.faulty import FaultyStore
from tests.moving import drop, move
from tests.s3server import S3Server
from tests.stores import Store
from tests.trees import describe, noise, prose

MIB = 1 << 20
REFRAME = pytest.mark.parametrize("reframe", [False, True], ids=["copied", "reframed"])


class Tree:
    """A pushed tree, read through objects that can be made to wait, and moved by others."""

    def __init__(self, base: Path, store: Store) -> None:
        self.base = base
        self.source = base / "tree"
        self.source.mkdir()
        for number in range(40):
            (self.source / f"file {number}").write_bytes(prose(number, 4000 + 999 * number))
        (self.source / "large").write_bytes(noise("large", 9 * MIB + 3))
        (self.source / "copy").write_bytes(noise("large", 9 * MIB + 3))
        with (self.source / "sparse").open("wb") as out:
            out.seek(3 * MIB)
            out.write(b"behind a hole")
        self.store = store
        self.pushed = store.push(self.source)
        self.others = Repository(store.faults.inner, store.repository.config, None)
        store.faults.clear()

    def reader(self, *, cache: bool = True) -> Repository:
        kept = BlobCache(self.base / "node") if cache else None
        return Repository(self.store.faults, self.store.repository.config, kept)

    def while_reading(self, read: Callable[[], object], change: Callable[[], object]) -> None:
        """Do ``change`` when ``read`` has its locations and asks for the first files."""
        gate = self.store.faults.gate("get_range", key="packs/", skip=1)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                read()
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        gate.wait_entered()
        change()
        gate.open()
        thread.join()
        if failures:
            raise failures[0]

    def looks(self) -> int:
        return self.store.faults.count("get", "locations/")


@pytest.fixture
def tree(tmp_path: Path, store: Store) -> Tree:
    return Tree(tmp_path, store)


@REFRAME
def test_a_pull_goes_on_where_packs_have_moved(tree: Tree, reframe: bool) -> None:
    place = tree.base / "pulled"
    tree.while_reading(
        lambda: pull(tree.reader(), tree.pushed.snapshot, place),
        lambda: move(tree.others, tree.pushed.manifest, reframe=reframe),
    )
    assert describe(place) == describe(tree.source)
    # Once to begin with, then once or twice: who fails meanwhile cannot know whether that is late
    # enough.
    assert 2 <= tree.looks() <= 3


def test_a_pull_asks_for_nothing_more_when_nothing_moves(tree: Tree) -> None:
    pull(tree.reader(), tree.pushed.snapshot, tree.base / "pulled")
    assert tree.looks() == 1


def test_a_pull_says_what_is_lost_and_of_which_file(tree: Tree) -> None:
    places = tree.others.located(tree.pushed.manifest)[1]
    with pytest.raises(NotFoundError, match=r"(file \d+|large|copy|sparse): .*packs/"):
        tree.while_reading(
            lambda: pull(tree.reader(), tree.pushed.snapshot, tree.base / "pulled"),
            lambda: drop(tree.others, places),
        )
    assert not (tree.base / "pulled").exists()
    assert tree.looks() <= 3


@REFRAME
def test_a_pull_may_begin_when_packs_have_just_moved(tree: Tree, reframe: bool) -> None:
    repository = tree.reader()
    old = repository.located(tree.pushed.manifest)
    move(tree.others, tree.pushed.manifest, reframe=reframe)
    assert [part.kinds for part in repository.parts(*old)] == [
        part.kinds for part in tree.others.parts(*tree.others.located(tree.pushed.manifest))
    ]
    drop(tree.others, tree.others.located(tree.pushed.manifest)[1])
    lost = Repository(tree.store.faults, repository.config, None)
    with pytest.raises(NotFoundError, match="packs/"):
        list(lost.parts(*old))


@REFRAME
def test_a_hydration_goes_on_where_packs_have_moved(tree: Tree, reframe: bool) -> None:
    repository = tree.reader()
    tree.while_reading(
        lambda: hydrate(repository, tree.pushed.snapshot),
        lambda: move(tree.others, tree.pushed.manifest, reframe=reframe),
    )
    # Everything is here: a second one fetches no file.
    tree.store.faults.clear()
    assert hydrate(repository, tree.pushed.snapshot).missing_files == 0
    assert tree.store.faults.count("get_range") == 0
    pinned = [one for one in (tree.base / "node" / "hydrated").rglob("pins/*/*") if one.is_file()]
    assert {one.read_bytes() for one in pinned} == {
        one.read_bytes() for one in tree.source.iterdir()
    }


def test_a_hydration_says_what_is_lost(tree: Tree) -> None:
    places = tree.others.located(tree.pushed.manifest)[1]
    with pytest.raises(NotFoundError, match="packs/"):
        tree.while_reading(
            lambda: hydrate(tree.reader(), tree.pushed.snapshot),
            lambda: drop(tree.others, places),
        )


@REFRAME
@pytest.mark.parametrize("far", [False, True], ids=["here", "far"])
def test_a_restore_fetches_again_only_what_has_moved(tree: Tree, reframe: bool, far: bool) -> None:
    repository = tree.reader(cache=far)
    if far:
        repository.objects.url = "s3://far/away?endpoint=http://127.0.0.1:1"
    opened = SnapshotTree(repository, tree.pushed.snapshot)
    views = {path: bytearray(size) for path, size in opened.sizes.items()}
    wants = [Want(path, 0, memoryview(view)) for path, view in views.items() if view]
    random.Random(1).shuffle(wants)
    tree.store.faults.clear()
    tree.while_reading(
        lambda: opened.read_into(wants),
        lambda: move(tree.others, tree.pushed.manifest, reframe=reframe),
    )
    for path, view in views.items():
        assert view == (tree.source / path).read_bytes()
    assert 1 <= tree.looks() <= 2


def test_a_restore_fetches_ahead_where_packs_have_moved(tree: Tree) -> None:
    repository = tree.reader()
    repository.objects.url = "s3://far/away?endpoint=http://127.0.0.1:1"
    opened = SnapshotTree(repository, tree.pushed.snapshot)
    move(tree.others, tree.pushed.manifest, reframe=True)
    assert opened.prefetch() > 9 * MIB
    drop(tree.others, tree.others.located(tree.pushed.manifest)[1])
    assert opened.read("large") == (tree.source / "large").read_bytes()


@REFRAME
def test_a_check_of_libraries_reads_where_packs_have_moved(tree: Tree, reframe: bool) -> None:
    repository = tree.reader(cache=False)
    root, locations = repository.located(tree.pushed.manifest)
    frames = _Frames(repository, repository.whereabouts(root, locations))
    move(tree.others, tree.pushed.manifest, reframe=reframe)
    number = 0
    for entry in tree.others.entries(tree.pushed.manifest):
        data = (tree.source / entry.path.decode()).read_bytes()
        at = 0
        for name, size in entry.refs:
            if name != HOLE:
                assert frames.chunk(number, name, size, entry.path) == data[at : at + size]
            at += size
            number += 1
    assert tree.looks() == 2
    drop(tree.others, tree.others.located(tree.pushed.manifest)[1])
    with pytest.raises(NotFoundError, match="packs/"):
        _Frames(repository, repository.whereabouts(root, locations)).chunk(0, *entry.refs[0], b"x")


def test_what_moves_again_and_again_is_given_up(tree: Tree) -> None:
    opened = SnapshotTree(tree.reader(cache=False), tree.pushed.snapshot, threads=1)
    places = tree.others.located(tree.pushed.manifest)[1]
    drop(tree.others, places)
    lies = iter(range(100))

    def look() -> Locations:
        changed = Locations(
            list(places.frames), places.part_frames, places.part_offsets, places.ref_frames,
            places.ref_offsets,
        )  # fmt: skip
        changed.part_offsets = changed.part_offsets[:]
        changed.part_offsets[0] = next(lies) + 1
        return changed

    opened._whereabouts = Whereabouts(places, look)
    with pytest.raises(NotFoundError, match=r"large: .*packs/"):
        opened.read("large")
    assert next(lies) <= 3


def test_many_who_ask_ask_once() -> None:
    old, new = Locations(), Locations(part_frames=Locations().part_frames[:])
    new.part_frames.append(1)
    entered, go = threading.Event(), threading.Event()
    asked: list[int] = []

    def look() -> Locations:
        asked.append(1)
        entered.set()
        assert go.wait(60)
        return new

    places = Whereabouts(old, look)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(places.again(old))) for _ in range(9)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    go.set()
    for thread in threads:
        thread.join()
    assert all(one is new for one in found)
    assert len(asked) == 1
    assert places.again(old) is new
    assert places.again(new) is None
    assert len(asked) == 2


@pytest.mark.parametrize("error", [NotFoundError("gone"), CorruptError("torn")])
def test_no_locations_are_no_better_ones(error: EnvstoreError) -> None:
    def look() -> Locations:
        raise error

    old = Locations()
    assert Whereabouts(old, look).again(old) is None


def test_all_of_it_on_a_server(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(5):
        (source / f"file {number}").write_bytes(noise(number, 900_000))
    faults = FaultyStore(open_objects(s3_server.url(s3_server.new_bucket()), create=True))
    config, _ = init_store(faults)
    pushing = Repository(faults, config, None)
    known = StatCache(tmp_path / "stat.sqlite")
    pushed = push(pushing, DirectorySource(source, kind="dir"), RefName.parse("tree"), known)
    known.close()
    faults.clear()
    others = Repository(faults.inner, config, None)
    repository = Repository(faults, config, BlobCache(tmp_path / "node"))
    opened = SnapshotTree(repository, pushed.snapshot)
    move(others, pushed.manifest, reframe=True)
    for path in opened.sizes:
        assert opened.read(path) == (source / path).read_bytes()
    move(others, pushed.manifest, reframe=False)
    pull(Repository(faults, config, None), pushed.snapshot, tmp_path / "pulled")
    assert describe(tmp_path / "pulled") == describe(source)
    pushing.close()
