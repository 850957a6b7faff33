"""The ranks of a sharded training: they save, restore and write down what they have.

python -m tests.checkpoint.sharded_rank RANKS DIRECTORY WORLD_SIZE=VERB:NAME,... ...

Each phase is a training of so many ranks; a rank that it has no place for waits for the next. Each
is a process, forked off one that has imported what takes seconds and has done nothing with it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from envstore.checkpoint.apply import apply
from envstore.checkpoint.capture import capture
from envstore.checkpoint.live import rng
from tests.checkpoint.memory_tree import MemoryTree

SHARED = ["model", "optim", "columns", "ddp", "ddp_optim", "step"]


def build(seed: int, *, sharded: bool) -> dict[str, Any]:
    """The same state, in shards or whole: uneven rows, tied weights, buffers, a loose tensor."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 7, bias=False))
    model[3].weight = model[0].weight
    model.register_buffer("scale", torch.full((1,), 0.5))
    other = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    columns = torch.randn(3, 8)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
        other = DistributedDataParallel(other)
        columns = distribute_tensor(columns, mesh, [Shard(1)])
    return {
        "model": model,
        "optim": torch.optim.AdamW(model.parameters(), lr=0.1),
        "columns": columns,
        "ddp": other,
        "ddp_optim": torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9),
        "rng": rng(),
        "step": 0,
    }


def train(state: dict[str, Any], steps: int) -> list[list[float]]:
    losses = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    for _ in range(steps):
        state["step"] += 1
        batch = torch.randn(4, 5) + rank
        both = []
        for model, optimizer in (("model", "optim"), ("ddp", "ddp_optim")):
            state[optimizer].zero_grad()
            loss = state[model](batch).pow(2).mean() + (state["step"] * 0.01)
            loss.backward()
            state[optimizer].step()
            both.append(loss.item())
        losses.append(both)
    return losses


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of the state as a whole, and the values."""

    def flat(value: Any, name: str, into: dict[str, Any]) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flat(item, f"{name}.{key}", into)
        elif isinstance(value, DTensor):
            into[name] = value.detach().full_tensor()
        elif torch.is_tensor(value):
            into[name] = value.detach().clone()

    found: dict[str, Any] = {}
    for item in ("model", "optim", "ddp", "ddp_optim"):
        module = state[item].module if item == "ddp" and dist.is_initialized() else state[item]
        flat(module.state_dict(), item, found)
    flat(state["columns"], "columns", found)
    return found


def read_tree(folder: Path) -> MemoryTree:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return MemoryTree({str(path.relative_to(folder)): path.read_bytes() for path in files})


def write_tree(tree: MemoryTree, folder: Path) -> None:
    for path, content in tree.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def run(rank: int, world_size: int, folder: Path, actions: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for action in actions:
        verb, name = action.split(":")
        if verb == "save":
            state = build(1, sharded=True)
            torch.manual_seed(100 + rank)
            train(state, 2)
            part = capture(state, rank=rank, world_size=world_size, facts={"step": 2})
            write_tree(MemoryTree.of(part), folder / name)
            tensors = whole(state)
            if rank == 0:
                torch.save(tensors, folder / f"{name}.pt")
            report["expected"] = train(state, 2)
        else:
            state = build(2, sharded=True)
            torch.manual_seed(200 + rank)
            if verb == "trained":
                train(state, 1)
            tree = read_tree(folder / name)
            only = None if verb == "exact" else SHARED
            apply(state, tree, rank=rank, world_size=world_size, only=only)
            wanted = torch.load(folder / f"{name}.pt")
            found = whole(state)
            report[action] = {
                "wrong": [
                    key
                    for key in wanted.keys() | found.keys()
                    if key not in wanted
                    or key not in found
                    or wanted[key].dtype != found[key].dtype
                    or not torch.equal(wanted[key], found[key])
                ],
                "count": len(found),
                "step": state["step"],
                "losses": train(state, 2) if verb == "exact" else [],
            }
        dist.barrier()
    return report


def main(rank: int, folder: Path, phases: list[str]) -> None:
    torch.set_num_threads(1)
    for phase in phases:
        number, _, actions = phase.partition("=")
        world_size = int(number)
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{number}", rank=rank, world_size=world_size
        )
        report = run(rank, world_size, folder, actions.split(","))
        (folder / f"report-{number}-{rank}.json").write_text(json.dumps(report))
        dist.destroy_process_group()


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # each optimizer does
    assert len(os.listdir("/proc/self/task")) == 1, "forking is safe"
    ranks = []
    for number in range(int(sys.argv[1])):
        ranks.append(os.fork())
        if not ranks[-1]:
            main(number, Path(sys.argv[2]), sys.argv[3:])
            sys.exit(0)
    for _ in ranks:
        if os.wait()[1]:
            sys.exit(1)  # the others may wait for it
