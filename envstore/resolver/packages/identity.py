"""Whether what an archive or a stored package says it is, is what the lock says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envstore.resolver.lock import CondaPackage, LocalPython, Package, PypiPackage


def is_called(package: PypiPackage, name: str, version: str) -> bool:
    """Return whether a name and version, written in any way, are those of ``package``."""
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    try:
        # In names of directories, old tools wrote "_" for "-".
        same = Version(version.replace("_", "-")) == Version(package.version)
    except InvalidVersion:
        same = version == package.version
    return same and canonicalize_name(name) == package.name


def differs(package: CondaPackage, index: Mapping[str, Any]) -> str:
    """Return the first field in which ``index.json`` says something else, empty if none."""
    for key, wanted in (
        ("name", package.name),
        ("version", package.version),
        ("build", package.build),
    ):
        # What other tools' locks leave out cannot be compared.
        if wanted and index.get(key) != wanted:
            return key
    return ""


def is_of(facts: Mapping[str, Any], package: Package) -> bool:
    """Return whether ``facts`` are of ``package``.

    They are not if a stored package got under another's key, or if a lock that somebody edited
    names the archive of another package.
    """
    if isinstance(package, CondaPackage):
        index = facts.get("index")
        return isinstance(index, dict) and not differs(package, index)
    if isinstance(package, LocalPython):
        interpreter = facts.get("interpreter")
        return isinstance(interpreter, dict) and interpreter.get("version") == package.version
    name, version = facts.get("name"), facts.get("version")
    return isinstance(name, str) and isinstance(version, str) and is_called(package, name, version)
