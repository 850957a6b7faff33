"""A checkpoint back into the live training state: checked as a whole, then read in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from envstore.checkpoint import live
from envstore.checkpoint.errors import StateMismatchError
from envstore.checkpoint.filling import Filler
from envstore.checkpoint.layout import Tree
from envstore.checkpoint.matching import Later, Matcher, Problems
from envstore.checkpoint.sources import Sources
from envstore.checkpoint.structure import ABSENT, SavedStructure
from envstore.checkpoint.table import ItemRecord
from envstore.errors import UsageError


@dataclass(frozen=True, slots=True)
class Applied:
    """What was restored: the step of the checkpoint, the items, and how many bytes were read."""

    step: int | None
    items: tuple[str, ...]
    bytes: int


def apply(
    state: MutableMapping[str, Any],
    tree: Tree,
    *,
    rank: int = 0,
    world_size: int = 1,
    only: Collection[str] | None = None,
    strict: bool = True,
    trusted: bool = False,
) -> Applied:
    """Restore ``state`` from the checkpoint in ``tree``, bit by bit.

    Tensors and arrays are filled in place, objects get their state by ``load_state_dict``, plain
    values are replaced in ``state`` and in the mappings and lists in it. ``only`` names items, or
    tensors of items as ``model/layers.0.*``; nothing else is touched or read. ``strict`` demands
    that the state and the checkpoint hold the same items, keys and tensors; what both have must
    agree in dtype and shape always. ``trusted`` allows pickled objects.

    A tensor that was saved in shards, or is to be restored in shards (DTensor), is put together
    from what intersects. Raises, before anything is changed, ``StateMismatchError`` with names,
    ``UntrustedObjectError``, ``RanksDisagreeError``, ``CorruptError`` and ``UsageError``; and the
    errors of the tree while it reads, after which the tensors hold anything.
    """
    if not isinstance(state, MutableMapping):
        raise UsageError("the state cannot take values", hint="pass a dict")
    sources = Sources(tree, rank, world_size)
    table = sources.own
    problems = Problems()
    filler = Filler()
    filled: dict[Any, Any] = {}
    finishing: list[tuple[str, Later]] = []
    for item, wanted in _choose(state, table.items, only, strict, problems):
        reason = sources.check_item(item)
        if reason is not None:
            if strict:
                problems.other.append(reason)
            continue
        decoder = SavedStructure(item, tree, trusted=trusted, values=wanted is None)
        matcher = Matcher(
            item, sources, filler, problems, strict=strict, wanted=wanted, filled=filled
        )
        later = matcher.value(decoder.decode(item.value), state.get(item.name, ABSENT))
        finishing.append((item.name, later))
    if not problems.message():
        problems.other += sources.check_alike()
    message = problems.message()
    if message:
        raise StateMismatchError(
            f"the state does not fit the checkpoint: {message}",
            hint="only=[...] restores the items that fit",
        )
    filler.read(tree)
    # What loading an object draws from the random generators must not count.
    finishing.sort(key=lambda entry: isinstance(state.get(entry[0]), live.Rng))
    for name, later in finishing:
        found = later()
        if found is not state.get(name, ABSENT):
            state[name] = found
    step = table.facts.get("step")
    return Applied(
        step if isinstance(step, int) else None,
        tuple(name for name, _ in finishing),
        filler.size,
    )


def _names(only: object) -> list[str]:
    listed = [only] if isinstance(only, str) else only
    if not isinstance(listed, Collection) or not all(isinstance(one, str) for one in listed):
        raise UsageError(f"only= is {only!r:.80}", hint="names of items, as in ['model']")
    return list(listed)


def _choose(
    state: Mapping[str, Any],
    saved: Mapping[str, ItemRecord],
    only: Collection[str] | None,
    strict: bool,
    problems: Problems,
) -> list[tuple[ItemRecord, Callable[[str], bool] | None]]:
    """Return the items to restore, each with which of its tensors (``None``: all of it)."""
    if only is None:
        if strict:
            problems.missing += [name for name in state if name not in saved]
        return [(item, None) for name, item in saved.items() if strict or name in state]
    patterns: dict[str, list[str] | None] = {}
    for entry in _names(only):
        name, _, pattern = entry.partition("/")
        if entry in saved:
            patterns[entry] = None
        elif name in saved and pattern:
            listed = patterns.setdefault(name, [])
            names = [*saved[name].tensors, *saved[name].aliases]
            if not any(fnmatchcase(tensor, pattern) for tensor in names):
                problems.other.append(f"the checkpoint has no tensor {entry}")
            if listed is not None:
                listed.append(pattern)
        else:
            raise UsageError(
                f"the checkpoint has no item {entry!r}",
                hint=f"it has {', '.join(saved) or 'none'}",
            )
    return [(saved[name], _wanted(listed)) for name, listed in patterns.items()]


def _wanted(patterns: list[str] | None) -> Callable[[str], bool] | None:
    if patterns is None:
        return None
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)
