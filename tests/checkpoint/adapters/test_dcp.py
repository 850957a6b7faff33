from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from envstore.checkpoint.adapters.dcp import EnvstoreReader, EnvstoreWriter
from envstore.checkpoint.run import Run
from envstore.errors import UsageError
from envstore.store.creation import create_store
from tests.s3server import S3Server
from tests.stores import Store

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def trained(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": step}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_save_and_load(store: Store) -> None:
    saved = state_of(*trained(), 10)
    with Run("team/llm") as run:
        dcp.save(saved, storage_writer=EnvstoreWriter(run, 10))
        assert run.latest() == 10
        loaded = state_of(*trained(1), 0)
        dcp.load(loaded, storage_reader=EnvstoreReader(run))
        assert_same(loaded, saved)
        # It is the same checkpoint that Run would have made, but that DCP makes all keys text.
        restored = state_of(*trained(1), 0)
        assert run.restore(restored, only=["model", "step"]) == 10
        assert_same(restored["model"], saved["model"])
        dcp.async_save(saved, storage_writer=EnvstoreWriter(run)).result()
        assert run.restore(restored) == 10
        assert_same(restored, saved)
    store.assert_sound()


def test_what_run_saved_is_loaded(store: Store) -> None:
    model, optimizer = trained()
    values = {"list": [torch.ones(2), 3], "tuple": (1, torch.ones(2)), "none": None}
    state = {"model": model, "optim": optimizer, "array": np.arange(6.0), "values": values}
    with Run("team/llm") as run:
        run.save(5, state).durable.result()
        loaded: dict[str, Any] = {}
        _load_state_dict(
            loaded,
            storage_reader=EnvstoreReader(run, 5),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        assert_same(loaded["model"], dict(model.state_dict()))
        assert np.array_equal(loaded["array"], np.arange(6.0))
        assert torch.equal(loaded["values"]["list"][0], torch.ones(2))
        assert torch.equal(loaded["values"]["tuple"][1], torch.ones(2))
        wide = {"model": {"0.weight": torch.zeros(7, 6, dtype=torch.float64)}}
        partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(wide, storage_reader=EnvstoreReader(run), planner=partial)
        assert torch.equal(wide["model"]["0.weight"], model.state_dict()["0.weight"].double())


def test_async_save_and_the_same_step_again(store: Store) -> None:
    saved = state_of(*trained(), 10)
    with Run("team/llm") as run:
        writer = EnvstoreWriter(run)
        assert isinstance(writer, AsyncStager)
        first = dcp.async_save(saved, storage_writer=writer, checkpoint_id="step-10")
        with torch.no_grad():
            saved["model"]["0.weight"].zero_()
        first.result()
        loaded = state_of(*trained(1), 0)
        dcp.load(loaded, storage_reader=EnvstoreReader(run), checkpoint_id="step-10")
        assert loaded["model"]["0.weight"].abs().sum() > 0
        dcp.async_save(saved, storage_writer=writer).result()
        dcp.load(loaded, storage_reader=EnvstoreReader(run), checkpoint_id="step-10")
        assert_same(loaded, saved)


def test_bad_input(store: Store) -> None:
    class Planner(dcp.DefaultSavePlanner):
        def lookup_object(self, index: Any) -> Any:
            return super().lookup_object(index)

    with Run("team/llm") as run:
        with pytest.raises(dcp.CheckpointException, match="no checkpoint yet"):
            dcp.load({"x": torch.ones(2)}, storage_reader=EnvstoreReader(run))
        with pytest.raises(dcp.CheckpointException, match="nothing says which step"):
            dcp.save({"x": torch.ones(2)}, storage_writer=EnvstoreWriter(run))
        with pytest.raises(UsageError, match="holds no step"):
            dcp.save({"x": torch.ones(2)}, storage_writer=EnvstoreWriter(run), checkpoint_id="x")
        with pytest.raises(dcp.CheckpointException, match="changes what is saved"):
            dcp.save({"x": torch.ones(2)}, storage_writer=EnvstoreWriter(run, 1), planner=Planner())
        with pytest.raises(UsageError, match="another process"):
            EnvstoreWriter(run).__reduce__()
        run.save(1, {"x": {1, 2}, "object": Marker()}).durable.result()
        wanted = {"object": None}
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        with pytest.raises(dcp.CheckpointException, match="pickled object"):
            dcp.load(wanted, storage_reader=EnvstoreReader(run), planner=planner)
        dcp.load(wanted, storage_reader=EnvstoreReader(run, trusted=True), planner=planner)
        assert isinstance(wanted["object"], Marker)
    assert EnvstoreWriter.validate_checkpoint_id("runs/step-10")
    assert not EnvstoreReader.validate_checkpoint_id("runs")
    with Run("team/llm") as run, pytest.raises(dcp.CheckpointException, match="restore"):
        dcp.save({"x": torch.ones(2)}, storage_writer=EnvstoreWriter(run, 2))


class Marker:
    """What JSON cannot say."""


KILLED = """
import os, signal, sys, torch
import torch.distributed.checkpoint as dcp
from envstore.checkpoint.run import Run
from envstore.checkpoint.adapters.dcp import EnvstoreWriter
run = Run("team/llm")
state = {"w": torch.arange(200_000), "step": 7}
dcp.async_save(state, storage_writer=EnvstoreWriter(run))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_staged_survives_a_kill(
    store: Store, until: Callable[[Callable[[], bool]], None]
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED], env=os.environ, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with Run("team/llm") as run:
        until(lambda: run.latest() == 7)
        loaded = {"w": torch.zeros(200_000, dtype=torch.int64), "step": 0}
        dcp.load(loaded, storage_reader=EnvstoreReader(run))
        assert_same(loaded, {"w": torch.arange(200_000), "step": 7})


def test_ranks_come_and_go(store: Store, tmp_path: Path) -> None:
    alone, optimizer = trained(3)
    with Run("team/alone") as run:
        dcp.save(state_of(alone, optimizer, 1), storage_writer=EnvstoreWriter(run, 1))
    script = Path(__file__).with_name("dcp_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2",
                 "PYTHONPATH": str(Path(__file__).parents[3])},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-4000:]
    assert_same(torch.load(tmp_path / "from-one.pt"), dict(alone.state_dict()))
    # What two saved, on one.
    expected = torch.load(tmp_path / "step-2.pt")
    with Run("team/llm") as run:
        loaded: dict[str, Any] = {}
        _load_state_dict(
            loaded,
            storage_reader=EnvstoreReader(run, 2),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        assert_same(loaded["model"], expected["model"])
        assert_same(loaded["optim"]["state"], expected["optim"]["state"])
        assert [commit.world_size for commit in run.list()] == [2, 2, 2]
    # The weights of all ranks, as one file that any loader reads.
    from safetensors.torch import load_file

    store.pull(tmp_path / "pulled", "team/llm:step-2")
    assert_same(load_file(tmp_path / "pulled" / "model.safetensors"), expected["model"])
    store.assert_sound()


def test_on_s3(
    s3_server: S3Server, slots_root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket(), "store")
    create_store(url)
    saved = state_of(*trained(), 10)
    with Run("team/llm", url) as run:
        dcp.save(saved, storage_writer=EnvstoreWriter(run, 10))
        loaded = state_of(*trained(1), 0)
        dcp.load(loaded, storage_reader=EnvstoreReader(run))
        assert_same(loaded, saved)
