"""Paths below ``envstore://``: which file of which tree they name, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from envstore.checkpoint.adapters.drafts import Draft
from envstore.checkpoint.adapters.reftrees import View
from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from envstore.store.manifest import Entry
from envstore.store.refs import RefName, is_part
from envstore.store.source import Kind

_ERRNO = (
    (NotFoundError, errno.ENOENT),
    (AccessDeniedError, errno.EACCES),
    (NoSpaceError, errno.ENOSPC),
    (UsageError, errno.EINVAL),
)
_STEP_TAG = re.compile(r"step-(0|[1-9]\d{0,11})", re.ASCII)

Info = dict[str, Any]


@contextlib.contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Say what the store says in the errors that users of file systems know."""
    try:
        yield
    except EnvstoreError as error:
        number = next((n for kind, n in _ERRNO if isinstance(error, kind)), errno.EIO)
        # OSError makes itself FileNotFoundError, PermissionError and so on, by the number.
        raise OSError(number, str(error), path) from error


def split(path: str) -> tuple[RefName | None, bytes]:
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


def place(path: str) -> tuple[RefName, bytes]:
    """Return the ref and the path of a file to be. Raises ``UsageError``."""
    ref, inner = split(path)
    if ref is None or not inner:
        raise UsageError(
            f"{path} is not a place for a file", hint="write envstore://namespace/name/tag/file"
        )
    return ref, inner


def step_of_tag(tag: str) -> int | None:
    """Return the step whose checkpoint the ref of a run with this tag names, if it is one."""
    match = _STEP_TAG.fullmatch(tag)
    return int(match[1]) if match else None


def name_of(path: bytes) -> bytes:
    """Return the last component of a path in a tree."""
    return path.rpartition(b"/")[2]


def missing(path: str) -> NotFoundError:
    """Return the error of a path that names nothing."""
    return NotFoundError(f"no such file or directory: envstore://{path}")


def directory_info(path: str) -> Info:
    """Describe a directory."""
    return {"name": path, "size": 0, "type": "directory"}


def draft_info(path: str, draft: Draft) -> Info:
    """Describe a file that is not part of its tree yet."""
    return {
        "name": path,
        "size": draft.size,
        "type": "file",
        "created": draft.created,
        "draft": True,
    }


def info_of(path: str, entry: Entry, view: View) -> Info:
    """Describe an entry of a tree; a symbolic link as the file it leads to."""
    if entry.kind is Kind.DIRECTORY:
        return directory_info(path)
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


def span(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Return the range that a slice takes of ``size`` bytes."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def is_in(path: bytes, places: set[bytes]) -> bool:
    """Return whether ``path`` is one of ``places`` or below one, ``b""`` being the root."""
    return any(not place or path == place or path.startswith(place + b"/") for place in places)


def at_and_below(entries: dict[bytes, Entry], place: bytes) -> list[Entry]:
    """Return the entry at ``place`` and all that are below it."""
    return [entry for entry in entries.values() if is_in(entry.path, {place})]


def drop(entries: dict[bytes, Entry], places: set[bytes]) -> None:
    """Remove what is at and below ``places``."""
    for path in [path for path in entries if is_in(path, places)]:
        del entries[path]


def rename(entries: dict[bytes, Entry], old: bytes, new: bytes) -> None:
    """Give what is at and below ``old`` the place ``new``, instead of what is there."""
    moved = at_and_below(entries, old)
    drop(entries, {old, new})
    for entry in moved:
        path = new + entry.path[len(old) :]
        entries[path] = replace(entry, path=path)
