"""Composes an environment from stored packages: whose file is at which path.

Packages come in the order of the lock and what comes later wins a path, as it would if they were
installed one after another. Nothing is read but what the stored packages say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from envstore.errors import UsageError
from envstore.store.manifest import Entry, sort_key
from envstore.store.source import Kind

_CACHE = b"/__pycache__/"


@dataclass(frozen=True, slots=True)
class Clobber:
    """A path that several packages have with different content: ``winner`` is who put it there.

    Both are numbers of packages, in the order of the lock.
    """

    path: bytes
    winner: int
    loser: int


@dataclass(slots=True)
class Composition:
    """Entries by path, and by path the number of the package that each comes from.

    ``names`` are what the packages are called; -1 is nobody's number.
    """

    names: Sequence[str]
    entries: dict[bytes, Entry] = field(default_factory=dict)
    owners: dict[bytes, int] = field(default_factory=dict)
    clobbers: list[Clobber] = field(default_factory=list)

    def sorted(self) -> list[Entry]:
        """Return the entries in the order of a manifest."""
        return sorted(self.entries.values(), key=lambda entry: sort_key(entry.path))

    def add(self, owner: int, entry: Entry) -> None:
        """Put ``entry`` of the package ``owner`` where it belongs, over what is there.

        Raises ``UsageError`` if only one of the two is a directory.
        """
        path = entry.path
        old = self.entries.get(path)
        if old is not None and Kind.DIRECTORY in (entry.kind, old.kind):
            if entry.kind is not old.kind:
                self._refuse(path, *sorted((owner, self.owners[path])))
            return
        if old is not None and not _same(old, entry):
            self.clobbers.append(Clobber(path, owner, self.owners[path]))
        self.entries[path] = entry
        self.owners[path] = owner

    def complete(self) -> None:
        """Add the directories that no package lists. Raises ``UsageError`` as ``add`` does."""
        missing: set[bytes] = set()
        for path in self.entries:
            parent = path.rpartition(b"/")[0]
            while parent and parent not in missing:
                above = self.entries.get(parent)
                if above is not None and above.kind is Kind.DIRECTORY:
                    break
                if above is not None:
                    self._refuse(parent, self.owners[path], self.owners[parent])
                missing.add(parent)
                parent = parent.rpartition(b"/")[0]
        for path in missing:
            self.add(-1, Entry(path, Kind.DIRECTORY))

    def _refuse(self, path: bytes, one: int, other: int) -> NoReturn:
        names = [self.names[number] if number >= 0 else "envstore" for number in (one, other)]
        raise UsageError(
            f"{os.fsdecode(path)} is a directory in only one of {names[0]} and {names[1]}",
            hint="these packages cannot be in one environment",
        )


def compose(packages: Sequence[Sequence[Entry]], names: Sequence[str]) -> Composition:
    """Return what the ``packages``, called ``names``, are together.

    Raises ``UsageError`` where one has a directory and another something else: then files of
    the one would lie in the other's.
    """
    composed = Composition(names)
    for number, entries in enumerate(packages):
        for entry in entries:
            composed.add(number, entry)
    composed.complete()
    for path in list(_stale_bytecode(composed)):
        del composed.entries[path], composed.owners[path]
    return composed


def _same(one: Entry, other: Entry) -> bool:
    return (one.kind, one.executable, one.refs, one.target, one.relocation) == (
        other.kind, other.executable, other.refs, other.target, other.relocation,
    )  # fmt: skip


def _stale_bytecode(composed: Composition) -> Iterator[bytes]:
    """Yield the bytecode of sources that another package replaced.

    Nothing compares bytecode with its source, so it would be run instead.
    """
    for path, owner in composed.owners.items():
        at = path.rfind(_CACHE)
        if at < 0 or not path.endswith(b".pyc"):
            continue
        stem = path[at + len(_CACHE) :].partition(b".")[0]
        if composed.owners.get(b"%b/%b.py" % (path[:at], stem), owner) != owner:
            yield path
