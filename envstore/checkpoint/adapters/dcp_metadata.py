"""What a checkpoint holds, in the words of torch.distributed.checkpoint.

The metadata that DCP pickles is made anew from the tables of the ranks (``state.json``), whoever
saved them: a ``Run`` or an ``EnvstoreWriter``. A tensor ``layers.0.weight`` of the item ``model``
is ``model.layers.0.weight`` here. Nothing is unpickled unless it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from envstore.checkpoint import table
from envstore.checkpoint.arrays import Shard
from envstore.checkpoint.encoding import torch_dtype
from envstore.checkpoint.errors import UntrustedObjectError
from envstore.checkpoint.filling import Filler
from envstore.checkpoint.layout import Tree
from envstore.checkpoint.sources import Sources
from envstore.checkpoint.structure import SavedStructure, StatefulRef, TensorRef
from envstore.checkpoint.table import ItemRecord, TensorRecord


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint as DCP sees it.

    ``boxes`` has where the bytes of each stored box of a tensor lie, ``values`` how to get at what
    is no tensor, by its name.
    """

    metadata: Metadata
    boxes: Mapping[MetadataIndex, TensorRecord]
    values: Mapping[str, Callable[[], Any]]


def read_contents(tree: Tree, rank: int, world_size: int, *, trusted: bool) -> Contents:
    """Read the tables of all ranks in ``tree`` for ``rank`` of those that load it.

    Raises ``CorruptError``, ``RanksDisagreeError`` and the errors of the tree.
    """
    sources = Sources(tree, rank, world_size)
    own = rank if sources.same_world else 0
    order = [own, *(other for other in range(sources.saved_by) if other != own)]
    reader = _Reader(tree, trusted=trusted)
    for number in order:
        # Of what each rank has for itself, DCP knows one: that of the rank that asks.
        reader.add(sources.table(number))
    return reader.contents()


_Pieces = Callable[[str, str], tuple[str, tuple[int, ...], list[TensorRecord]]]
"""Of an item and a name: the dtype, the shape and the stored boxes of a tensor."""


class _Reader:
    """Collects the names of all ranks; the first rank that has one says what it is."""

    def __init__(self, tree: Tree, *, trusted: bool) -> None:
        self._tree = tree
        self._trusted = trusted
        self._records: dict[tuple[str, str], list[TensorRecord]] = {}
        self._tensors: dict[str, tuple[str, str]] = {}
        self._values: dict[str, Callable[[], Any]] = {}
        self._mappings: dict[str, tuple[str | int, ...]] = {}

    def add(self, found: table.StateTable) -> None:
        for record in found.tensors:
            self._records.setdefault((record.item, record.name), []).append(record)
        structure = _Structure()
        nested = {
            item.name: structure.of(item, self._decoded(item)) for item in found.items.values()
        }
        flat, mappings = flatten_state_dict(nested)
        for name, value in flat.items():
            if name in self._mappings:
                continue
            self._mappings[name] = mappings[name]
            place = structure.places.get(id(value))
            if place is not None:
                self._tensors[name] = place
            else:
                self._values[name] = _Value(value, self._pieces, self._tree)

    def contents(self) -> Contents:
        described: dict[str, Any] = {name: BytesStorageMetadata() for name in self._values}
        boxes: dict[MetadataIndex, TensorRecord] = {}
        for name, place in self._tensors.items():
            dtype, shape, pieces = self._pieces(*place)
            chunks = []
            for record in pieces:
                offsets = torch.Size(record.offsets)
                boxes[MetadataIndex(name, offsets)] = record
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(record.lengths)))
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(dtype)), torch.Size(shape), chunks
            )
        metadata = Metadata(described, planner_data=dict(self._mappings), storage_data=boxes)
        return Contents(metadata, boxes, self._values)

    def _pieces(self, item: str, name: str) -> tuple[str, tuple[int, ...], list[TensorRecord]]:
        records = self._records[item, name]
        if records[0].per_rank:
            return records[0].dtype, records[0].shape, records[:1]
        whole = table.assemble_one(sorted(records, key=lambda record: record.owner))
        return whole.dtype, whole.shape, list(whole.pieces)

    def _decoded(self, item: ItemRecord) -> Any:
        return _Lazy(item, self._tree, trusted=self._trusted, values=True).decode(item.value)


@dataclass(frozen=True, slots=True)
class _Untrusted:
    """Stands for a pickled object that must not be loaded."""

    error: UntrustedObjectError


class _Lazy(SavedStructure):
    """Decodes the structure, although it may hold objects that must not be loaded."""

    def _object(self, number: int, name: str) -> Any:
        try:
            return super()._object(number, name)
        except UntrustedObjectError as error:
            return _Untrusted(error)


@dataclass(frozen=True, slots=True)
class _Inside:
    """Stands for a numpy array, or a tensor in a tuple: part of what DCP takes for a value."""

    kind: str
    item: str
    name: str


class _Structure:
    """Puts tensors without values where a decoded structure refers to tensors.

    ``places`` has the item and name of each by ``id``; they are kept alive here.
    """

    def __init__(self) -> None:
        self.places: dict[int, tuple[str, str]] = {}
        self._alive: list[Any] = []

    def of(self, item: ItemRecord, value: Any, *, inside: bool = False) -> Any:
        if isinstance(value, TensorRef):
            name = item.aliases.get(value.name, value.name)
            if inside or value.kind == "array":
                return _Inside(value.kind, item.name, name)
            stand_in = torch.empty((), device="meta")
            self.places[id(stand_in)] = (item.name, name)
            self._alive.append(stand_in)
            return stand_in
        if isinstance(value, StatefulRef):
            return self.of(item, value.value, inside=inside)
        if isinstance(value, dict):
            return {key: self.of(item, one, inside=inside) for key, one in value.items()}
        if type(value) is list:
            return [self.of(item, one, inside=inside) for one in value]
        if type(value) is tuple:
            return tuple(self.of(item, one, inside=True) for one in value)
        return value


class _Value:
    """Gets at a value that is no tensor when it is asked for."""

    def __init__(self, value: Any, pieces: _Pieces, tree: Tree) -> None:
        self._value = value
        self._pieces = pieces
        self._tree = tree

    def __call__(self) -> Any:
        """Return the value. Raises ``UntrustedObjectError`` and the errors of the tree."""
        return self._filled(self._value)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, _Untrusted):
            raise value.error
        if isinstance(value, _Inside):
            return self._read(value.kind, *self._pieces(value.item, value.name))
        if isinstance(value, dict):
            return {key: self._filled(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._filled, value))
        return value

    def _read(
        self, kind: str, dtype: str, shape: tuple[int, ...], pieces: list[TensorRecord]
    ) -> Any:
        target: Any
        if kind == "array":
            import numpy as np

            target = np.empty(shape, np.dtype(dtype.removeprefix("numpy:")))
        else:
            target = torch.empty(shape, dtype=torch_dtype(dtype))
        filler = Filler()
        whole = Shard(kind, target, dtype, shape, (0,) * len(shape), shape, target.nbytes)
        filler.add(pieces, whole)
        filler.read(self._tree)
        return target
