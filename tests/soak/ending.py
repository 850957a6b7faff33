"""The reckoning, when all is quiet: what was acknowledged is there, whole, and garbage is not."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from envstore import checkpoint
from envstore.checkpoint.errors import NoCheckpointError
from envstore.errors import EnvstoreError
from envstore.store.config import init_store
from envstore.store.locations import NOWHERE
from envstore.store.objects import open_objects
from envstore.store.pull import pull
from envstore.store.push import push
from envstore.store.refs import RefName, list_refs, read_ref
from envstore.store.repository import Repository
from envstore.store.roots import read_roots
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from envstore.store.usage import measure
from tests.soak import trainer, trees
from tests.soak.ledger import ABSENT, ANYTHING
from tests.soak.work import UMOUNT, Worker, judge_tree
from tests.soak.world import World

_LAST = ("--grace", "0s", "--max-unused", "1%")
ROOM = 1.05
"""What the store may take at the end, as a multiple of its live content in a fresh one."""


@dataclass(slots=True)
class Reckoning:
    """What was found at the end. Sizes are bytes of all objects.

    ``fresh`` is what a fresh store takes for the same content, ``du`` what ``envstore du`` calls
    stored, ``held`` what only those need who were
    killed, ``duplicate`` what chunks take that are live in more than one place.
    """

    snapshots_checked: int = 0
    checkpoints_checked: int = 0
    damaged: int = 0
    lost: int = 0
    unexpected: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_fresh: int = 0
    bytes_du: int = 0
    bytes_duplicate: int = 0
    held_snapshots: int = 0
    held_bytes: int = 0
    ratio: float = 0.0
    problems: int = 0

    def encode(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def reckon(world: World, url: str, workers: list[Worker], *, gc: bool) -> Reckoning:
    """Collect, verify, read everything, and weigh the store at ``url``, which nobody uses now."""
    found = Reckoning()
    home = world.root / "end"
    env = world.environment(home, "end", ENVSTORE_URL=url)
    found.bytes_before = _bytes(url)
    for _ in range(2 if gc else 0):
        with world.op("gc", "end") as op:
            done = world.run(op, "envstore", ["--json", "gc", *_LAST], env)
            world.judge(op, done)
            world.log(f"the last collection: {done.out}")
    with world.op("verify", "end") as op:
        done = world.run(op, "envstore", ["--json", "verify", "--read-data"], env, limit=600)
        if world.judge(op, done) != "done":
            world.fail(f"verify at the end: {(done.out + done.err)[-3000:]}")
        said = json.loads(done.out) if done.out.strip() else {"problems": []}
        found.problems = len(said["problems"])
    found.bytes_after = _bytes(url)
    with Repository.open(url) as repository:
        _check_refs(world, repository, found)
        for worker in workers:
            if worker.role == "train":
                _check_run(world, url, worker, found)
        _weigh(world, repository, found)
        _say_objects(world, repository)
    for worker in workers:
        world.look_at_logs(world.root / worker.name / ".local")
    found.ratio = found.bytes_after / max(1, found.bytes_fresh)
    if gc and found.ratio > ROOM:
        world.fail(
            f"the store takes {found.bytes_after:,} bytes, {found.ratio:.3f} times the "
            f"{found.bytes_fresh:,} of a fresh one with the same content"
        )
    return found


def _check_refs(world: World, repository: Repository, found: Reckoning) -> None:
    there = {str(name).removesuffix(":latest"): name for name in list_refs(repository.objects)}
    ours = {ref: name for ref, name in there.items() if ref.startswith("soak/")}
    for ref in world.ledger.refs():
        possible = world.ledger.possible(ref)
        if ref not in ours:
            if ABSENT not in possible:
                found.lost += 1
                world.fail(f"{ref} is lost; it was acknowledged as {possible}")
            continue
        tree = _read(world, repository, ref, ours[ref], found)
        if tree is not None and tree not in possible and ANYTHING not in possible:
            found.lost += 1
            world.fail(f"{ref} is {tree}, and was acknowledged as {possible}")
    for ref in ours.keys() - set(world.ledger.refs()):
        found.unexpected += 1
        world.fail(f"{ref} is there, and nobody ever wrote it")
    for ref in there.keys() - ours.keys():
        if not ref.startswith("runs/"):
            found.unexpected += 1
            world.fail(f"{ref} is there, and nobody ever wrote it")


def _read(
    world: World, repository: Repository, ref: str, name: RefName, found: Reckoning
) -> str | None:
    place = world.root / "end" / "tree"
    trees.remove(place)
    try:
        snapshot = read_ref(repository.objects, name).snapshot
        pull(repository, snapshot, place)
    except EnvstoreError as error:
        found.damaged += 1
        world.fail(f"{ref} cannot be read at the end: {error}")
        return None
    found.snapshots_checked += 1
    tree = judge_tree(world, f"{ref} at the end", trees.seen(place))
    found.damaged += tree is None
    return tree


def _check_run(world: World, url: str, worker: Worker, found: Reckoning) -> None:
    with checkpoint.Run(
        worker.run_name,
        url,
        staging=checkpoint.Staging(world.root / "shm" / "end"),
        persister="external",
    ) as run:
        latest = run.latest() or 0
        if latest < worker.acknowledged:
            found.lost += 1
            world.fail(
                f"{worker.run_name}: step {worker.acknowledged} is lost, {latest} is the last"
            )
        for commit in run.list():
            state = trainer.fresh()
            try:
                step = run.restore(state, step=commit.step, only=state.keys())
            except NoCheckpointError:
                continue
            except EnvstoreError as error:
                found.damaged += 1
                world.fail(f"{worker.run_name}: step {commit.step} cannot be restored: {error}")
                continue
            wrong = trainer.wrong(worker.run_name, state, step or 0)
            found.checkpoints_checked += 1
            if wrong:
                found.damaged += 1
                world.fail(f"{worker.run_name}: step {commit.step} is damaged: {wrong}")


def _bytes(url: str) -> int:
    objects = open_objects(url)
    try:
        return sum(info.size for info in objects.list(""))
    finally:
        objects.close()


def _weigh(world: World, repository: Repository, found: Reckoning) -> None:
    """Weigh what a fresh store takes for all that is live; also what no ref and no run needs.

    That is what killed writers had declared, and what killed mounts read: both count as live until
    their time is over.
    """
    names = sorted(list_refs(repository.objects))
    found.bytes_du = measure(repository, names).total.stored
    needed: dict[bytes, str] = {}
    for root in sorted(read_roots(repository.objects), key=lambda root: _held(root.key)):
        needed.setdefault(root.snapshot, root.key)
    found.bytes_duplicate = _duplicates(repository, needed)
    home = world.root / "fresh"
    objects = open_objects(f"file://{home}/store", create=True)
    config, _ = init_store(objects)
    with Repository(objects, config, None) as fresh:
        for number, (snapshot, key) in enumerate(needed.items()):
            found.held_snapshots += _held(key)
            place = home / "tree"
            trees.remove(place)
            pull(repository, snapshot, place)
            stat_cache = StatCache(home / "stat.sqlite")
            source = DirectorySource(place, kind="model", normalise=True)
            before = _size(fresh)
            try:
                push(fresh, source, RefName.parse(f"live/{number}"), stat_cache)
            finally:
                source.close()
                stat_cache.close()
            found.held_bytes += _held(key) * (_size(fresh) - before)
        found.bytes_fresh = _size(fresh)


def _duplicates(repository: Repository, snapshots: Iterable[bytes]) -> int:
    """Return what chunks take that live content has in other places, too."""
    places: dict[bytes, dict[tuple[bytes, int], float]] = {}
    for snapshot in snapshots:
        root, locations = repository.located(repository.snapshot(snapshot).manifest)
        number = 0
        for part in repository.parts(root, locations):
            for i, size in enumerate(part.ref_sizes):
                if (at := locations.ref_frames[number]) != NOWHERE:
                    frame = locations.frames[at]
                    chunk = part.ref_digests[32 * i : 32 * i + 32]
                    place = (frame.pack, frame.offset)
                    places.setdefault(chunk, {})[place] = frame.stored * size / max(1, frame.raw)
                number += 1
    return round(sum(sum(found.values()) - min(found.values()) for found in places.values()))


def _held(key: str) -> bool:
    """Whether this root is of somebody who was killed."""
    return key.startswith(("sessions/", "leases/")) or key.split("/")[3:4] == ["leases"]


def _size(repository: Repository) -> int:
    return sum(info.size for info in repository.objects.list(""))


def _say_objects(world: World, repository: Repository) -> None:
    sizes: dict[str, list[int]] = {}
    for info in repository.objects.list(""):
        sizes.setdefault(info.key.partition("/")[0], []).append(info.size)
    for prefix, found in sorted(sizes.items()):
        world.log(f"at the end {prefix}: {len(found)} objects, {sum(found):,} bytes")


def quiet(world: World, seconds: float) -> None:
    """Wait until no persister has anything to store, for ``seconds`` at most."""
    from tests.soak.processes import bury, marked

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        bury()
        if not [one for one in marked(world.token) if one.what == "persister"]:
            return
        time.sleep(0.2)


def unmount_all(root: Path) -> int:
    """Take away every mount below ``root``; returns how many there were."""
    count = 0
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        place = line.split()[4].encode().decode("unicode_escape")
        if place.startswith(f"{root}/"):
            subprocess.run([*UMOUNT, place], check=False, capture_output=True)
            count += 1
    return count
