"""A checkpoint is committed when all its parts are there, by whoever sees them, for good."""

from __future__ import annotations

import pytest

from envstore.checkpoint.errors import FencedError, NoCheckpointError, RanksDisagreeError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.errors import NotFoundError
from envstore.store.refs import RefName, read_ref
from tests.checkpoint.rankfiles import RUN, make_part
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def run(store: Store) -> RunStore:
    return RunStore(store.repository, RUN)


def newest(commits: object) -> CheckpointId | None:
    assert isinstance(commits, list)
    return commits[-1].checkpoint if commits else None


def save(run: RunStore, step: int, epoch: int, *, world_size: int = 1, attempt: int = 0) -> Commit:
    id = CheckpointId(step, epoch, attempt)
    for rank in range(world_size):
        run.put_part(make_part(run.repository, id, rank, world_size))
    commit = run.try_commit(id)
    assert commit is not None
    return commit


def points_at(store: Store, tag: str) -> bytes | None:
    try:
        return read_ref(store.repository.objects, RefName("team", "llm", tag)).snapshot
    except NotFoundError:
        return None


def test_of_one_rank_the_commit_is_its_part(store: Store, run: RunStore) -> None:
    epoch = run.open_epoch("first", 1, newest)
    assert (epoch.number, epoch.resumed_from) == (1, None)
    commit = save(run, 5, 1)
    other = RunStore(store.repository, RUN)
    assert other.latest() == other.find(5) == commit
    assert commit.parts == (commit.snapshot,)
    assert points_at(store, "step-5") == points_at(store, "latest") == commit.snapshot
    with pytest.raises(NoCheckpointError, match=r"of step 6 \(the nearest are 5"):
        other.find(6)
    store.assert_sound()


def test_all_parts_make_a_commit_and_one_less_makes_none(store: Store, run: RunStore) -> None:
    run.open_epoch("first", 3, newest)
    id = CheckpointId(7, 1)
    for rank in (2, 0):
        run.put_part(make_part(run.repository, id, rank, 3))
        assert run.try_commit(id) is None
    assert run.latest() is None
    run.put_part(make_part(run.repository, id, 1, 3))
    commit = RunStore(store.repository, RUN).try_commit(id)
    assert commit is not None
    assert commit == run.try_commit(id) == run.latest()
    paths = [
        e.path for e in run.repository.entries(run.repository.snapshot(commit.snapshot).manifest)
    ]
    assert paths == [
        b"ranks",
        *(p for r in (0, 1, 2) for p in (b"ranks/%05d" % r, b"ranks/%05d/state.json" % r)),
    ]
    store.assert_sound()


def test_a_replaced_incarnation_is_fenced(store: Store, run: RunStore) -> None:
    run.open_epoch("first", 1, newest)
    old = save(run, 5, 1)
    epoch = run.open_epoch("second", 1, newest)
    assert (epoch.number, epoch.resumed_from) == (2, old.checkpoint)
    run.put_part(make_part(run.repository, CheckpointId(6, 1)))
    with pytest.raises(FencedError, match="epoch 2 has begun without it"):
        run.try_commit(CheckpointId(6, 1))
    assert run.latest() == old
    new = save(run, 5, 2)
    assert run.find(5) == run.latest() == new
    assert run.commits() == [old, new]
    assert points_at(store, "step-5") == new.snapshot


def test_ranks_that_disagree_are_told(run: RunStore) -> None:
    run.open_epoch("first", 2, newest)
    with pytest.raises(RanksDisagreeError, match="one rank says that there are 3"):
        run.open_epoch("first", 3, newest)
    run.put_part(make_part(run.repository, CheckpointId(1, 1), 0, 2))
    run.put_part(make_part(run.repository, CheckpointId(1, 1), 0, 2))
    with pytest.raises(RanksDisagreeError, match="different states as rank 0"):
        run.put_part(make_part(run.repository, CheckpointId(1, 1), 0, 2, content="another"))
    run.put_part(make_part(run.repository, CheckpointId(1, 1), 0, 4))
    with pytest.raises(RanksDisagreeError, match="how many they are: 2, 4"):
        run.try_commit(CheckpointId(1, 1))
