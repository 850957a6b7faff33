"""Locks in the words of other tools: what each of them can say, and a remark on what it cannot.

An export is for people who have another tool; envstore's own lock says more than any of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from envstore.errors import UsageError
from envstore.resolver.lock import Build, Lock, PypiPackage, python_of
from envstore.resolver.lockfile import encode_lock
from envstore.resolver.target import MACHINES

_VCS = ("git", "hg", "svn", "bzr")
_BY_HAND = "it was built from a source that has no digest"


def export_lock(lock: Lock, form: str) -> bytes:
    """Return the file that ``form``, one of ``FORMATS``, makes of ``lock``.

    Raises ``UsageError`` where the format cannot say what the lock is about, and what
    ``encode_lock`` raises for an incomplete lock.
    """
    # Whatever the format: what is written must be complete and hold no credentials.
    data = encode_lock(lock)
    if form == "envstore":
        return data
    return FORMATS[form](lock).encode()


def pixi_lock(lock: Lock) -> str:
    """Return a ``pixi.lock`` with one environment, ``default``."""
    from rattler import LockChannel, LockFile, LockPlatform

    from envstore.resolver.conda import records_of
    from envstore.resolver.rattler_call import checked

    if lock.local_python() is not None:
        raise UsageError(
            "a pixi.lock cannot hold an interpreter of this machine",
            hint="export pylock, or lock with an interpreter from a channel",
        )

    def make() -> str:
        virtual = [f"{name}={version}" for name, version in sorted(lock.virtual.items())]
        platform = LockPlatform(lock.platform, virtual_packages=virtual)
        file = LockFile([platform])
        channels = dict.fromkeys(package.channel for package in lock.conda() if package.channel)
        file.set_channels("default", [LockChannel(channel) for channel in channels])
        for record in records_of(lock.conda()):
            file.add_conda_package("default", platform, record)
        for package in lock.pypi():
            location = _address(package, "a pixi.lock")
            file.add_pypi_package("default", platform, package.name, package.version, location)
        with tempfile.TemporaryDirectory() as work:
            path = Path(work, "pixi.lock")
            file.to_path(path)
            return path.read_text(encoding="utf-8")

    return "".join(_with_wheel_fields(checked(make), lock))


def _with_wheel_fields(text: str, lock: Lock) -> Iterator[str]:
    """Yield the lines of a ``pixi.lock`` with what rattler (0.28) cannot be told of wheels."""
    by_name = {package.name: package for package in lock.pypi()}
    package, is_wheel = None, False
    for line in text.splitlines(keepends=True):
        yield line
        if line.startswith("- "):
            package, is_wheel = None, line.startswith("- pypi: ")
        elif line.startswith("  name: ") and is_wheel:
            package = by_name[line.removeprefix("  name: ").strip().strip("'")]
        elif line.startswith("  version: ") and package is not None:
            yield f"  sha256: {_digest_at(package)}\n"
            if package.requires:
                yield "  requires_dist:\n"
                yield from (f"  - {json.dumps(need)}\n" for need in package.requires)
            if package.requires_python:
                yield f"  requires_python: {json.dumps(package.requires_python)}\n"


def pylock(lock: Lock) -> str:
    """Return a ``pylock.toml`` (PEP 751) of the wheels; the rest of the lock is remarked on."""
    _require_wheels(lock, "a pylock.toml")
    lines = [*_remarks(lock), 'lock-version = "1.0"']
    machine = MACHINES.get(lock.platform)
    if machine is not None:
        where = f"sys_platform == 'linux' and platform_machine == '{machine}'"
        lines.append(f"environments = [{_toml(where)}]")
    python = python_of(lock)
    if python is not None:
        lines.append(f"requires-python = {_toml(f'=={python.minor}.*')}")
    lines += ["extras = []", "dependency-groups = []", 'created-by = "envstore"']
    for package in lock.pypi():
        lines += ["", "[[packages]]", f"name = {_toml(package.name)}"]
        lines += [f"version = {_toml(package.version)}"]
        if package.requires_python:
            lines.append(f"requires-python = {_toml(package.requires_python)}")
        lines += _pylock_source(package)
    return "\n".join(lines) + "\n"


def requirements(lock: Lock) -> str:
    """Return a requirements file with a hash for every wheel, to be installed as it is."""
    _require_wheels(lock, "a requirements file")
    asked = lock.request.pypi
    lines = [*_remarks(lock), "# To be installed with --no-deps: all that is needed is here."]
    if asked.no_index:
        lines.append("--no-index")
    elif asked.default_index:
        lines.append(f"--index-url {asked.default_index}")
    lines += [f"--extra-index-url {url}" for url in asked.indexes]
    lines += [f"--find-links {url}" for url in asked.find_links]
    for package in lock.pypi():
        extras = f"[{','.join(package.extras)}]" if package.extras else ""
        if package.build is not None or package.direct:
            what = f"{package.name}{extras} @ {_address(package, 'a requirements file')}"
        else:
            what = f"{package.name}{extras}=={package.version}"
        lines += [f"{what} \\", f"    --hash=sha256:{_digest_at(package)}"]
    return "\n".join(lines) + "\n"


def explicit(lock: Lock) -> str:
    """Return an ``@EXPLICIT`` list (CEP 23) of the conda packages, in installation order."""
    if not lock.conda():
        raise UsageError(
            "an @EXPLICIT list holds conda packages, and this lock has none",
            hint="export pylock or requirements",
        )
    lines = [f"# platform: {lock.platform}"]
    wheels = ", ".join(f"{package.name} {package.version}" for package in lock.pypi())
    if wheels:
        lines.append(f"# Not in this list are the wheels of {wheels}")
    lines.append("@EXPLICIT")
    lines += [f"{p.url.partition('#')[0]}#sha256:{p.sha256}" for p in lock.conda()]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Lock], str]] = {
    "envstore": lambda lock: encode_lock(lock).decode(),
    "pixi": pixi_lock,
    "pylock": pylock,
    "requirements": requirements,
    "explicit": explicit,
}
"""What ``envstore lock --format`` takes, and what makes it."""


def _require_wheels(lock: Lock, what: str) -> None:
    if not lock.pypi():
        raise UsageError(
            f"{what} holds Python packages as wheels, and this lock has none",
            hint="export explicit or pixi",
        )


def _remarks(lock: Lock) -> Iterator[str]:
    yield f"# The Python packages of a lock of envstore for {lock.platform}."
    python = python_of(lock)
    if python is not None:
        yield f"# For Python {python.version}."
    conda = [f"{package.name} {package.version}" for package in lock.conda()]
    if conda:
        yield "# Not in this file, and provided by conda:"
        yield from (f"#   {name}" for name in conda)


def _pylock_source(package: PypiPackage) -> Iterator[str]:
    build = package.build
    digest = f"{{ sha256 = {_toml(_digest_at(package))} }}" if _has_digest(package) else ""
    if build is not None and build.source.partition("+")[0] in _VCS:
        yield from _pylock_vcs(build, package)
    elif build is not None and not digest:
        raise UsageError(f"a pylock.toml cannot name {package.name}: {_BY_HAND}")
    elif package.direct:
        yield "[packages.archive]"
        yield f"url = {_toml(_address(package, 'a pylock.toml'))}"
        yield f"hashes = {digest}"
    elif build is not None:
        yield "[packages.sdist]"
        yield f"name = {_toml(_last(build.source))}"
        yield f"url = {_toml(build.source)}"
        yield f"hashes = {digest}"
    else:
        yield "[[packages.wheels]]"
        yield f"name = {_toml(package.filename)}"
        yield f"url = {_toml(_plain(package.url))}"
        if package.size:
            yield f"size = {package.size}"
        yield f"hashes = {digest}"


def _pylock_vcs(build: Build, package: PypiPackage) -> Iterator[str]:
    kind, _, rest = build.source.partition("+")
    address, _, fragment = rest.partition("#")
    where, at, commit = address.rpartition("@")
    if not at or "/" in commit:
        raise UsageError(f"a pylock.toml cannot name {package.name}: {_BY_HAND}")
    yield "[packages.vcs]"
    yield f"type = {_toml(kind)}"
    yield f"url = {_toml(where)}"
    yield f"commit-id = {_toml(commit)}"
    folder = next((p[13:] for p in fragment.split("&") if p.startswith("subdirectory=")), "")
    if folder:
        yield f"subdirectory = {_toml(folder)}"


def _address(package: PypiPackage, what: str) -> str:
    """Return where a package, or what it was built from, can be had."""
    if package.build is None:
        return _plain(package.url)
    if not package.build.sha256:
        raise UsageError(f"{what} cannot name {package.name}: {_BY_HAND}")
    return _plain(package.build.source)


def _has_digest(package: PypiPackage) -> bool:
    return bool(package.sha256 if package.build is None else package.build.sha256)


def _digest_at(package: PypiPackage) -> str:
    return package.sha256 if package.build is None else package.build.sha256


def _plain(url: str) -> str:
    return url.partition("#")[0]


def _last(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def _toml(text: str) -> str:
    """Return a basic string of TOML; those of JSON without control characters are."""
    return json.dumps(text, ensure_ascii=False)
