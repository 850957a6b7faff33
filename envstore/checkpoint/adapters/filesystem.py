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

import contextlib
import errno
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile
from fsspec.transaction import Transaction

from envstore.checkpoint.adapters.drafts import Draft, Drafts
from envstore.checkpoint.adapters.recording import Recorder
from envstore.checkpoint.adapters.reftrees import RefTrees, View
from envstore.checkpoint.adapters.storing import StoredFile, Upload
from envstore.checkpoint.layout import RunName
from envstore.checkpoint.protocol import RunStore
from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from envstore.store.cache import default_cache
from envstore.store.manifest import Entry
from envstore.store.objects.url import default_store
from envstore.store.refs import RefName, is_part, list_refs
from envstore.store.repository import Repository
from envstore.store.source import Kind

BLOCK = 4 << 20

_ERRNO = (
    (NotFoundError, errno.ENOENT),
    (AccessDeniedError, errno.EACCES),
    (NoSpaceError, errno.ENOSPC),
    (UsageError, errno.EINVAL),
)
# Names of torch.distributed.checkpoint.filesystem: with one metadata file for all ranks, and
# with one for each.
_COMPLETION = re.compile(rb"(?:__(\d+))?\.metadata")
_INCOMPLETE = re.compile(rb".*\.distcp|(?:__\d+)?\.metadata\.tmp", re.DOTALL)
_STEP_TAG = re.compile(r"step-(0|[1-9]\d{0,11})", re.ASCII)

Info = dict[str, Any]


class EnvstoreFileSystem(AbstractFileSystem):
    """See the module. Every method raises ``OSError``s with the store's own message."""

    protocol = "envstore"
    root_marker = ""

    def __init__(self, store: str | None = None, **options: Any) -> None:
        """Use the store at the URL ``store``; by default as every command does."""
        super().__init__(store=store, **options)
        self.store = store
        self._opened: dict[str, tuple[RefTrees, Drafts]] = {}
        self._opening = threading.Lock()
        self._process = os.getpid()

    @property
    def transaction_type(self) -> type[Transaction]:
        """The class of ``transaction``."""
        return _Transaction

    @property
    def fsid(self) -> str:
        """Names the store."""
        return f"envstore-{self._url()}"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a directory, or the one file at ``path``."""
        with _as_os_errors(path):
            found = self._list(self._strip_protocol(path))
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> Info:
        """Describe a file (with ``digest``, its BLAKE3) or a directory."""
        path = self._strip_protocol(path)
        with _as_os_errors(path):
            ref, inner = _split(path)
            if ref is None:
                self._list(path)
                return _directory(path)
            view = self._trees.view(ref)
            entry = None if view is None else view.entries.get(inner)
            if view is not None and (entry is not None or not inner):
                return _directory(path) if entry is None else _info(path, entry, view)
            draft = self._drafts.find(ref, inner) if inner else None
            if draft is not None:
                return _draft_info(path, draft)
            if self._drafts.below(ref, inner):
                return _directory(path)
            raise _missing(path)

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
                with _as_os_errors(path):
                    view, entry = self._find(path)
                    spans = [_span(firsts[n], lasts[n], entry.size) for n in numbers]
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
        with _as_os_errors(str(path)):
            found = self.expand_path(path, recursive=recursive, maxdepth=maxdepth)
            self._remove(found)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file without reading it."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(path1):
            return
        with _as_os_errors(path1):
            view, entry = self._find(path1)
            ref, inner = _place(path2)
            copy = StoredFile(entry, {}).at(inner)
            self._trees.change(ref, lambda _: None, [copy], bases=[view.name])

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any
    ) -> None:
        """Rename a file or a directory; within one tree at once."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if path1 == path2:
            return
        with _as_os_errors(path1):
            (ref, inner), (target, new) = _place(path1), _place(path2)
            draft = self._drafts.find(ref, inner)
            if draft is not None:
                if ref != target:
                    raise UsageError(f"{path1} is not complete and cannot leave its tree")
                self._land(ref, [self._drafts.load(draft).at(new)])
                self._drafts.remove(ref, draft.path)
                return
            view = self._trees.view(ref)
            if view is None or inner not in view.entries:
                raise _missing(path1)
            if ref == target:
                self._trees.change(ref, lambda entries: _rename(entries, inner, new))
                return
            moved = [
                StoredFile(entry, {}).at(new + entry.path[len(inner) :])
                for entry in _at_and_below(view.entries, inner)
                if entry.kind is not Kind.DIRECTORY
            ]
            self._trees.change(target, lambda _: None, moved, bases=[view.name])
            self._trees.change(ref, lambda entries: _drop(entries, {inner}))

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
        with _as_os_errors(path):
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
        for trees, _ in opened.values():
            trees.repository.close()

    # What follows speaks of refs and raises the store's own errors.

    @property
    def _trees(self) -> RefTrees:
        return self._store()[0]

    @property
    def _drafts(self) -> Drafts:
        return self._store()[1]

    def _store(self) -> tuple[RefTrees, Drafts]:
        url = self._url()
        if os.getpid() != self._process:
            # After a fork, as in the workers of a data loader, connections are the parent's.
            self._opened, self._opening, self._process = {}, threading.Lock(), os.getpid()
        with self._opening:
            if url not in self._opened:
                repository = Repository.open(url, default_cache())
                self._opened[url] = RefTrees(repository), Drafts(repository)
            return self._opened[url]

    def _url(self) -> str:
        return self.store or os.environ.get("ENVSTORE_URL") or str(default_store())

    def _find(self, path: str) -> tuple[View, Entry]:
        """Return the tree and the file at ``path``. Raises ``NotFoundError``."""
        ref, inner = _split(path)
        if ref is not None and inner:
            view = self._trees.view(ref)
            entry = None if view is None else view.file(inner)
            if view is not None and entry is not None:
                return view, entry
            draft = self._drafts.find(ref, inner)
            if draft is not None:
                view = self._trees.at(draft.snapshot)
                return view, view.entries[draft.path]
        raise _missing(path)

    def _list(self, path: str) -> list[Info]:
        ref, inner = _split(path)
        if ref is None:
            return self._list_refs(path)
        view = self._trees.view(ref)
        found: dict[str, Info] = {}
        start = inner.decode() + "/" if inner else ""
        for draft in self._drafts.below(ref, inner):
            name, deeper, _ = draft.path.decode()[len(start) :].partition("/")
            full = f"{path}/{name}"
            found[full] = _directory(full) if deeper else _draft_info(full, draft)
        if view is not None:
            entry = view.entries.get(inner)
            if entry is not None and entry.kind is not Kind.DIRECTORY:
                return [_info(path, entry, view)]
            for child in view.children.get(inner, ()):
                full = f"{path}/{os.fsdecode(child.path.rpartition(b'/')[2])}"
                found[full] = _info(full, child, view)
        elif not found:
            draft_here = self._drafts.find(ref, inner) if inner else None
            if draft_here is not None:
                return [_draft_info(path, draft_here)]
        if not found and (view is None or (inner and inner not in view.entries)):
            raise _missing(path)
        return sorted(found.values(), key=lambda info: str(info["name"]))

    def _list_refs(self, path: str) -> list[Info]:
        """List namespaces, the names of one or the tags of a name."""
        above = path.split("/") if path else []
        names = set()
        for ref in list_refs(self._trees.repository.objects, "".join(f"{p}/" for p in above)):
            parts = (ref.namespace, ref.name, ref.tag)
            names.add("/".join(parts[: len(above) + 1]))
        if not names and above:
            raise _missing(path)
        return [_directory(name) for name in sorted(names)]

    def _upload(self, path: str) -> tuple[RefName, Upload]:
        """Begin to store the file at ``path``. Raises ``UsageError`` if none can be there."""
        ref, inner = _place(path)

        def bases() -> list[bytes]:
            view = self._trees.view(ref)
            return [] if view is None else [view.name]

        return ref, Upload(self._trees.repository, inner, bases)

    def _land(self, ref: RefName, files: Sequence[StoredFile]) -> None:
        """Make stored files part of their tree, or drafts of those that wait for others."""
        waiting = [file for file in files if _INCOMPLETE.fullmatch(_name(file.entry.path))]
        for file in waiting:
            self._drafts.put(ref, file)
        ready = [file for file in files if file not in waiting]
        if not ready:
            return
        drafts = [draft for file in ready for draft in self._completed_by(ref, file.entry.path)]
        drafts = [draft for draft in drafts if draft.path not in {f.entry.path for f in ready}]
        complete = any(_COMPLETION.fullmatch(_name(file.entry.path)) for file in ready)
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
        match = _COMPLETION.fullmatch(_name(path))
        if match is None:
            return []
        above = path.rpartition(b"/")[0]
        start = b"__%b_" % match[1] if match[1] else b""
        return [
            draft
            for draft in self._drafts.below(ref, above)
            if _name(draft.path).startswith(start) and draft.path.endswith(b".distcp")
        ]

    def _remove(self, paths: Sequence[str]) -> None:
        by_ref: dict[RefName, set[bytes]] = {}
        with _as_os_errors(", ".join(paths)):
            for path in paths:
                ref, inner = _split(path)
                if ref is None:
                    raise UsageError(f"{path} is not one tree", hint="remove its trees one by one")
                by_ref.setdefault(ref, set()).add(inner)
            for ref, inners in by_ref.items():
                self._remove_from(ref, inners)

    def _remove_from(self, ref: RefName, inners: set[bytes]) -> None:
        drafts = {draft.path for draft in self._drafts.below(ref)}
        gone = {path for path in drafts if _is_in(path, inners)}
        for path in gone:
            self._drafts.remove(ref, path)
        # A checkpoint that is being overwritten stays whole until its successor takes its place:
        # PyTorch removes the old .metadata first, and then renames the new one to that.
        kept = {
            path
            for path in inners
            if _COMPLETION.fullmatch(_name(path)) and path + b".tmp" in drafts
        }
        inners = inners - kept
        view = self._trees.view(ref)
        present = view is not None and (
            b"" in inners or any(path in view.entries for path in inners)
        )
        if present and inners:
            changed = self._trees.change(ref, lambda entries: _drop(entries, inners))
            if changed.snapshot is None and changed.before is not None:
                self._unrecord(ref, changed.before)
        elif not gone and not kept:
            raise _missing(", ".join(os.fsdecode(path) for path in inners))


class EnvstoreFile(AbstractBufferedFile):
    """A file that is read by ranges, or stored while it is written."""

    fs: EnvstoreFileSystem
    _upload: Upload | None = None
    _ref: RefName | None = None
    _stored: StoredFile | None = None

    def __init__(self, fs: EnvstoreFileSystem, path: str, mode: str, *args: Any, **kw: Any) -> None:
        if mode == "rb":
            # The tree as it is now, whatever the ref is moved to while this is open.
            self._view, self._entry = fs._find(path)
            kw["size"] = self._entry.size
        super().__init__(fs, path, mode, *args, **kw)

    def _fetch_range(self, start: int, end: int) -> bytes:
        with _as_os_errors(self.path):
            span = start, min(end, self._entry.size)
            return self._view.read(self._entry.path, [span])[0]

    def _initiate_upload(self) -> None:
        with _as_os_errors(self.path):
            self._ref, self._upload = self.fs._upload(self.path)

    def _upload_chunk(self, final: bool = False) -> bool:
        assert self._upload is not None  # noqa: S101 - fsspec initiates first
        with _as_os_errors(self.path):
            self._upload.write(self.buffer.getbuffer())
            if final:
                self._stored = self._upload.finish()
                self._upload = None
                if self.autocommit:
                    self.commit()
        return True

    def commit(self) -> None:
        """Make the file part of its tree."""
        if self._ref is not None and self._stored is not None:
            with _as_os_errors(self.path):
                self.fs._land(self._ref, [self._stored])

    def discard(self) -> None:
        """Leave the tree as it is."""
        self.closed = True
        if self._upload is not None:
            self._upload.abandon()
            self._upload = None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # What was being written when something failed is not what was to be written.
        if kind is not None and self.mode != "rb":
            self.discard()
        else:
            self.close()

    def __del__(self) -> None:
        if not self.closed and self.mode != "rb":
            warnings.warn(f"{self.path} was not closed: it is not kept", ResourceWarning, 2)
            self.discard()


class _Transaction(Transaction):
    """Files that become part of their trees together, one change for each tree."""

    fs: EnvstoreFileSystem

    def complete(self, commit: bool = True) -> None:
        """Commit or discard everything."""
        files = [*self.files]
        self.files.clear()
        try:
            by_ref: dict[RefName, list[StoredFile]] = {}
            for file in files:
                if not commit:
                    file.discard()
                elif file._ref is not None and file._stored is not None:
                    by_ref.setdefault(file._ref, []).append(file._stored)
            for ref, stored in by_ref.items():
                with _as_os_errors(str(ref)):
                    self.fs._land(ref, stored)
        finally:
            self.fs._intrans = False
            self.fs._transaction = None


@contextlib.contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """Say what the store says in the errors that users of file systems know."""
    try:
        yield
    except EnvstoreError as error:
        number = next((n for kind, n in _ERRNO if isinstance(error, kind)), errno.EIO)
        # OSError makes itself FileNotFoundError, PermissionError and so on, by the number.
        raise OSError(number, str(error), path) from error


def _split(path: str) -> tuple[RefName | None, bytes]:
    """Return the ref and the path in its tree; no ref above the trees. Raises ``UsageError``."""
    parts = [part for part in path.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise UsageError(f"{path} has '.' or '..' in it", hint="write the plain path")
    for part in parts[:3]:
        if not is_part(part):
            raise NotFoundError(f"{part!r} cannot be the namespace, name or tag of a ref")
    if len(parts) < 3:
        return None, b""
    return RefName(*parts[:3]), os.fsencode("/".join(parts[3:]))


def _place(path: str) -> tuple[RefName, bytes]:
    """Return the ref and the path of a file to be. Raises ``UsageError``."""
    ref, inner = _split(path)
    if ref is None or not inner:
        raise UsageError(
            f"{path} is not a place for a file", hint="write envstore://namespace/name/tag/file"
        )
    return ref, inner


def step_of_tag(tag: str) -> int | None:
    """Return the step whose checkpoint the ref of a run with this tag names, if it is one."""
    match = _STEP_TAG.fullmatch(tag)
    return int(match[1]) if match else None


def _name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def _missing(path: str) -> NotFoundError:
    return NotFoundError(f"no such file or directory: envstore://{path}")


def _directory(path: str) -> Info:
    return {"name": path, "size": 0, "type": "directory"}


def _draft_info(path: str, draft: Draft) -> Info:
    return {
        "name": path,
        "size": draft.size,
        "type": "file",
        "created": draft.created,
        "draft": True,
    }


def _info(path: str, entry: Entry, view: View) -> Info:
    if entry.kind is Kind.DIRECTORY:
        return _directory(path)
    if entry.kind is Kind.SYMLINK:
        target = view.file(entry.path)
        if target is None:
            return {"name": path, "size": 0, "type": "link", "target": os.fsdecode(entry.target)}
        entry = target
    return {
        "name": path,
        "size": entry.size,
        "type": "file",
        "created": view.snapshot.created,
        "digest": entry.digest.hex(),
    }


def _span(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def _is_in(path: bytes, places: set[bytes]) -> bool:
    return any(not place or path == place or path.startswith(place + b"/") for place in places)


def _at_and_below(entries: dict[bytes, Entry], place: bytes) -> list[Entry]:
    return [entry for entry in entries.values() if _is_in(entry.path, {place})]


def _drop(entries: dict[bytes, Entry], places: set[bytes]) -> None:
    for path in [path for path in entries if _is_in(path, places)]:
        del entries[path]


def _rename(entries: dict[bytes, Entry], old: bytes, new: bytes) -> None:
    moved = _at_and_below(entries, old)
    _drop(entries, {old, new})
    for entry in moved:
        path = new + entry.path[len(old) :]
        entries[path] = replace(entry, path=path)
