"""Reads specifications of any format into one request, or the lock that one of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envstore.errors import UsageError
from envstore.resolver.lock import Lock
from envstore.resolver.request import Request
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.detect import (
    ENVIRONMENT,
    FOREIGN,
    LOCKS,
    REQUESTS,
    detect_format,
    specification_in,
)
from envstore.resolver.specs.merge import merged
from envstore.resolver.specs.pythons import checked_python

_CONDA = frozenset({"environment.yml", "pixi.toml", "pixi.lock", "conda-lock.yml", "explicit"})
_PIP = frozenset({"requirements.txt", "pyproject.toml", "pylock.toml", "uv.lock"})


@dataclass(frozen=True, slots=True)
class Prefix:
    """A directory that is an environment already, which is pushed as it is."""

    path: Path


def read_specs(
    paths: Sequence[Path],
    *,
    conda: Sequence[Path] = (),
    pip: Sequence[Path] = (),
    platform: str,
    python: str = "",
    glibc: str = "",
    environment: str = "",
    extras: Sequence[str] = (),
    groups: Sequence[str] = (),
    default_channels: Sequence[str] = ("conda-forge",),
    warnings: list[str] | None = None,
) -> Request | Lock | Prefix:
    """Read specifications of one environment; what ``conda`` and ``pip`` hold must be of that kind.

    ``platform`` is a conda subdir. ``python`` and ``glibc`` are the target's; the first is added
    to what a request asks for, and both choose among what a lock holds (see ``Context``), whose
    ``request.python`` then says for which Python it was read. ``environment`` is pixi's name of
    one, ``extras`` and ``groups`` are a project's. ``warnings`` is added to.

    Raises ``UsageError`` for what is malformed, contradicts or cannot be combined, and
    ``NotFoundError`` and ``AccessDeniedError`` for files.
    """
    context = Context(
        platform,
        python,
        glibc,
        environment,
        tuple(extras),
        tuple(groups),
        tuple(default_channels),
        [] if warnings is None else warnings,
    )
    wanted = [(path, _sorted_out(path, context)) for path in paths]
    wanted += [_of_kind(path, context, _CONDA, "conda") for path in conda]
    wanted += [_of_kind(path, context, _PIP, "pip") for path in pip]
    if not wanted:
        raise UsageError("nothing to read", hint="name a specification or a lock")
    whole = [item for item in wanted if item[1] == ENVIRONMENT or item[1] in LOCKS]
    if whole and len(wanted) > 1:
        path, kind = whole[0]
        what = "an environment" if kind == ENVIRONMENT else f"a lock ({kind})"
        raise UsageError(
            f"{path} is {what}, which nothing can be added to",
            hint="name it alone, or the specifications it was made from",
        )
    if wanted[0][1] == ENVIRONMENT:
        return Prefix(wanted[0][0])
    _check_options(context, {kind for _, kind in wanted})
    results = [_read(path, kind, context) for path, kind in wanted]
    sources = tuple(context.sources)
    if isinstance(results[0], Lock):
        lock = results[0]
        if wanted[0][1] == "envstore-lock":
            return lock
        return replace(lock, sources=sources, request=replace(lock.request, sources=sources))
    request = merged([item for item in results if isinstance(item, Request)])
    return _finished(request, context)


def _read(path: Path, kind: str, context: Context) -> Request | Lock:
    if path.is_dir():
        inside = specification_in(path)
        if inside is None:
            raise UsageError(f"{path} holds no specification")
        context.warn(f"{path} is a directory: {inside.name} in it is taken")
        path = inside
    return _reader(kind)(path, context)


def _reader(kind: str) -> Callable[[Path, Context], Request | Lock]:
    """Return the function that reads a format; the modules need packages of their own."""
    match kind:
        case "environment.yml":
            from envstore.resolver.specs.environment_yml import read_environment_yml

            return read_environment_yml
        case "requirements.txt":
            from envstore.resolver.specs.requirements import read_requirements

            return read_requirements
        case "pylock.toml":
            from envstore.resolver.specs.pylock import read_pylock

            return read_pylock
        case "pixi.lock" | "conda-lock.yml":
            from envstore.resolver.specs.rattler_locks import read_rattler_lock

            return read_rattler_lock
        case "pyproject.toml":
            from envstore.resolver.specs.pyproject import read_pyproject

            return read_pyproject
        case "uv.lock":
            from envstore.resolver.specs.uv_lock import read_uv_lock

            return read_uv_lock
        case "pixi.toml":
            from envstore.resolver.specs.pixi import read_pixi

            return read_pixi
        case "envstore-lock":
            from envstore.resolver.lockfile import load_lock

            return lambda path, _: load_lock(path)
        case "explicit":
            from envstore.resolver.specs.explicit import read_explicit

            return read_explicit
    raise UsageError(f"{kind} is not supported")


def _sorted_out(path: Path, context: Context) -> str:
    kind = detect_format(path)
    if kind in FOREIGN:
        raise UsageError(f"{path} is a {kind}, which is not read", hint=FOREIGN[kind])
    if not kind:
        known = ", ".join(sorted((REQUESTS | LOCKS) - {"explicit", "envstore-lock"}))
        raise UsageError(
            f"{path} is no specification of an environment that is known here",
            hint=f"known are {known}, @EXPLICIT lists and envstore's own locks; "
            "--pip FILE takes a list of bare names",
        )
    return kind


def _of_kind(path: Path, context: Context, kinds: frozenset[str], option: str) -> tuple[Path, str]:
    if option == "pip" and path.is_file() and not detect_format(path):
        return path, "requirements.txt"  # its user knows what a list of bare names is for
    kind = _sorted_out(path, context)
    if kind not in kinds:
        raise UsageError(f"{path} is of the format {kind}, which --{option} does not take")
    return path, kind


def _check_options(context: Context, kinds: set[str]) -> None:
    """Refuse choices that none of the formats offers, so that none goes unheeded."""
    if context.environment and not kinds & {
        "pixi.toml",
        "pixi.lock",
        "pyproject.toml",
        "conda-lock.yml",
    }:
        raise UsageError(f"--environment {context.environment}: only pixi's files have several")
    projects = {"pyproject.toml", "uv.lock", "pylock.toml"}
    for option, names in (("--extra", context.extras), ("--group", context.groups)):
        if names and not kinds & projects:
            raise UsageError(f"{option} {names[0]}: only pyproject.toml and its locks have those")


def _finished(request: Request, context: Context) -> Request:
    """Return the request with what the caller asked for, checked against the platform."""
    if request.platforms and context.platform not in request.platforms:
        raise UsageError(
            f"the specification is for {', '.join(request.platforms)}, not {context.platform}"
        )
    python = request.python
    if checked_python(context.python):
        exact = context.python if context.python.count(".") > 1 else f"{context.python}.*"
        python = ",".join(filter(None, (python, f"=={exact}")))
    return replace(request, python=python, sources=tuple(context.sources))
