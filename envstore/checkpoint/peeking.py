"""A glance at a slot: its state, for two system calls and without a lock."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from envstore.checkpoint.slotformat import BROKEN, CONTROL_BYTES, ControlWords


@dataclass(frozen=True, slots=True)
class Peek:
    """What a control page says at this moment. ``key`` tells one save in one slot from others."""

    number: int
    sequence: int
    state: str
    wave: int

    @property
    def key(self) -> tuple[int, int]:
        """The slot and the sequence of the save in it."""
        return self.number, self.sequence


def peek(path: Path, number: int) -> Peek | None:
    """Return what the control page of slot ``number`` says; ``None`` if it is not to be used."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size < CONTROL_BYTES:
            return None
        page = os.pread(fd, CONTROL_BYTES, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(page) < CONTROL_BYTES:
        return None
    words = ControlWords(memoryview(page))
    control = words.read(found.st_size)
    if control is None:
        return None
    return Peek(number, control.sequence, words.state(found.st_size), control.wave)


def break_slot(path: Path) -> None:
    """Say of a slot that cannot be read that nobody will ever store what is in it."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.pwrite(fd, BROKEN.encode().ljust(8, b"\0"), 8)
    finally:
        os.close(fd)
