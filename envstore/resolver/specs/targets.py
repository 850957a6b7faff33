"""What a target that need not be this machine answers to markers, and which wheels fit it."""

from __future__ import annotations

import platform as machine
import re
from typing import TYPE_CHECKING

from envstore.errors import UsageError

if TYPE_CHECKING:
    from packaging.markers import Environment
    from packaging.specifiers import SpecifierSet
    from packaging.tags import Tag

_MACHINES = {"64": "x86_64", "32": "i686"}
_OLDEST_GLIBC = 5
_LEGACY = {"2.5": "manylinux1", "2.12": "manylinux2010", "2.17": "manylinux2014"}
_LEGACY_MACHINES = ("x86_64", "i686")


def python_version(asked: str, requires: SpecifierSet | None, where: str) -> str:
    """Return the version of Python to read a lock for, as exact as it was asked for.

    Without one asked for it is that of the running interpreter. Raises ``UsageError`` if the lock
    requires another.
    """
    if asked and not re.fullmatch(r"3\.\d+(\.\d+)?", asked):
        raise UsageError(f"{asked!r} is not a version of Python 3", hint="such as 3.12 or 3.12.4")
    version = asked or machine.python_version()
    if requires is not None and not requires.contains(full_version(version, requires)):
        hint = "name one that does with --python"
        raise UsageError(f"{where} requires Python {requires}, not {version}", hint=hint)
    return version


def full_version(version: str, requires: SpecifierSet | None = None) -> str:
    """Return ``version`` with a patch level: its first one that ``requires`` allows, else 0."""
    if version.count(".") > 1:
        return version
    candidates = (f"{version}.{patch}" for patch in range(100))
    allowed = (item for item in candidates if requires is None or requires.contains(item))
    return next(allowed, f"{version}.0")


def machine_of(platform: str) -> str:
    """Return a Linux subdir's machine as ``uname -m`` names it; raises ``UsageError``."""
    system, _, architecture = platform.partition("-")
    if system != "linux":
        hint = "environments are for Linux"
        raise UsageError(f"wheels for {platform} are not supported", hint=hint)
    return _MACHINES.get(architecture, architecture)


def markers(platform: str, full: str) -> Environment:
    """Return what a target answers to environment markers (PEP 508), except for extras."""
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": machine_of(platform),
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": ".".join(full.split(".")[:2]),
        "sys_platform": "linux",
    }


def wheel_tags(platform: str, version: str, glibc: str) -> list[Tag]:
    """Return the wheel tags a CPython takes on Linux with at least that glibc, best first."""
    from packaging.tags import compatible_tags, cpython_tags

    major, minor = (int(part) for part in version.split(".")[:2])
    platforms = _platform_tags(machine_of(platform), glibc)
    interpreter = f"cp{major}{minor}"
    tags = list(cpython_tags((major, minor), platforms=platforms))
    return tags + list(compatible_tags((major, minor), interpreter, platforms))


def _platform_tags(name: str, glibc: str) -> list[str]:
    """Return platform tags (PEP 600), newest glibc first."""
    if not re.fullmatch(r"2\.\d{1,3}", glibc):
        raise UsageError(f"{glibc!r} is not a version of glibc", hint="such as 2.28")
    tags = []
    oldest = _OLDEST_GLIBC if name in _LEGACY_MACHINES else 17
    for minor in range(int(glibc[2:]), oldest - 1, -1):
        tags.append(f"manylinux_2_{minor}_{name}")
        legacy = _LEGACY.get(f"2.{minor}")
        if legacy:
            tags.append(f"{legacy}_{name}")
    return [*tags, f"linux_{name}"]
