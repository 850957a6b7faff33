"""What this machine saw of refs, to notice when one goes back or vanishes.

A ref is not signed, and its sequence only a hint: whoever can write to the store can put back what
was there before, and so can a server that is restored from a copy. Who has seen more knows better.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.errors import EnvstoreError
from envstore.store.digest import parse_hex
from envstore.store.private import make_private, private
from envstore.store.problems import Problem
from envstore.store.refs import Ref, RefName

_FORMAT = 1
_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Judgement:
    """Refs that went back, and remarks about those that vanished or were made anew."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Witness:
    """Remembers refs of one store in the file ``path``. Safe for many processes and threads."""

    def __init__(self, path: Path) -> None:
        """Use ``path``, whose directory is made when something is remembered."""
        self._path = path

    def saw(self, name: RefName, ref: Ref) -> None:
        """Remember what somebody on this machine has made of a ref.

        If that cannot be done it is logged: the ref has moved already.
        """
        try:
            with self._changing() as known:
                known[name.key] = _fields(ref)
        except EnvstoreError as error:
            _log.warning("%s", error)

    def removed(self, name: RefName) -> None:
        """Forget a ref that somebody on this machine has removed; logs what is in the way."""
        try:
            with self._changing() as known:
                known.pop(name.key, None)
        except EnvstoreError as error:
            _log.warning("%s", error)

    def judge(
        self,
        refs: Mapping[RefName, Ref],
        unreadable: Collection[str] = (),
        *,
        remember: bool = True,
    ) -> Judgement:
        """Compare all refs that there are with what was seen of them, and ``remember`` them.

        ``unreadable`` are keys of others, of which nothing can be said. One that went back stays
        remembered as it was, until it is moved on from here. Raises ``EnvstoreError``.
        """
        found = Judgement()
        gone: list[str] = []
        current = {name.key: (name, ref) for name, ref in refs.items()}
        with self._changing(write=remember) as known:
            for key, seen in list(known.items()):
                before = _parse(seen)
                if before is None:
                    del known[key]
                elif key in unreadable:
                    continue
                elif key not in current:
                    gone.append(f"{_name(key)} (was at {_said(before)})")
                    del known[key]
                else:
                    self._compare(*current.pop(key), before, known, found)
            for key, (_, ref) in current.items():
                known[key] = _fields(ref)
        if gone:
            more = f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
            found.warnings.append(
                f"refs are gone that were not removed from here: {', '.join(gone[:_SHOWN])}{more}"
            )
        return found

    def _compare(
        self, name: RefName, ref: Ref, before: Ref, known: dict[str, Any], found: Judgement
    ) -> None:
        if ref.sequence > before.sequence or ref.nonce == before.nonce:
            known[name.key] = _fields(ref)
        elif ref.updated > before.updated:
            found.warnings.append(
                f"{name} was at {_said(before)}, and was removed and made again since"
            )
            known[name.key] = _fields(ref)
        else:
            found.problems.append(
                Problem(
                    name.key,
                    f"it went back: this machine saw it at {_said(before)}, now it is at "
                    f"{_said(ref)}",
                    (str(name),),
                )
            )

    @contextlib.contextmanager
    def _changing(self, *, write: bool = True) -> Iterator[dict[str, Any]]:
        """Yield what is remembered, by key, and store what was made of it."""
        try:
            make_private(self._path.parent)
            lock = os.open(
                self._path.with_name(f"{self._path.name}.lock"),
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                0o600,
            )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self._read()
                known = dict(before)
                yield known
                if write and known != before:
                    partial = self._path.with_name(f"{self._path.name}.partial")
                    with open(partial, "w", opener=private) as file:
                        json.dump({"format": _FORMAT, "refs": known}, file)
                    partial.replace(self._path)
            finally:
                os.close(lock)
        except OSError as error:
            raise EnvstoreError(
                f"cannot remember refs in {self._path}: {error.strerror}",
                hint="set ENVSTORE_CACHE_DIR",
            ) from error

    def _read(self) -> dict[str, Any]:
        """Return what is remembered; what cannot be read counts as nothing."""
        try:
            value = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        known = value.get("refs") if isinstance(value, dict) else None
        return known if isinstance(known, dict) and value.get("format") == _FORMAT else {}


def _fields(ref: Ref) -> list[Any]:
    return [ref.snapshot.hex(), ref.sequence, ref.nonce, ref.updated]


def _parse(seen: object) -> Ref | None:
    if not isinstance(seen, list) or len(seen) != 4:
        return None
    snapshot = parse_hex(str(seen[0]))
    if snapshot is None or not isinstance(seen[1], int):
        return None
    return Ref(snapshot, seen[1], str(seen[2]), str(seen[3]))


def _said(ref: Ref) -> str:
    return f"@{ref.snapshot.hex()[:12]}, move {ref.sequence} of {ref.updated}"


def _name(key: str) -> str:
    return str(RefName(*key.split("/")[1:4])) if key.count("/") == 3 else key
