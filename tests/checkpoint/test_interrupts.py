"""What gets in the way of a save: Ctrl-C, a persister that hangs, a second job."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envstore.checkpoint import Run, every, saves
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.link import Link
from tests.checkpoint.conftest import persisters

NAME = "team/llm"


def test_a_save_after_an_interrupted_one_of_the_same_step_counts(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = Link.staged

    def interrupted(self: Link, slot: int, checkpoint: Any) -> None:
        tell(self, slot, checkpoint)  # the persister has it: it will be committed
        raise KeyboardInterrupt

    with Run(NAME, store_url) as run:
        run.restore({})
        with monkeypatch.context() as patch:
            patch.setattr(Link, "staged", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.save(5, {"a": np.zeros(100)})
        run.save(5, {"a": np.ones(100)}).durable.result(60)
        state: dict[str, Any] = {"a": np.full(100, 7.0)}
        assert run.restore(state) == 5
        assert state["a"].tolist() == [1.0] * 100


def test_a_persister_that_hangs_does_not_end_the_training(
    store_url: str, slots_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "_LOCAL_SECONDS", 0.1)
    with Run(NAME, store_url) as run:
        state: Mapping[str, Any] = {"a": np.zeros(100)}
        run.restore(dict(state))
        run.save(1, state).durable.result(60)
        (pid,) = persisters(slots_root)
        os.kill(pid, signal.SIGSTOP)
        try:
            save = run.save(2, state)
            assert save.staged.done()
            assert not save.local.done()
            status = run.status()
            assert (status["failures"], "does not answer" in status["error"]) == (1, True)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert save.durable.result(60).step == 2


def test_a_second_job_by_mistake_does_not_fence_the_first(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "Stager", functools.partial(saves.Stager, patience=0.1))
    state = {"a": np.zeros(100)}
    with Run(NAME, store_url) as first:
        first.restore(dict(state))
        first.save(1, state).durable.result(60)
        with Run(NAME, store_url, save=every(10)) as second:
            assert second.restore(dict(state)) == 1
            second.step(2, state)
            with pytest.raises(CheckpointError, match="saves this rank of this run already"):
                second.save(2, state)
        first.save(3, state).durable.result(60)
        assert [commit.step for commit in first.list()] == [1, 3]
