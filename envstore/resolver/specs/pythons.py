"""For which Python a lock is read, which it holds packages for several of."""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING

from envstore.errors import UsageError

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_VERSION = re.compile(r"3\.\d{1,3}(\.\d{1,4})?")
_PATCHES = range(100)


def chosen_python(asked: str, requires: SpecifierSet | None, where: str) -> tuple[str, str]:
    """Return a full version of Python, and the specifier set that those like it satisfy.

    That is ``asked`` for (``3.11`` or ``3.11.7``), or the running interpreter's. Of a minor version
    the first patch level counts that ``requires`` allows. Raises ``UsageError`` if none is.
    """
    checked_python(asked)
    version = asked or platform.python_version()
    minor = ".".join(version.split(".")[:2])
    exact = asked.count(".") > 1
    versions = [version] if exact else [f"{minor}.{patch}" for patch in _PATCHES]
    for full in versions:
        if requires is None or requires.contains(full):
            return full, f"=={full}" if exact else f"=={minor}.*"
    shown = version if exact else minor
    raise UsageError(
        f"{where}: requires Python {requires}, not {shown}",
        hint="name one that does with --python",
    )


def checked_python(version: str) -> str:
    """Return a version of Python 3, or nothing for nothing; raises ``UsageError``."""
    if version and not _VERSION.fullmatch(version):
        raise UsageError(
            f"{version!r} is no version of Python 3",
            hint="such as 3.12 or 3.12.4; a program is named by its path",
        )
    return version
