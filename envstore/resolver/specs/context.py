"""For whom specifications are read, and what is told besides the result."""

from __future__ import annotations

from dataclasses import dataclass, field

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
