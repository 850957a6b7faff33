"""One of two ranks that train a sharded model, and save and load it by DCP. Run by test_dcp."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from envstore.checkpoint.adapters.dcp import EnvstoreReader, EnvstoreWriter
from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem
from envstore.checkpoint.run import Run


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    # 7 and 5: rows that two ranks cannot share evenly.
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))


def sharded(mesh: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make()
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def full(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    if hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state.clone() if isinstance(state, torch.Tensor) else state


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": step, "plain": torch.arange(3.0)}


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    # What one process saved, on two.
    model, optimizer = sharded(mesh)
    with Run("team/alone") as run:
        weights, _ = get_state_dict(model, optimizer)
        dcp.load({"model": weights}, storage_reader=EnvstoreReader(run, 1),
                 planner=dcp.DefaultLoadPlanner(allow_partial_load=True))  # fmt: skip
        loaded = full(weights)
        if rank == 0:
            torch.save(loaded, out / "from-one.pt")

    with Run("team/llm") as run:
        model, optimizer = sharded(mesh)
        train(model, optimizer)
        dcp.save(state_of(model, optimizer, 1), storage_writer=EnvstoreWriter(run, 1))
        train(model, optimizer)
        state = state_of(model, optimizer, 2)
        # DCP plans in a thread, which must not meet the training's own collectives.
        future = dcp.async_save(
            state, storage_writer=EnvstoreWriter(run), process_group=dist.new_group()
        )
        kept = full(state)
        train(model, optimizer)  # the state that was staged is another's by now
        future.result()
        if rank == 0:
            torch.save(kept, out / "step-2.pt")

    with Run("team/llm") as run:
        again, moments = sharded(mesh)
        train(again, moments)
        state = state_of(again, moments, 0)
        dcp.load(state, storage_reader=EnvstoreReader(run))
        set_state_dict(again, moments, model_state_dict=state["model"],
                       optim_state_dict=state["optim"])  # fmt: skip
        assert state["step"] == 2
        assert torch.equal(state["plain"], torch.arange(3.0))
        train(again, moments)
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one.to_local(), other.to_local())
        dcp.save(state_of(again, moments, 3), storage_writer=EnvstoreWriter(run, 3))

    # The same without a writer of ours: what two ranks write at once through fsspec.
    fsspec.register_implementation("envstore", EnvstoreFileSystem)
    url = "envstore://team/files/step-3"
    dcp.save(state_of(again, moments, 3), checkpoint_id=url)
    other, more = sharded(mesh)
    train(other, more)
    state = state_of(other, more, 0)
    dcp.load(state, checkpoint_id=url)
    assert state["step"] == 3
    for name, tensor in again.state_dict().items():
        assert torch.equal(state["model"][name].to_local(), tensor.to_local())
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
