"""Shows what a new lock has other than an old one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from envstore.cli import output

if TYPE_CHECKING:
    from envstore.resolver.update import Change


def print_changes(found: Sequence[Change]) -> None:
    """Print a line for each package that changed."""
    output.table(
        ("package", "kind", "was", "is"),
        ((item.name, item.kind, item.before or "-", item.after or "-") for item in found),
    )


def change_fields(found: Sequence[Change]) -> list[dict[str, str | None]]:
    """Return the changes for ``--json``; what is new or gone has no version on one side."""
    return [
        {
            "kind": item.kind,
            "name": item.name,
            "before": item.before or None,
            "after": item.after or None,
        }
        for item in found
    ]
