"""What changes between two locks, and how a lock is resolved again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, Package
from envstore.resolver.locking import Locked, Progress, Wishes, make_lock


@dataclass(frozen=True, slots=True)
class Change:
    """A package that is new, gone (an empty version) or another one than before.

    ``kind`` is ``conda``, ``pypi`` or ``python``. Versions have the build string behind them
    where only that differs, or the beginning of the digest where even that is the same.
    """

    kind: str
    name: str
    before: str
    after: str


def changes(old: Lock, new: Lock) -> tuple[Change, ...]:
    """Return what ``new`` has other than ``old``, by name."""
    before, after = _by_name(old.packages), _by_name(new.packages)
    found = []
    for key in sorted(before.keys() | after.keys(), key=lambda key: (key[1], key[0])):
        was, now = before.get(key), after.get(key)
        if was is None or now is None or was.sha256 != now.sha256:
            found.append(Change(*key, *_versions(was, now)))
    return tuple(found)


def same_but_for_tools(old: Lock, new: Lock) -> bool:
    """Whether two locks say the same, whatever made them."""
    return replace(old, tools={}) == replace(new, tools={})


def resolve_again(
    lock: Lock,
    names: Sequence[str],
    wishes: Wishes,
    cache: Path,
    warnings: list[str],
    *,
    progress: Progress,
) -> Locked:
    """Return the complete lock that the request of ``lock`` gives now.

    With ``names`` only these packages may change for a reason of their own: all others keep their
    versions as far as that is possible. An interpreter of a machine changes only if it is among
    them, for another machine's is no newer one. ``wishes`` change the request. Raises
    ``UsageError`` for a lock without a request, ``NotFoundError`` for a package it does not have,
    and what resolvers, downloads and builds raise.
    """
    request = lock.request
    if not request.conda.specs and not request.pypi.requirements:
        raise UsageError(
            "the lock does not say what was asked for",
            hint="it came from another tool: update it there, and push it again",
        )
    chosen = _chosen(lock, names)
    keep = [
        item
        for item in lock.packages
        if (names or isinstance(item, LocalPython)) and (_kind(item), _name(item)) not in chosen
    ]
    return make_lock(
        wishes.change(request),
        wishes,
        cache,
        warnings,
        target=wishes.target_again(lock),
        keep=keep,
        progress=progress,
    )


def _chosen(lock: Lock, names: Iterable[str]) -> set[tuple[str, str]]:
    found = set()
    for name in names:
        plain = re.sub(r"[-_.]+", "-", name).lower()
        fitting = {
            (_kind(item), _name(item))
            for item in lock.packages
            if _name(item) in (name.lower(), plain)
        }
        if not fitting:
            raise NotFoundError(f"{name} is not in this environment")
        found |= fitting
    return found


def _by_name(packages: Iterable[Package]) -> dict[tuple[str, str], Package]:
    return {(_kind(item), _name(item)): item for item in packages}


def _kind(package: Package) -> str:
    if isinstance(package, LocalPython):
        return "python"
    return "conda" if isinstance(package, CondaPackage) else "pypi"


def _name(package: Package) -> str:
    return "python" if isinstance(package, LocalPython) else package.name


def _versions(was: Package | None, now: Package | None) -> tuple[str, str]:
    if was is None or now is None:
        return was.version if was else "", now.version if now else ""
    if was.version != now.version:
        return was.version, now.version
    if isinstance(was, CondaPackage) and isinstance(now, CondaPackage) and was.build != now.build:
        return f"{was.version} {was.build}", f"{now.version} {now.build}"
    return f"{was.version} {was.sha256[:12]}", f"{now.version} {now.sha256[:12]}"
