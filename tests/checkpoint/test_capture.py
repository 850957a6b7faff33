from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from envstore.checkpoint import dtypes, table
from envstore.checkpoint.apply import apply
from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import CheckpointError, NotFiniteError, RanksDisagreeError
from envstore.checkpoint.layout import Captured
from envstore.checkpoint.live import rng
from envstore.checkpoint.table import StateTable, TensorRecord, parse_table
from envstore.errors import CorruptError, UnsupportedFormatError, UsageError
from tests.checkpoint.memory_tree import MemoryTree

DTYPES = [
    getattr(torch, name) for name in [*dtypes._SAFETENSORS, *dtypes._OTHER] if name != "complex32"
]


def table_of(part: Captured) -> StateTable:
    return parse_table(part.files[0].pieces[0].data, "state.json")  # type: ignore[attr-defined]


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.view(-1).view(torch.uint8).tolist()) if plain.numel() else b""


def stored_bits(tree: MemoryTree, record: TensorRecord) -> bytes:
    return tree.files[record.path][record.start : record.start + record.size]


def loaded(tree: MemoryTree, item: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(tree.files[f"{item}.safetensors"])


def tied_model() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.norm = nn.BatchNorm1d(4)
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_any_loader_reads_the_file_of_an_item() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)).bfloat16()
    tree = MemoryTree.of(capture({"model": model, "step": 3}))
    found = loaded(tree, "model")
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in model.state_dict().items()
    }
    length = int.from_bytes(tree.files["model.safetensors"][:8], "little")
    head = json.loads(tree.files["model.safetensors"][8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert head["__metadata__"] == {"format": "pt"}
    assert sorted(tree.files) == ["model.safetensors", "state.json"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4)], ids=str)
def test_every_dtype_is_stored_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.tensor([(7 * at + 1) % 256 for at in range(size)], dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    tensor = raw.view(dtype).view(shape)
    part = capture({"odd": torch.ones(1, dtype=torch.uint8), "x": {"a": tensor, "b": raw}})
    tree = MemoryTree.of(part)
    record = table_of(part).items["x"].tensors["a"]
    assert (record.dtype, record.shape) == (str(dtype).removeprefix("torch."), shape)
    assert stored_bits(tree, record) == bits(tensor)
    found = loaded(tree, "x")["a"]
    assert bits(found) == bits(tensor)
    here = torch.empty(shape, dtype=dtype)
    apply({"odd": torch.zeros(1, dtype=torch.uint8), "x": {"a": here, "b": raw.clone()}}, tree)
    assert bits(here) == bits(tensor)


NUMPY = [
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.array([1.5, np.nan, -0.0], dtype="<f8"),
    np.array([b"ab", b"c"]),
    np.array(["ä", "bcd"]),
    np.array(["2026-01-01"], dtype="M8[ns]"),
    np.array([True, False]),
    np.array(3 + 4j),
    np.zeros((0, 3), dtype="f4"),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(20, dtype=np.int16)[::3],
]


@pytest.mark.parametrize("array", NUMPY, ids=lambda array: array.dtype.str + str(array.shape))
def test_arrays_are_stored_bit_by_bit(array: np.ndarray) -> None:
    part = capture({"x": {"a": array}})
    tree = MemoryTree.of(part)
    assert stored_bits(tree, table_of(part).items["x"].tensors["a"]) == array.tobytes()
    safetensors.numpy.load(tree.files["x.safetensors"])
    for here in ({}, {"a": np.zeros_like(array)}):
        state: dict[str, Any] = {"x": here}
        apply(state, tree)
        assert here["a"].dtype == array.dtype
        assert here["a"].shape == array.shape
        assert here["a"].tobytes() == array.tobytes()


def layouts() -> dict[str, torch.Tensor]:
    base = torch.arange(48, dtype=torch.float32).reshape(2, 3, 8)
    weights = torch.randn(2, 3, 4, 5)
    return {
        "transposed": base.transpose(0, 2),
        "step": base[..., ::3],
        "middle": base[1],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels_last": weights.contiguous(memory_format=torch.channels_last),
        "conjugate": torch.complex(weights, weights + 1).conj(),
        "negative": torch.complex(weights, weights + 1).conj().imag,
        "scalar": base[1, 2, 3],
        "bytes": torch.arange(3, dtype=torch.uint8),
        "after bytes": base.t() if base.dim() == 2 else base.permute(2, 0, 1),
    }


def test_views_and_other_layouts_are_stored_row_after_row() -> None:
    tensors = layouts()
    part = capture({"x": tensors})
    tree = MemoryTree.of(part)
    for name, record in table_of(part).items["x"].tensors.items():
        assert stored_bits(tree, record) == bits(tensors[name]), name
    here = {
        name: torch.zeros_like(tensor) if name != "expanded" else torch.zeros(3, 2)
        for name, tensor in tensors.items()
    }
    before = dict(here)
    apply({"x": here}, tree)
    for name, tensor in tensors.items():
        assert here[name] is before[name]
        assert bits(here[name]) == bits(tensor), name


def test_a_strided_tensor_goes_to_an_address_that_is_not_its_elements() -> None:
    tensor = torch.arange(12, dtype=torch.float64).reshape(3, 4).t()
    piece = capture({"x": tensor}).files[1].pieces[1]
    space = bytearray(piece.nbytes + 9)
    for at in range(9):
        piece.copy_into(memoryview(space)[at : at + piece.nbytes])
        assert bytes(space[at : at + piece.nbytes]) == bits(tensor)


def test_every_tensor_is_aligned_and_large_ones_well() -> None:
    sizes = [(3, torch.int16), (16, torch.float32), (5, torch.uint8), (7, torch.float64)]
    value = [torch.zeros(count, dtype=dtype) for count, dtype in sizes * 3]
    records = table_of(capture({"x": value})).items["x"].tensors.values()
    assert [record.name for record in records] == [str(at) for at in range(12)]
    for record in records:
        assert record.start % (64 if record.size % 64 == 0 else 1) == 0
        assert record.start % dtypes.item_size(record.dtype) == 0


@pytest.mark.parametrize("share", [1, 1000, 4097, 1 << 22])
@pytest.mark.parametrize("pool", [True, False])
def test_long_tensors_are_copied_in_shares(
    share: int, pool: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.checkpoint.copying.SHARE", share)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    if not pool:
        ended = ThreadPoolExecutor()
        ended.shutdown()
        monkeypatch.setattr("envstore.checkpoint.copying._pool", lambda: ended)
    tensor = torch.randint(0, 256, (9001,), dtype=torch.uint8)
    for length in (1, 4, 5, 6, 9001):
        piece = capture({"x": tensor[:length]}).files[1].pieces[1]
        space = bytearray(length + 2)
        piece.copy_into(memoryview(space)[1:-1])
        assert bytes(space) == b"\0" + bits(tensor[:length]) + b"\0"


def test_tied_weights_are_stored_once_under_both_names() -> None:
    model = tied_model()
    part = capture({"model": model})
    item = table_of(part).items["model"]
    assert item.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in loaded(MemoryTree.of(part), "model")
    other = tied_model()
    apply({"model": other}, MemoryTree.of(part))
    assert other.head.weight is other.embed.weight
    assert bits(other.head.weight) == bits(model.embed.weight)
    loose = tied_model()
    loose.head.weight = nn.Parameter(torch.zeros(5, 4))
    apply({"model": loose}, MemoryTree.of(part))
    assert bits(loose.head.weight) == bits(loose.embed.weight) == bits(model.embed.weight)


def test_only_what_an_optimizer_alone_changes_is_stable() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    trained = [*model[0].parameters(), *model[1].parameters()]
    optimizer = torch.optim.Adam(trained, lr=torch.tensor(1e-3))
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = {"model": model, "optim": optimizer, "rng": rng(), "x": torch.ones(2), "n": np.ones(2)}
    part = capture(state)
    flags: dict[str, bool] = {}
    starts = {
        (record.path, record.start): f"{record.item}/{record.name}"
        for record in table_of(part).tensors
    }
    for file in part.files:
        at = 0
        for piece in file.pieces:
            if (file.path, at) in starts:
                flags[starts[file.path, at]] = piece.stable
            at += piece.nbytes
    assert {name for name, stable in flags.items() if stable} == {
        *(f"model/{at}.{name}" for at in (0, 1) for name in ("weight", "bias")),
        *(
            f"optim/state.{at}.{name}"
            for at in range(4)
            for name in ("step", "exp_avg", "exp_avg_sq")
        ),
    }
    assert len(flags) > 20
    alone = capture({"model": model})
    assert not any(piece.stable for piece in alone.files[1].pieces[1:])


def test_names_that_safetensors_cannot_hold_are_changed_and_come_back() -> None:
    value = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        1: torch.tensor(3),
        "1": torch.tensor(4),
        "__metadata__": torch.tensor(5),
        "\ud800": torch.tensor(6),
        "": torch.tensor(7),
        "ü/..": torch.tensor(8),
        "n" * 9000: torch.tensor(9),
        ("tuple",): torch.tensor(10),
    }
    names = ["w", "../up", "a/b", ".hidden", "ä ü", "\udc80", "state"]
    tree = MemoryTree.of(capture(dict.fromkeys(names, value) | {"t": torch.tensor(11)}))
    for path, content in tree.files.items():
        assert ".." not in path.split("/")
        assert not path.startswith(("/", "."))
        if path.endswith(".safetensors"):
            found = safetensors.torch.load(content)
            assert len(found) == (1 if path == "t.safetensors" else 10)
    here: dict[str, Any] = {}
    apply(here, tree)
    assert here == dict.fromkeys(names, value) | {"t": torch.tensor(11)}
    assert list(here["w"]) == list(value)


def test_generators_and_objects_are_told_apart() -> None:
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    part = capture({"rng": rng(), "meta": {"when": when, "sparse": torch.eye(2).to_sparse()}})
    assert [file.path for file in part.files] == [
        "state.json",
        "rng.safetensors",
        "objects/meta.0.pickle",
        "objects/meta.1.pickle",
    ]


def test_facts_and_values_are_written_down() -> None:
    found = table_of(capture({"step": 4}, facts={"step": 4, "metrics": {"loss": float("inf")}}))
    assert found.facts == {"step": 4, "metrics": {"loss": float("inf")}}
    with pytest.raises(CheckpointError, match=r"facts\.x is a builtins\.object"):
        capture({}, facts={"x": object()})


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"m": nn.Linear(1, 1, device="meta")}, "m/weight is on the meta device"),
        ({"m": nn.LazyLinear(1)}, "m/weight has no shape yet"),
        ({"m": {"f": lambda: 1}}, "m/f is a builtins.function, which cannot be saved"),
        ({"m": {torch.ones(1): 1}}, "m/Tensor has a tensor as a key|m has a tensor as a key"),
        ({"m": {"x": {1: [nn]}}}, "m/x.1.0 is a builtins.module, which cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_named(state: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        capture(state)


@pytest.mark.parametrize("name", [1, "", "x" * 200])
def test_items_need_usable_names(name: Any) -> None:
    with pytest.raises(UsageError, match="cannot name an item"):
        capture({name: 1})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
)
def test_tensors_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    large = torch.tensor([torch.finfo(dtype).max] * 64, dtype=torch.float64).to(dtype)
    bad = torch.ones(64)
    bad[7] = float("nan")
    state = {
        "x": {"large": large, "bad": bad.to(dtype), "int": torch.ones(3, dtype=torch.int8)},
        "z": torch.tensor([1j, complex(0, float("inf"))]),
        "n": np.array([1.0, -np.inf]),
        "m": np.array(["a"]),
        "empty": torch.zeros(0),
    }
    assert "not_finite" not in table_of(capture(state)).facts
    facts = table_of(capture(state, check_finite="record")).facts
    assert facts["not_finite"] == ["x/bad", "z/z", "n/n"]
    with pytest.raises(NotFiniteError, match="3 tensors hold NaN or infinity: x/bad, z/z, n/n"):
        capture(state, check_finite="refuse")
    assert table_of(capture({"x": large}, check_finite="refuse")).facts == {"not_finite": []}
    with pytest.raises(UsageError, match="check_finite"):
        capture(state, check_finite="maybe")  # type: ignore[arg-type]


def parts(states: list[dict[str, Any]], **options: Any) -> list[Captured]:
    return [
        capture(state, rank=rank, world_size=len(states), **options)
        for rank, state in enumerate(states)
    ]


def test_replicated_tensors_are_stored_by_one_rank_each() -> None:
    state = {"model": {f"w{at}": torch.full((3,), at) for at in range(20)}, "rng": rng()}
    for replicated in (["model"], True):
        made = parts([state] * 3, replicated=replicated)
        tree = MemoryTree.of(*made)
        for rank, part in enumerate(made):
            found = table_of(part)
            assert found.rank == rank
            for name, record in found.items["model"].tensors.items():
                owner = zlib.crc32(f"model/{name}".encode()) % 3
                assert (record.owner, record.stored) == (owner, owner == rank)
            assert all(record.per_rank for record in found.items["rng"].tensors.values())
        whole = table.assemble(table_of(part) for part in made)
        assert all(
            len(found.pieces) == (3 if item == "rng" else 1) for (item, _), found in whole.items()
        )
        assert sum(len(tree.files[f"ranks/0000{r}/model.safetensors"]) for r in range(3)) < 3000


def test_replicated_names_must_be_items() -> None:
    part = capture({"model": torch.ones(1)}, rank=0, world_size=2, replicated="model")
    assert not table_of(part).tensors[0].per_rank
    with pytest.raises(UsageError, match="replicated names 'modle'"):
        capture({"model": 1}, replicated=["modle"])


def test_values_that_no_reader_would_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.checkpoint.encoding.MAX_JSON", 1000)
    with pytest.raises(CheckpointError, match="bytes of JSON, more than 1000"):
        capture({"x": list(range(500))})


def test_tensors_of_each_rank_stay_its_own() -> None:
    made = parts([{"x": torch.tensor([rank, 1])} for rank in range(2)])
    whole = table.assemble(table_of(part) for part in reversed(made))
    assert whole["x", "x"].per_rank
    assert [piece.owner for piece in whole["x", "x"].pieces] == [0, 1]


def boxes(shape: tuple[int, ...], *placed: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Any]:
    return [
        TensorRecord("w", "m", "float32", shape, offsets, lengths, "f", 8, 4, rank)
        for rank, (offsets, lengths) in enumerate(placed)
    ]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (boxes((4, 4), ((0, 0), (2, 4))), "m/w has gaps: its ranks store 8 of 16"),
        (boxes((4, 4), ((0, 0), (2, 4)), ((1, 0), (2, 4))), "stored twice in part"),
        (boxes((4,), ((0,), (4,)), ((0,), (4,))), "stored twice in part"),
        (boxes((4,), ((0,), (2,)), ((1,), (2,)), ((3,), (1,))), "has gaps|stored twice"),
        (boxes((), ((), ()), ((), ())), "stored twice"),
        (
            [*boxes((4,), ((0,), (4,))), *boxes((5,), ((0,), (5,)))],
            r"m/w is float32 \[4\] on rank 0 and float32 \[5\]",
        ),
        (
            [TensorRecord("w", "m", "float32", (4,), (0,), (4,), "", -1, 0, 1)],
            "m/w is left to rank 1, which did not store it",
        ),
    ],
)
def test_ranks_that_do_not_fit_together_are_named(records: list[Any], words: str) -> None:
    with pytest.raises(RanksDisagreeError, match=words):
        table.assemble_one(records)


def test_a_missing_rank_is_named() -> None:
    made = [table_of(part) for part in parts([{"x": torch.ones(1)}] * 3)]
    for wrong in (made[:2], made[1:], [made[0], made[0], made[2]]):
        with pytest.raises(RanksDisagreeError, match="the part of rank"):
            table.assemble(wrong)
    other = table_of(capture({"x": torch.ones(1)}, rank=1, world_size=2))
    with pytest.raises(RanksDisagreeError, match="one of 2 ranks"):
        table.assemble([made[0], other, made[2]])


def example() -> dict[str, Any]:
    part = capture(
        {"m": tied_model(), "t": (1, torch.ones(2)), "when": datetime.date(2026, 1, 1)},
        facts={"step": 1},
    )
    found: dict[str, Any] = json.loads(part.files[0].pieces[0].data)  # type: ignore[attr-defined]
    return found


ROW = ["items", 0, "tensors", 0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], 0),
        (["format"], "1"),
        (["rank"], 1),
        (["rank"], -1),
        (["world_size"], 0),
        (["world_size"], 1 << 40),
        (["facts"], [1]),
        (["facts"], {"$": "tensor", "n": "x"}),
        (["items"], {}),
        (["items", 0], 1),
        (["items", 0, "name"], "t"),
        (["items", 0, "name"], ""),
        (["items", 0, "name"], ["m"]),
        (["items", 0, "name"], "x" * 500),
        (["items", 0, "kind"], None),
        (["items", 0, "size"], 10),
        (["items", 0, "size"], 1 << 61),
        (["items", 0, "size"], True),
        (["items", 0, "objects"], 1 << 40),
        (["items", 0, "objects"], None),
        (["items", 0, "aliases"], {"x": "nothing"}),
        (["items", 0, "aliases"], {"embed.weight": "embed.weight"}),
        (["items", 0, "tensors"], None),
        (ROW, []),
        (ROW, ["a", "float32", [1], 8, {}, {}]),
        ([*ROW, 0], 5),
        ([*ROW, 0], "norm.weight"),
        ([*ROW, 0], "x" * 5000),
        ([*ROW, 1], "float31"),
        ([*ROW, 1], "numpy:O"),
        ([*ROW, 1], ["float32"]),
        ([*ROW, 2], [1] * 100),
        ([*ROW, 2], [-1]),
        ([*ROW, 2], [1.0]),
        ([*ROW, 2], [1 << 59, 1 << 59]),
        ([*ROW, 2], [1 << 40]),
        ([*ROW, 3], -1),
        ([*ROW, 3], 0),
        ([*ROW, 3], 1 << 50),
        (ROW, ["a", "float32", [4], 8, {"offsets": [1], "lengths": [4]}]),
        (ROW, ["a", "float32", [4], 8, {"offsets": [], "lengths": [1]}]),
        (ROW, ["a", "float32", [4], 8, {"lengths": [1]}]),
        (ROW, ["a", "float32", [4], -1, {"owner": 0}]),
        (ROW, ["a", "float32", [4], -1, {"owner": 7}]),
        (ROW, ["a", "float32", [4], 8, 3]),
    ],
)
def test_a_table_nobody_wrote_is_corrupt(path: list[Any], value: Any) -> None:
    body = example()
    parse_table(json.dumps(body).encode(), "state.json")
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(CorruptError, match=r"state\.json "):
        parse_table(json.dumps(body).encode(), "state.json")


def test_a_table_of_a_newer_format_says_so() -> None:
    with pytest.raises(UnsupportedFormatError, match="newer than 1"):
        parse_table(json.dumps(example() | {"format": 2}).encode(), "state.json")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_table_never_does_anything_else(data: st.DataObject) -> None:
    whole = bytearray(json.dumps(example()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(CorruptError, UnsupportedFormatError):
        parse_table(bytes(whole), "state.json")


PLAIN = """
import sys
from envstore.checkpoint.apply import apply
from envstore.checkpoint.capture import capture
from envstore.checkpoint.live import rng
from tests.checkpoint.memory_tree import MemoryTree
state = {"step": 3, "rng": rng(), "log": {"losses": [1.5]}}
tree = MemoryTree.of(capture(state, check_finite="refuse"))
state["step"] = 4
apply(state, tree)
assert state["step"] == 3
assert not {"torch", "numpy"} & sys.modules.keys()
"""


def test_plain_states_need_neither_torch_nor_numpy() -> None:
    subprocess.run([sys.executable, "-c", PLAIN], cwd=Path(__file__).parents[2], check=True)


def test_capture_copies_nothing_and_draws_no_random_number() -> None:
    state = {"x": torch.zeros(4), "rng": rng(), "o": OrderedDict(a=1)}
    before = torch.get_rng_state()
    part = capture(state)
    state["x"] += 1
    assert loaded(MemoryTree.of(part), "x")["x"].tolist() == [1, 1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
