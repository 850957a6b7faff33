"""Which Python distributions conda packages bring, read from those that lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from envstore.errors import EnvstoreError
from envstore.resolver.lock import CondaPackage
from envstore.resolver.rattler_call import call

if TYPE_CHECKING:
    from rattler import PathsJson

Names = dict[str, list[tuple[str, str]]]
"""Names and versions of distributions by the SHA-256 of the conda package that holds them."""

_INFO = re.compile(
    r"site-packages/([^/]+?)-([^/-]+)(?:-py[0-9.]+)?\.(?:dist-info/METADATA|egg-info(?:/PKG-INFO)?)"
)


def names_in(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and versions of the distributions whose metadata is among ``paths``."""
    found = {match.groups() for path in paths if (match := _INFO.search(path))}
    return sorted((name, version) for name, version in found)


def names_at_hand(
    packages: Sequence[CondaPackage], known: Mapping[str, object], downloads: Path
) -> Names:
    """Return what the archives of ``packages`` hold that lie in ``downloads`` or a local channel.

    Those that ``known`` has are not looked at. Raises ``EnvstoreError`` for archives that cannot
    be read.
    """
    from rattler.package_streaming import PackageArchive

    wanted = {}
    for package in packages:
        suffix = ".conda" if package.filename.endswith(".conda") else ".tar.bz2"
        path = downloads / f"{package.sha256}{suffix}"
        if not path.is_file() and package.url.startswith("file:"):
            path = Path(unquote(urlsplit(package.url).path))
        if package.sha256 not in known and path.is_file():
            wanted[package.sha256] = path
    if not wanted:
        return {}

    async def listed(path: Path) -> PathsJson:
        archive = await PackageArchive.from_path(path)
        return await archive.paths_json()

    async def read() -> Names:
        found: Names = {}
        for sha256, path in wanted.items():
            paths = (await listed(path)).paths
            found[sha256] = names_in([str(entry.relative_path) for entry in paths])
        return found

    try:
        return call(read)
    except EnvstoreError as error:
        raise type(error)(f"a channel's archive: {error.message}", hint=error.hint) from error
