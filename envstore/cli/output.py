"""The one place that prints: results on stdout, remarks on stderr, names made harmless."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any

import click

from envstore.cli.context import PROGRAM, Settings
from envstore.wording import counted as counted

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((365 * 86_400, "year"), (30 * 86_400, "month"), (86_400, "day"), (3600, "hour"))


def printable(name: str | bytes) -> str:
    """Return a file name or message fit for any terminal, on one line.

    Bytes that are not UTF-8, and characters that a terminal would obey, become escapes.
    """
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def exact(name: bytes) -> str:
    """Return a file name for JSON, whatever the locale: bytes that are not UTF-8 become lone
    surrogates (PEP 383), which ``os.fsencode`` turns back.
    """
    return name.decode("utf-8", "surrogateescape")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether somebody looks at ``stream``; it is ``None`` if it was closed from the start."""
    return stream is not None and stream.isatty()


def result(value: Mapping[str, Any]) -> None:
    """Print the one JSON object of ``--json``."""
    click.echo(json.dumps(value))


def line(text: str = "") -> None:
    """Print a line of a command's answer on stdout."""
    click.echo(text)


def summary(settings: Settings, text: str) -> None:
    """Print what was done, unless quiet."""
    if not settings.quiet:
        click.echo(text)


def note(settings: Settings, text: str) -> None:
    """Print a remark on stderr, unless quiet."""
    if not settings.quiet:
        click.echo(f"{PROGRAM}: {printable(text)}", err=True)


def short(digest: bytes) -> str:
    """Return a digest as it is shown: enough to find it again with ``@``."""
    return digest.hex()[:12]


def size(count: float) -> str:
    """Return bytes for people: ``1.4 GiB``."""
    sign, left = ("-" if count < 0 else ""), abs(count)
    for unit in _UNITS:
        if left < 1000 or unit == _UNITS[-1]:
            break
        left /= 1024
    return f"{sign}{left:.0f} {unit}" if unit == "B" or left >= 100 else f"{sign}{left:.1f} {unit}"


def age(moment: str) -> str:
    """Return how long ago an RFC 3339 time was; the time itself if it cannot be read."""
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return printable(moment)
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - then).total_seconds()
    for length, unit in _AGES:
        if seconds >= length:
            return f"{counted(int(seconds // length), unit)} ago"
    minutes = int(seconds // 60)
    return f"{counted(minutes, 'minute')} ago" if minutes > 0 else "just now"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns; a heading that starts with ``>`` has its column to the right.

    On a terminal wide cells are folded to its width; elsewhere nothing is ever cut.
    """
    body = list(rows)
    right = [heading.startswith(">") for heading in headings]
    names = [heading.removeprefix(">") for heading in headings]
    if is_terminal(sys.stdout):
        _rich_table(names, right, body)
        return
    widths = [max(map(len, column)) for column in zip(names, *body, strict=True)]
    for row in (names, *body):
        cells = zip(row, widths, right, strict=True)
        click.echo(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in cells
            ).rstrip()
        )


def _rich_table(names: Sequence[str], right: Sequence[bool], body: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name, to_right in zip(names, right, strict=True):
        shown.add_column(
            name, justify="right" if to_right else "left", overflow="fold", no_wrap=to_right
        )
    for row in body:
        shown.add_row(*map(Text, row))
    Console(soft_wrap=False, highlight=False).print(shown)


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values below each other; pairs without a value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")
