"""Python requirements to wheels, by uv."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from envstore.errors import CorruptError, EnvstoreError, UsageError
from envstore.resolver.conflicts import clip
from envstore.resolver.lock import Build, PypiPackage
from envstore.resolver.pylock import Distribution, File, best_wheel, parse_pylock, ranked
from envstore.resolver.request import PypiRequest
from envstore.resolver.stubs import Provided, write_stubs
from envstore.resolver.target import Target
from envstore.resolver.uvtool import index_settings, run_uv

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.tags import Tag

_NEED = re.compile(r"DEBUG Adding transitive dependency for ([^\s=]+)==(\S+): (.+)")
_PARTS = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?(?:\{(.*)\})?(.*)")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is said of one distribution by name: the extras asked of it, and hashes to accept."""

    extras: tuple[str, ...] = ()
    hashes: frozenset[str] = frozenset()
    direct: str = ""


def solve(
    request: PypiRequest,
    target: Target,
    python: str,
    *,
    interpreter: Path,
    cache: Path,
    exclude_newer: str = "",
    provided: Sequence[Provided] = (),
    keep: Sequence[PypiPackage] = (),
    warnings: list[str] | None = None,
) -> tuple[PypiPackage, ...]:
    """Return the wheels for ``request`` under CPython ``python`` (``3.11.7``), by name.

    What has no fitting wheel is returned with the source to build one from, without a filename
    (see ``sdists``). ``interpreter`` is what uv runs on, of any version. ``provided`` are there
    already and not among the result; ``keep`` are versions to prefer. ``exclude_newer`` (RFC 3339)
    leaves out what was uploaded later; what uv warns of is added to ``warnings``. Logs of failed
    builds are kept below ``cache``. Raises ``UnsatisfiableError`` and whatever ``run_uv`` raises.
    """
    asked = requested(request)
    for line in (*request.constraints, *request.overrides):
        _parsed(line)
    arguments, environment = index_settings(request, exclude_newer)
    with tempfile.TemporaryDirectory(prefix="envstore-resolve-") as scratch:
        work = Path(scratch).resolve()
        constraints = [*request.constraints]
        command = ["pip", "compile", "requirements.in", "--format", "pylock.toml"]
        command += ["-o", "pylock.toml", "--generate-hashes", "--no-header"]
        command += ["--python", str(interpreter), "--python-version", python]
        platform = target.uv_platform()
        if platform is not None:
            command += ["--python-platform", platform]
        names = {item.name for item in provided}
        sources = [item for item in request.no_binary if item not in names]
        if provided:
            constraints += write_stubs(provided, work / "provided")
            arguments += ["--find-links", str(work / "provided")]
            for name in sorted(names):
                command += ["--no-emit-package", name]
                if sources:
                    command += ["--only-binary", name]
        command += [f"--only-binary={item}" for item in request.only_binary]
        command += [f"--no-binary={item}" for item in sources]
        _write(work / "requirements.in", request.requirements)
        for lines, option in ((constraints, "-c"), (request.overrides, "--overrides")):
            if lines:
                _write(work / f"lines{option}.txt", lines)
                command += [option, f"lines{option}.txt"]
        if keep:
            _write(work / "pylock.toml", _preferences(keep))
        logs = cache / "built" / "logs"
        said = run_uv([*command, *arguments], work, logs, environment=environment)
        text = (work / "pylock.toml").read_text(encoding="utf-8")
        found = parse_pylock(text, work, target.markers(python))
    if warnings is not None:
        warnings.extend(said.warnings)
    needs = _needs(said.log, constraints)
    tags = ranked(target.wheel_tags(python))
    packages = [
        _package(item, request, asked, needs, tags) for item in found if item.name not in names
    ]
    if request.require_hashes:
        _require_hashes(packages, asked)
    return tuple(sorted(packages, key=lambda package: package.name))


def requested(request: PypiRequest) -> dict[str, Asked]:
    """Return what the requirements say, by normalised name. Raises ``UsageError``."""
    from packaging.utils import canonicalize_name

    found: dict[str, Asked] = {}
    for line in request.requirements:
        parsed = _parsed(line)
        name = canonicalize_name(parsed.name)
        before = found.get(name, Asked())
        hashes = {
            value.partition(":")[2].lower()
            for value in request.hashes.get(line, ())
            if value.startswith("sha256:")
        }
        if request.hashes.get(line) and not hashes:
            raise UsageError(
                f"the hashes of {parsed.name} are not SHA-256", hint="add --hash=sha256:..."
            )
        found[name] = Asked(
            tuple(sorted({*before.extras, *parsed.extras})),
            before.hashes | hashes,
            before.direct or parsed.url or "",
        )
    return found


def _parsed(line: str) -> Requirement:
    """Return a requirement that uv will not take for an option or for several lines."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        if "\n" in line or "\r" in line:
            raise InvalidRequirement("it is more than one line")
        return Requirement(line)
    except InvalidRequirement as error:
        raise UsageError(f"{line!r} is no requirement: {clip(str(error))}") from error


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _preferences(keep: Sequence[PypiPackage]) -> list[str]:
    """Return an earlier ``pylock.toml``: uv takes its versions again if they still fit."""
    lines = ['lock-version = "1.0"', 'created-by = "envstore"']
    for package in keep:
        lines += ["[[packages]]", f'name = "{package.name}"', f'version = "{package.version}"']
    return lines


def _needs(log: Sequence[str], pins: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return requirements by name and version of who has them, from the resolver's own log.

    ``pins`` are constraints, which uv counts among them. They are for people to read; nothing is
    decided by them.
    """
    found: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for line in log:
        match = _NEED.match(line)
        parts = _PARTS.fullmatch(match[3].strip()) if match else None
        if match is None or parts is None:
            continue
        name, extras, marker, versions = parts.groups()
        wanted = versions.replace(" ", "") if versions.strip() != "*" else ""
        if name.lower() == match[1].lower() or f"{name}{wanted}" in pins:
            continue
        text = f"{name}{extras or ''}{wanted}" + (f" ; {marker}" if marker else "")
        found[match[1]][match[2]][text] = None
    return {
        name: {version: tuple(sorted(lines)) for version, lines in versions_of.items()}
        for name, versions_of in found.items()
    }


def _package(
    found: Distribution,
    request: PypiRequest,
    asked: Mapping[str, Asked],
    needs: Mapping[str, Mapping[str, tuple[str, ...]]],
    tags: Mapping[Tag, int],
) -> PypiPackage:
    """Return one resolved distribution with the wheel, or the source, that fits best."""
    said = asked.get(found.name, Asked())
    wheel, build = _source(found, request, said, tags)
    direct = ""
    if found.archive is not None:
        direct = found.archive.url
    elif build is not None and (found.git or found.directory):
        direct = build.source
    return PypiPackage(
        name=found.name,
        version=found.version,
        filename=wheel.filename if wheel else "",
        url=wheel.url if wheel else "",
        sha256=wheel.sha256 if wheel else "",
        size=wheel.size if wheel else 0,
        requires=_requires(needs.get(found.name, {}), found.version),
        direct=direct,
        extras=said.extras,
        requested=found.name in asked,
        build=build,
    )


def _requires(needs: Mapping[str, tuple[str, ...]], version: str) -> tuple[str, ...]:
    if not version and len(needs) == 1:  # a directory, whose build will say
        return next(iter(needs.values()))
    return needs.get(version, ())


def _source(
    found: Distribution, request: PypiRequest, said: Asked, tags: Mapping[Tag, int]
) -> tuple[File | None, Build | None]:
    if found.git is not None:
        below = found.git.subdirectory
        place = f"git+{found.git.url}@{found.git.commit}"
        return None, Build(place + (f"#subdirectory={below}" if below else ""), "")
    if found.directory is not None:
        return None, Build(found.directory.as_uri(), "")
    wheels, sdist = found.wheels, found.sdist
    if found.archive is not None:
        is_wheel = found.archive.filename.endswith(".whl")
        wheels = (found.archive,) if is_wheel else ()
        sdist = None if is_wheel else found.archive
    if not wheels and sdist is None:
        raise CorruptError(f"the index lists no files of {found.name} {found.version}")
    if said.hashes:
        listed = len(wheels) + (sdist is not None)
        wheels = tuple(file for file in wheels if file.sha256 in said.hashes)
        sdist = sdist if sdist is not None and sdist.sha256 in said.hashes else None
        if not wheels and sdist is None:
            raise CorruptError(
                f"none of the {listed} files of {found.name} {found.version} has a hash"
                " that is asked for",
                hint="the files or the hashes were changed: do not trust either",
            )
    from_source = {found.name, ":all:"} & set(request.no_binary) and sdist is not None
    best = None if from_source else best_wheel(wheels, tags)
    if best is not None:
        return best, None
    if sdist is None or {found.name, ":all:"} & set(request.only_binary):
        raise EnvstoreError(
            f"no wheel of {found.name} {found.version} fits {next(iter(tags))}",
            hint="ask for another version, or --platform, --glibc or --python",
        )
    below = f"#subdirectory={found.subdirectory}" if found.subdirectory else ""
    return None, Build(sdist.url + below, sdist.sha256)


def _require_hashes(packages: Sequence[PypiPackage], asked: Mapping[str, Asked]) -> None:
    bare = [
        f"{package.name}=={package.version}" if package.version else package.name
        for package in packages
        if not asked.get(package.name, Asked()).hashes
    ]
    if bare:
        shown = ", ".join(bare[:5]) + (f" and {len(bare) - 5} more" if len(bare) > 5 else "")
        raise UsageError(
            f"hashes are required, and there is none for {shown}",
            hint="list each distribution with --hash, or remove --require-hashes",
        )
