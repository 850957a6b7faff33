"""Old checkpoints are removed after new ones are committed; what is held is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from envstore.checkpoint import holds, retention
from envstore.checkpoint.errors import NoCheckpointError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.policies import encode_keep, every, last
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.errors import NotFoundError, UnavailableError, UsageError
from envstore.store.refs import RefName, move_ref, read_ref, try_read
from envstore.store.repository import Repository
from tests import trees
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.test_protocol import newest, points_at, save
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

BELOW = "runs/team/llm/"


@pytest.fixture
def run(store: Store) -> RunStore:
    opened = RunStore(store.repository, RUN)
    opened.open_epoch("first", 1, newest)
    return opened


def steps(commits: list[Commit]) -> list[int]:
    return [commit.step for commit in commits]


def listed(store: Store, what: str) -> list[str]:
    objects = store.faults.inner
    return sorted(info.key.removeprefix(BELOW + what) for info in objects.list(BELOW + what))


def test_what_the_policy_does_not_keep_goes_whole(store: Store, run: RunStore) -> None:
    for step in (10, 15, 20, 25):
        save(run, step, 1)
    removed = retention.apply(run, encode_keep(last(1) | every(10)))
    assert steps(removed) == [15]
    assert steps(run.commits()) == [10, 20, 25]
    assert [name[:12] for name in listed(store, "parts/")] == [f"{n:012d}" for n in (10, 20, 25)]
    assert points_at(store, "step-15") is None
    assert points_at(store, "latest") == points_at(store, "step-25")
    assert retention.apply(run, encode_keep(last(1) | every(10))) == []
    assert retention.apply(run, "") == []
    with pytest.raises(UsageError):
        retention.apply(run, "nonsense")


def test_nothing_goes_before_something_new_is_there(store: Store, run: RunStore) -> None:
    for step in (1, 2, 3):
        save(run, step, 1)
    store.faults.clear()
    retention.apply(run, encode_keep(last(1)))
    calls = [c for c in store.faults.calls if c.key.startswith(BELOW) and c.operation == "delete"]
    assert [c.key.split("/")[3] for c in calls] == ["parts", "commits"] * 2
    assert steps(run.commits()) == [3]


def test_what_is_pinned_leased_or_resumed_from_stays(store: Store, run: RunStore) -> None:
    one, two, three, _ = (save(run, step, 1) for step in (1, 2, 3, 4))
    run.pin(one, "the release")
    assert run.pins() == {one.checkpoint: "the release"}
    run.open_epoch("second", 1, lambda commits: three.checkpoint)
    assert steps(run.commits()) == [1, 2, 3]
    with run.lease(two) as leased:
        assert leased == two
        assert run.leases() == {two.checkpoint}
        save(run, 5, 2)
        assert steps(retention.apply(run, encode_keep(last(1)))) == [4]
        assert steps(run.commits()) == [1, 2, 3, 5]
        assert not run.remove(two)
    assert run.leases() == set()
    assert steps(retention.apply(run, encode_keep(last(1)))) == [2]
    run.unpin(one.checkpoint)
    assert steps(retention.apply(run, encode_keep(last(1)))) == [1]
    assert listed(store, "leases/") == listed(store, "pins/") == []


def test_what_an_older_incarnation_went_on_to_save_goes_once_it_is_reached(
    store: Store, run: RunStore
) -> None:
    save(run, 1, 1)
    for step in (2, 3, 4):
        save(run, step, 1)
    run.open_epoch("second", 1, lambda commits: commits[0].checkpoint)
    save(run, 3, 2)
    assert [str(c.checkpoint) for c in retention.apply(run, encode_keep(last(9)))] == [
        "000000000002-00000001-0000",
        "000000000003-00000001-0000",
    ]
    assert steps(run.commits(fenced=True)) == [4]
    assert points_at(store, "step-3") == run.find(3).snapshot
    assert points_at(store, "step-2") is None
    assert points_at(store, "step-4") is None


def test_abandoned_parts_go_and_what_may_be_completed_stays(store: Store, run: RunStore) -> None:
    two = [make_part(run.repository, CheckpointId(n, 1), 0, 2) for n in (1, 2, 3)]
    run.put_part(two[0])
    save(run, 2, 1, attempt=1)
    run.put_part(two[2])
    run.sweep()
    assert len(listed(store, "parts/")) == 3  # the epoch goes on
    run.open_epoch("second", 2, newest)
    run.sweep()
    # Step 3 was not resumed from; the other rank of step 1 may still be storing its part.
    assert [name[:21] for name in listed(store, "parts/")] == [
        "000000000001-00000001",
        "000000000002-00000001",
    ]
    save(run, 4, 2, world_size=2)
    run.open_epoch("third", 1, newest)
    save(run, 5, 3)
    run.sweep()
    assert {name[:21] for name in listed(store, "parts/")} == {
        "000000000002-00000001",
        "000000000004-00000002",
        "000000000005-00000003",
    }


def test_epochs_that_led_to_nothing_go(store: Store, run: RunStore) -> None:
    save(run, 1, 1)
    for crash in range(4):
        run.open_epoch(f"loop {crash}", 1, newest)
    assert run.open_epoch("works", 1, newest).number == 6
    save(run, 2, 6)
    run.sweep()
    assert listed(store, "epochs/") == [
        "00000001/claim", "00000001/start", "00000006/claim", "00000006/start"
    ]  # fmt: skip
    assert steps(run.commits()) == [1, 2]
    assert run.open_epoch("next", 1, newest).number == 7


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("key", [f"{BELOW}parts/", f"{BELOW}commits/", "refs/"])
def test_a_removal_that_was_interrupted_is_done_again(
    store: Store, run: RunStore, key: str, after: bool
) -> None:
    save(run, 1, 1)
    save(run, 2, 1)
    gone = UnavailableError("gone")
    fault = store.faults.fail("delete", gone, key=key, times=1, after=after)
    with pytest.raises(UnavailableError):
        retention.apply(run, encode_keep(last(1)))
    assert fault.hits == 1
    again = RunStore(Repository(store.faults.inner, store.repository.config, None), RUN)
    again.roll_forward()
    retention.apply(again, encode_keep(last(1)))
    assert steps(again.commits()) == [2]
    assert len(listed(store, "parts/")) == 1
    assert points_at(store, "step-1") is None
    assert points_at(store, "latest") == again.find(2).snapshot


def test_when_the_last_is_removed_no_name_is_left(store: Store, run: RunStore) -> None:
    one, two = save(run, 1, 1), save(run, 2, 1)
    assert run.remove(two)
    assert points_at(store, "latest") == one.snapshot
    assert run.remove(one)
    assert list(store.faults.inner.list("refs/")) == []
    assert run.latest() is None


def test_a_slow_committer_does_not_bring_back_what_was_removed(store: Store, run: RunStore) -> None:
    inner = store.faults.inner
    quick = RunStore(Repository(inner, store.repository.config, None), RUN)
    id = CheckpointId(1, 1)
    run.put_part(make_part(run.repository, id))
    gate = store.faults.gate("put_if", key=f"{BELOW}commits/")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(run.try_commit, id)
        gate.wait_entered()
        commit = quick.try_commit(id)
        assert commit is not None
        assert quick.remove(commit)
        gate.open()
        assert slow.result() is None
    assert run.commits() == []
    assert listed(store, "commits/") == listed(store, "parts/") == []


def pin_in_between(store: Store, run: RunStore, key: str, *, after: bool) -> tuple[bool, bool]:
    """Pin what is being removed, while a deletion waits; returns whether each of them was done."""
    commit = save(run, 1, 1)
    gate = store.faults.gate("delete", key=BELOW + key, after=after)
    other = RunStore(Repository(store.faults.inner, store.repository.config, None), RUN)
    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(run.remove, commit)
        gate.wait_entered()
        try:
            other.pin(commit)
            pinned = True
        except NoCheckpointError:
            pinned = False
        gate.open()
        return pinned, removing.result()


@pytest.mark.parametrize(
    ("key", "after", "expected"),
    [
        ("parts/", False, (True, False)),
        ("parts/", True, (False, True)),
        ("commits/", False, (False, True)),
        ("commits/", True, (False, True)),
    ],
)
def test_either_the_pin_or_the_removal_wins(
    store: Store, run: RunStore, key: str, after: bool, expected: tuple[bool, bool]
) -> None:
    assert pin_in_between(store, run, key, after=after) == expected
    assert steps(run.commits()) == ([1] if expected[0] else [])
    assert len(run.pins()) == int(expected[0])


def test_a_lease_is_renewed_and_runs_out(
    store: Store, run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = save(run, 1, 1)
    monkeypatch.setattr(holds, "RENEW_SECONDS", 0.01)
    with run.lease(commit):
        before = store.faults.count("put", f"{BELOW}leases/")
        while store.faults.count("put", f"{BELOW}leases/") < before + 3:
            time.sleep(0.001)
    assert listed(store, "leases/") == []
    lease = run.lease(commit)
    with lease:
        store.faults.drop("delete", key=f"{BELOW}leases/")
    store.faults.clear()
    assert len(listed(store, "leases/")) == 1
    later = time.time() + holds.LEASE_SECONDS + holds.SKEW_SECONDS
    assert run.leases(later - 5) == {commit.checkpoint}
    assert run.leases(later + 5) == set()
    assert listed(store, "leases/") == []


def test_a_lease_on_what_is_gone_is_refused(store: Store, run: RunStore) -> None:
    commit = save(run, 1, 1)
    assert run.remove(commit)
    with pytest.raises(NoCheckpointError, match="was removed meanwhile"), run.lease(commit):
        pass
    assert listed(store, "leases/") == []
    with pytest.raises(NoCheckpointError, match="is being removed"):
        run.pin(commit)


def test_damaged_pins_hold_and_damaged_leases_do_not(store: Store, run: RunStore) -> None:
    one, two = save(run, 1, 1), save(run, 2, 1)
    objects = store.faults.inner
    objects.put(f"{BELOW}pins/{one.checkpoint}", b"{")
    objects.put(f"{BELOW}leases/{two.checkpoint}/x", json.dumps({"format": 1}).encode())
    save(run, 3, 1)
    assert run.pins() == {one.checkpoint: ""}
    assert steps(retention.apply(run, encode_keep(last(1)))) == [2]


def test_names_of_others_are_left_alone(store: Store, run: RunStore, tmp_path: Path) -> None:
    trees.plain(tmp_path / "tree", "tree")
    environment = store.push(tmp_path / "tree", "team/llm:latest").snapshot
    store.push(tmp_path / "tree", "team/llm:step-1")
    store.push(tmp_path / "tree", "team/llm:notes")
    commit = save(run, 1, 1)
    assert points_at(store, "latest") == points_at(store, "step-1") == environment
    assert sorted(run.warnings) == [
        f"team/llm:{tag} is not a checkpoint of team/llm and stays where it points"
        for tag in ("latest", "step-1")
    ]
    assert run.remove(commit)
    run.sweep()
    assert points_at(store, "latest") == points_at(store, "notes") == environment


def test_names_that_a_dead_committer_did_not_move_are_moved_by_the_next(
    store: Store, run: RunStore
) -> None:
    fault = store.faults.fail("put_if", UnavailableError("gone"), key="refs/")
    one = save(run, 1, 1)
    assert points_at(store, "step-1") is None
    assert "refs of team/llm are not moved" in run.warnings[0]
    fault.remove()
    two = save(run, 2, 1)
    assert points_at(store, "step-1") == one.snapshot
    assert points_at(store, "latest") == two.snapshot
    # One that was removed by hand comes back when the run is next looked after.
    store.repository.objects.delete(RefName("team", "llm", "latest").key)
    run.roll_forward()
    assert points_at(store, "latest") == two.snapshot


def test_names_never_move_back(store: Store, run: RunStore) -> None:
    quick = RunStore(Repository(store.faults.inner, store.repository.config, None), RUN)
    gate = store.faults.gate("put_if", key="refs/team/llm/latest")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(save, run, 1, 1)
        gate.wait_entered()
        newer = save(quick, 2, 1)
        gate.open()
        slow.result()
    assert points_at(store, "latest") == newer.snapshot
    name = RefName("team", "llm", "latest")
    # Pointing at an old step of the run is as good as pointing nowhere.
    expected = try_read(store.repository.objects, name)
    move_ref(store.repository.objects, name, run.find(1).snapshot, expected)
    save(run, 3, 1)
    assert read_ref(store.repository.objects, name).snapshot == run.find(3).snapshot


def test_a_damaged_commit_is_passed_over_with_a_warning(store: Store, run: RunStore) -> None:
    one, two = save(run, 1, 1), save(run, 2, 1)
    key = f"{BELOW}commits/{two.checkpoint}"
    changes: list[Callable[[dict[str, object]], object]] = [
        lambda body: body.update(snapshot="00"),
        lambda body: body.update(parts=[]),
        lambda body: body.update(parts=[5]),
        lambda body: body.update(metrics={"loss": "much"}),
        lambda body: body.update(checkpoint=str(one.checkpoint)),
        lambda body: body.update(size=-1),
        lambda body: body.update(created="now"),
    ]
    good = store.faults.inner.get(key)
    for change in changes:
        body = json.loads(good)
        change(body)
        store.faults.inner.put(key, json.dumps(body).encode())
        fresh = RunStore(store.repository, RUN)
        assert fresh.latest() == one
        assert str(two.checkpoint) in fresh.warnings[0]
    store.faults.inner.delete(key)
    with pytest.raises(NotFoundError):
        run.repository.objects.get(key)
