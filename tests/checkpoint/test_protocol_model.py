"""Ranks, incarnations, zombies, deaths and removals in any order: what must hold always holds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from envstore.checkpoint import retention
from envstore.checkpoint.errors import FencedError, NoCheckpointError
from envstore.checkpoint.holds import Lease
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.policies import encode_keep, every, last
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit, Part
from envstore.errors import UnavailableError
from envstore.store.config import init_store, load_config
from envstore.store.objects import open_objects
from envstore.store.refs import RefName, try_read
from envstore.store.repository import Repository
from envstore.store.verify import verify
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.test_protocol_faults import Killed
from tests.faulty import FaultyStore

STEPS = st.integers(0, 4)


@dataclass(eq=False)
class Job:
    """The ranks of one incarnation, which may be dead or replaced and not know it."""

    epoch: int
    resumed_from: CheckpointId | None
    world_size: int
    parts: dict[CheckpointId, dict[int, Part]] = field(default_factory=dict)
    stored: dict[CheckpointId, set[int]] = field(default_factory=dict)


class Checkpoints(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="envstore-model-"))
        self.no_fsync = mock.patch("os.fsync", return_value=None)
        self.no_fsync.start()
        self.url = f"file://{self.root}/objects"
        init_store(open_objects(self.url, create=True))
        self.run = self.process()
        self.count = 0
        self.floor: CheckpointId | None = None
        """What was reported to be committed, on the line: latest is never less."""
        self.bytes: dict[CheckpointId, bytes] = {}
        self.pinned: set[CheckpointId] = set()
        self.leases: list[tuple[Lease, Commit]] = []

    def process(self) -> RunStore:
        objects = FaultyStore(open_objects(self.url))
        return RunStore(Repository(objects, load_config(objects.inner), None), RUN)

    def attempt(
        self, work: Callable[[RunStore], object], dies_at: int | None, fails_at: int | None
    ) -> tuple[bool, object]:
        """Do ``work`` in a process of its own, which may be killed, or told that a request failed.

        Returns whether it was done, and what came of it.
        """
        process = self.process()
        objects = process.repository.objects
        assert isinstance(objects, FaultyStore)
        if dies_at is not None:
            objects.fail("*", Killed(), skip=dies_at)
        if fails_at is not None:
            objects.fail("*", UnavailableError("no answer"), times=1, skip=fails_at, after=True)
        try:
            return True, work(process)
        except (Killed, UnavailableError, FencedError, NoCheckpointError):
            return False, None

    points = st.one_of(st.none(), st.integers(0, 40))

    @rule(
        target=jobs,
        world_size=st.sampled_from([1, 1, 2, 3]),
        back=st.sampled_from(["latest", "latest", "latest", "older", "fresh"]),
        dies_at=points,
        fails_at=points,
    )
    def start(
        self, world_size: int, back: str, dies_at: int | None, fails_at: int | None
    ) -> object:
        self.count += 1
        name = f"job {self.count}"

        def choose(commits: Sequence[Commit]) -> CheckpointId | None:
            if back == "fresh":
                return None
            return commits[0 if back == "older" else -1].checkpoint if commits else None

        before = self.run.epoch()
        done, epoch = self.attempt(
            lambda run: run.open_epoch(name, world_size, choose), dies_at, fails_at
        )
        began = self.run.epoch()
        if began is not None and (before is None or began.number > before.number):
            if back == "latest":
                assert self.floor is None or began.resumed_from is not None
                assert self.floor is None or began.resumed_from >= self.floor
            self.floor = began.resumed_from
        if not done:
            return multiple()
        # All other ranks join, and are told the same.
        for _ in range(1, world_size):
            assert self.process().open_epoch(name, world_size, lambda commits: None) == epoch
        assert epoch == began
        assert began is not None
        return Job(began.number, began.resumed_from, world_size)

    @rule(job=jobs, step=STEPS, attempt=st.integers(0, 1), rank=st.integers(0, 2), dies_at=points)
    def store(self, job: Job, step: int, attempt: int, rank: int, dies_at: int | None) -> None:
        rank %= job.world_size
        id = CheckpointId(step, job.epoch, attempt)
        if rank not in job.parts.setdefault(id, {}):
            repository = Repository(self.objects, self.run.repository.config, None)
            job.parts[id][rank] = make_part(repository, id, rank, job.world_size)
        done, _ = self.attempt(lambda run: run.put_part(job.parts[id][rank]), dies_at, None)
        if done:
            job.stored.setdefault(id, set()).add(rank)

    @property
    def objects(self) -> FaultyStore:
        objects = self.run.repository.objects
        assert isinstance(objects, FaultyStore)
        return objects

    @rule(job=jobs, step=STEPS, attempt=st.integers(0, 1), dies_at=points, fails_at=points)
    def commit(
        self, job: Job, step: int, attempt: int, dies_at: int | None, fails_at: int | None
    ) -> None:
        id = CheckpointId(step, job.epoch, attempt)
        _, commit = self.attempt(lambda run: run.try_commit(id), dies_at, fails_at)
        if isinstance(commit, Commit):
            assert commit.world_size == job.world_size
            assert self.run.latest() is not None
            if job.epoch == self.newest_epoch():
                self.floor = max(id, self.floor or id)
            if fails_at is None:
                self.check_names()

    @rule(job=jobs, step=STEPS, dies_at=points, fails_at=points)
    def save(self, job: Job, step: int, dies_at: int | None, fails_at: int | None) -> None:
        """All ranks save: what mostly happens."""
        for rank in range(job.world_size):
            self.store(job, step, 0, rank, None)
        self.commit(job, step, 0, dies_at, fails_at)

    @rule(keep=st.sampled_from([last(1), last(2), last(1) | every(2)]), dies_at=points)
    @precondition(lambda self: self.run.latest() is not None)
    def retain(self, keep: object, dies_at: int | None) -> None:
        self.attempt(lambda run: retention.apply(run, encode_keep(keep)), dies_at, None)  # type: ignore[arg-type]

    @rule(dies_at=points, fails_at=points)
    def roll_forward(self, dies_at: int | None, fails_at: int | None) -> None:
        done, _ = self.attempt(lambda run: run.roll_forward(), dies_at, fails_at)
        if done and fails_at is None:
            self.check_names()

    @rule(which=st.integers(0, 5))
    def pin(self, which: int) -> None:
        commits = self.run.commits()
        if commits:
            commit = commits[which % len(commits)]
            done, _ = self.attempt(lambda run: run.pin(commit, "why"), None, None)
            if done:
                self.pinned.add(commit.checkpoint)

    @rule()
    def unpin(self) -> None:
        for id in list(self.pinned):
            self.run.unpin(id)
            self.pinned.remove(id)

    @rule(which=st.integers(0, 5))
    def lease(self, which: int) -> None:
        commits = self.run.commits()
        if commits and len(self.leases) < 2:
            commit = commits[which % len(commits)]
            lease = self.run.lease(commit)
            lease.__enter__()
            self.leases.append((lease, commit))

    @rule()
    @precondition(lambda self: self.leases)
    def release(self) -> None:
        self.leases.pop()[0].__exit__(None, None, None)

    def newest_epoch(self) -> int:
        epoch = self.run.epoch()
        return 0 if epoch is None else epoch.number

    def check_names(self) -> None:
        latest = self.run.latest()
        found = try_read(self.objects, RefName("team", "llm", "latest"))
        assert (latest and latest.snapshot) == (found and found[0].snapshot)

    @invariant()
    def what_must_hold(self) -> None:
        if not hasattr(self, "run"):
            return
        run = self.process()
        counting, fenced = run.commits(), run.commits(fenced=True)
        epoch = run.epoch()
        limit = epoch.resumed_from if epoch else None
        for commit in counting:
            id = commit.checkpoint
            assert epoch is None or id.epoch == epoch.number or (limit and id <= limit)
        if self.floor is not None:
            assert counting
            assert counting[-1].checkpoint >= self.floor
        present = {commit.checkpoint for commit in (*counting, *fenced)}
        assert self.pinned <= present
        assert {commit.checkpoint for _, commit in self.leases} <= present
        assert not limit or limit in present
        for commit in (*counting, *fenced):
            assert self.bytes.setdefault(commit.checkpoint, commit.encode()) == commit.encode()
        # Half a checkpoint would lack trees.
        targets = [
            (str(c.checkpoint), tree)
            for c in (*counting, *fenced)
            for tree in (c.snapshot, *c.parts)
        ]
        assert verify(run.repository, targets).problems == []
        assert run.warnings == []

    def teardown(self) -> None:
        if hasattr(self, "run"):
            while self.leases:
                self.release()
            self.no_fsync.stop()
            shutil.rmtree(self.root)


Checkpoints.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCheckpoints = Checkpoints.TestCase
