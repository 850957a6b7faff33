"""How counts are said to people."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """Return ``1 file`` or ``1,234 files``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
