"""SIGKILL, of whoever and whenever: what ``save`` has acknowledged is committed, bit by bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from envstore import checkpoint
from envstore.checkpoint import Run
from tests.checkpoint.conftest import is_gone, persisters, wait_until
from tests.checkpoint.training import Trainer, Trainers, expected, fingerprint, fresh_state

NAME = "team/llm"
KILLS = int(os.environ.get("ENVSTORE_TEST_KILLS", "20"))
"""How often the trainer is killed right after ``save`` returned; 100 for the record."""


@pytest.fixture
def elsewhere(slots_root: Path) -> checkpoint.Staging:
    """Slots of another node: what is restored there comes from the store."""
    return checkpoint.Staging(slots_root / "elsewhere")


def kill_persisters(root: Path) -> None:
    for pid in persisters(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: is_gone(pid))


def test_a_trainer_killed_once_save_returned_loses_nothing(
    store_url: str, trainers: Trainers, elsewhere: checkpoint.Staging
) -> None:
    choose = random.Random(6)
    done = 0
    with Run(NAME, store_url, staging=elsewhere) as run:
        for _ in range(KILLS):
            last = done + choose.randint(1, 3)
            trainer = trainers.start(store=store_url, run=NAME, steps=last + 5, pause=0.01)
            restored = trainer.wait_for("restored")
            # From memory or from the store: always what was acknowledged last.
            assert restored["step"] in (done or None, *range(done + 1, last + 6))
            assert done == 0 or restored["digest"] == expected(restored["step"])
            last = max(last, (restored["step"] or 0) + 1)
            trainer.wait_for("saved", step=last)
            time.sleep(choose.random() * 0.004)
            trainer.kill()
            trainer.end()
            done = max(line["step"] for line in trainer.said if line["say"] == "saved")
            wait_until(lambda step=done: (run.latest() or 0) >= step)
            state = fresh_state()
            found = run.restore(state, step=done)
            assert (found, fingerprint(state)) == (done, expected(done))


def test_a_restart_on_the_node_restores_from_memory_before_the_upload_has_ended(
    store_url: str, trainers: Trainers, elsewhere: checkpoint.Staging
) -> None:
    # 240 KB at 60 kB/s: each upload takes seconds.
    slow = {"store": store_url, "run": NAME, "bandwidth": 60_000}
    trainer = trainers.start(steps=1, **slow)
    trainer.wait_for("saved", step=1)
    trainer.kill()
    trainer.end()
    again = trainers.start(steps=1, wait=False, **slow)
    found = again.wait_for("restored")
    with Run(NAME, store_url, staging=elsewhere) as run:
        assert run.latest() is None
        assert (found["step"], found["digest"]) == (1, expected(1))
        wait_until(lambda: run.latest() == 1)


def test_a_killed_persister_is_replaced_and_nothing_is_lost(
    store_url: str, trainers: Trainers, slots_root: Path
) -> None:
    trainer = trainers.start(store=store_url, run=NAME, steps=12, pause=0.03)
    for step in (2, 5, 8):
        trainer.wait_for("saved", step=step)
        kill_persisters(slots_root)
    trainer.wait_for("durable")
    trainer.wait_for("end")
    state = fresh_state()
    with Run(NAME, store_url) as run:
        assert run.restore(state) == 12
        assert [commit.step for commit in run.list()] == list(range(1, 13))
    assert fingerprint(state) == expected(12)


def test_trainer_and_persister_killed_at_once(
    store_url: str, trainers: Trainers, slots_root: Path
) -> None:
    trainer = trainers.start(store=store_url, run=NAME, steps=9, bandwidth=200_000, pause=60)
    saved = trainer.wait_for("saved", step=1)
    trainer.kill()
    kill_persisters(slots_root)
    trainer.end()
    # Nobody is left. The next start finds the slots, and starts a persister for them.
    again = trainers.start(store=store_url, run=NAME, steps=2)
    found = again.wait_for("restored")
    assert (found["step"], found["digest"]) == (1, saved["digest"])
    again.wait_for("end")
    with Run(NAME, store_url) as run:
        assert [commit.step for commit in run.list()] == [1, 2]


def test_what_was_saved_in_waves_is_waited_for(
    store_url: str, trainers: Trainers, slots_root: Path
) -> None:
    # Three waves of 400 KB: when save() has returned the last one is still on its way.
    size = {"max_bytes": 1 << 20, "values": 100_000}
    trainer = trainers.start(
        store=store_url, run=NAME, steps=1, bandwidth=600_000, pause=60, **size
    )
    saved = trainer.wait_for("saved", step=1)
    kill_persisters(slots_root)
    trainer.kill()
    trainer.end()
    again = trainers.start(store=store_url, run=NAME, steps=1, **size)
    found = again.wait_for("restored")
    assert (found["step"], found["digest"]) == (1, saved["digest"])
    again.wait_for("end")


def test_a_start_that_dies_before_its_first_save_loses_nothing(
    store_url: str, tmp_path: Path, trainers: Trainers, slots_root: Path
) -> None:
    # The second start resumes from memory and begins an epoch; what it resumed from is not
    # committed yet when the third looks.
    slow = {"store": store_url, "run": NAME, "bandwidth": 1}
    first = trainers.start(steps=1, pause=60, **slow)
    saved = first.wait_for("saved", step=1)
    first.kill()
    first.end()
    second = trainers.start(steps=9, save_every=9, pause=60, **slow)
    second.wait_for("step", step=2)
    wait_until((tmp_path / f"store/runs/{NAME}/epochs/00000002/start").exists)
    second.kill()
    second.end()
    kill_persisters(slots_root)
    third = trainers.start(store=store_url, run=NAME, steps=2)
    found = third.wait_for("restored")
    assert (found["step"], found["digest"]) == (1, saved["digest"])
    third.wait_for("end")
    with Run(NAME, store_url) as run:
        assert [commit.step for commit in run.list()] == [1, 2]


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 4), (4, 2)])
def test_ranks_and_persisters_are_killed_and_all_resume_one_step(
    store_url: str, trainers: Trainers, slots_root: Path, tmp_path: Path, ranks: int, rounds: int
) -> None:
    choose = random.Random(ranks)
    newest = 0
    values = 2_000

    def start(incarnation: int, steps: int) -> list[Trainer]:
        together = tmp_path / str(incarnation)
        together.mkdir()
        return [
            trainers.start(
                store=store_url,
                run=NAME,
                steps=steps,
                rank=rank,
                world_size=ranks,
                incarnation=f"start-{incarnation}",
                pause=0.01,
                values=values,
                together=str(together),
            )
            for rank in range(ranks)
        ]

    for number in range(rounds):
        jobs = start(number, 1000)
        restored = [job.wait_for("restored") for job in jobs]
        assert len({line["step"] for line in restored}) == 1
        step = restored[0]["step"] or 0
        # What was durable when the job was killed is never lost.
        assert step >= newest
        for rank, line in enumerate(restored):
            assert line["digest"] == expected(step, rank, values)
        for job in jobs:
            job.wait_for("saved", step=step + choose.randint(1, 4))
        victims = choose.choice(["one", "all", "persisters", "both"])
        if victims in ("persisters", "both"):
            kill_persisters(slots_root)
        for job in jobs[:1] if victims == "one" else jobs:
            job.kill()
        time.sleep(choose.random() * 0.02)
        for job in jobs:
            job.kill()
            job.end()
        said = [line for job in jobs for line in job.said if line["say"] == "step"]
        newest = max(line["status"]["durable"] or 0 for line in said)
    jobs = start(rounds, newest + 12)
    step = jobs[0].wait_for("restored")["step"]
    assert step >= newest
    for rank, job in enumerate(jobs):
        assert job.wait_for("restored")["digest"] == expected(step, rank, values)
        job.wait_for("end")
    with Run(NAME, store_url, rank=0, world_size=ranks, incarnation="after") as run:
        assert run.latest() == newest + 12
        assert run.verify().step == newest + 12


def test_a_signal_is_flushed_and_still_ends_the_trainer(
    store_url: str, trainers: Trainers, elsewhere: checkpoint.Staging
) -> None:
    trainer = trainers.start(store=store_url, run=NAME, steps=100, save_every=3, pause=0.01)
    trainer.wait_for("saved", step=3)
    trainer.kill(signal.SIGTERM)
    trainer.end()
    assert trainer.said[-1]["say"] in ("saved", "step", "preempted")
    with Run(NAME, store_url, staging=elsewhere) as run:
        wait_until(lambda: (run.latest() or 0) >= 3)


def test_a_signal_has_the_state_saved_at_the_next_step(
    store_url: str, trainers: Trainers, elsewhere: checkpoint.Staging
) -> None:
    trainer = trainers.start(
        store=store_url, run=NAME, steps=10_000, save_every=100_000, pause=0.01,
        on_preempt="snapshot",
    )  # fmt: skip
    trainer.wait_for("step", step=3)
    trainer.kill(signal.SIGTERM)
    left = trainer.wait_for("preempted")["step"]
    trainer.wait_for("durable")
    trainer.wait_for("end")
    state = fresh_state()
    with Run(NAME, store_url, staging=elsewhere) as run:
        assert run.restore(state) == left
    assert fingerprint(state) == expected(left)
