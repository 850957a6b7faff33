"""What differs between two trees, and how many bytes it makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from envstore.store.manifest import Entry, sort_key
from envstore.store.relocation import Relocation
from envstore.store.source import Kind


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs: ``old`` is ``None`` when added, ``new`` when removed."""

    path: bytes
    old: Entry | None
    new: Entry | None

    @property
    def status(self) -> str:
        """``added``, ``removed`` or ``changed``."""
        if self.old is None:
            return "added"
        return "removed" if self.new is None else "changed"

    @property
    def bytes(self) -> int:
        """By how much the logical size grew."""
        return (self.new.size if self.new else 0) - (self.old.size if self.old else 0)


def diff(old: Iterable[Entry], new: Iterable[Entry]) -> Iterator[Change]:
    """Yield the changes from ``old`` to ``new``, both in path order; holds nothing in memory.

    Content, kind, executable bit, link target, stored mode and how a file is relocated count; time
    stamps do not.
    """
    left, right = iter(old), iter(new)
    a, b = next(left, None), next(right, None)
    while a is not None or b is not None:
        if b is None or (a is not None and sort_key(a.path) < sort_key(b.path)):
            assert a is not None  # noqa: S101 - the loop's condition, for the type checker
            yield Change(a.path, a, None)
            a = next(left, None)
        elif a is None or sort_key(b.path) < sort_key(a.path):
            yield Change(b.path, None, b)
            b = next(right, None)
        else:
            if _facts(a) != _facts(b) or not _same_content(a, b):
                yield Change(a.path, a, b)
            a, b = next(left, None), next(right, None)


def _facts(entry: Entry) -> tuple[object, ...]:
    relocation = entry.relocation
    if relocation and entry.kind is Kind.FILE:
        relocation = Relocation.decode(relocation).nameless()
    return entry.kind, entry.executable, entry.target, entry.mode, relocation


def _same_content(one: Entry, other: Entry) -> bool:
    # The digests of a composed file and of one that is not say nothing of each other.
    return one.refs == other.refs if one.composed != other.composed else one.digest == other.digest
