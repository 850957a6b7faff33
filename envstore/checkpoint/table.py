"""``state.json``: what a rank saved, which tensors there are and where their bytes lie.

It comes from a store or a slot and is not trusted: every count, size and name is checked before
anything is made of it, and no path is taken from it. It is one JSON object:

``format`` 1, ``rank``, ``world_size``, ``facts`` (step, metrics, lineage: encoded values), and
``items``, a list of objects with

- ``name`` of the item (an encoded string), ``kind``: its class, for people;
- ``value``: its structure as ``encoding`` writes it, with ``{"$": "tensor" | "array", "n": name}``
  for tensors, ``{"$": "stateful", "c": class, "v": state}`` for objects with a state, and
  ``{"$": "object", "n": number}`` for pickled ones;
- ``size``: bytes of its file of tensors, 0 if this rank stores none; ``objects``: their number;
- ``tensors``: rows of name, dtype, shape of the whole, first byte in the file (-1 if another rank
  stores it) and, where needed, an object with ``owner`` (that rank), ``own`` (each rank has its
  own), ``offsets`` and ``lengths`` (the box this rank has) and ``twin`` (item and name of the same
  memory);
- ``aliases``: further names of a tensor to the name in its row; ``own``: no other number of ranks
  can restore it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from envstore.checkpoint import dtypes, encoding
from envstore.checkpoint.errors import RanksDisagreeError
from envstore.checkpoint.layout import part_prefix
from envstore.errors import CorruptError, UnsupportedFormatError, UsageError

FORMAT = 1
MAX_RANKS = 100_000
MAX_ITEMS = 10_000
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 64
MAX_NAME = 4096
_MAX_SIZE = 1 << 60
_MAX_STEM = 150
_OBJECT_BYTES = 16
"""Bytes that a table needs at least to refer to a pickled object."""

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of an item, or the box of it that one rank has.

    ``shape`` is that of the whole tensor; the box begins at ``offsets`` and has ``lengths``
    elements in each dimension. ``owner`` is the rank that stores these bytes. If it is the rank
    whose table this is, they are ``size`` bytes in the file ``path`` from ``start``; else ``path``
    is empty. ``per_rank``: every rank has a tensor of its own under this name. ``twin`` is the
    item and name of the same memory, if an earlier item had it too.
    """

    name: str
    item: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    path: str
    start: int
    size: int
    owner: int
    per_rank: bool = False
    twin: tuple[str, str] | None = None

    @property
    def memory(self) -> tuple[str, str]:
        """The first item and name under which the state had this memory."""
        return self.twin or (self.item, self.name)

    @property
    def stored(self) -> bool:
        """Whether the rank whose table this is stores the bytes."""
        return bool(self.path)

    @property
    def whole(self) -> bool:
        """Whether the box is all of the tensor."""
        return self.lengths == self.shape


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One entry of the state. ``value`` is its encoded structure, not yet decoded.

    ``kind`` is the class it had, for people. ``path`` and ``size`` are those of the file of its
    tensors, ``""`` and 0 if this rank stores none. ``aliases`` maps further names of a tensor to
    the one it is stored under. ``objects`` are the paths of its pickled objects.
    """

    name: str
    kind: str
    value: Any
    path: str
    size: int
    aliases: Mapping[str, str]
    objects: tuple[str, ...]
    tensors: Mapping[str, TensorRecord]
    per_rank: bool = False


@dataclass(frozen=True, slots=True)
class StateTable:
    """A parsed ``state.json``."""

    rank: int
    world_size: int
    facts: Mapping[str, Any]
    items: Mapping[str, ItemRecord]

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """All tensors of all items."""
        return tuple(record for item in self.items.values() for record in item.tensors.values())


@dataclass(frozen=True, slots=True)
class Assembled:
    """One tensor over all ranks: boxes that make it up exactly, in order of their offsets.

    ``per_rank``: the pieces are no boxes of one tensor but each rank's own, in order of ranks.
    """

    item: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[TensorRecord, ...]
    per_rank: bool = False


def stem_of(item: str) -> str:
    """Return the name of an item as it stands in paths. Raises ``UsageError``."""
    stem = quote(item.encode("utf-8", "surrogatepass"), safe=" +,=@")
    if stem.startswith("."):
        stem = f"%2E{stem[1:]}"
    if not stem or len(stem) > _MAX_STEM:
        raise UsageError(
            f"{item[:80]!r} cannot name an item of a state", hint="use a short name, not empty"
        )
    return stem


def tensor_path(item: str, rank: int, world_size: int) -> str:
    """Return the path of the file with the tensors of ``item`` that ``rank`` stores."""
    return f"{part_prefix(rank, world_size)}{stem_of(item)}.safetensors"


def object_path(item: str, number: int, rank: int, world_size: int) -> str:
    """Return the path of a pickled object of ``item``."""
    return f"{part_prefix(rank, world_size)}objects/{stem_of(item)}.{number}.pickle"


def encode_record(record: TensorRecord) -> list[Any]:
    """Return the row of ``record`` in ``state.json``."""
    row: list[Any] = [record.name, record.dtype, list(record.shape), record.start]
    more: dict[str, Any] = {}
    if not record.stored:
        more["owner"] = record.owner
    if record.per_rank:
        more["own"] = True
    if not record.whole:
        more["offsets"] = list(record.offsets)
        more["lengths"] = list(record.lengths)
    if record.twin is not None:
        more["twin"] = [encoding.Encoder().encode(part) for part in record.twin]
    return [*row, more] if more else row


def parse_table(data: bytes, what: str) -> StateTable:
    """Parse ``state.json``. Raises ``CorruptError`` or ``UnsupportedFormatError`` with ``what``."""
    return _Parser(what, len(data) // _OBJECT_BYTES).table(encoding.loads(data, what))


class _Parser:
    """Reads one table; knows what to call it in errors."""

    def __init__(self, what: str, objects: int) -> None:
        """``objects`` is how many pickled objects there can be at most."""
        self._what = what
        self._objects = objects
        self._rank = 0
        self._world_size = 1
        self._tensors = 0

    def table(self, body: Any) -> StateTable:
        if not isinstance(body, dict):
            raise CorruptError(f"{self._what} is not a JSON object")
        version = body.get("format")
        if type(version) is int and version > FORMAT:
            raise UnsupportedFormatError(
                f"{self._what} has format {version}, newer than {FORMAT}", hint="upgrade envstore"
            )
        self._check(version == FORMAT, "format")
        self._world_size = self._int(body.get("world_size"), "world_size", MAX_RANKS)
        self._rank = self._int(body.get("rank"), "rank", MAX_RANKS)
        self._check(self._rank < self._world_size, "rank")
        facts = encoding.Decoder(self._what).decode(body.get("facts"), "facts")
        self._check(isinstance(facts, dict), "facts")
        listed = body.get("items")
        if not isinstance(listed, list) or len(listed) > MAX_ITEMS:
            raise CorruptError(f"{self._what} has no valid items")
        items: dict[str, ItemRecord] = {}
        for entry in listed:
            item = self._item(entry)
            self._check(item.name not in items, f"items ({item.name!r} twice)")
            items[item.name] = item
        return StateTable(self._rank, self._world_size, facts, items)

    def _item(self, body: Any) -> ItemRecord:
        self._check(isinstance(body, dict), "items")
        name = encoding.Decoder(self._what).decode(body.get("name"), "items")
        self._check(isinstance(name, str), "item name")
        try:
            path = tensor_path(name, self._rank, self._world_size)
        except UsageError:
            raise CorruptError(f"{self._what} has no valid item name") from None
        kind = body.get("kind")
        self._check(isinstance(kind, str) and "value" in body, name)
        size = self._int(body.get("size"), f"{name}: size", _MAX_SIZE)
        rows = body.get("tensors")
        self._check(isinstance(rows, list), f"{name}: tensors")
        self._tensors += len(rows)
        self._check(self._tensors <= MAX_TENSORS, f"{name}: number of tensors")
        tensors: dict[str, TensorRecord] = {}
        for row in rows:
            record = self._record(row, name, path, size)
            self._check(record.name not in tensors, f"{name}: {record.name[:200]!r} twice")
            tensors[record.name] = record
        aliases = body.get("aliases", {})
        self._check(isinstance(aliases, dict), f"{name}: aliases")
        for alias, target in aliases.items():
            fits = isinstance(target, str) and target in tensors and alias not in tensors
            self._check(fits, f"{name}: aliases")
        objects = self._int(body.get("objects"), f"{name}: objects", self._objects)
        self._objects -= objects
        return ItemRecord(
            name,
            kind,
            body["value"],
            path if size else "",
            size,
            aliases,
            tuple(object_path(name, at, self._rank, self._world_size) for at in range(objects)),
            tensors,
            body.get("own") is True,
        )

    def _record(self, row: Any, item: str, path: str, file_size: int) -> TensorRecord:
        self._check(isinstance(row, list) and 4 <= len(row) <= 5, f"{item}: tensors")
        name, dtype, shape, start = row[:4]
        more = row[4] if len(row) == 5 else {}
        self._check(
            isinstance(name, str) and len(name) <= MAX_NAME and isinstance(more, dict),
            f"{item}: tensors",
        )
        what = f"{item}/{name[:200]}"
        self._check(isinstance(dtype, str) and dtypes.is_known(dtype), f"{what}: dtype")
        shape = self._sizes(shape, f"{what}: shape")
        offsets, lengths = (0,) * len(shape), shape
        if "lengths" in more:
            offsets = self._sizes(more.get("offsets"), f"{what}: offsets")
            lengths = self._sizes(more["lengths"], f"{what}: lengths")
            self._check(
                len(offsets) == len(lengths) == len(shape)
                and all(
                    at + length <= full
                    for at, length, full in zip(offsets, lengths, shape, strict=True)
                ),
                f"{what}: place in the whole",
            )
        item_size = dtypes.item_size(dtype)
        self._check(math.prod(shape) * item_size <= _MAX_SIZE, f"{what}: size")
        per_rank = more.get("own") is True
        twin = self._twin(more["twin"], what) if "twin" in more else None
        self._check(not per_rank or lengths == shape, f"{what}: place in the whole")
        if "owner" in more:
            owner = self._int(more["owner"], f"{what}: owner", self._world_size - 1)
            self._check(owner != self._rank and not per_rank and start == -1, f"{what}: owner")
            return TensorRecord(
                name, item, dtype, shape, offsets, lengths, "", -1, 0, owner, False, twin
            )
        start = self._int(start, f"{what}: start", _MAX_SIZE)
        size = math.prod(lengths) * item_size
        self._check(start >= 8 and start + size <= file_size, f"{what}: place in the file")
        return TensorRecord(
            name,
            item,
            dtype,
            shape,
            offsets,
            lengths,
            path,
            start,
            size,
            self._rank,
            per_rank,
            twin,
        )

    def _twin(self, value: Any, what: str) -> tuple[str, str]:
        found = encoding.Decoder(self._what).decode(value, what)
        self._check(
            isinstance(found, list) and len(found) == 2 and all(type(x) is str for x in found),
            f"{what}: twin",
        )
        return found[0], found[1]

    def _sizes(self, value: Any, field: str) -> tuple[int, ...]:
        self._check(isinstance(value, list) and len(value) <= MAX_DIMENSIONS, field)
        return tuple(self._int(size, field, _MAX_SIZE) for size in value)

    def _int(self, value: Any, field: str, limit: int) -> int:
        self._check(type(value) is int and 0 <= value <= limit, field)
        return int(value)

    def _check(self, fine: bool, field: str) -> None:
        if not fine:
            raise CorruptError(f"{self._what} has no valid {field}")


def assemble(tables: Iterable[StateTable]) -> dict[tuple[str, str], Assembled]:
    """Return every tensor of all ranks' tables, by item and name, as the boxes that store it.

    Raises ``RanksDisagreeError`` naming the tensor if ranks state another dtype or shape, if boxes
    overlap or leave a gap, or if the rank that is to store a box does not.
    """
    by_rank = sorted(tables, key=lambda table: table.rank)
    _check_ranks(by_rank)
    found: dict[tuple[str, str], list[TensorRecord]] = {}
    for table in by_rank:
        for record in table.tensors:
            found.setdefault((record.item, record.name), []).append(record)
    return {key: assemble_one(records) for key, records in found.items()}


def assemble_one(records: list[TensorRecord]) -> Assembled:
    """Put the records of one tensor, in order of ranks, together; errors as ``assemble``."""
    first = records[0]
    what = f"{first.item}/{first.name}"
    for record in records:
        if (record.dtype, record.shape) != (first.dtype, first.shape) and not first.per_rank:
            raise RanksDisagreeError(
                f"{what} is {describe(first.dtype, first.shape)} on rank {first.owner} and "
                f"{describe(record.dtype, record.shape)} on rank {record.owner}"
            )
        if record.per_rank != first.per_rank:
            raise RanksDisagreeError(
                f"{what} is each rank's own for some ranks, and one for others"
            )
    if first.per_rank:
        return Assembled(
            first.item, first.name, first.dtype, first.shape, tuple(records), per_rank=True
        )
    pieces = [record for record in records if record.stored and record.size]
    if not pieces and math.prod(first.shape) == 0:
        pieces = [record for record in records if record.stored][:1]
    pieces.sort(key=lambda record: record.offsets)
    stored = {(record.owner, record.offsets, record.lengths) for record in pieces}
    for record in records:
        key = (record.owner, record.offsets, record.lengths)
        if not record.stored and 0 not in record.lengths and key not in stored:
            raise RanksDisagreeError(
                f"{what} is left to rank {record.owner}, which did not store it"
            )
    _check_tiles(what, first.shape, pieces)
    return Assembled(first.item, first.name, first.dtype, first.shape, tuple(pieces))


def describe(dtype: str, shape: tuple[int, ...]) -> str:
    """Return ``float32 [4, 4]``."""
    return f"{dtype} {list(shape)}"


def overlap(a: TensorRecord, b: TensorRecord) -> bool:
    """Tell whether two boxes of one tensor share elements."""
    return all(
        max(x, y) < min(x + n, y + m)
        for x, n, y, m in zip(a.offsets, a.lengths, b.offsets, b.lengths, strict=True)
    )


def _check_ranks(tables: list[StateTable]) -> None:
    for at, table in enumerate(tables):
        if table.world_size != tables[0].world_size:
            raise RanksDisagreeError(
                f"rank {table.rank} is one of {table.world_size} ranks, and rank "
                f"{tables[0].rank} one of {tables[0].world_size}"
            )
        if table.rank != at:
            raise RanksDisagreeError(f"the part of rank {at} is missing or there twice")
    if tables and len(tables) != tables[0].world_size:
        raise RanksDisagreeError(f"the part of rank {len(tables)} is missing")


def _check_tiles(what: str, shape: tuple[int, ...], pieces: list[TensorRecord]) -> None:
    """Check that the boxes, sorted by offsets, fill ``shape`` once."""
    total = sum(math.prod(piece.lengths) for piece in pieces)
    full = math.prod(shape)
    if total < full:
        raise RanksDisagreeError(f"{what} has gaps: its ranks store {total} of {full} elements")
    for at, piece in enumerate(pieces):
        for other in pieces[at + 1 :]:
            if shape and other.offsets[0] >= piece.offsets[0] + piece.lengths[0]:
                break
            if overlap(piece, other):
                raise RanksDisagreeError(
                    f"{what} is stored twice in part, by ranks {piece.owner} and {other.owner}"
                )
    if total > full:
        raise RanksDisagreeError(f"{what} is stored by several ranks")
