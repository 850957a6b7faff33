"""When to save and what to keep, as values."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.policies import (
    FIRST_SECONDS,
    Policy,
    SaveStats,
    auto,
    best,
    decode_keep,
    encode_keep,
    every,
    last,
    pinned,
    younger_than,
)
from envstore.checkpoint.retention import superseded, to_delete
from envstore.errors import UsageError

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
NOW = EPOCH.timestamp()


@dataclass(frozen=True)
class Saved:
    checkpoint: CheckpointId
    created: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def saved(step: int, epoch: int = 1, *, age: float = 0, **metrics: float) -> Saved:
    created = (EPOCH - timedelta(seconds=age)).isoformat()
    return Saved(CheckpointId(step, epoch), created, metrics)


def steps_kept(keep: Policy, *commits: Saved) -> list[int]:
    gone = to_delete(keep, commits, (), (), (), NOW)
    return [one.checkpoint.step for one in commits if one not in gone]


def test_every_step_is_due_when_a_multiple_is_reached_or_passed() -> None:
    policy = every(steps=10)
    assert policy.by_step
    due = [step for step in range(1, 35) if policy.due(step, 0, SaveStats(step - 1, 0))]
    assert due == [10, 20, 30]
    assert policy.due(25, 0, SaveStats(19, 0))
    assert not policy.due(20, 1e9, SaveStats(20, 0))
    assert not every(10).due(507, 0, SaveStats(503, 0))  # restored at 503


def test_time_counts_from_the_last_save() -> None:
    policy = every(minutes=2) | every(1000)
    assert not policy.by_step
    assert not policy.due(5, 1119.9, SaveStats(3, 1000.0))
    assert policy.due(5, 1120.0, SaveStats(3, 1000.0))
    assert policy.due(1000, 1000.0, SaveStats(3, 1000.0))


@given(st.floats(0.001, 100), st.floats(0, 1000), st.floats(0.001, 0.5))
def test_auto_never_stands_still_longer_than_its_share(
    stall: float, persist: float, share: float
) -> None:
    policy = auto(max_overhead=share)
    stats = SaveStats(0, 100.0, stall=stall, persist=persist)
    wait = max(stall / share, persist)
    assert policy.due(9, 100.0 + wait * 1.001, stats)
    assert not policy.due(9, 100.0 + wait * 0.999, stats)
    assert not policy.due(9, 1e9, SaveStats(0, 100.0, stall, persist, busy=True))


def test_auto_first_learns_what_a_save_costs() -> None:
    assert not auto().due(1, FIRST_SECONDS - 1, SaveStats(0, 0.0))
    assert auto().due(1, FIRST_SECONDS, SaveStats(0, 0.0))


def test_what_is_kept() -> None:
    commits = [
        saved(0, age=9 * 86400, loss=3.0),
        saved(500, age=8 * 86400, loss=math.nan),
        saved(1000, age=3601, loss=1.0),
        saved(1500, age=3599, loss=2.0),
        saved(2000, age=5),
        saved(2100, age=0, loss=1.0),
    ]
    assert steps_kept(last(2), *commits) == [2000, 2100]
    assert steps_kept(every(1000), *commits) == [0, 1000, 2000, 2100]
    assert steps_kept(every(minutes=60), *commits) == [0, 500, 1000, 1500, 2100]
    assert steps_kept(best("loss", "min", 2), *commits) == [1000, 2100]
    assert steps_kept(best("loss", "max"), *commits) == [0, 2100]
    assert steps_kept(best("acc"), *commits) == [2100]
    assert steps_kept(younger_than(hours=1), *commits) == [1500, 2000, 2100]
    assert steps_kept(younger_than(days=8.5) | last(1), *commits) == [500, 1000, 1500, 2000, 2100]
    assert steps_kept(pinned, *commits) == [2100]
    assert to_delete(None, commits, (), (), (), NOW) == []
    assert to_delete(last(1), [], (), (), (), NOW) == []


def test_a_policy_in_the_wrong_place_is_told() -> None:
    with pytest.raises(UsageError, match=r"Last\(n=2\) says what to keep, not when to save"):
        (every(5) | last(2)).due(1, 0, SaveStats(0, 0))
    with pytest.raises(UsageError, match="says when to save, not what to keep"):
        encode_keep(last(1) | auto())
    with pytest.raises(UsageError, match="says when to save"):
        to_delete(auto(), [saved(1)], (), (), (), NOW)


@pytest.mark.parametrize(
    "make",
    [
        every,
        lambda: every(5, minutes=1),
        lambda: every(0),
        lambda: every(True),
        lambda: every(seconds=0),
        lambda: every(minutes=math.nan),
        lambda: last(0),
        lambda: last(1.5),
        lambda: best("", "min"),
        lambda: best("loss", "least"),
        lambda: best("loss", "min", 0),
        lambda: auto(0),
        lambda: auto(1.0),
        younger_than,
        lambda: younger_than(hours=1, days=1),
        lambda: younger_than(hours=-1),
        lambda: last(1) | 5,
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(UsageError):
        make()


keeps = st.recursive(
    st.one_of(
        st.builds(last, st.integers(1, 5)),
        st.builds(every, st.integers(1, 7)),
        st.builds(lambda s: every(seconds=s), st.integers(1, 50)),
        st.builds(best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
        st.builds(lambda h: younger_than(hours=h), st.floats(0.001, 0.02)),
        st.just(pinned),
    ),
    lambda inner: st.builds(lambda a, b: a | b, inner, inner),
    max_leaves=5,
)
ids = st.builds(CheckpointId, st.integers(0, 40), st.integers(1, 3), st.integers(0, 1))
runs = st.lists(
    st.builds(
        lambda id, age, loss: Saved(id, (EPOCH - timedelta(seconds=age)).isoformat(), loss),
        ids,
        st.integers(0, 100),
        st.one_of(
            st.just({}), st.builds(lambda x: {"loss": x}, st.floats(allow_nan=True, width=16))
        ),
    ),
    unique_by=lambda one: one.checkpoint,
    max_size=12,
).map(lambda found: sorted(found, key=lambda one: one.checkpoint))


@given(keeps)
def test_policies_survive_being_written(keep: Policy) -> None:
    assert decode_keep(encode_keep(keep)) == keep
    assert json.loads(encode_keep(keep))


@given(keeps, runs, st.sets(ids), st.sets(ids), st.sets(ids))
def test_what_must_stay_stays(
    keep: Policy,
    commits: list[Saved],
    pins: set[CheckpointId],
    leases: set[CheckpointId],
    protected: set[CheckpointId],
) -> None:
    gone = to_delete(keep, commits, pins, leases, protected, NOW)
    names = {one.checkpoint for one in gone}
    assert not names & (pins | leases | protected)
    if commits:
        assert commits[-1].checkpoint not in names
    assert gone == [one for one in commits if one.checkpoint in names]
    # Asked again, of what is left, nothing more has to go.
    rest = [one for one in commits if one not in gone]
    assert to_delete(keep, rest, pins, leases, protected, NOW) == []
    # Two policies keep what either keeps.
    more = to_delete(keep | last(2), commits, pins, leases, protected, NOW)
    assert {one.checkpoint for one in more} <= names


@given(runs, runs, st.sets(ids), st.sets(ids))
def test_what_no_longer_counts_goes_when_its_step_is_reached_again(
    fenced: list[Saved], commits: list[Saved], pins: set[CheckpointId], leases: set[CheckpointId]
) -> None:
    gone = {one.checkpoint for one in superseded(fenced, commits, pins, leases)}
    for one in fenced:
        id = one.checkpoint
        reached = [c for c in commits if c.checkpoint.epoch > id.epoch]
        again = max((c.checkpoint.step for c in reached), default=-1) >= id.step
        assert (id in gone) == (again and id not in pins | leases)


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "5", "[5]", '["last"]', '["last",0]', '["last",1,2]', '["last",true]',
        '["best","loss","least",1]', '["every_steps",null]', '["any"]',
        '["any",["any",["last",1]]]',
        '["every_seconds",0.5]', '["nothing"]', '["younger_than",-1]', "not JSON", "[" * 9000,
        '["any"' + ',["last",1]' * 65 + "]", '["auto",0.5]', '["pinned",1]',
    ],
)  # fmt: skip
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        decode_keep(text)


def test_keep_all_is_no_text() -> None:
    assert encode_keep(None) == ""
    assert decode_keep("") is None


def test_importing_policies_loads_nothing_heavy() -> None:
    code = (
        "import sys, envstore.checkpoint.policies; "
        "print([m for m in ('torch', 'numpy', 'boto3', 'fsspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
