"""The lock file: canonical JSON that people can review, described in ``docs/lock.md``.

One lock has one form, so its digest is an identity. Reading is strict, for a lock decides what
runs on every machine that uses it: nothing is guessed, and nothing unknown is skipped over.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NotFoundError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, Package, PypiPackage
from envstore.resolver.lockfields import FieldError
from envstore.resolver.lockformat import LOCK
from envstore.store.digest import digest
from envstore.store.locks import load_lock_bytes

if TYPE_CHECKING:
    from envstore.store.repository import Repository

FORMAT = "envstore-lock"
VERSION = 1
MAX_BYTES = 64 << 20
_WHEEL = re.compile(r"([^-]+)-([^-]+)(-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl")


class LockError(EnvstoreError):
    """A lock file is malformed, or what it would have to say is."""


def load_lock(path: Path) -> Lock:
    """Read the lock file at ``path``.

    Raises ``NotFoundError``, ``AccessDeniedError``, and what ``parse_lock`` does.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory, not a lock file") from None
    except OSError as error:
        raise AccessDeniedError(f"cannot read {path}: {error.strerror}") from error
    return parse_lock(data, str(path))


def parse_lock(data: bytes, what: str) -> Lock:
    """Return the lock in ``data``; ``what`` names it in errors.

    Raises ``LockError``; ``UnsupportedFormatError`` for a version this one does not know.
    """
    if len(data) > MAX_BYTES:
        raise LockError(f"{what} is longer than {MAX_BYTES >> 20} MiB, too long for a lock")
    document = _parse_json(data, what)
    _check_format(document, what)
    try:
        return _read(document)
    except FieldError as error:
        raise LockError(f"{what}: {_with_name(error, document)}") from None


def encode_lock(lock: Lock) -> bytes:
    """Return the one form of ``lock``: JSON, two blanks of indent, a line for each field.

    Raises ``LockError`` for a lock that ``parse_lock`` would refuse or that is incomplete: with a
    package without its sha256, or a wheel that is still to be built.
    """
    for package in lock.packages:
        _require_complete(package)
    document = {"format": FORMAT, "version": VERSION, **LOCK.write(lock)}
    try:
        _read(document)
    except FieldError as error:
        raise LockError(f"this cannot be locked: {_with_name(error, document)}") from None
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    data = text.encode() + b"\n"
    if len(data) > MAX_BYTES:
        raise LockError(f"the lock would be longer than {MAX_BYTES >> 20} MiB")
    return data


def lock_digest(lock: Lock) -> bytes:
    """Return the lock's identity, the BLAKE3 of its one form. Raises as ``encode_lock``."""
    return digest(encode_lock(lock))


def incomplete(package: Package) -> str:
    """Say what a package lacks that a written lock must have; empty if nothing."""
    if isinstance(package, PypiPackage):
        if package.build is not None and not (package.filename and package.sha256):
            return "its wheel is not built yet"
        if not package.url and package.build is None:
            return "it is not known where its wheel is"
    elif isinstance(package, CondaPackage) and not package.url:
        return "it is not known where it is"
    return "" if package.sha256 else "its sha256 is not known"


def _require_complete(package: Package) -> None:
    lacking = incomplete(package)
    if lacking:
        name = "python" if isinstance(package, LocalPython) else package.name
        raise LockError(f"{name} {package.version} cannot be locked as it is: {lacking}")


def _parse_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LockError(f"{what}, line {line}: not UTF-8 text") from None
    try:
        document = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        where = f"{what}, line {error.lineno}, column {error.colno}"
        raise LockError(f"{where}: not valid JSON: {error.msg}") from None
    except FieldError as error:
        raise LockError(f"{what}: {error}") from None
    except RecursionError:
        raise LockError(f"{what}: not a lock: too deeply nested") from None
    except ValueError:
        # Python's own limit on the digits of a number.
        raise LockError(f"{what}: not a lock: a number of too many digits") from None
    if not isinstance(document, dict):
        raise LockError(f"{what} is not a lock: not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FieldError("", f"the field {name[:100]!r} is there twice in one object")
        found[name] = value
    return found


def _refuse_constant(text: str) -> float:
    raise FieldError("", f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FieldError("", f"the number {text[:40]} is too large")
    return value


def _check_format(document: dict[str, Any], what: str) -> None:
    if document.get("format") != FORMAT:
        raise LockError(f'{what} is not a lock of envstore: no "format": "{FORMAT}"')
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LockError(f"{what}: version: must be a whole number from 1")
    if version > VERSION:
        raise UnsupportedFormatError(
            f"{what} is a lock of version {version}, this envstore reads up to {VERSION}",
            hint="upgrade envstore",
        )


def _read(document: dict[str, Any]) -> Lock:
    """Return the lock; raises ``FieldError``."""
    body = {name: item for name, item in document.items() if name not in ("format", "version")}
    lock: Lock = LOCK.read(body, "")
    seen: dict[tuple[str, str], int] = {}
    for i, package in enumerate(lock.packages):
        python = isinstance(package, LocalPython)
        name = "python" if isinstance(package, LocalPython) else package.name
        kind = "pypi" if isinstance(package, PypiPackage) else "conda"
        first = seen.setdefault((kind, name), i)
        if first != i:
            other = " interpreter" if python else f" {kind} package of this name"
            raise FieldError(f"packages[{i}]", f"a second{other}; the first is packages[{first}]")
        if not python and isinstance(package, PypiPackage):
            _check_origin(package, f"packages[{i}]")
    return lock


def _check_origin(package: PypiPackage, where: str) -> None:
    match = _WHEEL.fullmatch(package.filename)
    if match is None or re.sub(r"[-_.]+", "-", match[1]).lower() != package.name:
        raise FieldError(f"{where}.filename", f"is not the name of a wheel of {package.name}")
    if not package.url and package.build is None:
        raise FieldError(where, "has neither a url nor a build")


def _with_name(error: FieldError, document: dict[str, Any]) -> str:
    """Return the message with the name of the package it is about."""
    match = re.match(r"packages\[(\d+)\]", error.where)
    packages = document.get("packages")
    if match is None or not isinstance(packages, list):
        return str(error)
    package = packages[int(match[1])]
    name = package.get("name") if isinstance(package, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
        return str(error)
    return f"{match[0]} ({name}){error.where[match.end() :]}: {error.problem}"


def stored_lock(repository: Repository, ref: str) -> Lock:
    """Return the lock that ``ref`` was made from.

    Raises ``NotFoundError`` also for what was not made from one, ``LockError``, and the errors of
    the store.
    """
    snapshot = repository.snapshot(repository.resolve(ref))
    if snapshot.lock is None:
        what = "an environment that lay on a disk" if snapshot.kind == "env" else "no environment"
        raise NotFoundError(
            f"{ref} has no lock: what was pushed is {what}",
            hint="push it from a specification or a lock",
        )
    data = load_lock_bytes(repository.objects, snapshot.lock)
    return parse_lock(data, f"the lock of {ref}")
