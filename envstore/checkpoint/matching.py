"""One saved item beside what the program has in its place: what goes where, and what does not fit.

Matching touches nothing: it notes problems and what is to be read, and returns for every value a
function that, once the bytes are there, gives what stands in its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from envstore.checkpoint import arrays, encoding, live
from envstore.checkpoint.arrays import Shard
from envstore.checkpoint.encoding import join
from envstore.checkpoint.filling import Filler
from envstore.checkpoint.sources import Sources
from envstore.checkpoint.structure import (
    ABSENT,
    StatefulRef,
    TensorRef,
    has_refs,
    kind_of,
    refs_of,
)
from envstore.checkpoint.table import ItemRecord, TensorRecord, describe
from envstore.errors import CorruptError

Later = Callable[[], Any]


@dataclass(slots=True)
class Problems:
    """Why a state cannot be restored, one line each, as paths in the state."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def message(self) -> str | None:
        """Return all of it in one line; ``None`` if there is none."""
        said = list(self.other[:3])
        for found, words in (
            (self.different, "differ"),
            (self.missing, "are not in the checkpoint"),
            (self.unexpected, "are only in the checkpoint"),
        ):
            if found:
                shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
                said.append(f"{len(found)} {words}: {shown}")
        return "; ".join(said) or None


class Matcher:
    """Matches one item with the state of the program."""

    def __init__(
        self,
        item: ItemRecord,
        sources: Sources,
        filler: Filler,
        problems: Problems,
        *,
        strict: bool,
        wanted: Callable[[str], bool] | None,
        filled: dict[Any, TensorRecord],
    ) -> None:
        self._item = item
        self._sources = sources
        self._filler = filler
        self._problems = problems
        self._strict = strict
        self._wanted = wanted
        self._filled = filled
        self._places: arrays.Places = {}

    def value(self, saved: Any, here: Any, name: str = "") -> Later:
        """Match a part of a plain nest of mappings, lists, tensors, objects and values."""
        if type(saved) is TensorRef:
            return self._tensor(saved, here, name)
        if type(saved) is StatefulRef:
            is_mapping = isinstance(here, MutableMapping) and not live.is_stateful(here)
            if is_mapping and isinstance(saved.value, dict):
                return self._mapping(saved.value, here, name)
            return self._stateful(saved, here, name)
        if isinstance(saved, dict) and isinstance(here, MutableMapping):
            return self._mapping(saved, here, name)
        if isinstance(saved, dict) and live.is_stateful(here):
            return self._stateful(StatefulRef(kind_of(here), saved), here, name)
        if type(saved) in (list, tuple) and type(here) is type(saved) and has_refs(saved):
            return self._sequence(saved, here, name)
        if here is not ABSENT and self._holds_live(here):
            self._differs(name, kind_of(here), kind_of(saved))
        elif has_refs(saved):
            return self._template(saved, ABSENT, name, self._allocate)
        if self._wanted is not None:
            return lambda: here
        return lambda: saved

    def _mapping(self, saved: dict[Any, Any], here: MutableMapping[Any, Any], name: str) -> Later:
        children = {
            key: self.value(item, here.get(key, ABSENT), join(name, key))
            for key, item in saved.items()
        }
        if self._strict and self._wanted is None:
            self._problems.missing += [
                self._path(join(name, key)) for key in here if key not in saved
            ]

        def finish() -> Any:
            for key, later in children.items():
                found = later()
                if found is not ABSENT:
                    here[key] = found
            return here

        return finish

    def _sequence(self, saved: Any, here: Any, name: str) -> Later:
        children = [
            self.value(item, here[at] if at < len(here) else ABSENT, join(name, at))
            for at, item in enumerate(saved)
        ]
        partial = self._wanted is not None

        def finish() -> Any:
            found = [later() for later in children]
            if partial:
                return here
            if isinstance(here, tuple):
                return tuple(found)
            here[:] = found
            return here

        return finish

    def _stateful(self, saved: StatefulRef, here: Any, name: str) -> Later:
        if here is ABSENT or not live.is_stateful(here):
            if self._wants(name, saved.value):
                found = "missing" if here is ABSENT else kind_of(here)
                self._problems.other.append(
                    f"{self._path(name)} is the state of {saved.kind}, which is {found} here"
                )
            return lambda: here
        inner = live.unwrap(here)
        if live.is_module(inner) and isinstance(saved.value, dict):
            load = self._module(saved.value, inner, name)
        elif self._wanted is not None:
            self._problems.other.append(
                f"{self._path(name)} cannot be restored in part: it is {kind_of(inner)}"
            )
            return lambda: here
        elif live.is_optimizer(inner):
            load = self._optimizer(saved.value, inner, name)
        else:
            now = inner.state_dict() if has_refs(saved.value) else ABSENT
            body = self._template(saved.value, now, name, self._allocate)

            def load() -> None:
                inner.load_state_dict(body())

        def finish() -> Any:
            load()
            return here

        return finish

    def _module(self, saved: dict[str, Any], module: Any, name: str) -> Callable[[], None]:
        """Fill parameters and buffers in place; the module then loads what it already has."""
        now = module.state_dict()
        partial = self._wanted is not None
        children: dict[str, Later] = {}
        for key, item in saved.items():
            place = join(name, key)
            if key not in now:
                if self._wants(place, item):
                    self._problems.unexpected.append(self._path(place))
            elif type(item) is TensorRef and arrays.is_tensor(now[key]):
                if not partial or self._wants(place, item):
                    children[key] = self._tensor(item, now[key], place)
            elif not partial:
                children[key] = self._template(item, now[key], place, self._allocate)
        if not partial:
            missing = [self._path(join(name, key)) for key in now if key not in saved]
            self._problems.missing += missing if self._strict else []
        metadata = getattr(saved, "_metadata", None)
        strict = self._strict and not partial

        def load() -> None:
            state = OrderedDict((key, later()) for key, later in children.items())
            if metadata is not None:
                state._metadata = metadata  # type: ignore[attr-defined]
            module.load_state_dict(state, strict=strict)

        return load

    def _optimizer(self, saved: Any, optimizer: Any, name: str) -> Callable[[], None]:
        """Fill the state there is in place, and make what a fresh optimizer has not yet."""
        now = optimizer.state_dict()
        counts = [_group_sizes(state) for state in (now, saved)]
        if counts[0] != counts[1]:
            self._problems.different.append(
                f"{self._path(name)} has groups of {counts[0]} parameters here and of "
                f"{counts[1]} in the checkpoint"
            )
            return lambda: None
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        of_number = dict(zip(numbers, parameters, strict=True))

        def allocate(ref: TensorRef, place: str) -> Any:
            if ref.kind == "tensor" and not place.endswith(".step"):
                parts = place[len(name) + 1 if name else 0 :].split(".")
                number = int(parts[1]) if len(parts) > 2 and parts[1].isdecimal() else None
                parameter = of_number.get(number)
                record = self._record(ref.name)
                if parameter is not None and tuple(parameter.shape) == record.shape:
                    return _like(parameter, record.dtype)
            return self._allocate(ref, place)

        body = self._template(saved, now, name, allocate, exact=True)
        return lambda: optimizer.load_state_dict(body())

    def _template(
        self,
        saved: Any,
        here: Any,
        name: str,
        allocate: Callable[[TensorRef, str], Any],
        *,
        exact: bool = False,
    ) -> Later:
        """Build what was saved anew, with the tensors that ``here`` has in the same places."""
        if type(saved) is TensorRef:
            usable = here is not ABSENT and self._fits(saved, here, name)
            if not usable and not (exact and _is_elements(here)):
                here = allocate(saved, name)
            return self._tensor(saved, here, name)
        if type(saved) is StatefulRef:
            return self._stateful(saved, here, name)
        if not has_refs(saved):
            return lambda: saved
        if isinstance(saved, dict):
            mapping = here if isinstance(here, Mapping) else {}
            children = {
                key: self._template(
                    item, mapping.get(key, ABSENT), join(name, key), allocate, exact=exact
                )
                for key, item in saved.items()
            }
            kind = type(saved)
            metadata = getattr(saved, "_metadata", None)

            def build() -> Any:
                made = kind((key, later()) for key, later in children.items())
                if metadata is not None:
                    made._metadata = metadata  # type: ignore[attr-defined]
                return made

            return build
        held = here if isinstance(here, (list, tuple)) else ()
        items = [
            self._template(
                item,
                held[at] if at < len(held) else ABSENT,
                join(name, at),
                allocate,
                exact=exact,
            )
            for at, item in enumerate(saved)
        ]
        return lambda: type(saved)(later() for later in items)

    def _tensor(self, saved: TensorRef, here: Any, name: str) -> Later:
        """Fill ``here``, or a new tensor if the program has none there."""
        if self._wanted is not None and not self._wanted(saved.name):
            return lambda: here
        if here is ABSENT or here is None:
            here = self._allocate(saved, name)
        shard = arrays.shard_of(here, self._path(name), self._places)
        record = self._record(saved.name)
        if shard is None:
            self._differs(name, kind_of(here), describe(record.dtype, record.shape))
        elif (shard.dtype, shard.shape) != (record.dtype, record.shape):
            self._differs(
                name, describe(shard.dtype, shard.shape), describe(record.dtype, record.shape)
            )
        else:
            self._fill(record, shard, name)
        return lambda: here

    def _fill(self, record: TensorRecord, shard: Shard, name: str) -> None:
        if shard.kind == "array" and not shard.local.flags.writeable:
            self._problems.other.append(f"{self._path(name)} is a read-only array")
            return
        memory = arrays.identity(shard)
        before = self._filled.get(memory) if memory is not None else None
        if before is not None and before.memory == record.memory:
            return
        if before is not None:
            self._problems.other.append(
                f"{self._path(name)} and {before.item}/{before.name} are one tensor here and "
                "two in the checkpoint"
            )
        self._filled[memory] = record
        self._filler.add(self._sources.of(record, shard.offsets, shard.lengths), shard)

    def _fits(self, saved: TensorRef, here: Any, name: str) -> bool:
        shard = (
            arrays.shard_of(here, self._path(name), self._places) if _is_elements(here) else None
        )
        record = self._record(saved.name)
        if shard is None:
            return False
        return (shard.dtype, shard.shape) == (record.dtype, record.shape)

    def _allocate(self, ref: TensorRef, _name: str) -> Any:
        """Return a new tensor or array in main memory, as large as was saved."""
        record = self._record(ref.name)
        # Finding the bytes first bounds what is allocated by what is stored.
        self._sources.of(record, (0,) * len(record.shape), record.shape)
        try:
            if ref.kind == "array":
                import numpy as np

                return np.empty(record.shape, np.dtype(record.dtype.removeprefix("numpy:")))
            return _empty(record)
        except (ValueError, TypeError, RuntimeError, MemoryError):
            raise CorruptError(
                f"{self._path(record.name)} is no {ref.kind} of {record.dtype}"
            ) from None

    def _record(self, name: str) -> TensorRecord:
        return self._item.tensors[self._item.aliases.get(name, name)]

    def _wants(self, name: str, saved: Any) -> bool:
        """Tell whether any of ``saved`` is asked for."""
        if self._wanted is None:
            return True
        return any(self._wanted(ref.name) for ref in refs_of(saved))

    def _holds_live(self, value: Any) -> bool:
        """Tell whether replacing ``value`` would lose tensors or objects of the program."""
        if _is_elements(value):
            # Records and arrays of objects are saved as plain values, and replaced like them.
            return arrays.shard_of(value, self._item.name, self._places) is not None
        if live.is_stateful(value):
            return True
        if isinstance(value, Mapping):
            return any(self._holds_live(item) for item in value.values())
        return isinstance(value, (list, tuple)) and any(self._holds_live(item) for item in value)

    def _differs(self, name: str, here: str, there: str) -> None:
        self._problems.different.append(
            f"{self._path(name)} is {here} here and {there} in the checkpoint"
        )

    def _path(self, name: str) -> str:
        return f"{self._item.name}/{name}" if name else self._item.name


def _empty(record: TensorRecord) -> Any:
    dtype = encoding.torch_dtype(record.dtype)
    import torch

    return torch.empty(record.shape, dtype=dtype)


def _like(parameter: Any, dtype: str) -> Any:
    import torch

    with torch.no_grad():
        return torch.empty_like(parameter, dtype=encoding.torch_dtype(dtype), requires_grad=False)


def _is_elements(value: Any) -> bool:
    return arrays.is_tensor(value) or type(value).__name__ == "ndarray"


def _group_sizes(state: Any) -> list[int] | None:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list):
        return None
    return [len(group["params"]) for group in groups if isinstance(group, dict)]
