"""Unpacked packages: files laid out as they will be installed, waiting to be stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.store.source import Kind


@dataclass(frozen=True, slots=True)
class UnpackedEntry:
    """One file, directory or link of a package, by its path in the environment.

    ``relocation`` is an encoded ``Relocation``, empty for what does not hold the build prefix.
    ``size`` is that of the file as it lies there, unrelocated. Every parent directory has an
    entry of its own.
    """

    path: bytes
    kind: Kind
    executable: bool = False
    size: int = 0
    target: bytes = b""
    relocation: bytes = b""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A package's tree below ``root``, byte for byte as its archive has it.

    ``facts`` are JSON values kept with the stored package: all that is needed of it later to
    generate the files that belong to an environment instead of a package.
    """

    root: Path
    entries: tuple[UnpackedEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)
