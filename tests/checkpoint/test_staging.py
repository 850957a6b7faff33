"""Copying states into slots: at once, while training goes on, and in waves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load

from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import CheckpointError, SlotSpaceError
from envstore.checkpoint.layout import Captured, CapturedFile, CheckpointId, Orders, RunName
from envstore.checkpoint.overlap import StepGate
from envstore.checkpoint.slots import SlotDirectory, SlotTree, StagedSlot, slot_directory
from envstore.checkpoint.staging import Stager
from tests.checkpoint import slotfill

PATIENCE = 60


@dataclass
class Heard:
    """A listener that remembers what it is told."""

    said: list[tuple[Any, ...]] = field(default_factory=list)
    error: Exception | None = None
    on_wave: Callable[[int, int], None] | None = None

    def writing(self, slot: int, checkpoint: CheckpointId) -> None:
        self.said.append(("writing", slot, checkpoint.step))

    def wave(self, slot: int, checkpoint: CheckpointId, wave: int) -> None:
        self.said.append(("wave", slot, checkpoint.step, wave))
        if self.on_wave is not None:
            self.on_wave(slot, wave)

    def staged(self, slot: int, checkpoint: CheckpointId) -> None:
        self.said.append(("staged", slot, checkpoint.step))

    def check(self, checkpoint: CheckpointId) -> None:
        if self.error is not None:
            raise self.error


@dataclass
class Bytes:
    """A piece of bytes whose copy waits for a sign, if it has one to wait for."""

    data: bytes
    stable: bool = True
    sign: threading.Event | None = None
    error: Exception | None = None

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def copy_into(self, view: memoryview) -> None:
        assert self.sign is None or self.sign.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        view[:] = self.data


@pytest.fixture
def slots(slots_root: Any) -> SlotDirectory:
    return SlotDirectory(slot_directory("file:///store", RunName("team", "llm"), 0))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def overlapping(slots: SlotDirectory, heard: Heard) -> Iterator[Stager]:
    stager = Stager(slots, heard, overlap=True)
    yield stager
    stager.close()


def orders(step: int) -> Orders:
    return slotfill.orders("file:///store", step)


def captured(**files: list[Bytes]) -> Captured:
    return Captured(tuple(CapturedFile(path, tuple(pieces)) for path, pieces in files.items()))


def read(slots: SlotDirectory, number: int) -> StagedSlot:
    slot = slots.read_slot(number)
    assert slot is not None
    return slot


def tensors(slots: SlotDirectory, number: int, item: str) -> dict[str, torch.Tensor]:
    tree = SlotTree([read(slots, number)])
    found = load(tree.read(f"{item}.safetensors"))
    tree.close()
    return found


class Training:
    """A model with batch statistics, and an optimizer that moves all its parameters."""

    def __init__(self, fused: bool) -> None:
        torch.manual_seed(1)
        layers = torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 1)
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=fused)
        self.step()

    def forward(self) -> torch.Tensor:
        return self.model(torch.randn(16, 32)).square().mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optimizer}

    def tensors(self) -> dict[str, torch.Tensor]:
        found = self.model.state_dict()
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": value for name, value in state.items()}
        return {name: value.clone() for name, value in found.items()}

    def capture(self, step: int) -> Captured:
        return capture(self.state, rank=0, world_size=1, facts={"step": step})


def same(staged: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether the same tensors are in both, whatever the optimizer's are called."""
    left = sorted(value.numpy().tobytes() for value in staged.values())
    return left == sorted(value.numpy().tobytes() for value in wanted.values())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_staged_is_what_was_there_although_training_goes_on(
    slots: SlotDirectory, heard: Heard, overlap: bool, fused: bool
) -> None:
    training = Training(fused)
    stager = Stager(slots, heard, overlap=overlap)
    stager.prewarm(training.capture(0).size)
    for step in range(6):
        wanted = training.tensors()
        staged = stager.stage(training.capture(step), orders(step))
        assert staged is not None
        training.step()
        training.step()
        staged.done.result(PATIENCE)
        found = tensors(slots, staged.slot, "model") | tensors(slots, staged.slot, "optim")
        assert same(found, wanted)
        assert not same(found, training.tensors())
        with read(slots, staged.slot) as slot:
            slot.mark_durable()
    stager.close()
    assert heard.said[-2:] == [("writing", 1, 5), ("staged", 1, 5)]


def test_an_optimizer_waits_until_what_it_changes_is_copied(
    slots: SlotDirectory, overlapping: Stager
) -> None:
    training = Training(fused=True)
    sign = threading.Event()
    wanted = training.tensors()
    plain = training.capture(1)
    held = Captured((*plain.files, CapturedFile("last", (Bytes(b"x" * 9, sign=sign),))))
    staged = overlapping.stage(held, orders(1))
    assert staged is not None
    assert not staged.done.done()
    training.forward().backward()  # batch statistics change, and were copied
    stepping = threading.Thread(target=training.optimizer.step)
    stepping.start()
    stepping.join(0.05)
    assert stepping.is_alive()
    assert torch.equal(training.model[0].weight, wanted["0.weight"])
    with read(slots, staged.slot) as slot:
        assert slot.state == "writing"
    sign.set()
    stepping.join()
    staged.done.result(PATIENCE)
    assert not torch.equal(training.model[0].weight, wanted["0.weight"])
    found = tensors(slots, staged.slot, "model") | tensors(slots, staged.slot, "optim")
    assert same(found, wanted)


def test_what_may_change_at_once_is_copied_before_it_returns(
    slots: SlotDirectory, overlapping: Stager
) -> None:
    sign = threading.Event()
    early = captured(a=[Bytes(b"stable", sign=sign)], b=[Bytes(b"unstable", stable=False)])
    staged = overlapping.stage(early, orders(1))
    assert staged is not None
    with read(slots, staged.slot) as slot:
        ((start, length),) = slot.files[1].segments
        assert slot.view[start : start + length] == b"unstable"
    sign.set()
    overlapping.wait()
    assert SlotTree(slots.slots()).read("a") == b"stable"


def test_a_copy_that_fails_later_fails_its_save_alone(
    slots: SlotDirectory, heard: Heard, overlapping: Stager
) -> None:
    first = overlapping.stage(captured(a=[Bytes(b"1")]), orders(1))
    failing = captured(a=[Bytes(b"2", error=OSError("gone"))])
    second = overlapping.stage(failing, orders(2))
    assert first is not None
    assert second is not None
    with pytest.raises(OSError, match="gone"):
        second.done.result(PATIENCE)
    Training(fused=False).step()  # nothing waits for it any more
    third = overlapping.stage(captured(a=[Bytes(b"3")]), orders(3))
    assert third is not None
    third.done.result(PATIENCE)
    assert third.slot == second.slot
    assert [step for say, _, step in heard.said if say == "staged"] == [1, 3]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_optimizer_in_a_child_of_fork_does_not_wait() -> None:
    gate = StepGate()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    gate.shut()
    child = os.fork()
    if not child:
        optimizer.step()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    gate.close()
    gate.close()
    optimizer.step()


def test_a_copy_that_fails_leaves_what_was_staged(slots: SlotDirectory, heard: Heard) -> None:
    stager = Stager(slots, heard)
    assert stager.stage(captured(a=[Bytes(b"1")]), orders(1)) is not None
    with pytest.raises(OSError, match="gone"):
        stager.stage(captured(a=[Bytes(b"2", error=OSError("gone"))]), orders(2))
    assert [slot.orders.checkpoint.step for slot in slots.slots()] == [1]
    assert stager.stage(captured(a=[Bytes(b"3")]), orders(3)) is not None
    assert stager.stage(captured(a=[Bytes(b"4")]), orders(4)) is None, "both slots are needed"
    stager.close()
    stager.close()
    with pytest.raises(CheckpointError, match="closed"):
        stager.stage(captured(), orders(5))


def test_a_busy_stager_goes_on_once_a_slot_is_free(slots: SlotDirectory, heard: Heard) -> None:
    stager = Stager(slots, heard)
    for step in (1, 2):
        assert stager.stage(captured(a=[Bytes(b"1")]), orders(step)) is not None

    def free() -> None:
        with read(slots, 0) as slot:
            slot.mark_durable()
        stager.slot_freed()

    timer = threading.Timer(0.05, free)
    timer.start()
    assert stager.stage(captured(a=[Bytes(b"3")]), orders(3), timeout=PATIENCE) is not None
    timer.join()
    stager.close()


def test_other_slots_grow_after_the_first_save(slots: SlotDirectory, heard: Heard) -> None:
    stager = Stager(slots, heard)
    stager.stage(captured(a=[Bytes(bytes(500_000))]), orders(1))
    stager.wait()
    assert slots.slot_path(1).stat().st_size >= 500_000
    stager.close()


class Collector:
    """A persister of waves: collects the segments of each, in a thread."""

    def __init__(self, slots: SlotDirectory) -> None:
        self.slots = slots
        self.parts: dict[tuple[str, int], bytes] = {}
        self.waves: list[int] = []
        self.threads: list[threading.Thread] = []

    def on_wave(self, number: int, wave: int) -> None:
        self.threads.append(threading.Thread(target=self.take, args=(number, wave)))
        self.threads[-1].start()

    def take(self, number: int, wave: int) -> None:
        with read(self.slots, number) as slot:
            assert (slot.state, slot.wave) == ("staged" if slot.last else "wave", wave)
            assert not slot.complete
            self.waves.append(wave)
            for file in slot.files:
                for index, (start, length) in enumerate(file.segments):
                    if start:
                        assert (file.path, index) not in self.parts
                        self.parts[file.path, index] = bytes(slot.view[start : start + length])
            slot.take_wave()


def test_a_state_larger_than_its_memory_goes_in_waves(slots: SlotDirectory) -> None:
    collector = Collector(slots)
    heard = Heard(on_wave=collector.on_wave)
    stager = Stager(slots, heard, max_bytes=2 << 20)
    pieces = [Bytes(slotfill.content(seed, seed * 10_000)) for seed in range(20)]
    stager.prewarm(sum(piece.nbytes for piece in pieces))
    staged = stager.stage(captured(a=pieces[:11], b=pieces[11:]), orders(1))
    assert staged is not None
    last = len(collector.threads)
    assert last >= 1
    assert slots.slots()[0].last
    collector.take(staged.slot, last)
    for thread in collector.threads:
        thread.join()
    assert collector.waves == [*range(last + 1)]
    for (path, index), data in collector.parts.items():
        assert data == pieces[index + 11 * (path == "b")].data
    assert len(collector.parts) == 20
    assert all(slots.slot_path(number).stat().st_size <= 1 << 20 for number in (0, 1))
    stager.close()


def test_waves_that_nobody_takes_end_with_the_reason(slots: SlotDirectory) -> None:
    heard = Heard(error=CheckpointError("the store has no room"))
    stager = Stager(slots, heard, max_bytes=1 << 20)
    large = captured(a=[Bytes(bytes(300_000)), Bytes(bytes(300_000))])
    with pytest.raises(CheckpointError, match="no room"):
        stager.stage(large, orders(1))
    assert slots.slots() == []
    with pytest.raises(SlotSpaceError, match="600000 bytes of a do not fit"):
        stager.stage(captured(a=[Bytes(bytes(600_000))]), orders(1))
    stager.close()
