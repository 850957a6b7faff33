"""From specifications to a complete lock: read, resolve, and fetch or build what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from envstore.errors import UsageError
from envstore.resolver.lock import Lock, Package, python_of
from envstore.resolver.request import Request
from envstore.resolver.specs import Prefix, read_specs
from envstore.resolver.target import DEFAULT_GLIBC, Target, make_target

Progress = Callable[[str, int, int], None]
"""Told a phase, how much of it is done, and how much there is, 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user says besides the specifications; an empty value says nothing.

    ``python`` is a version, ``interpreter`` a program to take it from instead of a channel.
    ``channels`` and ``indexes`` come before those of the specifications, ``default_index`` and
    ``exclude_newer`` (RFC 3339) replace theirs. The rest is as ``read_specs`` and ``make_target``
    have it. Nothing holds credentials.
    """

    platform: str | None = None
    glibc: str | None = None
    cuda: str | None = None
    python: str = ""
    interpreter: Path | None = None
    channels: tuple[str, ...] = ()
    exclude_newer: str = ""
    environment: str = ""
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    default_index: str = ""
    indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()

    def target(self) -> Target:
        """Return the machine to resolve for. Raises ``UsageError``."""
        return make_target(self.platform, glibc=self.glibc, cuda=self.cuda)

    def target_again(self, lock: Lock) -> Target:
        """Return the machine that ``lock`` is for, as far as nothing else is wished.

        What its specification asked for is left to the one that is there now. Raises
        ``UsageError``.
        """
        target = self.target()
        asked = lock.request.virtual
        virtual = {name: text for name, text in lock.virtual.items() if name not in asked}
        for name in target.chosen:
            virtual.pop(name, None)
        chosen = {name: target.virtual[name] for name in target.chosen & target.virtual.keys()}
        return Target(lock.platform, {**virtual, **chosen}, target.chosen)

    def change(self, request: Request) -> Request:
        """Return ``request`` with what the user says of channels, indexes and time."""
        conda, pypi = request.conda, request.pypi
        return replace(
            request,
            conda=replace(conda, channels=_joined(self.channels, conda.channels)),
            pypi=replace(
                pypi,
                default_index=self.default_index or pypi.default_index,
                indexes=_joined(self.indexes, pypi.indexes),
                find_links=_joined(self.find_links, pypi.find_links),
            ),
            exclude_newer=self.exclude_newer or request.exclude_newer,
        )

    def refuse_for(self, lock: Lock) -> None:
        """Refuse what cannot be wished of a lock, which is never resolved again.

        Raises ``UsageError``.
        """
        python = python_of(lock)
        # What another tool's lock leaves open is chosen: an interpreter, and wheels that fit.
        own, bare = "envstore" in lock.tools, python is None
        for option, value in (
            ("--channel", not bare and self.channels),
            ("--exclude-newer", self.exclude_newer),
            ("--index-url", self.default_index),
            ("--extra-index-url", self.indexes),
            ("--find-links", self.find_links),
            ("--glibc", own and self.glibc),
            ("--cuda", own and self.cuda),
            ("--python", self.interpreter and not bare and lock.local_python() is None),
        ):
            if value:
                raise UsageError(
                    f"{option} changes nothing: a lock is taken as it is",
                    hint="name the specification that it was made from instead",
                )
        if python is not None and self.python and not _is_version(python.version, self.python):
            raise UsageError(f"this lock is for Python {python.version}, not {self.python}")
        if self.platform is not None and self.platform != lock.platform:
            raise UsageError(f"this lock is for {lock.platform}, not {self.platform}")


@dataclass(frozen=True, slots=True)
class Locked:
    """A complete lock, and where the wheels lie that were built for it, by SHA-256."""

    lock: Lock
    local: Mapping[str, Path] = field(default_factory=dict)


def read(
    paths: Sequence[Path],
    wishes: Wishes,
    warnings: list[str],
    *,
    conda: Sequence[Path] = (),
    pip: Sequence[Path] = (),
) -> Request | Lock | Prefix:
    """Read what an environment is to be made of, with ``wishes``; adds to ``warnings``.

    Raises as ``read_specs``.
    """
    from envstore.resolver.resolving import DEFAULT_CHANNELS

    target = wishes.target()
    found = read_specs(
        paths,
        conda=conda,
        pip=pip,
        platform=target.platform,
        python=wishes.python,
        glibc=target.virtual.get("__glibc", DEFAULT_GLIBC),
        environment=wishes.environment,
        extras=wishes.extras,
        groups=wishes.groups,
        default_channels=wishes.channels or DEFAULT_CHANNELS,
        warnings=warnings,
    )
    if isinstance(found, Lock):
        wishes.refuse_for(found)
    return wishes.change(found) if isinstance(found, Request) else found


def make_lock(
    found: Request | Lock,
    wishes: Wishes,
    cache: Path,
    warnings: list[str],
    *,
    target: Target | None = None,
    keep: Sequence[Package] = (),
    progress: Progress,
) -> Locked:
    """Return the complete lock of a request, or of a lock that may lack something.

    ``target`` is by default as wished. ``keep`` are packages that stay as they are if that is
    possible. What is fetched is kept below ``cache``. Raises what the resolvers, downloads and
    builds raise.
    """
    from envstore.resolver.completing import Means, complete
    from envstore.resolver.resolving import resolve

    target = target or wishes.target()
    if isinstance(found, Request):
        progress("resolve", 0, 0)
        found = resolve(
            found,
            target,
            cache=cache,
            python=wishes.interpreter,
            keep=keep,
            warnings=warnings,
            progress=progress,
        )
    means = Means(target, cache, wishes.channels, wishes.interpreter, warnings, progress)
    return complete(found, means)


def _is_version(exact: str, wanted: str) -> bool:
    """Whether ``exact`` (``3.11.7``) is a version that ``wanted`` (``3.11``) means."""
    return f"{exact}.".startswith(f"{wanted}.")


def _joined(first: Sequence[str], then: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *then)))
