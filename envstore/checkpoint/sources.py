"""Where the bytes of a tensor lie in a tree that one or many ranks have written."""

from __future__ import annotations

from envstore.checkpoint import encoding, table
from envstore.checkpoint.errors import StateMismatchError
from envstore.checkpoint.layout import STATE_FILE, Tree, Want, part_prefix
from envstore.checkpoint.table import Assembled, ItemRecord, StateTable, TensorRecord
from envstore.errors import CorruptError

_COMPARED_AT_ONCE = 64 << 20


class Sources:
    """The tables of a checkpoint, read when they are needed, for one rank that restores it.

    ``rank`` of ``world_size`` takes its own table if as many ranks saved, else that of rank 0.
    """

    def __init__(self, tree: Tree, rank: int, world_size: int) -> None:
        self._tree = tree
        self._tables: dict[int, StateTable] = {}
        self._assembled: dict[tuple[str, str], Assembled] = {}
        self._alike: dict[tuple[str, str], list[TensorRecord]] = {}
        alone = f"{part_prefix(0, 2)}{STATE_FILE}" not in tree.sizes
        self._many = not alone
        first = self._parse(0)
        self.saved_by = first.world_size
        self.same_world = first.world_size == world_size
        self.changed_world = not self.same_world
        self.own = self.table(rank) if self.same_world else first

    def table(self, rank: int) -> StateTable:
        """Return the table of ``rank``. Raises ``CorruptError`` and the errors of the store."""
        found = self._tables.get(rank)
        return self._parse(rank) if found is None else found

    def of(
        self, record: TensorRecord, offsets: tuple[int, ...], lengths: tuple[int, ...]
    ) -> list[TensorRecord]:
        """Return the stored boxes that make up a box of the tensor that ``record`` describes.

        ``record`` is from ``own``. Raises ``RanksDisagreeError`` if they do not.
        """
        if record.whole and (self.saved_by == 1 or (self.same_world and record.per_rank)):
            return [record]
        if self.same_world and (record.offsets, record.lengths) == (offsets, lengths):
            if record.stored:
                return [record]
            item = self.table(record.owner).items.get(record.item)
            other = item.tensors.get(record.name) if item is not None else None
            if other is not None and other.stored and _kind(other) == _kind(record):
                return [other]
        assembled = self._assemble(record.item, record.name)
        if assembled.per_rank:
            self._alike[record.item, record.name] = list(assembled.pieces)
            return [assembled.pieces[0]]
        return list(assembled.pieces)

    def check_item(self, item: ItemRecord) -> str | None:
        """Return why an item cannot be restored by another number of ranks, if it cannot."""
        if self.same_world:
            return None
        if item.per_rank:
            return self._explain(item.name)
        shared = item.tensors and not any(record.per_rank for record in item.tensors.values())
        if self.saved_by == 1 or shared:
            return None
        first = self._content(item)
        for rank in range(1, self.saved_by):
            other = self.table(rank).items.get(item.name)
            if other is None or self._content(other) != first:
                return self._explain(item.name)
        return None

    def check_alike(self) -> list[str]:
        """Compare what each rank stored of its own but another number of ranks is to restore.

        Returns why it cannot be, one reason for each item that differs. Reads those bytes.
        """
        differing: dict[str, str] = {}
        group: list[list[TensorRecord]] = []
        size = 0
        for records in [*self._alike.values(), None]:
            if records is None or size + sum(record.size for record in records) > _COMPARED_AT_ONCE:
                for item in self._differing(group):
                    differing[item] = self._explain(item)
                group, size = [], 0
            if records is not None:
                group.append(records)
                size += sum(record.size for record in records)
        return list(differing.values())

    def _differing(self, group: list[list[TensorRecord]]) -> list[str]:
        found: list[str] = []
        wants: list[Want] = []
        contents: list[list[bytearray]] = []
        for records in group:
            first = records[0]
            contents.append([])
            if any((r.dtype, r.shape) != (first.dtype, first.shape) for r in records):
                found.append(first.item)
                continue
            for record in records:
                content = bytearray(record.size)
                contents[-1].append(content)
                if content:
                    wants.append(Want(record.path, record.start, memoryview(content)))
        self._tree.read_into(wants)
        for records, each in zip(group, contents, strict=True):
            if any(content != each[0] for content in each[1:]):
                found.append(records[0].item)
        return found

    def _explain(self, item: str) -> str:
        return (
            f"{item} differs from rank to rank, and {self.saved_by} ranks saved it, "
            "not as many as here"
        )

    def _content(self, item: ItemRecord) -> tuple[object, list[bytes]]:
        return item.value, [self._tree.read(path) for path in item.objects]

    def _assemble(self, item: str, name: str) -> Assembled:
        found = self._assembled.get((item, name))
        if found is None:
            records = []
            for rank in range(self.saved_by):
                listed = self.table(rank).items.get(item)
                record = listed.tensors.get(name) if listed is not None else None
                if record is not None:
                    records.append(record)
            if records and records[0].per_rank and len(records) != self.saved_by:
                raise StateMismatchError(self._explain(item))
            found = self._assembled[item, name] = table.assemble_one(records)
        return found

    def _parse(self, rank: int) -> StateTable:
        path = f"{part_prefix(rank, 2 if self._many else 1)}{STATE_FILE}"
        sizes = self._tree.sizes
        if path not in sizes:
            raise CorruptError(f"the checkpoint has no {path}")
        if sizes[path] > encoding.MAX_JSON:
            raise CorruptError(f"{path} is {sizes[path]} bytes long, more than {encoding.MAX_JSON}")
        parsed = table.parse_table(self._tree.read(path), path)
        first = self._tables.get(0, parsed)
        world_fits = parsed.world_size == first.world_size and (parsed.world_size > 1) == self._many
        if parsed.rank != rank or not world_fits:
            raise CorruptError(f"{path} is of rank {parsed.rank} of {parsed.world_size}")
        for item in parsed.items.values():
            if item.path and sizes.get(item.path) != item.size:
                raise CorruptError(f"{item.path} is not as long as {path} says")
            for path_of_object in item.objects:
                if path_of_object not in sizes:
                    raise CorruptError(f"the checkpoint has no {path_of_object}")
        self._tables[rank] = parsed
        return parsed


def _kind(record: TensorRecord) -> tuple[object, ...]:
    return record.dtype, record.shape, record.offsets, record.lengths
