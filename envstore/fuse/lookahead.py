"""Frames in the order in which they are wanted, of which the next can be looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from envstore.store.locations import FrameRef


class Lookahead:
    """A queue of frames from ``source`` that shows ``window`` stored bytes of what comes next."""

    def __init__(self, source: Iterator[FrameRef], window: int) -> None:
        self._source = source
        self._window = window
        self._held: deque[FrameRef] = deque()

    def ahead(self) -> list[FrameRef]:
        """Return the frames that come next, of at least a window's bytes if so many are left."""
        size = sum(frame.stored for frame in self._held)
        while size < self._window and (frame := next(self._source, None)) is not None:
            self._held.append(frame)
            size += frame.stored
        return list(self._held)

    def keep(self, frames: Iterable[FrameRef]) -> None:
        """Of the frames that were shown, leave only these."""
        self._held = deque(frames)

    def put_back(self, frames: Iterable[FrameRef]) -> None:
        """Have ``frames`` come next."""
        self._held.extendleft(reversed(list(frames)))

    def clear(self) -> None:
        """Forget everything that is left."""
        self._source = iter(())
        self._held.clear()
