"""Progress with rate and remaining time on stderr; nothing where nobody would see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

from envstore.cli import output
from envstore.cli.context import Settings

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and how much there is, 0 if unknown."""


def _silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@contextmanager
def progress(
    settings: Settings, *, unit_bytes: bool = True, counted: Container[str] = ()
) -> Iterator[Report]:
    """Yield a ``Report`` that draws a bar while the block runs, if stderr is a terminal.

    What it is told is bytes, or without ``unit_bytes``, and in the steps ``counted``, a number.
    """
    if settings.quiet or settings.verbose or not output.is_terminal(sys.stderr):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    amount, speed, number = (
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        MofNCompleteColumn(),
    )

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            if not unit_bytes or task.description in counted:
                return number.render(task)
            return Text.assemble(amount.render(task), " ", speed.render(task))

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Amount(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report
