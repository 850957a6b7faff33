"""A push that is killed at any moment leaves the store valid, and the next one goes on from there.

The pushing process kills itself at a chosen step: as it enters one of the calls that change
something on disk (in the middle of the bytes, if it is a write), counted from the start, from when
it moves the ref or from when that is done, or when it has told its progress so and so often.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from envstore.store import packing, packs
from envstore.store.digest import parse_hex
from envstore.store.known import find_orphans
from envstore.store.push import PushResult
from tests import trees
from tests.stores import Store

ROOT = Path(__file__).parents[2]
PACK_SIZE = 1 << 20
SEGMENT_PACKS = 3
ROUNDS = 16

_PUSH = """
import os, signal, sys
from pathlib import Path

from envstore.store import packing, packs, push, statcache
from envstore.store.refs import RefName
from envstore.store.source import DirectorySource
from tests.stores import Store

root, tree, what, doom = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
packs.TARGET_SIZE, packing.SEGMENT_PACKS = int(sys.argv[5]), int(sys.argv[6])
seen = {"step": 0, "progress": 0, "moving": 0, "after": 0}
stage = "step"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def met(kind):
    seen[kind] += 1
    return kind == what and seen[kind] == doom

def deadly(call):
    def wrapped(*args, **more):
        if met(stage):
            die()
        return call(*args, **more)
    return wrapped

move_ref = push.move_ref
def moving(*args):
    global stage
    stage = "moving"
    move_ref(*args)
    stage = "after"
push.move_ref = moving

write = os.write
def deadly_write(fd, data):
    if met(stage):
        write(fd, memoryview(data)[: len(data) // 2])
        die()
    return write(fd, data)

def progress(phase, done, total):
    if met("progress"):
        die()

with Store(root) as store:
    os.fsync = lambda fd: None  # the dying of a process loses nothing that was written
    for name in ("fsync", "rename", "replace", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    os.write = deadly_write
    statcache.StatCache.save = deadly(statcache.StatCache.save)
    push.push(
        store.repository,
        DirectorySource(tree),
        RefName.parse("tree"),
        store.stat_cache,
        state=store.state,
        progress=progress,
    )
print(*seen.values())
"""


@dataclass(frozen=True)
class _Scene:
    """A store that holds an older state of a tree, and what a push that is left alone does."""

    root: Path
    tree: Path
    old: PushResult
    new: PushResult
    steps: int
    tellings: int
    moving: int
    after: int


def _push_killed(store: Path, tree: Path, what: str, doom: int) -> tuple[int, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-c", _PUSH, str(store), str(tree), what, str(doom)),
            *(str(PACK_SIZE), str(SEGMENT_PACKS)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Scene]:
    root = tmp_path_factory.mktemp("killed")
    tree = root / "tree"
    trees.plain(tree, "old", files=60, size=30_000)
    with Store(root / "store") as store:
        old = store.push(tree)
    for i in range(8):
        (tree / f"noise {i}").write_bytes(trees.noise(f"killed {i}", 7 << 18))
        (tree / f"prose {i}").write_bytes(trees.prose(f"killed {i}", 1 << 19))
    (tree / "file 0").write_text("changed")
    trees.settle(tree)
    shutil.copytree(root / "store", root / "free")
    with Store(root / "free") as store, pytest.MonkeyPatch.context() as patch:
        _small_packs(patch)
        new = store.push(tree)
        assert len(store.object_keys("packs/")) > 12
    shutil.copytree(root / "store", root / "counted")
    code, told = _push_killed(root / "counted", tree, "nothing", 0)
    assert code == 0
    yield _Scene(root, tree, old, new, *map(int, told.split()))
    shutil.rmtree(root)


def _small_packs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packs, "TARGET_SIZE", PACK_SIZE)
    patch.setattr(packing, "SEGMENT_PACKS", SEGMENT_PACKS)


def _moments(scene: _Scene) -> list[tuple[str, int]]:
    """Return seeded random moments before the ref moves, and every one from then on.

    Threads upload packs, so a push is now a few steps longer, now shorter: only what comes when
    all are there is always the same.
    """
    rng = random.Random("moments")
    steps = rng.sample(range(1, scene.steps - 20), 8)
    tellings = rng.sample(range(2, scene.tellings), 4)
    chosen = [("step", n) for n in steps] + [("progress", n) for n in tellings]
    chosen += [("moving", n) for n in range(1, scene.moving + 1)]
    return chosen + [("after", n) for n in range(1, scene.after + 1)]


def _usable(store: Store) -> set[str]:
    """Return the keys of the packs that the next push on this machine can know of."""
    found = {packs.pack_key(pack.digest) for pack in find_orphans(store.repository, store.state)}
    for key in store.object_keys("index/"):
        name = parse_hex(key.partition("/")[2])
        assert name is not None
        found |= {packs.pack_key(pack.digest) for pack in store.repository.segment(name)}
    return found


@pytest.mark.usefixtures("_no_fsync")
def test_a_push_killed_at_any_moment(scene: _Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_packs(monkeypatch)
    moments = _moments(scene)
    assert len(moments) >= ROUNDS
    went_on = moved = 0
    for number, (what, doom) in enumerate(moments):
        place = scene.root / f"round {number}"
        shutil.copytree(scene.root / "store", place)
        with Store(place) as store:
            before = set(store.object_keys("packs/"))
        code, _ = _push_killed(place, scene.tree, what, doom)
        assert code == -9, (what, doom)
        with Store(place) as store:
            report = store.verify()
            assert report.problems == [], (what, doom)
            manifest = store.snapshot().manifest
            assert manifest in (scene.old.manifest, scene.new.manifest)
            moved += manifest == scene.new.manifest
            usable = _usable(store) - before
            arrived = set(store.object_keys("packs/")) - before
            # Only what was just being sent can be unknown.
            assert usable <= arrived
            assert len(arrived - usable) <= packing.UPLOADS
            there = sum(store.path(key).stat().st_size for key in usable)

            again = store.push(scene.tree)
            assert again.manifest == scene.new.manifest
            assert again.stored_bytes <= max(0, scene.new.stored_bytes - there + (1 << 20))
            if len(usable) >= 2:
                went_on += 1
                assert again.uploaded_bytes < scene.new.uploaded_bytes
            assert store.verify().problems == []
            assert list(store.state.glob("?" * 64)) == [] or manifest == scene.new.manifest
            third = store.push(scene.tree)
            assert third.unchanged
            assert third.uploaded_bytes == 0
        shutil.rmtree(place)
    assert went_on >= ROUNDS // 2
    assert moved >= scene.after >= 1


@pytest.mark.usefixtures("_no_fsync")
def test_killed_again_and_again_it_still_gets_there(
    scene: _Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_packs(monkeypatch)
    place = scene.root / "again and again"
    shutil.copytree(scene.root / "store", place)
    died = 0
    # Never given the time for more than a part of it.
    while _push_killed(place, scene.tree, "step", scene.steps // 4)[0]:
        died += 1
        assert died < 20
    assert died > 2
    with Store(place) as store:
        sent = sum(store.path(key).stat().st_size for key in store.object_keys("packs/"))
        assert sent < 1.5 * scene.new.stored_bytes + (2 << 20)
        assert store.snapshot().manifest == scene.new.manifest
        assert store.verify().problems == []
