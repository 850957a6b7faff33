"""Reads ``pixi.lock`` (versions 3 to 7) and ``conda-lock.yml`` (version 1) through rattler."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from envstore.errors import UsageError
from envstore.resolver.lock import CondaPackage, Lock, PypiPackage
from envstore.resolver.request import CondaRequest, Request
from envstore.resolver.specs.artefacts import checked_sha256, conda_name, pypi_package
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import file_url, read_text, refuse_secrets, wrong

if TYPE_CHECKING:
    from rattler.lock import Environment, LockFile, LockPlatform

_PLACE = re.compile(r" at line (\d+) column (\d+)")
_CATEGORY = re.compile(r"^\s*(?:-\s+)?category:\s*([\w-]+)", re.MULTILINE)
_NO_DIGEST = re.compile(r"^( +md5:) *(?:''|\"\") *$", re.MULTILINE)
_UNKNOWN = "0" * 32
_OURS = frozenset(
    {"name", "version", "build", "subdir", "sha256", "size", "md5", "build_number", "noarch"}
    | {"depends", "constrains", "python_site_packages_path", "url", "channel", "fn"}
    | {"arch", "platform"}
)


def read_rattler_lock(path: Path, context: Context) -> Lock:
    """Read one environment of a lock for the context's platform; raises ``UsageError``.

    Packages come in the order in which they can be installed: after what they depend on.
    """
    text = read_text(path, context)
    try:
        # Relative paths in a lock are of its directory, which rattler wants to know absolute.
        file = _parsed(path, text)
    except Exception as error:
        if type(error).__module__ not in {"exceptions", "rattler.exceptions"}:
            raise
        what = " ".join(str(error).split())
        place = _PLACE.search(what)
        line, column = (int(place[1]), int(place[2])) if place else (0, 0)
        what = _PLACE.sub("", what)
        raise wrong(path, f"not a lock: {what}", line=line, column=column) from error
    categories = sorted(set(_CATEGORY.findall(text)) - {"main"})
    if categories:
        context.warn(f"{path}: packages of the categories {', '.join(categories)} are included")
    name, environment = _environment(file, path, context)
    target = _platform(environment, path, context.platform)
    conda, pypi = _packages(environment, target, path, context)
    channels = tuple(
        refuse_secrets(str(channel), str(path)).rstrip("/") for channel in environment.channels()
    )
    return Lock(
        platform=context.platform,
        packages=(*conda, *sorted(pypi, key=lambda item: item.name)),
        virtual=_virtual(target),
        request=Request(name=name, conda=CondaRequest(channels=tuple(dict.fromkeys(channels)))),
    )


def _parsed(path: Path, text: str) -> LockFile:
    from rattler import LockFile

    if not _NO_DIGEST.search(text):
        return LockFile.from_path(Path(os.path.abspath(path)))
    # Old conda-locks wrote these for virtual packages; rattler (0.28) takes them for wrong ones.
    with tempfile.TemporaryDirectory(prefix="envstore-lock-") as name:
        cleaned = Path(name, path.name)
        cleaned.write_text(_NO_DIGEST.sub(rf"\1 {_UNKNOWN}", text), encoding="utf-8")
        return LockFile.from_path(cleaned)


def _environment(file: LockFile, path: Path, context: Context) -> tuple[str, Environment]:
    found = dict(file.environments())
    if context.environment:
        wanted = context.environment
    else:
        wanted = "default" if "default" in found or len(found) != 1 else next(iter(found))
    environment = found.get(wanted)
    if environment is None:
        hint = f"it has {', '.join(sorted(found))}; choose with --environment" if found else None
        raise wrong(path, f"has no environment {wanted!r}", hint=hint)
    return ("" if wanted == "default" else wanted), environment


def _platform(environment: Environment, path: Path, wanted: str) -> LockPlatform:
    found = environment.platforms()
    for platform in found:
        if platform.name == wanted:
            return platform
    fitting = [platform for platform in found if str(platform.subdir) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    if not found:
        raise wrong(path, "its environment is empty", hint="choose another with --environment")
    names = ", ".join(sorted(platform.name for platform in found))
    what = f"has no packages for {wanted}"
    if fitting:
        what = f"has several variants of {wanted}, of which none has that name"
    raise wrong(path, what, hint=f"it is for {names}")


def _virtual(platform: LockPlatform) -> dict[str, str]:
    """Return virtual packages by name, as a version or ``version=build`` if that says anything."""
    found = {}
    for item in platform.virtual_packages:
        name, _, rest = str(item).partition("=")
        version, _, build = rest.lstrip("=").partition("=")
        found[name] = version if build in ("", "0") else f"{version}={build}"
    return found


def _packages(
    environment: Environment, platform: LockPlatform, path: Path, context: Context
) -> tuple[list[CondaPackage], list[PypiPackage]]:
    from rattler import PackageRecord
    from rattler.lock import CondaLockedBinaryPackage, PypiLockedPackage

    found, pypi = dict[str, tuple[PackageRecord, str, str]](), dict[str, PypiPackage]()
    for package in environment.packages(platform) or []:
        if isinstance(package, PypiLockedPackage):
            wheel = _pypi(package, path, context)
            if wheel is not None and pypi.setdefault(wheel.name, wheel) != wheel:
                raise wrong(path, f"holds {wheel.name} twice for {platform.name}")
            continue
        if package.name.startswith("__"):
            continue
        if not isinstance(package, CondaLockedBinaryPackage):
            if _is_itself(package.location, path):
                context.left_out(path, [package.name])
                continue
            raise wrong(
                path,
                f"{package.name} is built from source ({package.location})",
                hint="build a conda package of it, and lock that",
            )
        record = package.package_record
        if record is None:
            raise wrong(path, f"says nothing of {package.location}")
        channel = package.repo_data_record().channel or ""
        url = _conda_url(package.location, path)
        # conda-lock repeats a package for each category that it is of.
        if found.get(record.name.normalized, (record, url, ""))[1] != url:
            raise wrong(path, f"holds {record.name.normalized} twice for {platform.name}")
        found[record.name.normalized] = (record, url, channel)
    # Sorted before, so that ties come out the same whatever the lock's order.
    records = [record for _, (record, _, _) in sorted(found.items())]
    conda = []
    for record in PackageRecord.sort_topologically(records):
        _, url, channel = found[record.name.normalized]
        conda.append(_conda(json.loads(record.to_json()), url, channel, path))
    return conda, list(pypi.values())


def _is_itself(location: str, path: Path) -> bool:
    """Return whether a package is the directory that the lock is in."""
    there = os.path.realpath(path.parent / unquote(location))
    return "://" not in location and there == os.path.realpath(path.parent)


def _conda_url(location: str, path: Path) -> str:
    if "://" not in location:
        return file_url(path.parent / location)
    return refuse_secrets(location, str(path)).partition("#")[0]


def _conda(record: dict[str, Any], url: str, channel: str, path: Path) -> CondaPackage:
    if url.rpartition("/")[2] == "" or conda_name(url) is None:
        raise wrong(path, f"{url} is not the URL of a conda package")
    where = f"{path}: {record['name']}"
    sha256, md5 = record.get("sha256") or "", (record.get("md5") or "").replace(_UNKNOWN, "")
    if not sha256 and not md5:
        raise UsageError(f"{where} has no digest", hint="lock it again, with digests")
    return CondaPackage(
        name=record["name"],
        version=record["version"],
        build=record["build"],
        subdir=record["subdir"],
        url=url,
        sha256=checked_sha256(sha256, where) if sha256 else "",
        size=record.get("size") or 0,
        md5=md5,
        channel=refuse_secrets(channel or url.rsplit("/", 2)[0], where).rstrip("/"),
        build_number=record.get("build_number") or 0,
        noarch=record.get("noarch") or "",
        depends=tuple(record.get("depends") or ()),
        constrains=tuple(record.get("constrains") or ()),
        python_site_packages_path=record.get("python_site_packages_path") or "",
        extra={key: value for key, value in record.items() if key not in _OURS},
    )


def _pypi(package: Any, path: Path, context: Context) -> PypiPackage | None:
    """Return a distribution, ``None`` for the project itself, which the lock is only about."""
    location: str = package.location.removeprefix("direct+")
    direct = location if location != package.location else ""
    where = f"{path}: {package.name}"
    if "://" not in location:
        if _is_itself(location, path):
            context.left_out(path, [package.name])
            return None
        if not location.endswith((".whl", ".tar.gz", ".zip", ".tar.bz2")):
            raise UsageError(
                f"{where} is the directory {location}, which can change",
                hint="build a wheel of it, and lock that",
            )
        location = file_url(path.parent / unquote(location))
    try:
        sha256 = package.hashes.sha256
    except AttributeError:
        # What rattler 0.28 says of a package without hashes.
        sha256 = None
    digest = sha256.hex() if isinstance(sha256, bytes) else str(sha256 or "")
    return pypi_package(
        str(package.name),
        "" if package.version == "<dynamic>" else str(package.version),
        location,
        digest,
        where,
        requires=tuple(map(str, package.requires_dist)),
        requires_python=str(package.requires_python or ""),
        direct=direct,
    )
