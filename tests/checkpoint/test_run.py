"""A Run from end to end: real stores, real slots, a persister of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envstore import checkpoint
from envstore.checkpoint import Run, every, last
from envstore.checkpoint.errors import (
    CheckpointError,
    NoCheckpointError,
    SaveFailedError,
    SlotSpaceError,
    StateMismatchError,
)
from envstore.errors import CorruptError, NotFoundError, UnavailableError, UsageError
from tests.checkpoint.conftest import make_store
from tests.checkpoint.training import Trainers, expected, fingerprint, fresh_state, train
from tests.s3server import S3Server, running_s3

NAME = "team/llm"
Until = Callable[[Callable[[], bool]], None]


def advanced(step: int) -> dict[str, Any]:
    state = fresh_state()
    for number in range(1, step + 1):
        train(state, number)
    return state


def test_a_state_comes_back_in_another_process(store_url: str, trainers: Trainers) -> None:
    first = trainers.start(store=store_url, run=NAME, steps=5, save_every=2)
    assert first.wait_for("restored")["step"] is None
    first.wait_for("durable")
    first.end()
    second = trainers.start(store=store_url, run=NAME, steps=6)
    found = second.wait_for("restored")
    assert (found["step"], found["digest"]) == (4, expected(4))
    assert second.wait_for("saved", step=6)["digest"] == expected(6)
    second.wait_for("end")


def test_the_first_start_restores_nothing_and_touches_nothing(store_url: str) -> None:
    state = fresh_state()
    before = fingerprint(state)
    with Run(NAME, store_url) as run:
        assert run.restore(state) is None
        assert run.latest() is None
        assert run.list() == []
    assert fingerprint(state) == before


def test_steps_are_found_pinned_verified_and_removed(store_url: str, until: Until) -> None:
    with Run(NAME, store_url, keep=last(2)) as run:
        run.restore(fresh_state())
        for step in (1, 2, 3, 4):
            run.save(step, advanced(step), {"loss": 1 / step}, pin="good" if step == 1 else "")
            run.wait()
        # Retention comes after the commit.
        until(lambda: [commit.step for commit in run.list()] == [1, 3, 4])
        assert run.latest() == 4
        assert run.info(3).metrics == {"loss": 1 / 3}
        assert run.verify().step == 4
        assert run.verify(3).step == 3
        run.unpin(1)
        run.pin(3, "better")
        run.save(5, advanced(5)).durable.result(60)
        until(lambda: [commit.step for commit in run.list()] == [3, 4, 5])
        for step in (2, 9):
            with pytest.raises(NoCheckpointError, match=f"step {step}"):
                run.info(step)
            with pytest.raises(NoCheckpointError, match=f"step {step}"):
                run.restore(fresh_state(), step=step)
        state = fresh_state()
        assert run.restore(state, step=3) == 3
        assert fingerprint(state) == expected(3)


def test_a_save_says_how_far_it_is(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        save = run.save(7, advanced(1))
        assert save.staged.done()
        assert save.local.done()
        assert save.bytes > 3 * 80_000
        assert save.durable.result(60).step == save.step == 7
        status = run.status()
        assert (status["staged"], status["local"], status["durable"]) == (7, 7, 7)
        assert (status["pending"], status["failures"], status["error"]) == ([], 0, "")


def test_the_same_step_may_be_saved_again(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        run.save(1, advanced(1)).durable.result(60)
        run.save(1, advanced(2)).durable.result(60)
        state = fresh_state()
        assert run.restore(state) == 1
        assert fingerprint(state) == expected(2)


def test_training_goes_back_and_on_from_there(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        for step in (1, 2, 3):
            run.save(step, advanced(step)).durable.result(60)
        assert run.restore(fresh_state(), step=1) == 1
        run.save(2, advanced(5)).durable.result(60)
        assert [commit.step for commit in run.list()] == [1, 2]
        state = fresh_state()
        assert run.restore(state) == 2
        assert fingerprint(state) == expected(5)


def test_who_only_restores_fences_nobody(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        run.save(1, advanced(1)).durable.result(60)
        with Run(NAME, store_url) as reader:
            assert reader.restore({"model": fresh_state()["model"]}, only=["model"]) == 1
        run.save(2, advanced(2)).durable.result(60)
        assert run.latest() == 2


def test_a_run_that_was_not_restored_must_not_save(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        run.save(1, advanced(1)).durable.result(60)
    with Run(NAME, store_url) as run, pytest.raises(CheckpointError, match="none was restored"):
        run.save(2, advanced(2))
    run = Run(NAME, store_url, save=every(steps=1))
    with pytest.raises(CheckpointError, match="none was restored"):
        run.step(2, advanced(2))
    run.close()
    with Run(NAME, store_url, fresh=True) as run:
        run.save(9, advanced(2)).durable.result(60)
        assert [commit.step for commit in run.list()] == [9]


def test_saves_come_when_they_are_due(store_url: str) -> None:
    with Run(NAME, store_url, save=every(steps=3)) as run:
        run.restore(fresh_state())
        saved = []
        for step in range(1, 8):
            if run.step(step, advanced(1)) is not None:
                saved.append(step)
                run.wait()
        assert saved == [3, 6]


def test_lineage_is_recorded_and_refs_become_digests(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_SNAPSHOT", "ab" * 32)
    with Run("team/base", store_url) as base:
        base.restore(fresh_state())
        base.save(1, {"model": {"w": np.arange(300_000, dtype="f4")}}).durable.result(60)
    lineage = {"model": "team/base:step-1", "data": "s3://elsewhere/set"}
    with Run(NAME, store_url, lineage=lineage) as run:
        run.restore(fresh_state())
        save = run.save(1, {"model": {"w": np.arange(300_000, dtype="f4")}})
        save.durable.result(60)
        found = run.info(1).lineage
        assert found["model"].startswith("team/base:step-1@")
        assert found["data"] == "s3://elsewhere/set"
        assert found["environment"] == f"@{'ab' * 32}"
        assert found["world_size"] == "1"
        assert run.status()["sent"] < 100_000 < save.bytes
    with Run(NAME, store_url, lineage={"model": "team/nothing"}) as run:
        run.restore({"model": {"w": np.zeros(300_000, "f4")}})
        with pytest.raises(NotFoundError, match="team/nothing"):
            run.save(2, fresh_state())


def test_what_does_not_fit_is_named_and_nothing_is_touched(store_url: str) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        run.save(1, advanced(1)).durable.result(60)
        state = fresh_state()
        state["model"]["w1"] = np.zeros(7, "f4")
        before = fingerprint(state)
        with pytest.raises(StateMismatchError, match="w1"):
            run.restore(state)
        assert fingerprint(state) == before


def test_a_damaged_checkpoint_is_named_and_the_older_one_too(
    store_url: str, tmp_path: Path, slots_root: Path
) -> None:
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        for step in (1, 2):
            run.save(step, advanced(step)).durable.result(60)
        damaged = run.info(2)
    packs = [path for path in (tmp_path / "store" / "packs").rglob("*") if path.is_file()]
    newest = max(packs, key=lambda path: path.stat().st_mtime)
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 1
    newest.chmod(0o644)
    newest.write_bytes(data)
    elsewhere = checkpoint.Staging(slots_root / "elsewhere")
    with Run(NAME, store_url, staging=elsewhere) as run:
        with pytest.raises(CorruptError, match=r"step 2 of team/llm is damaged.*step=1"):
            run.restore(fresh_state())
        with pytest.raises(CorruptError, match="step 2"):
            run.verify(damaged.step)
        state = fresh_state()
        assert run.restore(state, step=1) == 1
        assert fingerprint(state) == expected(1)


def test_no_memory_for_a_slot_is_an_error_not_a_signal(store_url: str) -> None:
    staging = checkpoint.Staging(max_bytes=1 << 20)
    with Run(NAME, store_url, staging=staging) as run:
        run.restore(fresh_state())
        with pytest.raises(SlotSpaceError):
            run.save(1, {"w": np.zeros(1 << 22, "u1")})


def test_training_goes_on_without_the_store(
    tmp_path: Path,
    slots_root: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    until: Until,
) -> None:
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "1")
    with running_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = server.url(server.new_bucket())
        make_store(url)
        run = Run(NAME, url, save=every(steps=1), max_failures=3)
        run.restore(fresh_state())
        assert run.step(1, advanced(1)) is not None
        run.wait(60)
    with caplog.at_level(logging.WARNING, "envstore.checkpoint"):
        assert run.step(2, advanced(2)) is not None
        until(lambda: run.status()["failures"] == 1)
        assert run.step(3, advanced(3)) is not None
        assert run.step(4, advanced(4)) is None
        assert run.status()["error"]
        until(lambda: run.status()["failures"] >= 2)
        until(lambda: run.status()["failures"] >= 3)
        with pytest.raises(SaveFailedError, match="in a row"):
            run.step(5, advanced(5))
    assert "step 4 is not saved" in caplog.text
    with pytest.raises(UnavailableError):
        run.latest()
    run.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"save": last(2)},
        {"save": 5},
        {"keep": every(steps=3) | checkpoint.auto()},
        {"staging": "/dev/shm"},
        {"persister": "inproc"},
        {"on_busy": "replace"},
        {"on_error": "ignore"},
        {"max_failures": 0},
        {"on_preempt": True},
        {"signals": ["SIGNONE"]},
        {"replicated": "model"},
        {"codec": "zstd"},
        {"bandwidth": "fast"},
        {"bandwidth": 0},
        {"lineage": {"code": "x"}},
        {"lineage": {"data": 5}},
        {"check_finite": "always"},
        {"fresh": 1},
        {"rank": 1},
        {"rank": 2, "world_size": 2},
        {"incarnation": ""},
        {"incarnation": 3},
        {"rank": "0", "world_size": "2"},
        {"signals": ["SIGKILL"]},
        {"signals": None},
        {"lineage": "team/base:v1"},
    ],
)
def test_an_option_that_cannot_be_is_refused_at_once(store_url: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Run(NAME, store_url, **wrong)


def test_calls_that_cannot_be_are_refused_and_change_nothing(store_url: str) -> None:
    for name, store in ((None, store_url), (3, store_url), (b"x", store_url), (NAME, 3)):
        with pytest.raises(UsageError):
            Run(name, store)  # type: ignore[arg-type]
    wrong: Any
    with Run(NAME, store_url) as run:
        run.restore(fresh_state())
        run.save(1, fresh_state())
        for wrong in (None, [1], 3):
            with pytest.raises(UsageError, match="no state"):
                run.save(2, wrong)
        for wrong in (3, {"loss": 10**400}):
            with pytest.raises(UsageError, match="metrics"):
                run.save(2, fresh_state(), wrong)
        for wrong in (3, "x" * 5000):
            with pytest.raises(UsageError, match=r"pin=|reason"):
                run.save(2, fresh_state(), pin=wrong)
        run.wait()
        for wrong in (3, [3], {"model": 3}.items()):
            with pytest.raises(UsageError, match="only"):
                run.restore(fresh_state(), only=wrong)
        for wrong in (-1, "1", None, True, 10**12):
            for act in (run.pin, run.unpin, run.info):
                with pytest.raises(UsageError, match="step"):
                    act(wrong)
        assert [commit.step for commit in run.list()] == [1]


def test_ranks_without_a_board_cannot_save_by_the_time(store_url: str) -> None:
    with pytest.raises(CheckpointError, match="no way to agree"):
        Run(NAME, store_url, save=every(minutes=1), rank=0, world_size=2, incarnation="a")
    with pytest.raises(CheckpointError, match="no way to agree"):
        Run(NAME, store_url, on_preempt="snapshot", rank=0, world_size=2, incarnation="a")


def test_ranks_without_an_incarnation_are_told_so(store_url: str) -> None:
    with (
        Run(NAME, store_url, rank=0, world_size=2) as run,
        pytest.raises(CheckpointError, match="incarnation="),
    ):
        run.restore(fresh_state())


def test_a_closed_run_says_so(store_url: str) -> None:
    run = Run(NAME, store_url)
    run.close()
    run.close()
    with pytest.raises(UsageError, match="closed"):
        run.step(1, fresh_state())


def test_importing_is_cheap() -> None:
    program = (
        "import sys; from envstore import checkpoint; checkpoint.Run; checkpoint.Staging; "
        "print([name for name in ('torch', 'numpy', 'boto3', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_s3_from_end_to_end(
    s3_server: S3Server,
    slots_root: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainers: Trainers,
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket())
    make_store(url)
    trainer = trainers.start(store=url, run=NAME, steps=3)
    trainer.wait_for("durable")
    state = fresh_state()
    with Run(f"{url}#{NAME}", prefetch=True) as run:
        assert run.restore(state) == 3
    assert fingerprint(state) == expected(3)
