"""No writer writes anything that may be collected, or lead to it, outside of a session.

Every write that reaches the disk of a ``file://`` store is watched, whoever made it and however.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from envstore.checkpoint.adapters.directory import save_dir
from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.store.catalog import tag
from envstore.store.doomed import PREFIXES
from envstore.store.objects.file import FileObjects
from envstore.store.profiles import Range, new_profile, save_profile
from envstore.store.refs import RefName
from envstore.store.repack import repack
from envstore.store.roots import is_root
from tests import trees
from tests.channel.conda import Channel
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.slotfill import orders, stage, state
from tests.checkpoint.talker import Talker, serving
from tests.resolver import locks
from tests.sources import ListedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        monkeypatch.setenv("ENVSTORE_URL", opened.url)
        monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "node"))
        yield opened


class Watch:
    """What was written, by the first part of its key, and what of it without a session."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.outside: list[str] = []
        self.left: list[str] = []


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], Watch]:
    """A function that begins to watch a store."""

    def begin(store: Store) -> Watch:
        watch = Watch()
        write = FileObjects._write

        def watched(self: FileObjects, key: str, *args: object, **kw: object) -> None:
            if key.startswith(PREFIXES) or is_root(key):
                kind = key.partition("/")[0]
                watch.kinds.add(kind if kind != "runs" else f"runs/{key.split('/')[3]}")
                if not os.listdir(store.path("sessions")):
                    watch.outside.append(key)
            write(self, key, *args, **kw)  # type: ignore[arg-type]

        store.path("sessions").mkdir(exist_ok=True)
        monkeypatch.setattr(FileObjects, "_write", watched)
        return watch

    return begin


@contextmanager
def held(watch: Watch, store: Store, *kinds: str) -> Iterator[None]:
    """See that all that is written here is written in sessions, and all of ``kinds`` is."""
    watch.kinds.clear()
    yield
    assert watch.outside == []
    assert set(kinds) <= watch.kinds
    assert store.object_keys("sessions/") == []


TREE = ("packs", "index", "locations", "manifests", "snapshots")


def test_pushes_tags_and_repacks(store: Store, watching: Callable[[Store], Watch]) -> None:
    watch = watching(store)
    with held(watch, store, *TREE, "refs"):
        files = {b"%d" % number: trees.noise(number, 300_000) for number in range(12)}
        name = store.push(ListedSource(files)).snapshot
    with held(watch, store, "refs"):
        tag(store.repository, "tree", RefName.parse("tagged"))
        tag(store.repository, f"@{name.hex()}", RefName.parse("pinned"))
    ranges = [Range(b"%d" % number, 0, 1000) for number in range(0, 12, 3)]
    with held(watch, store):
        # The command line does so in a session; here it only has to be there.
        manifest = store.repository.snapshot(name).manifest
        save_profile(store.repository.objects, manifest, "start", new_profile(ranges, []))
        watch.outside.clear()
    with held(watch, store, "packs", "index", "locations"):
        assert not repack(store.repository, name).unchanged


def test_pushes_of_locks(
    store: Store,
    watching: Callable[[Store], Watch],
    conda_channel: Channel,
    tmp_path: Path,
) -> None:
    watch = watching(store)
    with held(watch, store, *TREE, "refs", "locks", "packages"):
        lock = locks.listed_lock(conda_channel, "greeting", "settings")
        locks.push(store, lock, tmp_path / "machine")


def test_persisters(
    store: Store,
    watching: Callable[[Store], Watch],
    slots: SlotDirectory,
    owner: SlotOwner,
) -> None:
    watch = watching(store)
    kinds = (*TREE, "runs/parts", "runs/commits", "refs")
    with held(watch, store, *kinds), serving(slots.path), Talker(slots.path) as talker:
        for step in (1, 2):
            wanted = orders(store.url, step)
            writer = stage(owner, wanted, state({"m": (100_000, step)}))
            talker.ask("staged", slot=writer.number, id=str(wanted.checkpoint))
            talker.hear("durable", id=str(wanted.checkpoint))


def test_commits_of_several_ranks(store: Store, watching: Callable[[Store], Watch]) -> None:
    run = RunStore(store.repository, RUN)
    run.open_epoch("job", 2, lambda _: None)
    id = CheckpointId(5, 1)
    parts = [make_part(store.repository, id, rank, 2) for rank in (0, 1)]
    watch = watching(store)
    with held(watch, store, "runs/parts"):
        for part in parts:
            run.put_part(part)
    with held(watch, store, "manifests", "snapshots", "runs/commits", "refs"):
        assert run.try_commit(id) is not None
    store.repository.objects.delete(run.run.ref("latest").key)
    with held(watch, store, "refs"):
        run.roll_forward()


def test_directories_as_checkpoints(
    store: Store, watching: Callable[[Store], Watch], tmp_path: Path
) -> None:
    watch = watching(store)
    source = tmp_path / "output"
    source.mkdir()
    (source / "model.bin").write_bytes(trees.noise("model", 100_000))
    with held(watch, store, *TREE, "runs/parts", "runs/commits", "refs"):
        save_dir("team/llm", 3, source, store=store.url)


def test_files_of_fsspec(store: Store, watching: Callable[[Store], Watch]) -> None:
    watch = watching(store)
    fsspec.register_implementation("envstore", EnvstoreFileSystem, clobber=True)
    fs = fsspec.filesystem("envstore", store=store.url)
    try:
        with held(watch, store, *TREE, "refs"), fs.open("team/data/v1/file", "wb") as file:
            file.write(trees.noise("file", 6 << 20))
        with held(watch, store, *TREE, "refs"), fs.transaction:
            for name in ("one", "two"):
                with fs.open(f"team/data/v1/{name}", "wb") as file:
                    file.write(trees.noise(name, 100_000))
        with held(watch, store, "drafts"), fs.open("team/llm/step-5/__0_0.distcp", "wb") as file:
            file.write(trees.noise("part", 100_000))
        with held(watch, store, "runs/commits"), fs.open("team/llm/step-5/.metadata", "wb") as file:
            file.write(b"metadata")
        with held(watch, store, "refs"):
            fs.cp_file("team/data/v1/one", "team/other/v1/one")
            fs.mv("team/data/v1/two", "team/data/v1/three")
            fs.mv("team/data/v1/three", "team/other/v1/three")
            fs.rm("team/data/v1/one")
        with held(watch, store):
            file = fs.open("team/data/v1/given-up", "wb")
            file.write(trees.noise("given up", 100_000))
            file.discard()
    finally:
        EnvstoreFileSystem.clear_instance_cache()
