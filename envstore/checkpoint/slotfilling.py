"""Waits for a trainer to fill a slot, for as long as it lives."""

from __future__ import annotations

import time
from collections.abc import Callable

from envstore.checkpoint.slotformat import STAGED, WAVE, WRITING
from envstore.checkpoint.slots import SlotDirectory, StagedSlot

_POLL = 0.002
_ALIVE_POLL = 0.1


class AbandonedError(Exception):
    """The trainer ended, or gave up, before the part was staged. Nobody is to be told."""


class SlotFilling:
    """How far a trainer is with a slot: the ``Filling`` of an upload from it.

    All that waits raises ``AbandonedError`` if the trainer will never get there.
    """

    def __init__(self, slot: StagedSlot, slots: SlotDirectory) -> None:
        self._slot = slot
        self._slots = slots
        self._looked = time.monotonic()

    def reached(self, end: int) -> bool:
        """Return whether all bytes before the offset ``end`` are there."""
        return self._slot.filled >= end

    def wait(self, end: int) -> None:
        """Return once they are."""
        self._until(lambda: self.reached(end))

    def finish(self) -> None:
        """Return once the slot is staged, or its wave complete."""
        state = STAGED if self._slot.last else WAVE
        self._until(lambda: self._slot.state == state)

    def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            if self._slot.state not in (WRITING, STAGED, WAVE):
                raise AbandonedError
            now = time.monotonic()
            if now - self._looked > _ALIVE_POLL:
                self._looked = now
                # It may have got there just before it ended.
                if not self._slots.trainer_alive() and not true():
                    raise AbandonedError
            time.sleep(_POLL)
