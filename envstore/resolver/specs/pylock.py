"""Reads ``pylock.toml`` (PEP 751) into a lock of wheels for one platform and one Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from envstore.errors import UsageError
from envstore.resolver.lock import Lock, PypiPackage
from envstore.resolver.request import Request
from envstore.resolver.specs.artefacts import pypi_package
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import (
    file_url,
    parse_toml,
    read_text,
    wrong,
)
from envstore.resolver.specs.pythons import chosen_python
from envstore.resolver.target import make_target

if TYPE_CHECKING:
    from packaging.markers import Environment
    from packaging.pylock import Package

_HINT = "a lock may be for one Python only: --python names it"


def read_pylock(path: Path, context: Context) -> Lock:
    """Read a ``pylock.toml`` or ``pylock.<name>.toml``.

    The context's extras and groups must be ones that the file knows; its default groups
    count besides. Raises ``UsageError``.
    """
    return lock_of(parse_toml(path, read_text(path, context)), path, context)


def lock_of(content: dict[str, Any], path: Path, context: Context) -> Lock:
    """Return the lock of a parsed file, whose relative paths are those of ``path``."""
    from packaging.pylock import Pylock, PylockSelectError, PylockValidationError
    from packaging.utils import canonicalize_name

    try:
        pylock = Pylock.from_dict(content)
    except PylockValidationError as error:
        raise wrong(path, f"not a pylock.toml: {error}") from error
    extras = [canonicalize_name(name) for name in context.extras]
    _check_names("extra", extras, pylock.extras or (), path)
    _check_names("group", context.groups, pylock.dependency_groups or (), path)
    full, python = chosen_python(context.python, pylock.requires_python, str(path))
    target = make_target(context.platform, glibc=context.glibc or None)
    try:
        selected = list(
            pylock.select(
                environment=cast("Environment", target.markers(full)),
                tags=target.wheel_tags(full),
                extras=extras,
                dependency_groups=[*(pylock.default_groups or ()), *context.groups],
            )
        )
    except PylockSelectError as error:
        what = f"{context.platform}, glibc {target.virtual['__glibc']} and Python {full}"
        raise wrong(path, f"does not fit {what}: {error}", hint=_HINT) from error
    packages = sorted(
        (_package(package, chosen, path) for package, chosen in selected), key=lambda p: p.name
    )
    return Lock(
        platform=context.platform,
        packages=tuple(packages),
        virtual={"__glibc": target.virtual["__glibc"]},
        request=Request(python=python),
    )


def _check_names(kind: str, asked: Sequence[str], known: Sequence[str], path: Path) -> None:
    for name in asked:
        if name not in known:
            hint = f"it has {', '.join(map(str, known))}" if known else f"it has no {kind}s"
            raise wrong(path, f"has no {kind} {name!r}", hint=hint)


def _package(package: Package, chosen: object, path: Path) -> PypiPackage:
    from packaging.pylock import PackageArchive, PackageDirectory, PackageSdist, PackageWheel

    where = f"{path}: {package.name}"
    if isinstance(chosen, PackageDirectory):
        raise UsageError(
            f"{where} is the directory {chosen.path}, which can change",
            hint="build a wheel of it, and lock that",
        )
    if not isinstance(chosen, PackageArchive | PackageSdist | PackageWheel):
        raise UsageError(
            f"{where} comes from a version control system, without a digest of its content",
            hint="build a wheel of it, and lock that",
        )
    location = chosen.url or file_url(path.parent / (chosen.path or ""))
    direct = ""
    if isinstance(chosen, PackageArchive):
        direct = location
        if chosen.subdirectory:
            location += f"#subdirectory={chosen.subdirectory}"
    return pypi_package(
        package.name,
        str(package.version or ""),
        location,
        chosen.hashes.get("sha256", ""),
        where,
        filename=chosen.filename if isinstance(chosen, PackageWheel) else "",
        size=chosen.size or 0,
        requires_python=str(package.requires_python or ""),
        direct=direct,
    )
