"""Notices that the job is to end, without taking the signal away from anybody."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from envstore.errors import UsageError

Handler = Callable[[int, FrameType | None], object] | int | None


class SignalWatch:
    """Calls ``notice`` on each of ``numbers``, then whatever handled the signal before.

    Where nothing did, the default follows, so that a process which SIGTERM would have ended still
    ends - unless ``absorb`` says that the caller ends it by itself. An ignored signal stays
    ignored after it was noticed. ``notice`` runs in the main thread between two bytecodes: it must
    neither block nor take a lock.

    Python lets only the main thread set handlers: elsewhere ``active`` is false and nothing is
    watched.
    """

    def __init__(
        self, numbers: Sequence[int], notice: Callable[[int], None], *, absorb: bool
    ) -> None:
        self.active = threading.current_thread() is threading.main_thread()
        self._notice = notice
        self._absorb = absorb
        self._before: dict[int, Handler] = {}
        self._closed = False
        self._process = os.getpid()
        if self.active:
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Put back what was there before; idempotent.

        A handler that somebody has set since, and that may call ours, stays; ours then only
        passes the signal on.
        """
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in list(self._before.items()):
            # == and not `is`: each access makes another bound method.
            if signal.getsignal(number) == self._handle:
                # A handler that C code had set cannot be put back from Python.
                with contextlib.suppress(TypeError):
                    signal.signal(number, before)
                del self._before[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child (a loader's worker) has this handler too, and is to end as it would have.
        watching = not self._closed and os.getpid() == self._process
        if watching:
            self._notice(number)
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL and not (watching and self._absorb):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def parse_signals(names: Sequence[str | int]) -> tuple[int, ...]:
    """Return the numbers of signals like ``"SIGTERM"``. Raises ``UsageError``."""
    if not isinstance(names, list | tuple | set | frozenset):
        raise UsageError(f"signals= is {names!r:.80}", hint="as in signals=('SIGTERM',)")
    numbers = []
    for name in names:
        try:
            number = int(signal.Signals[name] if isinstance(name, str) else signal.Signals(name))
            if number in (signal.SIGKILL, signal.SIGSTOP):
                raise ValueError
            numbers.append(number)
        except (KeyError, ValueError):
            raise UsageError(
                f"{name!r} is not a signal that can be watched",
                hint="write for example signals=('SIGTERM',)",
            ) from None
    return tuple(numbers)
