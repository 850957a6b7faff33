"""For whom specifications are read, and what is told besides the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from envstore.resolver.request import SourceFile


@dataclass(frozen=True, slots=True)
class Context:
    """For whom specifications are read.

    ``platform`` is a conda subdir, ``python`` a version (``3.11`` or ``3.11.7``, empty: that of
    the interpreter envstore runs under, where a lock leaves the choice), ``glibc`` the newest one
    that wheels may need (empty: see ``make_target``). ``environment`` is pixi's. ``warnings`` and
    ``sources`` are added to.
    """

    platform: str
    python: str = ""
    glibc: str = ""
    environment: str = ""
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    default_channels: tuple[str, ...] = ("conda-forge",)
    warnings: list[str] = field(default_factory=list)
    sources: list[SourceFile] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def left_out(self, path: Path, names: Sequence[str]) -> None:
        """Warn that the projects which a file is about are not part of the environment."""
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            what = "the project itself, is" if len(names) == 1 else "the projects themselves, are"
            self.warn(
                f"{path}: {shown}, {what} not part of the environment: name the directory in a "
                "requirements file to have it built and added"
            )
