"""Incarnations of a run follow each other; what an older one goes on saving does not count."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from envstore.checkpoint.epochs import Epoch
from envstore.checkpoint.errors import CheckpointError, FencedError, NoCheckpointError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.errors import (
    CorruptError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.repository import Repository
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.test_protocol import newest, save
from tests.faulty import FaultyStore
from tests.s3server import S3Server
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

EPOCHS = "runs/team/llm/epochs/"


@pytest.fixture
def run(store: Store) -> RunStore:
    return RunStore(store.repository, RUN)


def other(store: Store) -> RunStore:
    """The run as another process sees it, which nothing fails for."""
    return RunStore(Repository(store.faults.inner, store.repository.config, None), RUN)


def at(step: int) -> Callable[[object], CheckpointId]:
    def choose(commits: object) -> CheckpointId:
        assert isinstance(commits, list)
        return next(commit.checkpoint for commit in commits if commit.step == step)

    return choose


def keys(store: Store) -> set[str]:
    return {info.key.removeprefix(EPOCHS) for info in store.faults.inner.list(EPOCHS)}


def test_ranks_join_until_something_is_committed(store: Store, run: RunStore) -> None:
    first = run.open_epoch("same", 2, newest)
    assert other(store).open_epoch("same", 2, newest) == first == run.epoch()
    save(run, 1, 1, world_size=2)
    # Whoever comes now was started again, under the same name.
    again = run.open_epoch("same", 2, newest)
    assert (again.number, again.resumed_from) == (2, CheckpointId(1, 1))
    assert other(store).open_epoch("same", 2, lambda commits: None) == again


def test_what_is_committed_while_an_epoch_begins_is_not_lost(store: Store, run: RunStore) -> None:
    old = other(store)
    old.open_epoch("old", 1, newest)
    save(old, 100, 1)
    gate = store.faults.gate("put_if", key=f"{EPOCHS}00000002/start")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(run.open_epoch, "new", 1, newest)
        gate.wait_entered()
        late = save(old, 110, 1)
        gate.open()
        epoch = opening.result()
    assert (epoch.number, epoch.resumed_from) == (3, late.checkpoint)
    assert old.latest() == late
    with pytest.raises(FencedError):
        save(old, 120, 1)


def test_a_commit_that_an_epoch_has_begun_without_is_not_reported(
    store: Store, run: RunStore
) -> None:
    old = other(store)
    faults = FaultyStore(store.faults.inner)
    late = RunStore(Repository(faults, store.repository.config, None), RUN)
    old.open_epoch("old", 1, newest)
    first = save(old, 100, 1)
    start = f"{EPOCHS}00000002/start"
    listed, seen = store.faults.gate("put_if", key=start), faults.gate("put_if", key=start)
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(run.open_epoch, "new", 1, newest)
        listed.wait_entered()
        saving = pool.submit(save, late, 110, 1)
        seen.wait_entered()  # it is about to make void what begins a moment before
        listed.open()
        assert opening.result().resumed_from == first.checkpoint
        seen.open()
        with pytest.raises(FencedError, match="epoch 2 has begun without it"):
            saving.result()
    assert old.latest() == first


def test_a_claim_whose_maker_died_holds_up_nobody(store: Store, run: RunStore) -> None:
    old = other(store)
    old.open_epoch("old", 1, newest)
    store.faults.fail("put_if", UnavailableError("gone"), key=f"{EPOCHS}00000002/start")
    with pytest.raises(UnavailableError):
        run.open_epoch("new", 1, newest)
    assert keys(store) == {"00000001/claim", "00000001/start", "00000002/claim"}
    saved = save(old, 5, 1)
    epoch = other(store).open_epoch("newer", 1, newest)
    assert (epoch.number, epoch.resumed_from) == (3, saved.checkpoint)
    # Had it only been slow, it would find itself replaced.
    store.faults.clear()
    run = RunStore(store.repository, RUN)
    assert run.open_epoch("new", 1, newest).number == 4


@pytest.mark.parametrize("kind", ["claim", "start"])
def test_an_answer_that_was_lost_changes_nothing(store: Store, run: RunStore, kind: str) -> None:
    lost = UnavailableError("no answer")
    key = f"{EPOCHS}00000001/{kind}"
    store.faults.fail("put_if", lost, key=key, after=True)
    assert run.open_epoch("one", 1, newest).number == 1
    store.faults.clear()
    assert run.open_epoch("one", 1, newest).number == 1


def test_a_later_claim_fences_an_opener(store: Store, run: RunStore) -> None:
    gate = store.faults.gate("put_if", key=f"{EPOCHS}00000001/start", after=True)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(run.open_epoch, "slow", 1, newest)
        gate.wait_entered()
        assert other(store).open_epoch("fast", 1, newest).number == 2
        gate.open()
        with pytest.raises(FencedError, match="at the same time"):
            opening.result()


def test_going_back_leaves_a_branch_that_can_be_returned_to(store: Store, run: RunStore) -> None:
    run.open_epoch("a", 1, newest)
    one, two, three = (save(run, step, 1) for step in (1, 2, 3))
    run.open_epoch("b", 1, at(1))
    assert run.commits() == [one]
    assert run.commits(fenced=True) == [two, three]
    again = save(run, 2, 2)
    assert run.commits() == [one, again]
    run.open_epoch("c", 1, newest)
    assert run.commits() == [one, again]
    run.open_epoch("d", 1, lambda commits: three.checkpoint)
    assert run.commits() == [one, two, three]
    assert run.commits(fenced=True) == [again]
    run.open_epoch("fresh", 1, lambda commits: None)
    assert run.latest() is None
    assert run.commits(fenced=True) == [one, two, again, three]


def test_what_was_resumed_from_is_the_latest_though_it_is_a_smaller_step(run: RunStore) -> None:
    run.open_epoch("a", 1, newest)
    save(run, 10, 1)
    run.open_epoch("b", 1, newest)
    small = save(run, 2, 2)
    run.open_epoch("c", 1, lambda commits: small.checkpoint)
    assert run.commits() == [small]


def test_an_attempt_after_the_one_resumed_from_does_not_count(run: RunStore) -> None:
    run.open_epoch("a", 1, newest)
    first = save(run, 7, 1)
    run.open_epoch("b", 1, newest)
    run.put_part(make_part(run.repository, CheckpointId(7, 1, 1)))
    with pytest.raises(FencedError):
        run.try_commit(CheckpointId(7, 1, 1))
    assert run.find(7) == first


def test_what_was_staged_counts_once_it_is_committed(store: Store, run: RunStore) -> None:
    run.open_epoch("a", 1, newest)
    first, staged = save(run, 1, 1), CheckpointId(2, 1)
    epoch = run.open_epoch("b", 1, lambda commits: staged, staged=staged)
    assert epoch.resumed_from == staged
    assert run.latest() == first
    late = save(other(store), 2, 1)
    assert run.latest() == late
    assert other(store).open_epoch("b", 1, lambda commits: first.checkpoint) == epoch


def test_a_choice_that_cannot_be_is_refused_before_anything_changes(
    store: Store, run: RunStore
) -> None:
    def refuse(commits: object) -> CheckpointId:
        raise CheckpointError("call restore() first")

    with pytest.raises(CheckpointError, match="restore"):
        run.open_epoch("a", 1, refuse)
    with pytest.raises(NoCheckpointError, match="is not committed"):
        run.open_epoch("a", 1, lambda commits: CheckpointId(9, 1))
    for incarnation, world_size in (("", 1), ("x" * 5000, 1), ("a", 0), ("a", 10_001)):
        with pytest.raises(UsageError):
            run.open_epoch(incarnation, world_size, newest)
    assert keys(store) == set()


def test_opening_commits_what_was_left_undone(store: Store, run: RunStore) -> None:
    run.open_epoch("a", 2, newest)
    for rank in (0, 1):
        run.put_part(make_part(run.repository, CheckpointId(3, 1), rank, 2))
    epoch = other(store).open_epoch("b", 4, newest)
    assert epoch.resumed_from == CheckpointId(3, 1)


def put_start(store: Store, number: int, **changes: object) -> None:
    body: dict[str, object] = {
        "format": 1,
        "incarnation": "x",
        "world_size": 1,
        "resumed_from": "",
        "created": "2026-01-01T00:00:00Z",
    }
    key = f"{EPOCHS}{number:08d}/start"
    store.faults.inner.put(key, json.dumps({**body, **changes}).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"resumed_from": "000000000001-00000001-0000"},
        {"resumed_from": "1-1-1"},
        {"world_size": 0},
        {"world_size": True},
        {"world_size": 1 << 40},
        {"incarnation": "y" * 5000},
        {"created": "yesterday"},
        {"created": "2026-13-01T00:00:00Z"},
        {"incarnation": None},
    ],
)
def test_a_damaged_epoch_is_named(store: Store, run: RunStore, changes: dict[str, object]) -> None:
    put_start(store, 1, **changes)
    with pytest.raises(CorruptError, match="epoch 1 of team/llm"):
        run.latest()


def test_a_newer_format_is_refused(store: Store, run: RunStore) -> None:
    put_start(store, 1, format=2)
    with pytest.raises(UnsupportedFormatError, match="epoch 1 of team/llm"):
        run.open_epoch("a", 1, newest)


def test_keys_that_are_none_of_ours_are_passed_over(store: Store, run: RunStore) -> None:
    for key in ("1/claim", "0000000x/start", "00000001/other", "00000009"):
        store.faults.inner.put(EPOCHS + key, b"{}")
    assert run.open_epoch("a", 1, newest).number == 1


def race(count: int, work: Callable[[int], object]) -> list[object]:
    """Do ``work`` in so many threads at once; return what it returns, or raises."""
    start = threading.Barrier(count)

    def one(n: int) -> object:
        start.wait()
        try:
            return work(n)
        except FencedError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_races_on_a_real_server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    objects = open_objects(s3_server.url(s3_server.new_bucket()), create=True)
    config, _ = init_store(objects)

    def fresh() -> RunStore:
        return RunStore(Repository(objects, config, None), RUN)

    try:
        together = race(8, lambda n: fresh().open_epoch("job", 8, newest))
        assert len(set(map(str, together))) == 1
        run = fresh()
        id = CheckpointId(1, 1)

        def rank(n: int) -> Commit | None:
            own = fresh()
            own.put_part(make_part(own.repository, id, n, 8))
            return own.try_commit(id)

        found = [commit for commit in race(8, rank) if commit is not None]
        assert found
        assert all(commit == run.latest() for commit in found)
        same = race(8, lambda n: fresh().try_commit(id))
        assert same == [run.latest()] * 8
        apart = race(8, lambda n: fresh().open_epoch(f"job {n}", 1, newest))
        begun = [epoch for epoch in apart if isinstance(epoch, Epoch)]
        assert run.epoch() in begun
        assert len({epoch.number for epoch in begun}) == len(begun)
        assert {epoch.resumed_from for epoch in begun} == {id}
    finally:
        objects.close()
