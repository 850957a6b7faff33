"""Composes an environment from stored packages: whose file is at which path.

Packages come in the order of the lock and what comes later wins a path, as it would if they were
installed one after another. Nothing is read but what the stored packages say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    """Entries by path, and by path the number of the package that each comes from."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    owners: dict[bytes, int] = field(default_factory=dict)
    clobbers: list[Clobber] = field(default_factory=list)

    def sorted(self) -> list[Entry]:
        """Return the entries in the order of a manifest."""
        return sorted(self.entries.values(), key=lambda entry: sort_key(entry.path))

    def add(self, owner: int, entry: Entry) -> None:
        """Put ``entry`` of the package ``owner`` where it belongs, over what is there."""
        path = entry.path
        old = self.entries.get(path)
        if old is not None and entry.kind is Kind.DIRECTORY and old.kind is Kind.DIRECTORY:
            return
        if old is not None and not _same(old, entry):
            self.clobbers.append(Clobber(path, owner, self.owners[path]))
        self.entries[path] = entry
        self.owners[path] = owner


def compose(packages: Sequence[Sequence[Entry]], names: Sequence[str]) -> Composition:
    """Return what the ``packages``, called ``names``, are together.

    Raises ``UsageError`` where one has a directory and another something else: then files of
    the one would lie in the other's.
    """
    composed = Composition()
    for number, entries in enumerate(packages):
        for entry in entries:
            composed.add(number, entry)
    _check_directories(composed, names)
    for path in list(_stale_bytecode(composed)):
        del composed.entries[path], composed.owners[path]
    return composed


def _same(one: Entry, other: Entry) -> bool:
    return (one.kind, one.executable, one.refs, one.target, one.relocation) == (
        other.kind, other.executable, other.refs, other.target, other.relocation,
    )  # fmt: skip


def _check_directories(composed: Composition, names: Sequence[str]) -> None:
    entries, owners = composed.entries, composed.owners
    missing: set[bytes] = set()
    for path in entries:
        parent = path.rpartition(b"/")[0]
        while parent and parent not in missing:
            above = entries.get(parent)
            if above is not None and above.kind is Kind.DIRECTORY:
                break
            if above is not None:
                raise UsageError(
                    f"{os.fsdecode(parent)} is a directory in {names[owners[path]]}, "
                    f"but not in {names[owners[parent]]}",
                    hint="these packages cannot be in one environment",
                )
            missing.add(parent)
            parent = parent.rpartition(b"/")[0]
    for path in missing:
        entries[path] = Entry(path, Kind.DIRECTORY)
        owners[path] = -1


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
