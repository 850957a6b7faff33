"""Completes locks: finds the digests, metadata, wheels and interpreter that others leave open.

What a lock says already is never replaced. Archives that had to be fetched for it stay in the
cache, where a push finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from envstore import __version__
from envstore.errors import CorruptError
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, Package, python_of
from envstore.resolver.locking import Locked, Progress
from envstore.resolver.request import CondaRequest, Request
from envstore.resolver.target import Target

if TYPE_CHECKING:
    from rattler.package import IndexJson

    from envstore.resolver.packages.download import Fetched

ARCHIVES = "archives"
"""The directory below the cache where archives are kept until they are stored."""

_ANY_PYTHON = ">=3"


@dataclass(frozen=True, slots=True)
class Means:
    """What a lock is completed with: for whom, and where interpreter and packages come from.

    ``channels`` are for the interpreter of a lock that has wheels only, unless ``interpreter`` is
    a program to take it from. ``warnings`` is added to.
    """

    target: Target
    cache: Path
    channels: tuple[str, ...]
    interpreter: Path | None
    warnings: list[str]
    progress: Progress


def complete(lock: Lock, means: Means) -> Locked:
    """Return ``lock`` with everything that a written lock must have.

    Packages without a SHA-256 are downloaded, as are conda packages of a list that says nothing
    but their URLs; wheels are built where there is a source only; wheels without an interpreter
    get one. A complete lock costs nothing. Raises what downloads, builds and the conda resolver
    raise.
    """
    lock = _with_digests(lock, means)
    lock = _with_interpreter(lock, means)
    lock = _with_wheels(lock, means)
    if "envstore" not in lock.tools:
        lock = replace(
            lock,
            tools={**lock.tools, "envstore": __version__},
            virtual=lock.virtual or dict(means.target.virtual),
        )
    return Locked(lock, dict(_built(lock, means.cache)))


def _with_digests(lock: Lock, means: Means) -> Lock:
    from envstore.resolver.packages.download import Archive, iter_archives

    bare = _is_bare(lock)
    wanted = []
    for package in lock.packages:
        if isinstance(package, LocalPython) or not package.url:
            continue
        if not package.sha256 or (bare and isinstance(package, CondaPackage)):
            md5 = package.md5 if isinstance(package, CondaPackage) else ""
            label = f"{package.name}-{package.version}"
            wanted.append(Archive(package.url, package.sha256, package.size, label, md5))
    if not wanted:
        return lock
    found = {}
    for item in iter_archives(
        wanted,
        means.cache / ARCHIVES,
        progress=lambda done, total: means.progress("download", done, total),
    ):
        # Of one digest one archive is fetched, whatever it is called.
        same = (one.url for one in wanted if one.sha256 == item.sha256)
        found.update(dict.fromkeys((item.archive.url, *same), item))
    packages = [_with_digest(package, found) for package in lock.packages]
    return replace(lock, packages=tuple(_described(packages, found) if bare else packages))


def _with_digest(package: Package, found: Mapping[str, Fetched]) -> Package:
    item = None if isinstance(package, LocalPython) else found.get(package.url)
    if item is None or isinstance(package, LocalPython):
        return package
    return replace(package, sha256=item.sha256, size=item.size)


def _is_bare(lock: Lock) -> bool:
    """Whether a lock is a list of URLs that says nothing else of its conda packages."""
    conda = lock.conda()
    return bool(conda) and "envstore" not in lock.tools and not any(p.depends for p in conda)


def _described(packages: Sequence[Package], found: Mapping[str, Fetched]) -> list[Package]:
    """Return ``packages`` with what the conda packages among them say of themselves."""
    from rattler.package_streaming import PackageArchive

    from envstore.resolver.rattler_call import call

    async def read_all() -> dict[str, IndexJson]:
        said = {}
        for package in packages:
            if isinstance(package, CondaPackage):
                archive = await PackageArchive.from_path(found[package.url].path)
                said[package.url] = await archive.index_json()
        return said

    said = call(read_all)
    return [
        _with_index(package, said[package.url]) if isinstance(package, CondaPackage) else package
        for package in packages
    ]


def _with_index(package: CondaPackage, index: IndexJson) -> CondaPackage:
    # The version is compared where the archive is unpacked; rattler may spell it otherwise.
    name, build = index.name.normalized, str(index.build)
    if (name, build) != (package.name.lower(), package.build):
        raise CorruptError(
            f"{package.filename} holds {name} {index.version} {build}",
            hint="it was renamed or replaced: fetch it elsewhere",
        )
    noarch = "python" if index.noarch.python else "generic" if index.noarch.generic else ""
    return replace(
        package,
        noarch=noarch,
        build_number=index.build_number,
        depends=tuple(index.depends),
        constrains=tuple(index.constrains),
        python_site_packages_path=index.python_site_packages_path or "",
    )


def _with_interpreter(lock: Lock, means: Means) -> Lock:
    """Return a lock of wheels with the interpreter that it does not name."""
    if not lock.pypi() or python_of(lock) is not None:
        return lock
    from envstore.resolver.resolving import resolve

    asked = Request(
        conda=CondaRequest(channels=means.channels), python=lock.request.python or _ANY_PYTHON
    )
    found = resolve(
        asked,
        means.target,
        cache=means.cache,
        python=means.interpreter,
        warnings=means.warnings,
    )
    return replace(
        lock,
        packages=(*found.packages, *lock.packages),
        virtual=lock.virtual or found.virtual,
        tools={**found.tools, **lock.tools},
    )


def _with_wheels(lock: Lock, means: Means) -> Lock:
    """Return a lock whose wheels are all built."""
    waiting = [package for package in lock.pypi() if package.build and not package.sha256]
    python = python_of(lock)
    if not waiting or python is None:
        return lock
    from envstore.resolver.sdists import Builder, make_wheels

    builder = Builder(
        python.version,
        means.target,
        means.cache,
        lock.request.pypi,
        lock.request.exclude_newer,
        means.interpreter if lock.local_python() is not None else None,
        lock.conda(),
    )
    made = iter(make_wheels(waiting, builder, means.progress)[0])
    packages = [next(made) if package in waiting else package for package in lock.packages]
    return replace(lock, packages=tuple(packages))


def _built(lock: Lock, cache: Path) -> list[tuple[str, Path]]:
    """Return where wheels lie that were built here, by their SHA-256; other machines have none."""
    from envstore.resolver.sdists import BUILT

    found = []
    for package in lock.pypi():
        if package.build is None:
            continue
        path = cache / BUILT / "wheels" / package.sha256 / package.filename
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == package.sha256:
                    found.append((package.sha256, path))
    return found
