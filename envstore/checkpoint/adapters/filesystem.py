"""The fsspec scheme ``envstore://``: trees of a store as files, for whatever speaks fsspec.

``envstore://namespace/name/tag/path`` is a file of the tree that the ref ``namespace/name:tag``
names, in the store of ``storage_options={"store": URL}``, else of ``ENVSTORE_URL``, else the
user's own. Reading fetches the ranges that are asked for, through the node's cache. Contents are
stored while they are written; the tree changes when a file is closed, or all at once when a
transaction ends. What PyTorch writes as a distributed checkpoint (``*.distcp``) joins the tree
when its ``.metadata`` does, so that nobody meets half a checkpoint, whoever dies; at
``namespace/run/step-<n>`` it is then a checkpoint of the run ``namespace/run``.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.transaction import Transaction

from envstore.checkpoint.adapters.drafts import Draft, Drafts
from envstore.checkpoint.adapters.fsfiles import EnvstoreFile, TreeTransaction
from envstore.checkpoint.adapters.fspaths import (
    Info,
    as_os_errors,
    at_and_below,
    directory_info,
    draft_info,
    drop,
    info_of,
    is_in,
    missing,
    name_of,
    place,
    rename,
    span,
    split,
    step_of_tag,
)
from envstore.checkpoint.adapters.recording import Recorder
from envstore.checkpoint.adapters.reftrees import RefTrees, View
from envstore.checkpoint.adapters.sharing import Hold, Sharing
from envstore.checkpoint.adapters.storing import StoredFile, Upload
from envstore.checkpoint.layout import RunName
from envstore.checkpoint.protocol import RunStore
from envstore.errors import (
    UsageError,
)
from envstore.store.cache import default_cache
from envstore.store.manifest import Entry
from envstore.store.objects.url import default_store
from envstore.store.refs import RefName, list_refs
from envstore.store.repository import Repository
from envstore.store.source import Kind

BLOCK = 4 << 20

# Names of torch.distributed.checkpoint.filesystem: with one metadata file for all ranks, and
# with one for each.
_COMPLETION = re.compile(rb"(?:__(\d+))?\.metadata")
_INCOMPLETE = re.compile(rb".*\.distcp|(?:__\d+)?\.metadata\.tmp", re.DOTALL)


class EnvstoreFileSystem(AbstractFileSystem):
    """See the module. Every method raises ``OSError``s with the store's own message."""

    protocol = "envstore"
    root_marker = ""

    def __init__(self, store: str | None = None, **options: Any) -> None:
        """Use the store at the URL ``store``; by default as every command does."""
        super().__init__(store=store, **options)
        self.store = store
        self._opened: dict[str, tuple[RefTrees, Drafts, Sharing]] = {}
        self._writing = threading.local()
        self._opening = threading.Lock()
        self._process = os.getpid()

    @property
    def transaction_type(self) -> type[Transaction]:
        """The class of ``transaction``."""
        return TreeTransaction

    @property
    def fsid(self) -> str:
        """Names the store."""
        return f"envstore-{self._url()}"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a directory, or the one file at ``path``."""
        with as_os_errors(path):
            found = self._list(self._strip_protocol(path))
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> Info:
        """Describe a file (with ``digest``, its BLAKE3) or a directory."""
        path = self._strip_protocol(path)
        with as_os_errors(path):
            ref, inner = split(path)
            if ref is None:
                self._list(path)
                return directory_info(path)
            view = self._trees.view(ref)
            entry = None if view is None else view.entries.get(inner)
            if view is not None and (entry is not None or not inner):
                return directory_info(path) if entry is None else info_of(path, entry, view)
            draft = self._drafts.find(ref, inner) if inner else None
            if draft is not None:
                return draft_info(path, draft)
            if self._drafts.below(ref, inner):
                return directory_info(path)
            raise missing(path)

    def created(self, path: str) -> Any:
        """Return when a file became part of its tree, as a ``datetime``."""
        return datetime.fromisoformat(self.info(path)["created"])

    modified = created

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Return the bytes of a file from ``start`` to ``end``, negative ones from its end."""
        data: bytes = self.cat_ranges([path], [start], [end], on_error="raise")[0]
        return data

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Return a range of each path, those of one file fetched together."""
        count = len(paths)
        firsts = list(starts) if isinstance(starts, (list, tuple)) else [starts] * count
        lasts = list(ends) if isinstance(ends, (list, tuple)) else [ends] * count
        groups: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            groups.setdefault(self._strip_protocol(path), []).append(number)
        found: list[Any] = [b""] * count
        for path, numbers in groups.items():
            try:
                with as_os_errors(path):
                    view, entry = self._find(path)
                    spans = [span(firsts[n], lasts[n], entry.size) for n in numbers]
                    for number, data in zip(numbers, view.read(entry.path, spans), strict=True):
                        found[number] = data
            except OSError as error:
                if on_error == "raise":
                    raise
                for number in numbers:
                    found[number] = error
        return found

    def rm_file(self, path: str) -> None:
        """Remove one file."""
        self._remove([self._strip_protocol(path)])

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, and directories if ``recursive``; those of one tree at once."""
        with as_os_errors(str(path)):
            found = self.expand_path(path, recursive=recursive, maxdepth=maxdepth)
            self._remove(found)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file without reading it."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(path1):
            return
        with as_os_errors(path1), self._inside():
            view, entry = self._find(path1)
            ref, inner = place(path2)
            copy = StoredFile(entry, {}).at(inner)
            self._trees.change(ref, lambda _: None, [copy], bases=[view.name])

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any
    ) -> None:
        """Rename a file or a directory; within one tree at once."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if path1 == path2:
            return
        with as_os_errors(path1), self._inside():
            (ref, inner), (target, new) = place(path1), place(path2)
            draft = self._drafts.find(ref, inner)
            if draft is not None:
                if ref != target:
                    raise UsageError(f"{path1} is not complete and cannot leave its tree")
                self._land(ref, [self._drafts.load(draft).at(new)])
                self._drafts.remove(ref, draft.path)
                return
            view = self._trees.view(ref)
            if view is None or inner not in view.entries:
                raise missing(path1)
            if ref == target:
                self._trees.change(ref, lambda entries: rename(entries, inner, new))
                return
            moved = [
                StoredFile(entry, {}).at(new + entry.path[len(inner) :])
                for entry in at_and_below(view.entries, inner)
                if entry.kind is not Kind.DIRECTORY
            ]
            self._trees.change(target, lambda _: None, moved, bases=[view.name])
            self._trees.change(ref, lambda entries: drop(entries, {inner}))

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Do nothing: a directory is there as long as a file is in it."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing, as ``mkdir``."""

    def rmdir(self, path: str) -> None:
        """Do nothing, as ``mkdir``."""

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> EnvstoreFile:
        if mode == "ab":
            raise OSError(errno.EINVAL, "cannot be appended to; write it anew", path)
        with as_os_errors(path):
            if mode == "xb" and self.exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            return EnvstoreFile(
                self, path, mode, block_size or BLOCK, autocommit,
                cache_options=cache_options, **options,
            )  # fmt: skip

    def close(self) -> None:
        """Release the connections to stores; what is used later opens them again."""
        with self._opening:
            opened, self._opened = self._opened, {}
        for trees, _, _ in opened.values():
            trees.repository.close()

    # What follows speaks of refs and raises the store's own errors.

    @property
    def _trees(self) -> RefTrees:
        """The trees: within a session while this thread writes in one."""
        inside: tuple[RefTrees, Drafts] | None = getattr(self._writing, "inside", None)
        return self._store()[0] if inside is None else inside[0]

    @property
    def _drafts(self) -> Drafts:
        inside: tuple[RefTrees, Drafts] | None = getattr(self._writing, "inside", None)
        return self._store()[1] if inside is None else inside[1]

    def _hold(self) -> Hold:
        """Take part in the session of what is written now."""
        return self._store()[2].hold()

    @contextmanager
    def _inside(self, hold: Hold | None = None) -> Iterator[None]:
        """Write in a session on this thread: that of ``hold``, or the one there is."""
        if getattr(self._writing, "inside", None) is not None:
            yield
            return
        own = self._hold() if hold is None else hold
        try:
            self._writing.inside = (self._store()[0].within(own.repository), Drafts(own.repository))
            yield
        finally:
            self._writing.inside = None
            if hold is None:
                own.release()

    def _store(self) -> tuple[RefTrees, Drafts, Sharing]:
        url = self._url()
        if os.getpid() != self._process:
            # After a fork, as in the workers of a data loader, connections are the parent's.
            self._opened, self._opening, self._process = {}, threading.Lock(), os.getpid()
            self._writing = threading.local()
        with self._opening:
            if url not in self._opened:
                repository = Repository.open(url, default_cache())
                self._opened[url] = RefTrees(repository), Drafts(repository), Sharing(repository)
            return self._opened[url]

    def _url(self) -> str:
        return self.store or os.environ.get("ENVSTORE_URL") or str(default_store())

    def _find(self, path: str) -> tuple[View, Entry]:
        """Return the tree and the file at ``path``. Raises ``NotFoundError``."""
        ref, inner = split(path)
        if ref is not None and inner:
            view = self._trees.view(ref)
            entry = None if view is None else view.file(inner)
            if view is not None and entry is not None:
                return view, entry
            draft = self._drafts.find(ref, inner)
            if draft is not None:
                view = self._trees.at(draft.snapshot)
                return view, view.entries[draft.path]
        raise missing(path)

    def _list(self, path: str) -> list[Info]:
        ref, inner = split(path)
        if ref is None:
            return self._list_refs(path)
        view = self._trees.view(ref)
        found: dict[str, Info] = {}
        start = inner.decode() + "/" if inner else ""
        for draft in self._drafts.below(ref, inner):
            name, deeper, _ = draft.path.decode()[len(start) :].partition("/")
            full = f"{path}/{name}"
            found[full] = directory_info(full) if deeper else draft_info(full, draft)
        if view is not None:
            entry = view.entries.get(inner)
            if entry is not None and entry.kind is not Kind.DIRECTORY:
                return [info_of(path, entry, view)]
            for child in view.children.get(inner, ()):
                full = f"{path}/{os.fsdecode(child.path.rpartition(b'/')[2])}"
                found[full] = info_of(full, child, view)
        elif not found:
            draft_here = self._drafts.find(ref, inner) if inner else None
            if draft_here is not None:
                return [draft_info(path, draft_here)]
        if not found and (view is None or (inner and inner not in view.entries)):
            raise missing(path)
        return sorted(found.values(), key=lambda info: str(info["name"]))

    def _list_refs(self, path: str) -> list[Info]:
        """List namespaces, the names of one or the tags of a name."""
        above = path.split("/") if path else []
        names = set()
        for ref in list_refs(self._trees.repository.objects, "".join(f"{p}/" for p in above)):
            parts = (ref.namespace, ref.name, ref.tag)
            names.add("/".join(parts[: len(above) + 1]))
        if not names and above:
            raise missing(path)
        return [directory_info(name) for name in sorted(names)]

    def _upload(self, path: str, hold: Hold) -> tuple[RefName, Upload]:
        """Begin to store the file at ``path``. Raises ``UsageError`` if none can be there."""
        ref, inner = place(path)

        def bases() -> list[bytes]:
            view = self._trees.view(ref)
            return [] if view is None else [view.name]

        return ref, Upload(hold.repository, inner, bases)

    def _land(self, ref: RefName, files: Sequence[StoredFile]) -> None:
        """Make stored files part of their tree, or drafts of those that wait for others."""
        waiting = [file for file in files if _INCOMPLETE.fullmatch(name_of(file.entry.path))]
        for file in waiting:
            self._drafts.put(ref, file)
        ready = [file for file in files if file not in waiting]
        if not ready:
            return
        drafts = [draft for file in ready for draft in self._completed_by(ref, file.entry.path)]
        drafts = [draft for draft in drafts if draft.path not in {f.entry.path for f in ready}]
        complete = any(_COMPLETION.fullmatch(name_of(file.entry.path)) for file in ready)
        changed = self._trees.change(
            ref,
            lambda _: None,
            [*map(self._drafts.load, drafts), *ready],
            kind="checkpoint" if complete else "dir",
        )
        for draft in drafts:
            self._drafts.remove(ref, draft.path)
        if changed.snapshot is not None and any(f.entry.path == b".metadata" for f in ready):
            self._record(ref, changed.snapshot)

    def _record(self, ref: RefName, name: bytes) -> None:
        """Have a distributed checkpoint at ``namespace/run/step-<n>`` be one of the run's."""
        step = step_of_tag(ref.tag)
        if step is not None:
            repository = self._trees.repository
            snapshot = repository.snapshot(name)
            saved = datetime.now(UTC).isoformat(timespec="microseconds")
            run = RunStore(repository, RunName(ref.namespace, ref.name))
            Recorder(run).commit(step, name, saved, size=snapshot.logical_bytes)

    def _unrecord(self, ref: RefName, name: bytes) -> None:
        """Have the run forget the checkpoint that was removed as a tree."""
        step = step_of_tag(ref.tag)
        if step is not None:
            run = RunStore(self._trees.repository, RunName(ref.namespace, ref.name))
            for commit in run.commits():
                if commit.step == step and commit.snapshot == name:
                    run.remove(commit)

    def _completed_by(self, ref: RefName, path: bytes) -> list[Draft]:
        match = _COMPLETION.fullmatch(name_of(path))
        if match is None:
            return []
        above = path.rpartition(b"/")[0]
        start = b"__%b_" % match[1] if match[1] else b""
        return [
            draft
            for draft in self._drafts.below(ref, above)
            if name_of(draft.path).startswith(start) and draft.path.endswith(b".distcp")
        ]

    def _remove(self, paths: Sequence[str]) -> None:
        by_ref: dict[RefName, set[bytes]] = {}
        with as_os_errors(", ".join(paths)):
            for path in paths:
                ref, inner = split(path)
                if ref is None:
                    raise UsageError(f"{path} is not one tree", hint="remove its trees one by one")
                by_ref.setdefault(ref, set()).add(inner)
            with self._inside():
                for ref, inners in by_ref.items():
                    self._remove_from(ref, inners)

    def _remove_from(self, ref: RefName, inners: set[bytes]) -> None:
        drafts = {draft.path for draft in self._drafts.below(ref)}
        gone = {path for path in drafts if is_in(path, inners)}
        for path in gone:
            self._drafts.remove(ref, path)
        # A checkpoint that is being overwritten stays whole until its successor takes its place:
        # PyTorch removes the old .metadata first, and then renames the new one to that.
        kept = {
            path
            for path in inners
            if _COMPLETION.fullmatch(name_of(path)) and path + b".tmp" in drafts
        }
        inners = inners - kept
        view = self._trees.view(ref)
        present = view is not None and (
            b"" in inners or any(path in view.entries for path in inners)
        )
        if present and inners:
            changed = self._trees.change(ref, lambda entries: drop(entries, inners))
            if changed.snapshot is None and changed.before is not None:
                self._unrecord(ref, changed.before)
        elif not gone and not kept:
            raise missing(", ".join(os.fsdecode(path) for path in inners))
