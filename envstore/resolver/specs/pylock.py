"""Reads ``pylock.toml`` (PEP 751) into a lock of wheels for one platform and one Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envstore.errors import UsageError
from envstore.resolver.lock import Build, Lock, PypiPackage
from envstore.resolver.request import Request
from envstore.resolver.specs import targets
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import (
    file_url,
    parse_toml,
    read_text,
    refuse_secrets,
    wrong,
)

if TYPE_CHECKING:
    from packaging.pylock import Package, PackageArchive, PackageSdist, PackageWheel


def read_pylock(path: Path, context: Context) -> Lock:
    """Read a ``pylock.toml`` or ``pylock.<name>.toml``.

    The context's extras and groups must be ones that the file knows; without groups its default
    groups count. Raises ``UsageError``.
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
    version = targets.python_version(context.python, pylock.requires_python, str(path))
    full = targets.full_version(version, pylock.requires_python)
    try:
        selected = list(
            pylock.select(
                environment=targets.markers(context.platform, full),
                tags=targets.wheel_tags(context.platform, version, context.glibc),
                extras=extras,
                dependency_groups=context.groups or None,
            )
        )
    except PylockSelectError as error:
        target = f"{context.platform}, Python {version}, glibc {context.glibc}"
        raise wrong(path, f"has nothing for {target}: {_plain(error)}") from error
    packages = sorted(
        (_package(package, chosen, path) for package, chosen in selected), key=lambda p: p.name
    )
    minor = ".".join(version.split(".")[:2])
    request = Request(
        python=f"=={version}" if version.count(".") > 1 and context.python else f"=={minor}.*"
    )
    return Lock(platform=context.platform, packages=tuple(packages), request=request)


def _plain(error: Exception) -> str:
    return str(error).replace(" matching the provided tags", "")


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
    if isinstance(chosen, PackageArchive | PackageSdist | PackageWheel):
        location = _location(chosen, path, where)
        version = str(package.version or _version_of(location, where))
        sha256 = _sha256(chosen.hashes, where)
        if location.endswith(".whl"):
            name = (
                chosen.filename if isinstance(chosen, PackageWheel) else location.rpartition("/")[2]
            )
            size = chosen.size or 0
            direct = location if isinstance(chosen, PackageArchive) else ""
            return PypiPackage(package.name, version, name, location, sha256, size, direct=direct)
        direct = location if isinstance(chosen, PackageArchive) else ""
        if getattr(chosen, "subdirectory", None):
            raise UsageError(
                f"{where} is built in a directory of its archive, which is not supported",
                hint="lock a wheel of it",
            )
        return PypiPackage(
            package.name, version, "", "", "", direct=direct, build=Build(location, sha256)
        )
    raise UsageError(
        f"{where} comes from a version control system, without a digest of its content",
        hint="build a wheel of it, and lock that",
    )


def _location(chosen: PackageArchive | PackageSdist | PackageWheel, path: Path, where: str) -> str:
    if chosen.url:
        return refuse_secrets(chosen.url.partition("#")[0], where)
    local = path.parent / (chosen.path or "")
    return file_url(local)


def _version_of(location: str, where: str) -> str:
    from packaging.utils import (
        InvalidSdistFilename,
        InvalidWheelFilename,
        parse_sdist_filename,
        parse_wheel_filename,
    )

    name = location.rpartition("/")[2]
    try:
        if name.endswith(".whl"):
            return str(parse_wheel_filename(name)[1])
        return str(parse_sdist_filename(name)[1])
    except (InvalidSdistFilename, InvalidWheelFilename):
        raise UsageError(
            f"{where} has no version", hint="neither its entry nor its file's name says one"
        ) from None


def _sha256(hashes: Mapping[str, str], where: str) -> str:
    digest = hashes.get("sha256", "").lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UsageError(f"{where} has no valid SHA-256", hint="lock it again with one")
    return digest
