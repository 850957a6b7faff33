"""What uv resolved: its ``pylock.toml`` (PEP 751) as distributions and their files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from envstore.errors import CorruptError, EnvstoreError
from envstore.resolver.packages.credentials import without_login

if TYPE_CHECKING:
    from packaging.tags import Tag

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class File:
    """A wheel or source archive. ``url`` has no login; ``size`` is bytes, 0 if unknown."""

    url: str
    filename: str
    sha256: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository at a commit, and where in it the project lies."""

    url: str
    commit: str
    subdirectory: str = ""


@dataclass(frozen=True, slots=True)
class Distribution:
    """One resolved distribution. Exactly one kind of source is given: those of an index
    (``wheels``, ``sdist``), or what a requirement names (``archive``, ``directory``, ``git``)."""

    name: str
    version: str
    wheels: tuple[File, ...] = ()
    sdist: File | None = None
    archive: File | None = None
    directory: Path | None = None
    git: Repository | None = None
    subdirectory: str = ""


def parse_pylock(text: str, base: Path, markers: Mapping[str, str]) -> list[Distribution]:
    """Return what a ``pylock.toml`` beside ``base`` holds for the environment ``markers``.

    Raises ``CorruptError``.
    """
    try:
        document = tomllib.loads(text)
        packages = document.get("packages", [])
        return [
            _distribution(package, base)
            for package in packages
            if _applies(package.get("marker"), markers)
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"uv wrote a pylock.toml that cannot be read: {error}") from error


def _applies(marker: str | None, markers: Mapping[str, str]) -> bool:
    from packaging.markers import Marker

    return marker is None or Marker(marker).evaluate(dict(markers))


def _distribution(value: Mapping[str, Any], base: Path) -> Distribution:
    name, version = value["name"], value.get("version", "")
    if "directory" in value:
        where = base / value["directory"]["path"]
        directory = where / value["directory"].get("subdirectory", "")
        return Distribution(name, version, directory=directory)
    if "vcs" in value:
        vcs = value["vcs"]
        if vcs["type"] != "git":
            raise ValueError(f"{name} comes from {vcs['type']}, not git")
        url = vcs.get("url") or (base / vcs["path"]).as_uri()
        if not url.startswith(("ssh://", "git@")):  # there the user is a part of the address
            url = without_login(url)
        git = Repository(url, vcs["commit-id"], vcs.get("subdirectory", ""))
        return Distribution(name, version, git=git)
    if "archive" in value:
        archive = value["archive"]
        subdirectory = archive.get("subdirectory", "")
        return Distribution(name, version, archive=_file(archive, base), subdirectory=subdirectory)
    return Distribution(
        name,
        version,
        wheels=tuple(_file(wheel, base) for wheel in value.get("wheels", ())),
        sdist=_file(value["sdist"], base) if "sdist" in value else None,
    )


def _file(value: Mapping[str, Any], base: Path) -> File:
    url = without_login(value["url"]) if "url" in value else (base / value["path"]).as_uri()
    split = urlsplit(url)
    filename = value.get("name") or unquote(split.path.rpartition("/")[2])
    sha256 = str(value["hashes"]["sha256"]).lower()
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"{filename} has no SHA-256")
    size = int(value.get("size", 0))
    if not size and split.scheme == "file":
        size = _size_of(Path(unquote(split.path)))
    return File(url.partition("#")[0], filename, sha256, size)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise EnvstoreError(f"cannot read {path}: {error.strerror}") from error


def ranked(tags: Sequence[Tag]) -> dict[Tag, int]:
    """Return the place of each of ``tags``, the first being the best."""
    return {tag: rank for rank, tag in enumerate(tags)}


def best_wheel(files: Iterable[File], ranks: Mapping[Tag, int]) -> File | None:
    """Return the wheel among ``files`` that fits best (see ``ranked``), ``None`` if none does.

    Of equals that with the higher build number is taken, then the first by name.
    """
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    best: tuple[tuple[int, tuple[int, str], str], File] | None = None
    for file in files:
        try:
            _, _, build, own = parse_wheel_filename(file.filename)
        except InvalidWheelFilename:
            continue
        fitting = [ranks[tag] for tag in own if tag in ranks]
        if not fitting:
            continue
        number = (-build[0], build[1]) if build else (0, "")
        key = (min(fitting), number, file.filename)
        if best is None or key < best[0]:
            best = (key, file)
    return best[1] if best else None
