from __future__ import annotations

import datetime
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from envstore.checkpoint.apply import Applied, apply
from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import CheckpointError, StateMismatchError, UntrustedObjectError
from envstore.checkpoint.live import rng
from envstore.errors import CorruptError, UsageError
from tests.checkpoint.memory_tree import MemoryTree


def saved(state: dict[str, Any], **facts: Any) -> MemoryTree:
    return MemoryTree.of(capture(state, facts=facts))


class Loader:
    """A shuffled loader that can stop in the middle of an epoch, as StatefulDataLoader can."""

    def __init__(self, data: torch.Tensor, seed: int) -> None:
        self.data = data
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.at = 0

    def __next__(self) -> torch.Tensor:
        batch = self.data[self.order[self.at : self.at + 4]]
        self.at = (self.at + 4) % len(self.data)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = state["order"], state["at"]


class Text(nn.Module):
    """A small transformer with tied embeddings, dropout, a batch norm and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.seen = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden = self.block(self.embed(tokens))
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "history": [torch.tensor(self.seen)]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["history"][0].item() == state["seen"]
        self.seen = state["seen"]


Optimizers = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
}


def begin(seed: int, make: Optimizers) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = Text()
    optimizer = make(model.parameters())
    tokens = torch.randint(0, 11, (12, 6), generator=torch.Generator().manual_seed(1))
    return {
        "model": model,
        "optim": optimizer,
        "sched": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "scaler": torch.amp.GradScaler("cpu"),
        "loader": Loader(tokens, seed),
        "rng": rng(),
        "step": 0,
        "log": {"losses": [], "best": None},
    }


def train(state: dict[str, Any], steps: int) -> list[float]:
    losses = []
    model, optimizer, scaler = state["model"], state["optim"], state["scaler"]
    for _ in range(steps):
        batch = next(state["loader"])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())
        loss = loss * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        state["sched"].step()
        state["step"] += 1
        losses.append(loss.item())
    state["log"]["losses"] += losses
    return losses


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_restored_training_goes_on_with_the_same_losses(name: str) -> None:
    first = begin(1, OPTIMIZERS[name])
    train(first, 3)
    tree = saved(first, step=first["step"])
    expected = train(first, 4)
    for steps in (0, 2):  # a fresh optimizer, and one that has a state already
        again = begin(2, OPTIMIZERS[name])
        train(again, steps)
        before = {id(parameter) for parameter in again["model"].parameters()}
        moments = [
            value
            for entry in again["optim"].state.values()
            for value in entry.values()
            if torch.is_tensor(value)
        ]
        log = again["log"]
        applied = apply(again, tree)
        assert (applied.step, again["step"], again["model"].seen) == (3, 3, 3)
        assert {id(parameter) for parameter in again["model"].parameters()} == before
        assert again["model"].head.weight is again["model"].embed.weight
        kept = [value for entry in again["optim"].state.values() for value in entry.values()]
        assert {id(value) for value in moments} <= {id(value) for value in kept}
        assert again["log"] is log
        assert train(again, 4) == expected
        assert log == first["log"]


def test_an_optimizer_with_lists_of_tensors_goes_on() -> None:
    def step(model: nn.Module, optim: torch.optim.Optimizer) -> float:
        def closure() -> torch.Tensor:
            optim.zero_grad()
            loss = (model(torch.arange(6.0).reshape(3, 2)) - 1).pow(2).sum()
            loss.backward()
            return loss

        return optim.step(closure).item()  # type: ignore[arg-type]

    states = []
    for steps in (2, 0, 3):
        model = linear(2, 3, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=2)
        for _ in range(steps):
            step(model, optimizer)
        states.append({"model": model, "optim": optimizer})
    tree = saved(states[0])
    expected = [step(**states[0]) for _ in range(3)]
    for state in states[1:]:
        apply(state, tree)
        assert [step(**state) for _ in range(3)] == expected


def test_what_is_read_is_what_is_stored() -> None:
    state = begin(1, OPTIMIZERS["AdamW"])
    train(state, 1)
    tree = saved(state)
    applied = apply(begin(2, OPTIMIZERS["AdamW"]), tree)
    stored = sum(size for path, size in tree.sizes.items() if path.endswith(".safetensors"))
    assert applied.bytes == tree.read_bytes
    assert stored - 15_000 < applied.bytes < stored  # without the headers
    assert applied.items == (
        "model", "optim", "sched", "scaler", "loader", "step", "log", "rng",
    )  # fmt: skip


def test_only_the_wanted_items_and_tensors_are_touched_and_read() -> None:
    state = begin(1, OPTIMIZERS["AdamW"])
    train(state, 2)
    tree = saved(state, step=2)
    other = begin(2, OPTIMIZERS["AdamW"])
    assert apply(other, tree, only=["model"]).items == ("model",)
    weights = sum(p.nbytes for p in state["model"].parameters())
    assert tree.read_bytes <= 1.02 * weights + 150  # the buffers
    assert {path for path, _, _ in tree.wanted} == {"model.safetensors"}
    assert other["step"] == 0
    assert not other["optim"].state

    third = begin(3, OPTIMIZERS["AdamW"])
    before = third["model"].block.linear2.weight.clone()
    tree.wanted.clear()
    apply(third, tree, only=["model/block.linear1.*", "model/head.weight", "step"])
    assert torch.equal(third["model"].block.linear1.weight, state["model"].block.linear1.weight)
    assert torch.equal(third["model"].embed.weight, state["model"].embed.weight)
    assert torch.equal(third["model"].block.linear2.weight, before)
    assert third["model"].seen == 0
    assert third["step"] == 2
    assert tree.read_bytes == 4 * (16 * 8 + 16 + 11 * 8)


def test_tensors_of_nested_mappings_can_be_picked() -> None:
    tree = saved({"x": {"a": torch.ones(2), "b": [torch.ones(3), 5], "n": 1}})
    state = {"x": {"a": torch.zeros(2), "b": [torch.zeros(3), 6], "n": 2, "mine": 3}}
    apply(state, tree, only=["x/b.*"])
    assert state["x"]["a"].sum() == 0
    assert state["x"]["b"][0].sum() == 3
    assert state["x"]["b"][1] == 6
    assert (state["x"]["n"], state["x"]["mine"]) == (2, 3)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (["modle"], "no item 'modle' .it has model, optim"),
        (["model/nothing.*"], "the checkpoint has no tensor model/nothing"),
        (["optim/state.0.*"], "optim cannot be restored in part: it is torch.optim.adamw.AdamW"),
    ],
)
def test_what_cannot_be_picked_is_named(only: list[str], words: str) -> None:
    state = begin(1, OPTIMIZERS["AdamW"])
    train(state, 1)
    tree = saved(state)
    with pytest.raises((UsageError, StateMismatchError), match=words):
        apply(begin(1, OPTIMIZERS["AdamW"]), tree, only=only)
    assert not tree.wanted


def linear(*sizes: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    layers = [nn.Linear(a, b, bias, dtype=dtype) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


def adam(model: nn.Module, *, steps: int = 0, groups: int = 1) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    lists = [{"params": parameters[at::groups]} for at in range(groups)]
    optimizer = torch.optim.Adam(lists)
    for _ in range(steps):
        model(torch.ones(1, parameters[0].shape[1], dtype=parameters[0].dtype)).sum().backward()
        optimizer.step()
    return optimizer


T = torch.ones
BASE = linear(2, 3)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (
            {"m": linear(4, 4, 2, 2)},
            {"m": linear(4, 4, 2, 2, dtype=torch.bfloat16)},
            r"6 differ: m/0.weight is bfloat16 \[4, 4\] here and float32 \[4, 4\] in the "
            r"checkpoint, .*m/1.bias.*, \.\.\.",
        ),
        ({"m": linear(2, 2)}, {"m": linear(2, 3)}, r"m/0.weight is float32 \[3, 2\] here"),
        ({"m": linear(2, 2, 2)}, {"m": linear(2, 2)}, "2 are only in the checkpoint: m/1.weight"),
        ({"m": linear(2, 2)}, {"m": linear(2, 2, 2)}, "2 are not in the checkpoint: m/1.weight"),
        ({"a": 1}, {"a": 1, "b": 2, "c": 3}, "2 are not in the checkpoint: b, c"),
        ({"a": {"x": 1}}, {"a": {"x": 1, "y": {}, "z": 1}}, "checkpoint: a/y, a/z"),
        ({"m": linear(2, 2)}, {"a": 1}, "m is the state of torch.nn.*Sequential, which is mis"),
        ({"m": linear(2, 2)}, {"m": 1}, "m is the state of torch.nn.*, which is int here"),
        ({"m": 1}, {"m": linear(2, 2)}, "m is torch.nn.*Sequential here and int in the che"),
        ({"m": 1}, {"m": T(1)}, "m is torch.Tensor here and int in the checkpoint"),
        ({"m": {"a": [1, 2]}}, {"m": {"a": [T(1)]}}, "m/a is list here and list in the"),
        ({"m": T(1)}, {"m": "text"}, r"m is str here and float32 \[1\] in the checkpoint"),
        ({"m": T(2)}, {"m": np.ones(2)}, r"m is float64 \[2\] here and float32 \[2\] in"),
        ({"m": np.ones(2)}, {"m": np.ones(2, ">f8")}, r"m is numpy:>f8 \[2\] here and float64"),
        (
            {"o": adam(linear(2, 2))},
            {"o": adam(linear(2, 2, 2))},
            r"groups of \[4\] parameters here and of \[2\] in",
        ),
        (
            {"o": adam(linear(2, 2), groups=2)},
            {"o": adam(linear(2, 2))},
            r"groups of \[2\] parameters here and of \[1, 1\] in",
        ),
        (
            {"o": adam(linear(2, 3), steps=1)},
            {"o": adam(linear(2, 4), steps=1)},
            r"o/state.0.exp_avg is float32 \[4, 2\] here and float32 \[3, 2\] in",
        ),
        (
            {"x": {"a": T(2), "b": 2 * T(2)}},
            {"x": dict.fromkeys("ab", T(2))},
            "x/b and x/a are one tensor here and two in the checkpoint",
        ),
        ({"m": linear(2, 2)}, {"m": linear(2, 2).to("meta")}, "m/0.weight is on the meta device"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_touched(
    there: dict[str, Any], here: dict[str, Any], words: str
) -> None:
    tree = saved({"first": torch.ones(3), "value": 1, **there})
    state = {"first": torch.zeros(3), "value": 0, **here}
    with pytest.raises(CheckpointError, match=words):
        apply(state, tree)
    assert not tree.wanted
    assert state["first"].sum() == 0
    assert state["value"] == 0


def test_read_only_arrays_are_named() -> None:
    tree = saved({"a": np.ones(3)})
    here = np.zeros(3)
    here.flags.writeable = False
    with pytest.raises(StateMismatchError, match="a is a read-only array"):
        apply({"a": here}, tree)


def test_without_strict_what_both_have_is_restored() -> None:
    model, other = linear(2, 2, 2), linear(2, 2)
    tree = saved({"m": model, "gone": 1, "x": {"a": 1, "b": 2}})
    state: dict[str, Any] = {"m": other, "new": 5, "x": {"a": 0, "mine": 3}}
    with pytest.raises(StateMismatchError, match="only in the checkpoint"):
        apply(dict(state), tree)
    state["m"] = linear(2, 2, 2, 2)
    applied = apply(state, tree, strict=False)
    assert applied.items == ("m", "x")
    assert torch.equal(state["m"][1].weight, model[1].weight)
    assert state == {"m": state["m"], "new": 5, "x": {"a": 1, "b": 2, "mine": 3}}
    assert "gone" not in state


def test_pickled_objects_need_trust_and_nothing_is_touched_without() -> None:
    when = datetime.date(2026, 2, 3)
    tree = saved({"first": T(2), "log": {"when": [when], "queue": deque([1, 2], 3)}})
    state: dict[str, Any] = {"first": torch.zeros(2), "log": {}}
    with pytest.raises(
        UntrustedObjectError, match=r"log/when\.0 is a pickled object.*trusted=True"
    ):
        apply(state, tree)
    assert state["first"].sum() == 0
    assert not tree.wanted
    apply(state, tree, trusted=True)
    assert state["log"] == {"when": [when], "queue": deque([1, 2], 3)}
    assert apply({"first": torch.zeros(2)}, tree, only=["first"]).items == ("first",)


def test_an_object_that_cannot_be_unpickled_is_named() -> None:
    tree = saved({"when": datetime.date(2026, 2, 3)})
    tree.files["objects/when.0.pickle"] = b"\x80\x05cnowhere\nX\n."
    with pytest.raises(CheckpointError, match="when cannot be unpickled here: ModuleNotFound"):
        apply({"when": None}, tree, trusted=True)


def test_new_keys_are_added_and_containers_stay_the_same_objects() -> None:
    value = {"t": T(2), "deep": {"n": np.arange(3), 5: (T(1), None)}, "list": [1, T(3)]}
    tree = saved({"x": value, "y": T(4)})
    inner: dict[str, Any] = {"deep": {}, "list": [0]}
    state: dict[str, Any] = {"x": inner}
    deep, listed = inner["deep"], inner["list"]
    apply(state, tree)
    assert state["x"] is inner
    assert inner["deep"] is deep
    assert inner["list"] is listed
    assert torch.equal(inner["t"], T(2))
    assert deep["n"].tolist() == [0, 1, 2]
    assert torch.equal(deep[5][0], T(1))
    assert listed[0] == 1
    assert torch.equal(listed[1], T(3))
    assert torch.equal(state["y"], T(4))


def test_objects_inside_mappings_and_lists_are_restored() -> None:
    def make() -> dict[str, Any]:
        models = {"g": linear(2, 2), "d": [linear(3, 3), linear(1, 1)]}
        return {"models": models, "optims": (adam(models["g"], steps=2), adam(linear(4, 4)))}

    first, second = make(), make()
    apply(second, saved(first))
    assert torch.equal(second["models"]["d"][1][0].weight, first["models"]["d"][1][0].weight)
    for a, b in zip(
        first["optims"][0].state.values(), second["optims"][0].state.values(), strict=True
    ):
        assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_tensors_shared_by_items_are_restored_once() -> None:
    model = linear(2, 2)
    tree = saved({"model": model, "views": list(model.parameters())})
    other = linear(2, 2)
    apply({"model": other, "views": list(other.parameters())}, tree)
    assert torch.equal(other[0].weight, model[0].weight)
    assert tree.read_bytes == 4 * 6
    apart: dict[str, Any] = {"model": linear(2, 2), "views": [torch.zeros(2, 2), torch.zeros(2)]}
    apply(apart, tree)
    assert torch.equal(apart["views"][0], model[0].weight)
    loose = saved({"model": linear(2, 2), "views": [T(2, 2), T(2)]})
    with pytest.raises(
        StateMismatchError, match=r"views/0 and model/0\.weight are one tensor here"
    ):
        apply({"model": other, "views": list(other.parameters())}, loose)


def test_tensors_that_are_not_dense_are_filled_through_scratch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("envstore.checkpoint.filling.SCRATCH_AT_ONCE", 100)
    values = {f"t{at}": torch.arange(24.0).reshape(4, 6) + at for at in range(5)}
    values["conj"] = torch.complex(T(3, 2), 2 * T(3, 2))
    tree = saved({"x": values})
    here = {name: torch.zeros(6, 4).t() for name in values if name != "conj"}
    here["t1"] = torch.zeros(4, 12)[:, ::2]
    here["conj"] = torch.zeros(3, 2, dtype=torch.complex64).conj()
    kept = dict(here)
    apply({"x": here}, tree)
    for name, value in values.items():
        assert here[name] is kept[name]
        assert torch.equal(here[name], value), name
    assert tree.read_bytes == sum(value.nbytes for value in values.values())


def test_compiled_modules_go_by_the_names_of_the_plain_one() -> None:
    model = linear(2, 2)
    tree = saved({"model": torch.compile(model, backend="eager")})
    other = linear(2, 2)
    apply({"model": other}, tree)
    assert torch.equal(other[0].weight, model[0].weight)
    again = linear(2, 2)
    apply({"model": torch.compile(again, backend="eager")}, tree)
    assert torch.equal(again[0].weight, model[0].weight)


def test_hooks_and_versions_of_modules_are_served() -> None:
    seen: list[Any] = []
    model, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.register_load_state_dict_pre_hook(
        lambda module, state, prefix, local, *rest: seen.append(local.get("version"))
    )
    apply({"model": other}, saved({"model": model}))
    assert seen == [2]


def test_nan_payloads_survive() -> None:
    raw = torch.tensor([0x7FC00001, 0x7F800001, -1, -(1 << 31)], dtype=torch.int32)
    tree = saved({"x": raw.view(torch.float32)})
    state = {"x": torch.zeros(4)}
    apply(state, tree)
    assert torch.equal(state["x"].view(torch.int32), raw)


def test_all_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        return [random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()]

    draw()
    tree = saved({"rng": rng()})
    expected = draw()
    apply({"rng": rng()}, tree)
    assert draw() == expected


def test_single_generators_go_on_where_they_were() -> None:
    def make(seed: int) -> dict[str, Any]:
        return {
            "python": random.Random(seed),
            "numpy": np.random.default_rng(seed),
            "old": np.random.Generator(np.random.MT19937(seed)),
            "nested": [torch.Generator().manual_seed(seed)],
        }

    def draw(state: dict[str, Any]) -> list[Any]:
        return [
            state["python"].gauss(0, 1),
            state["numpy"].normal(),
            state["old"].integers(1 << 40),
            torch.randn(3, generator=state["nested"][0]).tolist(),
        ]

    first, second = make(1), make(2)
    draw(first)
    tree = saved(first)
    assert not any(path.startswith("objects") for path in tree.files)
    apply(second, tree)
    assert draw(second) == draw(first)


def test_a_module_takes_a_plain_state_and_a_mapping_takes_a_modules() -> None:
    model, other = linear(2, 3), linear(2, 3)
    apply({"m": other}, saved({"m": model.state_dict()}))
    assert torch.equal(other[0].weight, model[0].weight)
    tree = saved({"m": model})
    plain: dict[str, Any] = {"m": {}}
    apply(plain, tree)
    assert torch.equal(plain["m"]["0.weight"], model[0].weight)
    apply({"m": linear(2, 3).state_dict()}, tree)
    with pytest.raises(StateMismatchError, match=r"m is the state of torch.*, which is missing"):
        apply({}, tree)


def test_a_step_that_is_no_number_is_none() -> None:
    assert apply({}, saved({}, step="x")) == Applied(None, (), 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop("state.json"), "has no state.json"),
        (lambda files: files.update({"state.json": b"{"}), "state.json is not valid JSON"),
        (lambda files: files.pop("x.safetensors"), "x.safetensors is not as long as"),
        (lambda files: files.update({"x.safetensors": b"short"}), "x.safetensors is not as long"),
        (lambda files: files.pop("objects/x.0.pickle"), "has no objects/x.0.pickle"),
    ],
)
def test_damaged_trees_are_corrupt(change: Callable[[Any], Any], words: str) -> None:
    tree = saved({"x": {"t": T(3), "when": datetime.date(2026, 1, 1)}})
    change(tree.files)
    with pytest.raises(CorruptError, match=words):
        apply({"x": {"t": T(3)}}, tree, trusted=True)


@pytest.mark.parametrize(
    "value",
    [
        {"$": "tensor", "n": "other"},
        {"$": "object", "n": 0},
        {"$": "object", "n": -1},
        {"$": "array", "n": "t"},
        {"$": "stateful", "v": 1},
        {"$": "unheard of"},
    ],
)
def test_references_to_nothing_are_corrupt(value: Any) -> None:
    tree = saved({"x": {"t": T(3).bfloat16()}})
    body = json.loads(tree.files["state.json"])
    body["items"][0]["value"]["t"] = value
    tree.files["state.json"] = json.dumps(body).encode()
    with pytest.raises(CorruptError, match="x"):
        apply({}, tree, trusted=True)


def test_a_huge_shape_without_bytes_allocates_nothing() -> None:
    tree = saved({"x": {"t": T(3)}})
    body = json.loads(tree.files["state.json"])
    row = body["items"][0]["tensors"][0]
    row[2] = [1 << 40]
    row.append({"offsets": [0], "lengths": [3]})
    tree.files["state.json"] = json.dumps(body).encode()
    with pytest.raises(CheckpointError, match="x/t has gaps"):
        apply({}, tree)


def test_a_state_that_takes_no_values_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot take values"):
        apply(OrderedDict().items(), saved({}))  # type: ignore[arg-type]


def test_arrays_that_are_saved_as_objects_come_back_where_such_arrays_are() -> None:
    def made(value: float) -> dict[str, Any]:
        records = np.full(3, value, dtype=[("x", "f4"), ("y", "i8")])
        return {
            "log": {"records": records, "nested": [np.array([{"a": value}], dtype=object)]},
            "plain": np.full(2, value),
        }

    state = made(0.0)
    apply(state, saved(made(7.0)), trusted=True)
    assert state["log"]["records"].tolist() == [(7.0, 7)] * 3
    assert state["log"]["nested"][0].tolist() == [{"a": 7.0}]
    assert state["plain"].tolist() == [7.0, 7.0]
    with pytest.raises(UntrustedObjectError):
        apply(made(0.0), saved(made(7.0)))
