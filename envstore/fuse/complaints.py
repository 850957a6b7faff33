"""Says once what goes wrong many times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_AGAIN_AFTER = 30.0
_REMEMBERED = 1000


class Complaints:
    """Logs warnings, the same one at most twice a minute and with the number left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def say(self, message: str, subject: str = "") -> None:
        """Warn that ``message``; warnings that differ only in ``subject`` count as the same."""
        now = self._clock()
        last, hidden = self._last.get(message, (-_AGAIN_AFTER, 0))
        if now - last < _AGAIN_AFTER:
            self._last[message] = last, hidden + 1
            return
        if len(self._last) >= _REMEMBERED:
            self._last.clear()
        self._last[message] = now, 0
        more = f" (and {hidden} more times before)" if hidden else ""
        self._log.warning("%s%s%s", f"{subject}: " if subject else "", message, more)
