"""The trees that refs name, read and changed file by file.

A change reads the tree that the ref names now, stores the changed one and moves the ref by
compare-and-swap; whoever comes second does it again on top of the first. So a reader sees a tree
before a change or after it.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from envstore.checkpoint.adapters.storing import (
    StoredFile,
    save_checkpoint_snapshot,
    store_entries,
)
from envstore.checkpoint.layout import Want
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import ConflictError, UsageError
from envstore.store.manifest import Entry
from envstore.store.refs import Ref, RefName, move_ref, try_read
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot
from envstore.store.source import Kind

_KEPT = 8
_TRIES = 100
_PAUSE = 0.02
_HOPS = 40

Edit = Callable[[dict[bytes, Entry]], None]
"""Changes the entries of a tree in place; called again when somebody else was first."""


class View:
    """One snapshot's tree. Safe to share between threads; one reads at a time."""

    def __init__(self, repository: Repository, name: bytes) -> None:
        self.name = name
        self.snapshot: Snapshot = repository.snapshot(name)
        self._repository = repository
        self._lock = threading.Lock()

    @cached_property
    def entries(self) -> dict[bytes, Entry]:
        """Every entry by its path."""
        return {entry.path: entry for entry in self._repository.entries(self.snapshot.manifest)}

    @cached_property
    def children(self) -> dict[bytes, list[Entry]]:
        """The entries of each directory by its path, the root being ``b""``."""
        found: dict[bytes, list[Entry]] = {b"": []}
        for entry in self.entries.values():
            found.setdefault(entry.path.rpartition(b"/")[0], []).append(entry)
            if entry.kind is Kind.DIRECTORY:
                found.setdefault(entry.path, [])
        return found

    def file(self, path: bytes) -> Entry | None:
        """Return the file at ``path``, symbolic links followed inside the tree, or ``None``."""
        entry = self.entries.get(path)
        for _ in range(_HOPS):
            if entry is None or entry.kind is not Kind.SYMLINK:
                break
            above = entry.path.rpartition(b"/")[0]
            entry = self.entries.get(os.path.normpath(os.path.join(above, entry.target)))
        return entry if entry is not None and entry.kind is Kind.FILE else None

    def read(self, path: bytes, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the ``(start, end)`` spans of a file, all fetched together and verified."""
        buffers = [bytearray(end - start) for start, end in spans]
        wants = [
            Want(os.fsdecode(path), start, memoryview(buffer))
            for (start, _), buffer in zip(spans, buffers, strict=True)
            if buffer
        ]
        with self._lock:
            self._tree.read_into(wants)
        return [bytes(buffer) for buffer in buffers]

    @cached_property
    def _tree(self) -> SnapshotTree:
        return SnapshotTree(self._repository, self.name)


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change made of a ref: the new snapshot, ``None`` if nothing is left of the tree."""

    snapshot: bytes | None
    before: bytes | None


class RefTrees:
    """Trees by ref. Blocking; safe to share between threads."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._views: OrderedDict[bytes, View] = OrderedDict()
        self._lock = threading.Lock()

    def within(self, repository: Repository) -> RefTrees:
        """Return these trees, with what is known of them, in the session of ``repository``."""
        found = copy.copy(self)
        found.repository = repository
        return found

    def view(self, ref: RefName) -> View | None:
        """Return the tree that ``ref`` names now, ``None`` if there is no such ref. One request."""
        found = try_read(self.repository.objects, ref)
        return None if found is None else self.at(found[0].snapshot)

    def at(self, name: bytes) -> View:
        """Return the tree of a snapshot, of which the last few are kept."""
        with self._lock:
            view = self._views.get(name)
            if view is not None:
                self._views.move_to_end(name)
                return view
        view = View(self.repository, name)
        with self._lock:
            self._views[name] = view
            while len(self._views) > _KEPT:
                self._views.popitem(last=False)
        return view

    def change(
        self,
        ref: RefName,
        edit: Edit,
        files: Sequence[StoredFile] = (),
        *,
        bases: Sequence[bytes] = (),
        kind: str = "dir",
    ) -> Changed:
        """Apply ``edit`` to the tree of ``ref``, then put ``files`` into it, and move the ref.

        ``bases`` are snapshots besides the present one that entries come from; ``kind`` is that
        of a new tree. A ref of which no file is left is removed. Raises ``ConflictError`` if
        others were first for too long, ``UsageError`` for environments, which are made from
        their lock.
        """
        objects = self.repository.objects
        for attempt in range(_TRIES):
            expected = try_read(objects, ref)
            before = None if expected is None else self.at(expected[0].snapshot)
            if before is not None and before.snapshot.kind == "env":
                raise UsageError(
                    f"{ref} is an environment, whose files follow from its lock",
                    hint="change the lock, or write to another ref",
                )
            entries = {} if before is None else dict(before.entries)
            edit(entries)
            for file in files:
                _check_place(entries, file.entry.path)
                entries[file.entry.path] = file.entry
            if not any(entry.kind is not Kind.DIRECTORY for entry in entries.values()):
                objects.delete(ref.key)
                return Changed(None, before.name if before else None)
            name = self._store(ref, entries, before, files, bases, kind)
            if before is not None and name == before.name:
                return Changed(name, name)
            if self._moved(ref, name, expected):
                return Changed(name, before.name if before else None)
            time.sleep(random.uniform(0, _PAUSE * min(attempt + 1, 20)))  # noqa: S311
        raise ConflictError(
            f"ref {ref} was moved by others {_TRIES} times in a row",
            hint="let fewer writers change one tree at once, or use a transaction",
        )

    def _moved(self, ref: RefName, name: bytes, expected: tuple[Ref, str] | None) -> bool:
        try:
            move_ref(self.repository.objects, ref, name, expected)
        except ConflictError:
            return False
        return True

    def _store(
        self,
        ref: RefName,
        entries: dict[bytes, Entry],
        before: View | None,
        files: Sequence[StoredFile],
        bases: Sequence[bytes],
        kind: str,
    ) -> bytes:
        parents = () if before is None else (before.name,)
        uniform = _uniform(entries.values(), dated=_is_dated(before))
        root = store_entries(self.repository, uniform, bases=(*parents, *bases), files=files)
        if before is not None and root.digest == before.snapshot.manifest:
            return before.name
        attributes = {}
        if before is not None:
            kind, attributes = before.snapshot.kind, dict(before.snapshot.attributes)
        if kind == "checkpoint":
            attributes["run"] = f"{ref.namespace}/{ref.name}"
        return save_checkpoint_snapshot(
            self.repository, root, parents, kind=kind, attributes=attributes
        )


def _check_place(entries: dict[bytes, Entry], path: bytes) -> None:
    """Refuse a file where a directory is, or below a file. Raises ``UsageError``."""
    found = entries.get(path)
    above = path
    while found is None and b"/" in above:
        above = above.rpartition(b"/")[0]
        found = entries.get(above)
        if found is not None and found.kind is Kind.DIRECTORY:
            return
    if found is not None and (above != path or found.kind is Kind.DIRECTORY):
        what = "a directory" if found.kind is Kind.DIRECTORY else "no directory"
        raise UsageError(f"cannot write {os.fsdecode(path)}: {os.fsdecode(above)} is {what}")


def _is_dated(before: View | None) -> bool:
    """Whether the entries of a tree have modes and times: all of one do, or none."""
    return before is not None and any(entry.mode is not None for entry in before.entries.values())


def _uniform(entries: Iterable[Entry], *, dated: bool) -> list[Entry]:
    now = time.time_ns()
    found = []
    by_path = {entry.path: entry for entry in entries}
    for entry in by_path.values():
        first = by_path.get(entry.link) if entry.link else None
        if entry.link and (first is None or first.digest != entry.digest):
            entry = replace(entry, link=b"")
        if not dated:
            entry = replace(entry, mode=None, mtime_ns=None)
        elif entry.mode is None:
            mode = 0o644 if entry.kind is Kind.FILE else 0o755
            entry = replace(entry, mode=mode, mtime_ns=now)
        found.append(entry)
    return found
