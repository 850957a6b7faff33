"""Wheels of what has none: built once from a source, and found again in the cache.

A build runs in an isolated environment with a fixed time, locale and hash seed, so that most
backends give the same bytes each time. Below ``<cache>/built`` lie ``wheels/<sha256>/<file>`` and,
for each source and interpreter, a record of the wheel that it became.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnavailableError
from envstore.resolver.compiler import base_interpreter
from envstore.resolver.conflicts import clip
from envstore.resolver.lock import Build, CondaPackage, PypiPackage
from envstore.resolver.pylock import File, best_wheel, ranked
from envstore.resolver.rattler_call import without_secrets
from envstore.resolver.request import PypiRequest
from envstore.resolver.target import Target, own_platform
from envstore.resolver.uvtool import index_settings, run_uv

BUILT = "built"
"""The directory below the cache where built wheels and their records are kept."""

DOWNLOADS = "downloads"
"""The directory below the cache where archives are kept."""

_WORK = "making-"
_ABANDONED = 2 * 86_400  # seconds
_EPOCH = "315532800"  # 1980, the first year that a zip archive knows
_SETTINGS = {
    "SOURCE_DATE_EPOCH": _EPOCH,
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
    "GIT_TERMINAL_PROMPT": "0",
}
_TOOLS = re.compile(r"DEBUG Installing build requirements?: (.+)")
_BACKEND = re.compile(r"DEBUG Calling `([^`]+?)\.build_wheel\(")
_NOT_SOURCE = ("__pycache__", ".venv", ".tox", ".nox", ".mypy_cache", ".pytest_cache")

Progress = Callable[[str, int, int], None]
"""Told a phase (``build``), how many wheels are built, and how many there are to build."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Builder:
    """Where and how wheels are built: for CPython ``python`` (``3.11.7``) on ``target``.

    ``pypi`` says which indexes build requirements come from, ``exclude_newer`` (RFC 3339 or
    empty) how old they must be. ``interpreter`` is one of the same minor version, by default that
    of the environment's ``conda`` packages if it runs here, else the one this program runs on or
    whichever uv finds.
    """

    python: str
    target: Target
    cache: Path
    pypi: PypiRequest = field(default_factory=PypiRequest)
    exclude_newer: str = ""
    interpreter: Path | None = None
    conda: tuple[CondaPackage, ...] = ()

    @property
    def minor(self) -> str:
        """``3.11`` of ``3.11.7``."""
        return ".".join(self.python.split(".")[:2])

    @property
    def tag(self) -> str:
        """What tells builds of one source apart, ``cp311-linux-64``."""
        return f"cp{self.minor.replace('.', '')}-{self.target.platform}"

    def program(self) -> str:
        """Return the interpreter to build with, as uv's ``--python`` takes it.

        Raises what fetching raises, if one has to be fetched.
        """
        if self.interpreter is not None:
            return str(self.interpreter)
        if self.conda and self.target.platform == own_platform():
            from envstore.resolver.buildpython import conda_interpreter

            return str(conda_interpreter(self.conda, self.cache / BUILT / "pythons"))
        if self.minor == f"{sys.version_info.major}.{sys.version_info.minor}":
            return str(base_interpreter())
        return self.minor


def make_wheels(
    packages: Sequence[PypiPackage], builder: Builder, progress: Progress | None = None
) -> tuple[list[PypiPackage], dict[str, Path]]:
    """Return ``packages`` with a wheel each, and where the built ones lie, by their SHA-256.

    Built are those with a ``build`` whose wheel is not in the cache. Where a package has a
    ``sha256`` already its wheel must turn out the same. Raises ``EnvstoreError`` for a build that
    fails (its log is kept, and named), ``CorruptError`` for one that gives another wheel, and what
    downloads raise.
    """
    found: dict[str, Path] = {}
    waiting = sum(1 for package in packages if package.build is not None)
    done = 0
    made = []
    for package in packages:
        if package.build is not None:
            if progress is not None:
                progress("build", done, waiting)
            package, path = make_wheel(package, builder)
            found[package.sha256] = path
            done += 1
        made.append(package)
    if progress is not None and waiting:
        progress("build", done, waiting)
    return made, found


def make_wheel(package: PypiPackage, builder: Builder) -> tuple[PypiPackage, Path]:
    """Return ``package`` with its wheel, and where that lies. Raises as ``make_wheels``."""
    build = package.build
    if build is None:
        raise ValueError(f"{package.name} is not to be built")
    place = builder.cache / BUILT
    if package.sha256:
        path = place / "wheels" / package.sha256 / package.filename
        if path.is_file() and _digest(path) == package.sha256:
            return package, path
    source = _source_url(build.source)
    known = None if source.scheme == "file-directory" else _recorded(place, build, builder)
    if known is None:
        known = _build(package, build, builder)
        _record(place, build, builder, known)
    filename, sha256, size, done = known
    if package.sha256 and package.sha256 != sha256:
        raise CorruptError(
            f"{package.name} {package.version} was built into another wheel than the lock has",
            hint="push from where it was built, or lock again",
        )
    _check_fit(package, filename, builder)
    completed = replace(
        package,
        version=package.version or _version_of(filename),
        filename=filename,
        sha256=sha256,
        size=size,
        build=done,
    )
    return completed, place / "wheels" / sha256 / filename


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a source is: an archive (``scheme`` as in its URL), ``git`` or ``file-directory``."""

    scheme: str
    url: str
    commit: str = ""
    subdirectory: str = ""


def _source_url(text: str) -> _Source:
    url, _, fragment = text.partition("#")
    found = re.search(r"(?:^|&)subdirectory=([^&]*)", fragment)
    below = unquote(found[1]) if found else ""
    if url.startswith("git+"):
        where, _, commit = url.removeprefix("git+").rpartition("@")
        return _Source("git", where, commit, below)
    split = urlsplit(url)
    if split.scheme == "file" and Path(unquote(split.path)).is_dir():
        return _Source("file-directory", url, "", below)
    return _Source(split.scheme, url, "", below)


_Known = tuple[str, str, int, Build]


def _key(build: Build) -> str:
    return build.sha256 or hashlib.sha256(build.source.encode()).hexdigest()


def _recorded(place: Path, build: Build, builder: Builder) -> _Known | None:
    """Return what was built from ``build``'s source before, if it is still there and whole."""
    path = place / _key(build) / f"{builder.tag}.json"
    try:
        value = json.loads(path.read_bytes())
        filename, sha256, size = value["filename"], value["sha256"], value["size"]
        made = Build(build.source, build.sha256, value["backend"], tuple(value["tools"]))
        wheel = place / "wheels" / sha256 / filename
        if wheel.parent.parent != place / "wheels" or _digest(wheel) != sha256:
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("the record of a build, %s, cannot be read: %s", path, error)
        return None
    return filename, sha256, size, made


def _record(place: Path, build: Build, builder: Builder, known: _Known) -> None:
    filename, sha256, size, made = known
    path = place / _key(build) / f"{builder.tag}.json"
    value = {
        "source": build.source,
        "filename": filename,
        "sha256": sha256,
        "size": size,
        "backend": made.backend,
        "tools": list(made.tools),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file, indent=1)
    os.replace(file.name, path)


def _build(package: PypiPackage, build: Build, builder: Builder) -> _Known:
    """Build a wheel and put it into the cache."""
    place = builder.cache / BUILT
    place.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=place) as name:
        work = Path(name)
        source = _fetch(package, build, work, builder)
        arguments, environment = index_settings(builder.pypi, builder.exclude_newer)
        command = ["build", str(source), "--wheel", "--out-dir", "out", "--python"]
        command += [builder.program(), "--no-python-downloads", "--no-create-gitignore"]
        said = run_uv(
            [*command, *arguments],
            work,
            place / "logs",
            environment={**_SETTINGS, **environment},
            what=f"{package.name} {package.version}".strip(),
        )
        wheels = sorted((work / "out").glob("*.whl"))
        if len(wheels) != 1:
            raise EnvstoreError(f"the build of {package.name} made {len(wheels)} wheels, not one")
        wheel = wheels[0]
        sha256 = _digest(wheel)
        final = place / "wheels" / sha256 / wheel.name
        final.parent.mkdir(parents=True, exist_ok=True)
        size = wheel.stat().st_size
        os.replace(wheel, final)
    tools: dict[str, None] = {}
    backend = ""
    for line in said.log:
        if match := _TOOLS.match(line):
            tools.update(dict.fromkeys(part.strip() for part in match[1].split(",")))
        elif match := _BACKEND.match(line):
            backend = match[1]
    made = Build(build.source, build.sha256, backend or build.backend, tuple(sorted(tools)))
    return wheel.name, sha256, size, made


def _sweep(place: Path) -> None:
    """Remove what builds left that were killed."""
    for path in place.glob(f"{_WORK}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _fetch(package: PypiPackage, build: Build, work: Path, builder: Builder) -> Path:
    """Return the source to build, in or outside ``work``: an archive or a directory."""
    source = _source_url(build.source)
    if source.scheme == "git":
        return _below(_clone(source, work), source.subdirectory)
    if source.scheme == "file-directory":
        # Backends litter the tree that they build.
        origin = Path(unquote(urlsplit(source.url).path))
        copy = work / "source"
        try:
            ignored = shutil.ignore_patterns(*_NOT_SOURCE)
            shutil.copytree(origin, copy, symlinks=True, ignore=ignored)
        except (OSError, shutil.Error) as error:
            raise EnvstoreError(f"cannot copy {origin}: {error}") from error
        return _below(copy, source.subdirectory)
    if source.subdirectory:
        raise EnvstoreError(
            f"{package.name} lies in a directory of an archive, and such cannot be built",
            hint="name its git repository instead",
        )
    from envstore.resolver.packages.download import Archive, iter_archives

    archive = Archive(source.url, build.sha256, name=f"the source of {package.name}")
    (fetched,) = iter_archives([archive], builder.cache / DOWNLOADS)
    named = work / unquote(urlsplit(source.url).path.rpartition("/")[2])
    os.symlink(fetched.path.absolute(), named)
    return named


def _below(directory: Path, subdirectory: str) -> Path:
    found = (directory / subdirectory).resolve()
    if not found.is_relative_to(directory.resolve()) or not found.is_dir():
        raise NotFoundError(f"there is no directory {subdirectory!r} in the source")
    return found


def _clone(source: _Source, work: Path) -> Path:
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", source.commit):
        raise EnvstoreError(f"{without_secrets(source.url)} is at no commit: {source.commit!r}")
    copy = work / "source"
    _git(["clone", "--quiet", "--no-checkout", "--", source.url, str(copy)], work, source)
    _git(["checkout", "--quiet", "--detach", source.commit], copy, source)
    _git(["submodule", "--quiet", "update", "--init", "--recursive"], copy, source)
    return copy


def _git(arguments: Iterable[str], directory: Path, source: _Source) -> None:
    environment = {
        **os.environ,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",  # others run commands
    }
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise NotFoundError("git is needed to fetch a source and is not there") from error
    if done.returncode != 0:
        text = without_secrets(done.stderr.decode(errors="replace"))
        raise UnavailableError(f"git cannot fetch {without_secrets(source.url)}: {clip(text)}")


def _check_fit(package: PypiPackage, filename: str, builder: Builder) -> None:
    """Refuse a wheel that the target does not run, or may not: it was compiled for another."""
    tags = ranked(builder.target.wheel_tags(builder.python))
    if best_wheel([File("", filename, "")], tags) is None:
        raise EnvstoreError(f"{filename} was built, which does not fit {builder.tag}")
    if not filename.endswith("-any.whl") and not builder.target.runs_here:
        major, minor = builder.target.glibc
        raise EnvstoreError(
            f"{package.name} {_version_of(filename)} has no wheel for {builder.target.platform} "
            f"with glibc {major}.{minor}, and what is compiled here may not run there",
            hint="lock on such a machine, or write --only-binary :all: into the requirements, "
            "for versions with wheels",
        )


def _version_of(filename: str) -> str:
    from packaging.utils import parse_wheel_filename

    return str(parse_wheel_filename(filename)[1])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
