"""The real code in seeded orders of its requests, with deaths, lost and late answers.

Pushes of trees that share chunks, tags, removals and collections without grace run at once over
one store that lets in a request at a time. After each deletion, and in the end, every byte of
every ref is there; and when all is quiet, collections leave nothing but what is live.
``ENVSTORE_TEST_INTERLEAVINGS=1000`` for as many orders.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError
from envstore.store import catalog, known, packing, repository, sessions
from envstore.store.catalog import remove_refs, tag
from envstore.store.config import init_store
from envstore.store.gc import collecting, sweeping
from envstore.store.gc.collecting import collect
from envstore.store.push import push
from envstore.store.refs import RefName, list_refs, read_ref
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from envstore.store.verify import verify
from tests import trees
from tests.model.stepped import Actor, Door, Memory, SteppedStore, fate

ORDERS = int(os.environ.get("ENVSTORE_TEST_INTERLEAVINGS", "12"))
FIRST = int(os.environ.get("ENVSTORE_TEST_FIRST", "0"))
# More than anybody waits before a writer, or a collector, that was not heard of counts as dead.
_LONG = 1000.0


class _World:
    """One store, what is done to it, and what must be true of it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(f"interleavings {seed}")
        self.root = root
        self.store = SteppedStore()
        self.memory: Memory = self.store.memory
        self.config, _ = init_store(self.memory)
        self.number = 0
        self.old = b""
        self.jumps = self.rng.random() < 0.5
        for name, seeds in {"one": "ab", "two": "bc", "three": "a"}.items():
            tree = root / name
            tree.mkdir()
            for part in seeds:
                (tree / part).write_bytes(trees.noise(part, 30_000))
            trees.settle(tree)

    def repository(self, objects: Door | Memory) -> Repository:
        return Repository(objects, self.config, None)

    # What actors do.

    def push(self, objects: Door | Memory, tree: str, ref: str) -> None:
        self.number += 1
        stat_cache = StatCache(self.root / f"stat {self.number}")
        source = DirectorySource(self.root / tree)
        try:
            push(self.repository(objects), source, RefName.parse(ref), stat_cache)
        finally:
            source.close()
            stat_cache.close()

    def tag(self, objects: Door, source: str, ref: str) -> None:
        tag(self.repository(objects), source, RefName.parse(ref), force=True)

    def remove(self, objects: Door, ref: str) -> None:
        remove_refs(self.repository(objects), [RefName.parse(ref)])

    def collect(self, objects: Door | Memory) -> None:
        collect(self.repository(objects), grace=0)

    def condemn(self) -> None:
        """Collect, with a writer there that keeps what is condemned from being deleted."""
        with sessions.Session.begin(self.memory, "a bystander"):
            self.collect(self.memory)

    def collect_again(self, objects: Door) -> None:
        """Collect, and once more when writers that are not done yet count as stopped for long."""
        self.collect(objects)
        if self.jumps:
            self.memory.time += _LONG
        self.collect(objects)

    # What must be true.

    def check(self) -> None:
        """Every byte of every ref is there."""
        names = list(list_refs(self.memory))
        targets = [(str(name), read_ref(self.memory, name).snapshot) for name in names]
        report = verify(self.repository(self.memory), targets, read_data=True)
        assert report.problems == [], self.store.log

    def settle(self) -> None:
        """Let everything end, and time go by; then nothing may be left that is not live."""
        for _ in range(2):
            self.memory.time += _LONG
            self.collect(self.memory)
        self.check()
        for key in [info.key for info in self.memory.list("sessions/")]:
            self.memory.delete(key)  # as after the days for which what was declared is kept
        self.collect(self.memory)
        self.check()
        for name in list(list_refs(self.memory)):
            self.memory.delete(name.key)
        self.collect(self.memory)
        left = {info.key.partition("/")[0] for info in self.memory.list("")}
        assert left <= {"envstore.json", "gc"}, self.store.log


def _actors(world: _World) -> list[Callable[[Door], None]]:
    """Choose what is done at once, on a store whose refs "old" and "kept" are there."""
    rng = world.rng
    snapshot = world.old.hex()
    chosen: list[Callable[[Door], None]] = [
        lambda objects: world.push(objects, "one", "new"),
        lambda objects: world.push(objects, "two", "kept"),
        lambda objects: world.push(objects, "three", "third"),
        lambda objects: world.tag(objects, "old", "moved"),
        lambda objects: world.tag(objects, f"@{snapshot}", "back"),
        lambda objects: world.remove(objects, "old"),
    ]
    rng.shuffle(chosen)
    return [*chosen[: rng.randrange(2, 5)], world.collect_again]


def _run(world: _World) -> None:
    rng, store = world.rng, world.store
    faults = rng.choice((0.0, 0.002, 0.01))
    world.push(world.memory, "one", "old")
    world.old = read_ref(world.memory, RefName.parse("old")).snapshot
    world.push(world.memory, "three", "kept")
    if rng.random() < 0.7:  # what "old" holds is condemned already
        body = world.memory.get(RefName.parse("old").key)
        world.memory.delete(RefName.parse("old").key)
        world.condemn()
        if rng.random() < 0.5:
            world.memory.put(RefName.parse("old").key, body)
    actors = [Actor(store, f"{at}", work) for at, work in enumerate(_actors(world))]
    # Each is run for a while, so that long stretches of one meet the middle of another.
    favourite = ""
    while waiting := store.ready():
        if store.late and rng.random() < 0.02:
            store.arrive(rng.choice(store.late))
            world.check()
        if rng.random() < 0.1 or all(request.actor.name != favourite for request in waiting):
            favourite = rng.choice(waiting).actor.name
        (request,) = [request for request in waiting if request.actor.name == favourite]
        store.answer(request, fate(rng, request, faults))
        if request.name == "delete" or request.key.startswith(("refs/", "locations/")):
            world.check()
    for actor in actors:
        actor.join()
        if actor.error is not None and not isinstance(actor.error, EnvstoreError):
            raise actor.error
    while store.late:
        store.arrive(rng.choice(store.late))
        world.check()
    world.settle()


@pytest.fixture
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch, _no_fsync: None) -> None:
    """Have every actor make one request after the other, so that an order can be had again."""
    for module in (repository, known, sweeping, sessions, packing, catalog, collecting):
        for name in ("PARALLEL", "_PARALLEL", "UPLOADS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.mark.usefixtures("_one_at_a_time")
@pytest.mark.timeout(120 + 10 * ORDERS)
def test_nothing_is_lost_in_any_order(tmp_path: Path) -> None:
    for seed in range(FIRST, FIRST + ORDERS):
        root = tmp_path / str(seed)
        root.mkdir()
        try:
            _run(_World(root, seed))
        except BaseException as error:
            error.add_note(f"ENVSTORE_TEST_FIRST={seed}")
            raise
        shutil.rmtree(root)
