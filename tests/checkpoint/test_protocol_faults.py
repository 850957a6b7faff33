"""Whatever request fails, and whoever dies at which one: what was committed is there and whole."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from envstore.checkpoint import retention
from envstore.checkpoint.errors import FencedError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.policies import encode_keep, last
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit, Part
from envstore.errors import UnavailableError
from envstore.store.config import load_config
from envstore.store.objects import open_objects
from envstore.store.refs import RefName, read_ref
from envstore.store.repository import Repository
from envstore.store.verify import verify
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.test_protocol import newest
from tests.faulty import FaultyStore
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

KEEP = encode_keep(last(1))


class Killed(BaseException):
    """The process is no more."""


def repository_at(root: Path) -> Repository:
    objects = FaultyStore(open_objects(f"file://{root}"))
    return Repository(objects, load_config(objects.inner), None)


@dataclass
class Rank:
    """One process: it tries again what the store did not do, and stops when it is killed."""

    number: int
    run: RunStore
    parts: list[Part]
    acknowledged: list[Commit] = field(default_factory=list)
    stored: set[CheckpointId] = field(default_factory=set)
    dead: bool = False

    @property
    def faults(self) -> FaultyStore:
        objects = self.run.repository.objects
        assert isinstance(objects, FaultyStore)
        return objects

    def work(self, task: Callable[[], object]) -> None:
        for _ in range(4):
            if self.dead:
                return
            try:
                task()
                return
            except UnavailableError:
                continue
            except FencedError:
                return
            except Killed:
                self.dead = True
        assert self.dead, "each failure is mended by one more try"

    def begin(self) -> None:
        self.work(lambda: self.run.open_epoch("second", self.parts[0].world_size, newest))

    def put(self, part: Part) -> None:
        def task() -> None:
            self.run.put_part(part)
            self.stored.add(part.checkpoint)

        self.work(task)

    def commit(self, checkpoint: CheckpointId) -> None:
        def task() -> None:
            commit = self.run.try_commit(checkpoint)
            if commit is not None:
                self.acknowledged.append(commit)
                retention.apply(self.run, KEEP)

        self.work(task)


def prepare(root: Path, world_size: int) -> list[list[Part]]:
    """Store what an epoch has committed, step 1, and the trees of steps 2 and 3 of a second one."""
    with Store(root) as store:
        run = RunStore(store.repository, RUN)
        run.open_epoch("first", world_size, newest)
        for rank in range(world_size):
            run.put_part(make_part(store.repository, CheckpointId(1, 1), rank, world_size))
        assert run.try_commit(CheckpointId(1, 1)) is not None
        return [
            [make_part(store.repository, CheckpointId(step, 2), n, world_size) for step in (2, 3)]
            for n in range(world_size)
        ]


def play(root: Path, trees: list[list[Part]], arm: Callable[[list[Rank]], None]) -> list[Rank]:
    """Let all ranks save two steps, in turn; ``arm`` tells their stores how to fail."""
    ranks = [Rank(n, RunStore(repository_at(root), RUN), parts) for n, parts in enumerate(trees)]
    arm(ranks)
    for rank in ranks:
        rank.begin()
    for at in (0, 1):
        for rank in ranks:
            rank.put(rank.parts[at])
            rank.commit(rank.parts[at].checkpoint)
    return ranks


def check(root: Path, ranks: list[Rank]) -> None:
    """Look at what is left with the eyes of another process."""
    repository = repository_at(root)
    run = RunStore(repository, RUN)
    acknowledged = {c.checkpoint: c for rank in ranks for c in rank.acknowledged}
    assert all(c == acknowledged[c.checkpoint] for rank in ranks for c in rank.acknowledged)
    before = run.latest()
    assert before is not None
    assert before.checkpoint >= max(acknowledged, default=CheckpointId(1, 1))
    run.roll_forward()
    latest = run.latest()
    assert latest is not None
    assert latest.checkpoint >= before.checkpoint
    # What all ranks have stored is committed, by whoever comes next if by none of them.
    if all(CheckpointId(3, 2) in rank.stored for rank in ranks):
        assert latest.checkpoint == CheckpointId(3, 2)
    whole = [*run.commits(), *run.commits(fenced=True)]
    targets = [(str(c.checkpoint), tree) for c in whole for tree in (c.snapshot, *c.parts)]
    assert verify(repository, targets, read_data=True).problems == []
    for commit in whole:
        assert acknowledged.get(commit.checkpoint, commit) == commit
    tag = RefName("team", "llm", "latest")
    assert read_ref(repository.objects, tag).snapshot == latest.snapshot
    assert run.warnings == []
    # And it all goes on.
    epoch = run.open_epoch("third", 1, newest)
    assert epoch.resumed_from == latest.checkpoint
    run.put_part(make_part(repository, CheckpointId(4, epoch.number)))
    commit = run.try_commit(CheckpointId(4, epoch.number))
    assert commit is not None
    retention.apply(run, KEEP)
    assert run.commits() == [latest, commit]
    tags = {info.key.rpartition("/")[2] for info in repository.objects.list("refs/team/llm/")}
    assert tags == {"latest", "step-4", f"step-{latest.step}"}


def faults_of(ranks: list[Rank]) -> Iterator[tuple[int, int, str]]:
    for rank in ranks:
        for at, call in enumerate(rank.faults.calls):
            yield rank.number, at, "killed"
            yield rank.number, at, "refused"
            if call.operation in ("put", "put_if", "delete"):
                yield rank.number, at, "unanswered"


@pytest.mark.parametrize(("world_size", "each"), [(1, 7), (2, 23), (4, 67)])
def test_any_request_may_fail(tmp_path: Path, world_size: int, each: int) -> None:
    trees = prepare(tmp_path / "first", world_size)
    shutil.copytree(tmp_path / "first/objects", tmp_path / "calm")
    calm = play(tmp_path / "calm", trees, lambda ranks: None)
    check(tmp_path / "calm", calm)
    assert len(calm[-1].acknowledged) == 2

    def arm(number: int, at: int, what: str) -> Callable[[list[Rank]], None]:
        def do(ranks: list[Rank]) -> None:
            faults = ranks[number].faults
            if what == "killed":
                faults.fail("*", Killed(), skip=at)
            else:
                error = UnavailableError(what)
                faults.fail("*", error, times=1, skip=at, after=what == "unanswered")

        return do

    for number, at, what in itertools.islice(faults_of(calm), 0, None, each):
        root = tmp_path / "now"
        shutil.copytree(tmp_path / "first/objects", root)
        try:
            check(root, play(root, trees, arm(number, at, what)))
        except BaseException as error:
            error.add_note(f"rank {number} {what} at {at}: {calm[number].faults.calls[at]}")
            raise
        shutil.rmtree(root)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_at_once_with_failures_now_and_then(tmp_path: Path, seed: int) -> None:
    trees = prepare(tmp_path, 4)
    random = Random(seed)
    ranks = [
        Rank(n, RunStore(repository_at(tmp_path / "objects"), RUN), parts)
        for n, parts in enumerate(trees)
    ]
    for rank in ranks:
        for after in (False, True):
            error = UnavailableError("now and then")
            rank.faults.fail("*", error, times=1, skip=random.randrange(60), after=after)
    doomed = random.choice([None, 0, 3])
    if doomed is not None:
        ranks[doomed].faults.fail("*", Killed(), skip=random.randrange(40, 120))

    def live(rank: Rank) -> None:
        rank.begin()
        for part in rank.parts:
            rank.put(part)
            rank.commit(part.checkpoint)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(live, ranks))
    check(tmp_path / "objects", ranks)
