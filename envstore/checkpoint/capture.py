"""A live training state described as files, ready to be copied: nothing is copied here.

The structure and the plain values become ``state.json`` at once; tensors and arrays stay where
they are until their pieces are told to copy themselves.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from envstore.checkpoint import arrays, dtypes, encoding, live, table, tensorfile
from envstore.checkpoint.arrays import BytesPiece, Shard
from envstore.checkpoint.errors import CheckpointError, NotFiniteError
from envstore.checkpoint.layout import STATE_FILE, Captured, CapturedFile, Piece, part_prefix
from envstore.checkpoint.table import TensorRecord
from envstore.errors import UsageError

CheckFinite = Literal["off", "record", "refuse"]


def capture(
    state: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    replicated: Collection[str] | Literal[True] = (),
    facts: Mapping[str, Any] | None = None,
    check_finite: CheckFinite = "off",
) -> Captured:
    """Describe ``state`` as the files of this rank's part.

    Items of ``state`` are plain values, tensors, arrays, objects with ``state_dict`` and
    ``load_state_dict``, and nested mappings and lists of them. ``replicated`` names the items
    whose plain tensors are equal on all ranks (``True``: all items but random generators);
    modules in DistributedDataParallel and the optimizers of their parameters need not be named.
    ``facts`` are plain values that go into ``state.json``. ``check_finite`` looks at all floating
    tensors: ``record`` adds the fact ``not_finite`` with their names, ``refuse`` raises
    ``NotFiniteError``.

    A piece is ``stable`` if it is a parameter or state of a torch optimizer in ``state``. Raises
    ``CheckpointError`` for what cannot be saved, naming it, and ``UsageError``.
    """
    if not isinstance(state, Mapping):
        raise UsageError(
            f"a {type(state).__name__} is no state", hint='a mapping, as in {"model": model}'
        )
    if isinstance(replicated, str):
        replicated = (replicated,)
    unknown = [] if replicated is True else [name for name in replicated if name not in state]
    if unknown:
        raise UsageError(f"replicated names {unknown[0]!r}, which the state has not")
    memories = _Memories()
    items: list[_Item] = []
    for name, value in state.items():
        if not isinstance(name, str):
            raise UsageError(f"{name!r} cannot name an item of a state", hint="use a string")
        item = _Item(name, memories)
        item.read(value)
        items.append(item)
    known = dict(facts or {})
    _look_for_nan(items, known, check_finite)
    placing = _Placing(rank, world_size, replicated, memories)
    files: list[CapturedFile] = []
    described: list[dict[str, Any]] = []
    for item in items:
        entry, made = placing.place(item)
        described.append(entry)
        files += made
    body = {
        "format": table.FORMAT,
        "rank": rank,
        "world_size": world_size,
        "facts": encoding.Encoder().encode(known, "facts"),
        "items": described,
    }
    head = BytesPiece(encoding.dumps(body))
    if head.nbytes > encoding.MAX_JSON:
        raise CheckpointError(
            f"the values of the state are {head.nbytes} bytes of JSON, more than "
            f"{encoding.MAX_JSON}",
            hint="put long lists into tensors or arrays",
        )
    prefix = part_prefix(rank, world_size)
    return Captured((CapturedFile(f"{prefix}{STATE_FILE}", (head,)), *files))


class _Memories:
    """Whose memory a tensor lies in, as far as the objects in the state tell."""

    def __init__(self) -> None:
        self.places: arrays.Places = {}
        self.stable: dict[tuple[Any, int], int] = {}
        self.first: dict[Any, tuple[str, str]] = {}
        self.parallel: set[tuple[Any, int]] = set()
        self.broadcast: set[tuple[Any, int]] = set()

    def note_optimizer(self, optimizer: Any) -> None:
        """Remember what only a step of ``optimizer`` changes."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._note_stable(parameter)
        for entry in optimizer.state.values():
            if isinstance(entry, dict):
                for value in entry.values():
                    if arrays.is_tensor(value):
                        self._note_stable(value)

    def note_parallel(self, wrapper: Any) -> None:
        """Remember which memory DistributedDataParallel keeps equal on all ranks."""
        for parameter in wrapper.module.parameters():
            self.parallel.add((parameter.device, parameter.data_ptr()))
        if wrapper.broadcast_buffers:
            for buffer in wrapper.module.buffers():
                self.broadcast.add((buffer.device, buffer.data_ptr()))

    def is_stable(self, shard: Shard) -> bool:
        """Tell whether all bytes of ``shard`` lie in what an optimizer alone changes."""
        if shard.kind != "tensor" or not arrays.is_dense(shard.local):
            return False
        known = self.stable.get((shard.local.device, shard.local.data_ptr()), 0)
        return 0 < shard.nbytes <= known

    def _note_stable(self, tensor: Any) -> None:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if arrays.is_dense(local):
            key = (local.device, local.data_ptr())
            self.stable[key] = max(self.stable.get(key, 0), local.nbytes)


class _Item(encoding.Encoder):
    """One item of the state: its structure, its tensors and its pickled objects."""

    def __init__(self, name: str, memories: _Memories) -> None:
        super().__init__()
        self.name = name
        self.memories = memories
        self.stem = table.stem_of(name)
        self.kind = ""
        self.value: Any = None
        self.shards: dict[str, Shard] = {}
        self.owners: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        self.twins: dict[str, tuple[str, str]] = {}
        self.objects: list[bytes] = []
        self.per_rank = False
        self._kinds.update(dict.fromkeys(arrays.plain_kinds(), self.other))
        self._seen: dict[Any, str] = {}
        self._owner: Any = None

    def read(self, value: Any) -> None:
        """Walk through ``value``."""
        inner = live.unwrap(value)
        self.kind = encoding.type_name(type(inner if live.is_module(inner) else value))
        self.value = self.encode(value)

    def other(self, value: Any, name: str, depth: int) -> Any:
        """Note tensors and objects and return how ``state.json`` refers to them."""
        what = f"{self.name}/{name}" if name else self.name
        shard = arrays.shard_of(value, what, self.memories.places)
        if shard is None and live.is_stateful(value):
            return self._stateful(value, name, depth)
        if shard is None:
            return self._pickled(value, what)
        if self.in_key:
            raise CheckpointError(f"{what} has a tensor as a key", hint="use its name")
        name = self._free_name(name)
        key = arrays.identity(shard)
        stored = self._seen.setdefault(key, name) if key is not None else name
        if stored is not name:
            self.aliases[name] = stored
        else:
            self.shards[name] = shard
            self.owners[name] = self._owner
            first = self.memories.first.setdefault(key, (self.name, name)) if key else None
            if first is not None and first[0] != self.name:
                self.twins[name] = first
        return {"$": shard.kind, "n": name}

    def _stateful(self, value: Any, name: str, depth: int) -> Any:
        if self.in_key:
            raise CheckpointError(f"{self.name}/{name} has an object with a state as a key")
        if live.is_replicated_module(value):
            self.memories.note_parallel(value)
        kind = encoding.type_name(type(value))
        value = live.unwrap(value)
        if live.is_module(value):
            kind = encoding.type_name(type(value))
        if live.is_optimizer(value):
            self.memories.note_optimizer(value)
        self.per_rank = self.per_rank or getattr(value, "per_rank", False) is True
        before, self._owner = self._owner, value
        body = self.encode(value.state_dict(), name, depth + 1)
        self._owner = before
        return {"$": "stateful", "c": kind, "v": body}

    def _pickled(self, value: Any, what: str) -> Any:
        try:
            data = pickle.dumps(value, protocol=5)
        except Exception as error:  # __reduce__ of any class may raise anything
            raise CheckpointError(
                f"{what} is a {encoding.type_name(type(value))}, which cannot be saved: {error}",
                hint="give it state_dict and load_state_dict, or leave it out",
            ) from error
        self.objects.append(data)
        return {"$": "object", "n": len(self.objects) - 1}

    def _free_name(self, name: str) -> str:
        """Return ``name`` as safetensors can hold it, and as no other tensor of the item has it."""
        name = name or self.name
        if not name.isascii():
            name = name.encode("utf-8", "backslashreplace").decode()
        if len(name) > table.MAX_NAME - 20:
            name = f"{name[: table.MAX_NAME - 40]}#"
        free, number = name, 0
        while free in self.shards or free in self.aliases or free == "__metadata__":
            number += 1
            free = f"{name}#{number}"
        return free


class _Placing:
    """Decides which rank stores what, and where in its files."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        replicated: Collection[str] | Literal[True],
        memories: _Memories,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._replicated = replicated
        self._memories = memories

    def place(self, item: _Item) -> tuple[dict[str, Any], list[CapturedFile]]:
        """Return the entry of ``item`` in ``state.json`` and its files."""
        stored: list[str] = []
        owners: dict[str, int] = {}
        own: set[str] = set()
        for name, shard in item.shards.items():
            owner = self._owner(item, name, shard)
            if owner is None:
                own.add(name)
                owner = self._rank
            owners[name] = owner
            if owner == self._rank:
                stored.append(name)
        stored.sort(key=lambda name: _alignment(item.shards[name]))
        starts: dict[str, int] = {}
        files: list[CapturedFile] = []
        size = 0
        if stored:
            size = self._file(item, stored, starts, files)
        for number, data in enumerate(item.objects):
            path = table.object_path(item.name, number, self._rank, self._world_size)
            files.append(CapturedFile(path, (BytesPiece(data),)))
        path = table.tensor_path(item.name, self._rank, self._world_size)
        rows = []
        for name, shard in item.shards.items():
            record = TensorRecord(
                name,
                item.name,
                shard.dtype,
                shard.shape,
                shard.offsets,
                shard.lengths,
                path if name in starts else "",
                starts.get(name, -1),
                shard.nbytes,
                owners[name],
                name in own,
                item.twins.get(name),
            )
            rows.append(table.encode_record(record))
        entry = {
            "name": encoding.Encoder().encode(item.name),
            "kind": item.kind,
            "size": size,
            "objects": len(item.objects),
            "tensors": rows,
            "value": item.value,
        }
        if item.aliases:
            entry["aliases"] = item.aliases
        if item.per_rank:
            entry["own"] = True
        return entry, files

    def _file(
        self, item: _Item, stored: list[str], starts: dict[str, int], files: list[CapturedFile]
    ) -> int:
        head = tensorfile.header(
            (name, shard.dtype, shard.lengths, shard.nbytes)
            for name, shard in ((name, item.shards[name]) for name in stored)
        )
        at = len(head)
        pieces: list[Piece] = [BytesPiece(head)]
        for name in stored:
            shard = item.shards[name]
            starts[name] = at
            at += shard.nbytes
            if shard.nbytes:
                pieces.append(arrays.piece_of(shard, self._memories.is_stable(shard)))
        path = table.tensor_path(item.name, self._rank, self._world_size)
        files.append(CapturedFile(path, tuple(pieces)))
        return at

    def _owner(self, item: _Item, name: str, shard: Shard) -> int | None:
        """Return the rank that stores ``shard``; ``None`` if each rank has its own."""
        if self._world_size == 1:
            return self._rank
        if shard.distributed:
            return shard.owner
        memories = self._memories
        named = self._replicated is True or item.name in self._replicated
        if named and not (item.per_rank and self._replicated is True):
            return self._by_name(item, name)
        if shard.kind == "tensor" and memories.parallel:
            key = (shard.local.device, shard.local.data_ptr())
            if shard.nbytes and key in memories.broadcast:
                return 0
            if shard.nbytes and key in memories.parallel:
                return self._by_name(item, name)
            owner = item.owners[name]
            if live.is_optimizer(owner) and self._is_parallel(owner):
                return self._by_name(item, name)
        return None

    def _is_parallel(self, optimizer: Any) -> bool:
        return all(
            (parameter.device, parameter.data_ptr()) in self._memories.parallel
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def _by_name(self, item: _Item, name: str) -> int:
        what = f"{item.name}/{name}".encode("utf-8", "surrogatepass")
        return zlib.crc32(what) % self._world_size


def _alignment(shard: Shard) -> tuple[bool, int]:
    """Return the rank of a tensor in its file: there are no gaps, yet all should be aligned.

    Those that leave the next one aligned for a fast copy come first, and the rest, mostly small,
    by falling size of their elements, so that each is aligned to those.
    """
    odd = shard.nbytes % tensorfile.ALIGNMENT != 0
    return odd, -min(8, dtypes.item_size(shard.dtype)) if odd else 0


def _look_for_nan(items: list[_Item], facts: dict[str, Any], check: CheckFinite) -> None:
    if check == "off":
        return
    if check not in ("record", "refuse"):
        raise UsageError(f"check_finite cannot be {check!r}", hint="off, record or refuse")
    shards = [
        (f"{item.name}/{name}", shard) for item in items for name, shard in item.shards.items()
    ]
    found = arrays.not_finite(shards)
    if found and check == "refuse":
        named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise NotFiniteError(
            f"{len(found)} tensors hold NaN or infinity: {named}",
            hint="the step is not saved; look at the loss and the learning rate",
        )
    facts["not_finite"] = found
