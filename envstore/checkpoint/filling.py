"""Stored bytes into live tensors: straight where the memory allows, through scratch otherwise."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from envstore.checkpoint import arrays
from envstore.checkpoint.arrays import Shard
from envstore.checkpoint.layout import Tree, Want
from envstore.checkpoint.table import TensorRecord

SCRATCH_AT_ONCE = 256 << 20


@dataclass(frozen=True, slots=True)
class _Detour:
    """A range that must be read into memory of its own first, and how it is then copied."""

    path: str
    start: int
    size: int
    copy: Callable[[Any], None]
    kind: str


class Filler:
    """Collects what is to be read, and reads it. Nothing is touched before ``read``."""

    def __init__(self) -> None:
        self._straight: list[Want] = []
        self._detours: list[_Detour] = []
        self._alive: list[Shard] = []
        self.size = 0

    def add(self, sources: list[TensorRecord], target: Shard) -> None:
        """Note that ``target`` is to be filled from stored boxes that cover it."""
        memory = arrays.memory_of(target)
        self._alive.append(target)
        for source in sources:
            self._add_box(source, target, memory)

    def read(self, tree: Tree) -> None:
        """Read everything. Raises what the tree raises; the targets then hold anything."""
        wants, self._straight = self._straight, []
        waiting: list[tuple[_Detour, Any]] = []
        size = 0
        for detour in self._detours:
            if size and size + detour.size > SCRATCH_AT_ONCE:
                self._round(tree, wants, waiting)
                wants, waiting, size = [], [], 0
            scratch, view = _scratch(detour.kind, detour.size)
            wants.append(Want(detour.path, detour.start, view))
            waiting.append((detour, scratch))
            size += detour.size
        self._detours = []
        self._round(tree, wants, waiting)
        self._alive = []

    def _round(self, tree: Tree, wants: list[Want], waiting: list[tuple[_Detour, Any]]) -> None:
        if wants:
            tree.read_into(wants)
        for detour, scratch in waiting:
            detour.copy(scratch)

    def _add_box(self, source: TensorRecord, target: Shard, memory: memoryview | None) -> None:
        """Note the intersection of a stored box and the target."""
        starts, lengths = [], []
        for a, n, b, m in zip(
            source.offsets, source.lengths, target.offsets, target.lengths, strict=True
        ):
            start, end = max(a, b), min(a + n, b + m)
            if start >= end:
                return
            starts.append(start)
            lengths.append(end - start)
        box = tuple(lengths)
        count = math.prod(box)
        if not count or not target.nbytes:
            return
        unit = target.nbytes // math.prod(target.lengths)
        there = [at - offset for at, offset in zip(starts, source.offsets, strict=True)]
        here = [at - offset for at, offset in zip(starts, target.offsets, strict=True)]
        first = _linear(there, source.lengths)
        start = source.start + first * unit
        in_one_run = _is_run(box, source.lengths)
        if memory is not None and in_one_run and _is_run(box, target.lengths):
            begin = _linear(here, target.lengths) * unit
            view = memory[begin : begin + count * unit]
            self._straight.append(Want(source.path, start, view))
            self.size += view.nbytes
            return
        last = _linear([at + n - 1 for at, n in zip(there, box, strict=True)], source.lengths)
        size = (last - first + 1) * unit
        strides = _strides(source.lengths)
        place = tuple(slice(at, at + n) for at, n in zip(here, box, strict=True))

        def copy(scratch: Any) -> None:
            _copy(scratch, box, strides, target, place)

        self._detours.append(_Detour(source.path, start, size, copy, target.kind))
        self.size += size


def _copy(
    scratch: Any,
    box: tuple[int, ...],
    strides: tuple[int, ...],
    target: Shard,
    place: tuple[slice, ...],
) -> None:
    local = target.local
    if target.kind == "array":
        np = sys.modules["numpy"]
        typed = scratch.view(local.dtype)
        steps = tuple(step * local.dtype.itemsize for step in strides)
        local[place] = np.lib.stride_tricks.as_strided(typed, box, steps)
        return
    torch = sys.modules["torch"]
    with torch.no_grad():
        typed = scratch.view(local.dtype).as_strided(box, strides)
        local[place].copy_(typed)


def _scratch(kind: str, size: int) -> tuple[Any, memoryview]:
    if kind == "array":
        made = sys.modules["numpy"].empty(size, "uint8")
        return made, memoryview(made)
    torch = sys.modules["torch"]
    scratch = torch.empty(size, dtype=torch.uint8)
    return scratch, arrays.view_of(scratch.data_ptr(), size)


def _linear(at: list[int], lengths: tuple[int, ...]) -> int:
    """Return how many elements lie before ``at`` in a dense box."""
    index = 0
    for position, length in zip(at, lengths, strict=True):
        index = index * length + position
    return index


def _strides(lengths: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for length in reversed(lengths):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _is_run(box: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Tell whether a box in a dense array of shape ``full`` is one run of memory."""
    at = 0
    while at < len(box) and box[at] == 1:
        at += 1
    return box[at + 1 :] == full[at + 1 :]
