"""Makes an installed environment's files independent of where it was installed.

Looked at are the files that ``conda-meta`` says name the prefix, those in ``bin``, and a few that
installers are known to write it into. What a file was found to hold is remembered with its
signature, so that an unchanged environment is scanned without opening any of them; losing that
memory costs time only.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from envstore.errors import CorruptError
from envstore.resolver.condameta import claims, lasting_history, lasting_installed, lasting_record
from envstore.resolver.restoring import Claim, restore, with_placeholder
from envstore.store.relocation import PLACEHOLDER, Mode, link_relocation, plan
from envstore.store.source import WINDOW, DirectorySource, Kind, SourceEntry

ALGORITHM = "1"
"""Changes whenever something else is made of the same files."""

_RECORD = re.compile(rb"conda-meta/[^/]+\.json")
_PROGRAM = re.compile(rb"s?bin/[^/]+")
_BEGINNINGS = (b"bin/", b"sbin/", b"conda-meta/", b"pyvenv.cfg")
_TEXTS = (b"/direct_url.json", b"/kernel.json", b".pth", b".egg-link")
_ENDINGS = (*_TEXTS, b".dist-info/RECORD")
# Whoever names these means the system, not the environment.
_EVERYBODYS = (b"/", b"/usr")
_MOST_TEXT = 4 << 20
_MOST_RESTORED = 2 << 30
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class _Finding:
    """What is to be done with a file: ``how`` is the key of ``_DONE`` or one of those below.

    ``leave``, ``restore`` (a package's file), ``text`` (with the placeholder), or ``stuck``:
    names the prefix and cannot be changed. ``size`` is that of the result.
    """

    how: str
    size: int = 0
    relocation: bytes = b""


_LEAVE = _Finding("leave")
_DONE = {"record": lasting_record, "history": lasting_history, "installed": lasting_installed}


class Portable:
    """The files of ``tree`` as they are stored. ``memory`` is a directory of this user's cache."""

    def __init__(self, tree: DirectorySource, memory: Path) -> None:
        self.warnings: list[str] = []
        self._tree = tree
        root = os.fsencode(tree.root)
        # Installers differ in which of the two they write.
        both = dict.fromkeys((root, os.path.realpath(root)))
        self._prefixes = tuple(path for path in both if path not in _EVERYBODYS)
        name = blake2b(f"{ALGORITHM}\0{tree.identity}".encode(errors="surrogateescape"))
        self._memory = memory / f"{name.hexdigest()[:40]}.json"
        self._original: dict[bytes, SourceEntry] = {}
        self._found: dict[bytes, _Finding] = {}
        self._claims: dict[bytes, tuple[Claim, ...]] = {}

    def apply(self, entries: Iterable[SourceEntry]) -> list[SourceEntry]:
        """Return ``entries`` as they are to be stored.

        Raises ``ChangedError`` and ``AccessDeniedError`` for files that have to be looked at.
        """
        self.warnings.clear()
        self._original, self._found = {}, {}
        entries = list(entries)
        files = {entry.path: entry for entry in entries if entry.kind is Kind.FILE}
        memory = _Memory(self._memory)
        self._claims = self._read_claims(files, memory)
        claimed_of = self._claims
        for path, entry in files.items():
            if not (
                path.endswith(_ENDINGS)
                or path.startswith(_BEGINNINGS)
                or path in claimed_of
                or b"/__editable__" in path
            ):
                continue  # nearly all of them
            how = self._kind_of(path)
            if how is not None:
                claimed = claimed_of.get(path, ())
                found = memory.finding(entry, claimed)
                if found is None:
                    found = self._look(entry, how, claimed)
                memory.keep(entry, claimed, found)
                self._found[path] = found
        memory.save()
        self._warn()
        found_of = self._found
        return [
            self._stored(entry) if entry.path in found_of or entry.target else entry
            for entry in entries
        ]

    def read(self, entry: SourceEntry) -> Iterator[bytes] | None:
        """Return the content of an entry of ``apply``, ``None`` if it is as it is on disk."""
        original = self._original.get(entry.path)
        if original is None:
            return None
        data = self._changed(original, self._found[entry.path].how, self._bytes(original))
        return (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))

    def _read_claims(
        self, files: dict[bytes, SourceEntry], memory: _Memory
    ) -> dict[bytes, tuple[Claim, ...]]:
        found: dict[bytes, tuple[Claim, ...]] = {}
        for path in sorted(path for path in files if path.startswith(b"conda-meta/")):
            if not _RECORD.fullmatch(path):
                continue
            entry = files[path]
            claimed = memory.claims(entry)
            if claimed is None:
                try:
                    claimed = claims(self._bytes(entry))
                except ValueError:
                    claimed = {}
                    self.warnings.append(
                        f"{os.fsdecode(path)} is not readable: what its package says of the prefix "
                        "is not known"
                    )
            memory.keep_claims(entry, claimed)
            for name, claim in claimed.items():
                found[name] = (*found.get(name, ()), claim)
        return found

    def _kind_of(self, path: bytes) -> str | None:
        if path in self._claims:
            return "restore"
        if path.startswith(b"conda-meta/"):
            if path == b"conda-meta/history":
                return "history"
            return "record" if _RECORD.fullmatch(path) else None
        if path.endswith(b".dist-info/RECORD"):
            return "installed"
        names_it = (
            path.endswith(_TEXTS)
            or (path.endswith(b".py") and b"/__editable__" in path)
            or path == b"pyvenv.cfg"
            or (path.startswith((b"bin/", b"sbin/")) and _PROGRAM.fullmatch(path) is not None)
        )
        return "text" if names_it else None

    def _look(self, entry: SourceEntry, how: str, claimed: tuple[Claim, ...]) -> _Finding:
        """Return what is to be done with a file, which is read for that."""
        if entry.size > (_MOST_RESTORED if claimed else _MOST_TEXT):
            return _LEAVE
        data = self._bytes(entry)
        if how in _DONE:
            changed = _DONE[how](data)
            if how == "history":
                return self._text(changed, "history")
            return _LEAVE if changed == data else _Finding(how, len(changed))
        if claimed:
            match = self._restored(data, claimed)
            if match is not None:
                claim, own = match
                mode = Mode.BINARY if claim.binary else Mode.TEXT
                with contextlib.suppress(CorruptError):
                    relocation = plan(own, claim.placeholder, mode, claim.package)
                    encoded = relocation.encode() if relocation is not None else b""
                    return _Finding("restore", len(own), encoded)
        if b"\0" not in data:
            return self._text(data, "text")
        named = claimed and any(prefix in data for prefix in self._prefixes)
        return _Finding("stuck") if named else _LEAVE

    def _text(self, data: bytes, how: str) -> _Finding:
        changed = self._placed(data)
        if changed == data and how == "text":
            return _LEAVE
        try:
            relocation = plan(changed, PLACEHOLDER, Mode.TEXT) if PLACEHOLDER in changed else None
        except CorruptError:
            return _Finding("stuck")
        return _Finding(how, len(changed), relocation.encode() if relocation is not None else b"")

    def _placed(self, data: bytes) -> bytes:
        for prefix in self._prefixes:
            data = with_placeholder(data, prefix)
        return data

    def _restored(self, data: bytes, claimed: tuple[Claim, ...]) -> tuple[Claim, bytes] | None:
        for claim in claimed:
            for prefix in self._prefixes:
                own = restore(data, claim, prefix)
                if own is not None:
                    return claim, own
        return None

    def _changed(self, entry: SourceEntry, how: str, data: bytes) -> bytes:
        """Return what ``_look`` found that a file is to hold."""
        if how == "restore":
            match = self._restored(data, self._claims[entry.path])
            return data if match is None else match[1]
        if how == "text":
            return self._placed(data)
        changed = _DONE[how](data)
        return self._placed(changed) if how == "history" else changed

    def _bytes(self, entry: SourceEntry) -> bytes:
        return b"".join(self._tree.read(entry))

    def _stored(self, entry: SourceEntry) -> SourceEntry:
        if entry.kind is Kind.SYMLINK:
            for prefix in self._prefixes:
                if link_relocation(entry.target, prefix):
                    target = PLACEHOLDER + entry.target.removeprefix(prefix)
                    return replace(entry, target=target, relocation=PLACEHOLDER)
            return entry
        found = self._found.get(entry.path, _LEAVE)
        if found.how in ("leave", "stuck"):
            return entry
        self._original[entry.path] = entry
        parts = (ALGORITHM, found.how, _told(self._claims.get(entry.path, ())))
        signature = blake2b(entry.signature + "\0".join(parts).encode(), digest_size=20).digest()
        return replace(entry, size=found.size, relocation=found.relocation, signature=signature)

    def _warn(self) -> None:
        stuck = sorted(path for path, found in self._found.items() if found.how == "stuck")
        if stuck:
            names = ", ".join(map(os.fsdecode, stuck[:_MOST_NAMED]))
            more = f" and {len(stuck) - _MOST_NAMED} more" if len(stuck) > _MOST_NAMED else ""
            self.warnings.append(
                f"changed since they were installed, and bound to {self._tree.root}: {names}{more}"
            )


class _Memory:
    """What an earlier scan of the same tree found, and what this one found."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = _load(path)
        self._new: dict[str, dict[str, Any]] = {"claims": {}, "files": {}}

    def claims(self, entry: SourceEntry) -> dict[bytes, Claim] | None:
        """Return what a package's record was found to say."""
        with contextlib.suppress(ValueError, TypeError, IndexError):
            row = self._row("claims", entry)
            if row is not None:
                return {
                    os.fsencode(path): Claim(os.fsencode(place), binary, digest, package)
                    for path, place, binary, digest, package in row[1]
                }
        return None

    def keep_claims(self, entry: SourceEntry, found: dict[bytes, Claim]) -> None:
        """Remember what a package's record says."""
        rows = [
            [os.fsdecode(path), os.fsdecode(it.placeholder), it.binary, it.sha256, it.package]
            for path, it in found.items()
        ]
        self._keep("claims", entry, rows)

    def finding(self, entry: SourceEntry, claimed: tuple[Claim, ...]) -> _Finding | None:
        """Return what was found of a file when the same was claimed of it."""
        with contextlib.suppress(ValueError, TypeError, IndexError):
            row = self._row("files", entry)
            if row is not None and row[1] == _told(claimed):
                return _Finding(row[2], row[3], base64.b64decode(row[4]))
        return None

    def keep(self, entry: SourceEntry, claimed: tuple[Claim, ...], found: _Finding) -> None:
        """Remember what was found of a file."""
        relocation = base64.b64encode(found.relocation).decode()
        self._keep("files", entry, _told(claimed), found.how, found.size, relocation)

    def save(self) -> None:
        """Write what this scan found if that is news; a cache that cannot be written stays."""
        if self._new == self._old:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(dir=self._path.parent)
            try:
                with open(fd, "w") as file:
                    json.dump(self._new, file)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise

    def _row(self, table: str, entry: SourceEntry) -> list[Any] | None:
        row: list[Any] | None = self._old[table].get(os.fsdecode(entry.path))
        return row if row is not None and row[0] == entry.signature.hex() else None

    def _keep(self, table: str, entry: SourceEntry, *values: Any) -> None:
        # What may change without its signature changing has to be looked at again.
        if entry.settled:
            self._new[table][os.fsdecode(entry.path)] = [entry.signature.hex(), *values]


def _load(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
        return {"claims": dict(found["claims"]), "files": dict(found["files"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {"claims": {}, "files": {}}


def _told(claimed: tuple[Claim, ...]) -> str:
    """Return what tells claims apart."""
    text = "\0".join(f"{os.fsdecode(c.placeholder)} {c.binary} {c.sha256}" for c in claimed)
    whole = blake2b(text.encode(errors="surrogateescape"), digest_size=16)
    return whole.hexdigest() if claimed else ""
