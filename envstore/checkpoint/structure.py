"""The saved structure of an item: values as they were, tensors and objects as references."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from envstore.checkpoint import encoding
from envstore.checkpoint.errors import CheckpointError, UntrustedObjectError
from envstore.checkpoint.layout import Tree
from envstore.checkpoint.table import ItemRecord


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor or array (``kind``) of a saved structure, by its name in the item."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class StatefulRef:
    """The saved state of an object, and the class it had."""

    kind: str
    value: Any


class _Absent:
    """What stands where the program has nothing; it tells this from ``None``."""


ABSENT = _Absent()


class SavedStructure(encoding.Decoder):
    """Decodes the structure of an item; tensors become references, objects are unpickled.

    ``trusted`` allows that; ``values`` is whether they are wanted at all.
    """

    def __init__(self, item: ItemRecord, tree: Tree, *, trusted: bool, values: bool) -> None:
        super().__init__(f"the state of {item.name!r}")
        self._item = item
        self._tree = tree
        self._trusted = trusted
        self._values = values

    def other(self, body: dict[str, Any], name: str, depth: int) -> Any:
        """Return a reference or an object. Raises ``UntrustedObjectError``."""
        tag = body["$"]
        number = body.get("n")
        if tag in ("tensor", "array") and isinstance(number, str):
            if number in self._item.tensors or number in self._item.aliases:
                return TensorRef(tag, number)
        elif tag == "stateful" and isinstance(body.get("c"), str):
            return StatefulRef(body["c"][:200], self.decode(body.get("v"), name, depth + 1))
        elif tag == "object" and type(number) is int and 0 <= number < len(self._item.objects):
            return self._object(number, name) if self._values else None
        self.corrupt(name)

    def _object(self, number: int, name: str) -> Any:
        what = f"{self._item.name}/{name}" if name else self._item.name
        if not self._trusted:
            raise UntrustedObjectError(
                f"{what} is a pickled object, which could run any program when it is loaded",
                hint="trusted=True restores it, if you trust whoever wrote the checkpoint",
            )
        data = self._tree.read(self._item.objects[number])
        try:
            return pickle.loads(data)  # noqa: S301 - the caller trusts it, and its bytes are verified
        except Exception as error:  # the constructors of any class may raise anything
            raise CheckpointError(
                f"{what} cannot be unpickled here: {type(error).__name__}: {error}",
                hint="make its class importable, or leave the item out with only=",
            ) from error


def kind_of(value: Any) -> str:
    """Return what ``value`` is, for people."""
    if type(value) is TensorRef:
        return value.kind
    if type(value) is StatefulRef:
        return f"the state of {value.kind}"
    return encoding.type_name(type(value)).removeprefix("builtins.")


def refs_of(saved: Any) -> list[TensorRef]:
    """Return all tensors that a saved structure refers to."""
    if type(saved) is TensorRef:
        return [saved]
    if type(saved) is StatefulRef:
        return refs_of(saved.value)
    if isinstance(saved, dict):
        return [ref for item in saved.values() for ref in refs_of(item)]
    if type(saved) in (list, tuple):
        return [ref for item in saved for ref in refs_of(item)]
    return []


def has_refs(saved: Any) -> bool:
    """Tell whether a saved structure refers to any tensor or object with a state."""
    if type(saved) is TensorRef or type(saved) is StatefulRef:
        return True
    if isinstance(saved, dict):
        return any(has_refs(item) for item in saved.values())
    return type(saved) in (list, tuple) and any(has_refs(item) for item in saved)
