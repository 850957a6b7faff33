"""The node is lost: another one, with nothing but the store, goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from envstore.checkpoint import Run
from envstore.checkpoint.spawning import ask_hello
from tests.checkpoint.conftest import end_persisters, make_store, wait_until
from tests.checkpoint.training import Trainers, expected, fingerprint, fresh_state
from tests.s3server import S3Server

NAME = "team/llm"


def test_a_second_node_goes_on_from_what_is_committed(
    s3_server: S3Server,
    slots_root: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainers: Trainers,
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket())
    make_store(url)
    second = {
        "ENVSTORE_SLOTS": str(slots_root / "second"),
        "ENVSTORE_CACHE_DIR": str(tmp_path / "second-cache"),
    }
    first = trainers.start(store=url, run=NAME, steps=100, pause=0.05)
    first.wait_for("saved", step=4)
    with Run(NAME, url) as run:
        wait_until(lambda: (run.latest() or 0) >= 3)
        # The node is gone, its memory and all processes with it.
        first.kill()
        end_persisters(slots_root)
        first.end()
        committed = run.latest()
        assert committed is not None
        job = trainers.start(environ=second, store=url, run=NAME, steps=committed + 3)
        found = job.wait_for("restored")
        assert (found["step"], found["digest"]) == (committed, expected(committed))
        job.wait_for("end")
        assert run.latest() == committed + 3
        # A zombie of the first node: its trainer is stopped for good, what it saves does not count.
        steps = [commit.step for commit in run.list()]
        assert steps == sorted(set(steps))
    end_persisters(slots_root / "second")


def test_a_rank_that_misses_a_slot_waits_with_a_persister_of_its_own(
    store_url: str, slots_root: Path, trainers: Trainers
) -> None:
    def ranks(incarnation: str) -> list[Run]:
        return [
            Run(NAME, store_url, rank=rank, world_size=2, incarnation=incarnation)
            for rank in range(2)
        ]

    jobs = [
        trainers.start(
            store=store_url, run=NAME, steps=1, rank=rank, world_size=2, incarnation="first",
            bandwidth=1,
        )
        for rank in range(2)
    ]  # fmt: skip
    for job in jobs:
        job.wait_for("saved", step=1)
        job.kill()
        job.end()
    end_persisters(slots_root)
    first, second = ranks("second")
    with contextlib.ExitStack() as opened:
        opened.callback(second.close)
        opened.callback(first.close)
        # What both ranks have in memory; with a choice of items no slot is made ready for saving.
        assert first.restore(fresh_state(0), only=list(fresh_state(0))) == 1
        (slot,) = slots_root.glob("*/00000/slot-0")
        with slot.open("r+b") as locked, ThreadPoolExecutor(1) as pool:
            fcntl.flock(locked, fcntl.LOCK_EX)
            state = fresh_state(1)
            restoring = pool.submit(second.restore, state)
            (directory,) = slots_root.glob("*/00001")
            wait_until(lambda: ask_hello(directory) is not None)
            assert not restoring.done()
            fcntl.flock(locked, fcntl.LOCK_UN)
            assert restoring.result(timeout=60) == 1
        assert fingerprint(state) == expected(1, 1)


def test_a_replaced_trainer_is_told_so_and_nothing_of_it_counts(
    store_url: str, slots_root: Path, tmp_path: Path, trainers: Trainers
) -> None:
    zombie = trainers.start(store=store_url, run=NAME, steps=10_000, pause=0.05)
    zombie.wait_for("saved", step=2)
    second = {
        "ENVSTORE_SLOTS": str(slots_root / "second"),
        "ENVSTORE_CACHE_DIR": str(tmp_path / "second-cache"),
    }
    with Run(NAME, store_url) as run:
        wait_until(lambda: (run.latest() or 0) >= 1)
        job = trainers.start(environ=second, store=store_url, run=NAME, steps=60, pause=0.05)
        began = job.wait_for("restored")["step"]
        job.wait_for("saved", step=began + 1)
        told = zombie.wait_for("error")
        assert told["kind"] == "FencedError"
        job.wait_for("end")
        state = fresh_state()
        assert run.restore(state) == 60
        assert fingerprint(state) == expected(60)
        assert [commit.step for commit in run.list()] == list(range(1, 61))
    end_persisters(slots_root / "second")
    assert os.path.exists(slots_root)
