"""Where an environment's interpreter comes from: a conda channel, or this machine."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from envstore.errors import UsageError
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import LocalPython
from envstore.resolver.target import Target, own_platform

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet


_log = logging.getLogger(__name__)


def conda_python(requires: str) -> str:
    """Return the conda spec for an interpreter that ``requires`` (PEP 440) allows.

    Raises ``UsageError``.
    """
    versions = []
    for specifier in sorted(_specifiers(requires), key=str):
        operator, version = specifier.operator, specifier.version
        if operator in {"==", "==="}:
            versions.append(version if version.endswith(".*") else f"=={version}")
        else:
            versions.append(f"{operator}{version}")
    return " ".join(["python", ",".join(versions)]).strip()


def check_local(program: Path, version: str, requires: str, target: Target) -> None:
    """Refuse the interpreter ``program`` of this machine where it cannot be the one asked for.

    Raises ``UsageError`` if it does not run on ``target``, ``UnsatisfiableError`` if ``requires``
    (PEP 440) does not allow its ``version``.
    """
    if target.platform != own_platform():
        raise UsageError(
            f"an interpreter of this machine does not run on {target.platform}",
            hint="name a conda channel that has one: --channel NAME",
        )
    if not allows(requires, version):
        raise UnsatisfiableError(
            f"{program} is Python {version}, and python{requires} is asked for",
            hint="--python PROGRAM names another, --channel NAME takes one from conda",
        )


def allows(requires: str, version: str) -> bool:
    """Whether ``requires`` (PEP 440) allows ``version``. Raises ``UsageError``."""
    return _specifiers(requires).contains(version, prereleases=True)


def described(program: Path, directory: Path) -> LocalPython:
    """Return what the interpreter ``program`` is as a package, kept below ``directory``.

    Found there as long as none of its files changed. Raises as ``describe_interpreter``.
    """
    from envstore.resolver.packages.interpreter import describe_interpreter, fingerprint

    path = directory / f"{fingerprint(program)}.json"
    try:
        return LocalPython(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        _log.warning("what is kept of an interpreter, %s, cannot be read: %s", path, error)
    found = describe_interpreter(program)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
        json.dump(asdict(found), file)
    os.replace(file.name, path)
    return found


def _specifiers(text: str) -> SpecifierSet:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise UsageError(
            f"{text!r} is no set of Python versions", hint="such as >=3.11,<3.13"
        ) from error
