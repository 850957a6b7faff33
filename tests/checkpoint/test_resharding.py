from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from envstore.checkpoint import table
from envstore.checkpoint.apply import apply
from envstore.checkpoint.arrays import Shard as Box
from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import CheckpointError, RanksDisagreeError, StateMismatchError
from envstore.checkpoint.filling import Filler
from envstore.checkpoint.live import rng
from envstore.checkpoint.table import TensorRecord, parse_table
from envstore.errors import CorruptError
from tests.checkpoint import sharded_rank
from tests.checkpoint.memory_tree import MemoryTree

ROOT = Path(__file__).parents[2]


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world whose other ranks never answer: enough to cut tensors into shards."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


Layout = tuple[tuple[int, ...], tuple[Any, ...]]  # the mesh, and a placement for each dimension


def cut(full: torch.Tensor, layout: Layout) -> DTensor:
    mesh = init_device_mesh("cpu", layout[0])
    return distribute_tensor(full, mesh, layout[1], src_data_rank=None)


def size_of(layout: Layout) -> int:
    return torch.Size(layout[0]).numel()


def save(make: Callable[[], dict[str, Any]], world_size: int, **options: Any) -> MemoryTree:
    parts = []
    for rank in range(world_size):
        with rank_of(rank, world_size):
            parts.append(capture(make(), rank=rank, world_size=world_size, **options))
    return MemoryTree.of(*parts)


LAYOUTS: list[Layout] = [
    ((2,), (Shard(0),)),
    ((3,), (Shard(1),)),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 3), (Shard(1), Replicate())),
    ((9,), (Shard(0),)),
    ((2,), (Replicate(),)),
]


@pytest.mark.parametrize("there", LAYOUTS, ids=str)
def test_shards_go_into_any_other_shards(there: Layout) -> None:
    full = torch.arange(7 * 5 * 2, dtype=torch.float32).reshape(7, 5, 2)
    tree = save(lambda: {"x": cut(full, there)}, size_of(there))
    stored = sum(size for path, size in tree.sizes.items() if path.endswith(".safetensors"))
    assert stored < full.nbytes + size_of(there) * 200  # replicas are stored once
    whole = {"x": torch.zeros(7, 5, 2)}
    apply(whole, tree)
    assert torch.equal(whole["x"], full)
    for here in LAYOUTS:
        world_size = size_of(here)
        for rank in range(world_size):
            with rank_of(rank, world_size):
                state = {"x": cut(torch.zeros(7, 5, 2), here)}
                apply(state, tree, rank=rank, world_size=world_size)
                assert torch.equal(state["x"].to_local(), cut(full, here).to_local())


def test_rows_are_read_and_no_more() -> None:
    full = torch.randn(64, 16)
    tree = save(lambda: {"x": cut(full, ((4,), (Shard(0),)))}, 4)
    for world_size in (2, 3, 8):
        for rank in range(world_size):
            tree.wanted.clear()
            with rank_of(rank, world_size):
                state = {"x": cut(torch.zeros(64, 16), ((world_size,), (Shard(0),)))}
                apply(state, tree, rank=rank, world_size=world_size)
                assert tree.read_bytes == state["x"].to_local().nbytes


def test_a_whole_tensor_goes_into_shards_and_back() -> None:
    full = torch.randn(5, 4)
    tree = MemoryTree.of(capture({"x": full}))
    with rank_of(1, 2):
        state = {"x": cut(torch.zeros(5, 4), ((2,), (Shard(0),)))}
        apply(state, tree, rank=1, world_size=2)
        assert torch.equal(state["x"].to_local(), full[3:])


def test_a_fresh_sharded_optimizer_gets_shards() -> None:
    full = torch.randn(6, 4)

    def make(*, steps: int) -> dict[str, Any]:
        parameter = torch.nn.Parameter(cut(full, ((2,), (Shard(0),))))
        optimizer = torch.optim.AdamW([parameter])
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return {"optim": optimizer}

    tree = save(lambda: make(steps=1), 2)
    with rank_of(1, 2):
        state = make(steps=0)
        apply(state, tree, rank=1, world_size=2)
        (entry,) = state["optim"].state.values()
        assert isinstance(entry["exp_avg"], DTensor)
        assert entry["exp_avg"].placements == (Shard(0),)
        assert torch.equal(entry["exp_avg"].to_local(), torch.full((3, 4), 0.1))
        assert entry["step"].item() == 1


def test_what_is_alike_on_all_ranks_goes_to_any_number_of_them() -> None:
    tree = save(lambda: {"x": {"t": torch.ones(3), "n": 1, "w": [torch.arange(4)]}}, 2)
    for world_size in (1, 3):
        state: dict[str, Any] = {"x": {"t": torch.zeros(3), "n": 0}}
        apply(state, tree, rank=world_size - 1, world_size=world_size)
        assert state["x"]["t"].tolist() == [1, 1, 1]
        assert state["x"]["w"][0].tolist() == [0, 1, 2, 3]


def parts(states: list[dict[str, Any]], **options: Any) -> MemoryTree:
    made = [
        capture(state, rank=rank, world_size=len(states), **options)
        for rank, state in enumerate(states)
    ]
    return MemoryTree.of(*made)


@pytest.mark.parametrize(
    "states",
    [
        [{"x": {"t": torch.tensor([rank])}} for rank in range(2)],
        [{"x": {"t": torch.ones(rank + 1)}} for rank in range(2)],
        [{"x": {"at": rank}} for rank in range(2)],
        [{"x": {"at": 1}}, {}],
        [{"x": {"t": torch.ones(1)}}, {"x": {"u": torch.ones(1)}}],
        [{"x": {"o": {complex: rank}}} for rank in range(2)],
    ],
)
def test_what_differs_from_rank_to_rank_needs_as_many_ranks(states: list[dict[str, Any]]) -> None:
    tree = parts([{"y": torch.ones(2), **state} for state in states])
    here = {"x": {}, "y": torch.zeros(2)}
    with pytest.raises(StateMismatchError, match=r"x differs from rank to rank.*only="):
        apply(here, tree, trusted=True)
    assert here["y"].sum() == 0
    assert apply(here, tree, only=["y"]).items == ("y",)
    if len(states[1]) == 1:
        for rank in range(2):
            here = {"x": {}, "y": torch.zeros(2)}
            apply(here, tree, rank=rank, world_size=2, trusted=True)
            assert repr(here["x"]) == repr(states[rank]["x"])


def test_random_generators_belong_to_their_rank() -> None:
    alone = MemoryTree.of(capture({"rng": rng(), "n": 1}))
    state = {"rng": rng(), "n": 0}
    with pytest.raises(StateMismatchError, match="rng differs from rank to rank"):
        apply(state, alone, rank=0, world_size=2)
    assert apply(state, alone, rank=0, world_size=2, strict=False).items == ("n",)
    with pytest.raises(StateMismatchError, match="rng differs"):
        apply(state, parts([state, state], replicated=True))


def test_replicated_items_go_to_any_number_of_ranks() -> None:
    value = {f"t{at}": torch.full((2,), at) for at in range(9)}
    tree = parts([{"x": value | {"mine": rank}} for rank in range(3)], replicated=["x"])
    for rank, world_size in [(0, 1), (1, 2), (2, 3), (4, 5)]:
        state: dict[str, Any] = {"x": {}}
        tree.wanted.clear()
        apply(state, tree, rank=rank, world_size=world_size)
        assert all(torch.equal(state["x"][name], tensor) for name, tensor in value.items())
        assert state["x"]["mine"] == (2 if world_size == 3 else 0)
        assert tree.read_bytes == 9 * 16


@pytest.mark.parametrize("rows", [7, 8, 10])
def test_rows_dealt_out_twice_are_found_in_their_order(rows: int) -> None:
    full = torch.arange(rows * 3.0).reshape(rows, 3)
    ranks = iter(range(4))

    def make() -> dict[str, Any]:
        # Tensor parallel first, then FSDP within: the outer dimension of the mesh cuts last.
        outer, inner = divmod(next(ranks), 2)
        local = full.chunk(2)[inner].chunk(2)[outer].clone()
        placements = (_StridedShard(0, split_factor=2), Shard(0))
        mesh = init_device_mesh("cpu", (2, 2))
        made = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
        )
        return {"w": made}

    state = {"w": torch.zeros(rows, 3)}
    apply(state, save(make, 4))
    assert torch.equal(state["w"], full)


BUFFERS = {"8.running_mean", "8.running_var", "8.num_batches_tracked"}


@pytest.mark.parametrize("broadcast", [True, False])
def test_what_data_parallel_ranks_have_alike_is_stored_once(broadcast: bool) -> None:
    def make() -> dict[str, Any]:
        inner = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(8)))
        inner.append(torch.nn.BatchNorm1d(2))
        model = DistributedDataParallel(inner)
        model.broadcast_buffers = broadcast  # as an option it has another name in newer torch
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        inner(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        loose = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], momentum=0.9)
        loose.param_groups[0]["params"][0].grad = torch.ones(2)
        loose.step()
        return {"model": model, "optim": optimizer, "loose": loose}

    tree = save(make, 2)
    tables = [
        parse_table(tree.files[f"ranks/{rank:05d}/state.json"], "state.json") for rank in range(2)
    ]
    whole = table.assemble(tables)
    owners = {piece.owner for found in whole.values() for piece in found.pieces}
    assert owners == {0, 1}
    for (item, name), found in whole.items():
        buffer = item == "model" and name in BUFFERS
        own = item == "loose" or (buffer and not broadcast)
        assert found.per_rank == own, (item, name)
        if buffer and broadcast:
            assert [piece.owner for piece in found.pieces] == [0]
    assert "0.weight" in tables[0].items["model"].tensors


def test_partial_sums_are_refused() -> None:
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        state = {"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}
        with pytest.raises(CheckpointError, match="w is a partial sum"):
            capture(state, world_size=2)


def test_a_missing_rank_is_corrupt() -> None:
    tree = save(lambda: {"x": cut(torch.ones(4, 4), ((2,), (Shard(0),)))}, 2)
    del tree.files["ranks/00001/state.json"]
    with pytest.raises(CorruptError, match=r"has no ranks/00001/state\.json"):
        apply({"x": torch.zeros(4, 4)}, tree)


def test_ranks_that_saved_different_tensors_disagree() -> None:
    one = save(lambda: {"x": cut(torch.ones(4, 4), ((2,), (Shard(0),)))}, 2)
    other = save(lambda: {"x": cut(torch.ones(6, 4), ((2,), (Shard(0),)))}, 2)
    mixed = {
        path: (one if "00000" in path else other).files[path] for path in [*one.files, *other.files]
    }
    with pytest.raises(RanksDisagreeError, match=r"x/x is float32 \[4, 4\] on rank 0 and"):
        apply({"x": torch.zeros(4, 4)}, MemoryTree(mixed))


def test_all_of_a_tensor_is_found_by_assembling_tables() -> None:
    full = torch.arange(70.0).reshape(7, 10)
    tree = save(lambda: {"m": {"w": cut(full, ((2, 2), (Shard(1), Shard(0)))), "n": 1}}, 4)
    tables = [
        parse_table(tree.files[f"ranks/{rank:05d}/state.json"], "state.json") for rank in range(4)
    ]
    found = table.assemble(tables)["m", "w"]
    assert (found.dtype, found.shape, len(found.pieces)) == ("float32", (7, 10), 4)
    made = torch.zeros(7, 10)
    for piece in found.pieces:
        raw = bytearray(tree.files[piece.path][piece.start : piece.start + piece.size])
        place = tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.lengths, strict=True))
        made[place] = torch.frombuffer(raw, dtype=torch.float32).reshape(piece.lengths)
    assert torch.equal(made, full)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[tuple[int, int]]], Any]:
    """A shape, how each dimension is cut, and a box that is wanted."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    cuts, offsets, lengths = [], [], []
    for length in shape:
        ends = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))})
        cuts.append(list(itertools.pairwise(ends)))
        offsets.append(draw(st.integers(0, length - 1)))
        lengths.append(draw(st.integers(1, length - offsets[-1])))
    return shape, cuts, (tuple(offsets), tuple(lengths))


@given(grids(), st.sampled_from([torch.int16, torch.float64]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_box_is_put_together_from_any_grid(
    grid: Any, dtype: torch.dtype, transposed: bool
) -> None:
    shape, cuts, (offsets, lengths) = grid
    full = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    name = str(dtype).removeprefix("torch.")
    files, records = {}, []
    for rank, spans in enumerate(itertools.product(*cuts)):
        piece = full[tuple(slice(a, b) for a, b in spans)].contiguous()
        path = f"{rank}"
        files[path] = bytes(8) + piece.numpy().tobytes()
        at = tuple(a for a, _ in spans)
        records.append(
            TensorRecord("w", "m", name, shape, at, tuple(piece.shape), path, 8, piece.nbytes, rank)
        )
    pieces = list(table.assemble_one(records).pieces)
    local = torch.zeros(lengths[::-1] if transposed else lengths, dtype=dtype)
    if transposed:
        local = local.permute(*range(local.dim() - 1, -1, -1))
    target = Box("tensor", local, name, shape, offsets, lengths, local.nbytes)
    filler = Filler()
    filler.add(pieces, target)
    filler.read(MemoryTree(files))
    wanted = full[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(local, wanted)


def run_ranks(folder: Path, count: int, *phases: str) -> None:
    """Run the ranks of real trainings, each in a process; each writes down what it found."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.sharded_rank", str(count), str(folder), *phases],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            status = process.wait(240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that wait for one that has failed
        assert status == 0, process.stdout.read()


def test_real_ranks_save_and_other_numbers_of_ranks_restore(tmp_path: Path) -> None:
    alone = sharded_rank.build(5, sharded=False)
    torch.manual_seed(9)
    sharded_rank.train(alone, 2)
    sharded_rank.write_tree(MemoryTree.of(capture(alone, facts={"step": 2})), tmp_path / "one")
    torch.save(sharded_rank.whole(alone), tmp_path / "one.pt")

    run_ranks(tmp_path, 3, "2=save:two,exact:two,trained:two,fresh:one", "3=fresh:two,trained:one")
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("report-*.json"))]
    assert len(reports) == 5
    for report in reports:
        for action, found in report.items():
            if action != "expected":
                assert found["wrong"] == [], action
                assert found["count"] >= 30
                assert found["step"] == 2
    for report in reports[:2]:
        assert report["exact:two"]["losses"] == report["expected"]

    again = sharded_rank.build(6, sharded=False)
    tree = sharded_rank.read_tree(tmp_path / "two")
    with pytest.raises(StateMismatchError, match="rng differs from rank to rank"):
        apply(again, tree)
    apply(again, tree, only=sharded_rank.SHARED)
    wanted = torch.load(tmp_path / "two.pt")
    found = sharded_rank.whole(again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
