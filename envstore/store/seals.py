"""Seals: time stamps that say of a file that it was verified since this machine started.

What a cache holds was verified when it was put in, but a power failure can undo what had not
reached the disk, and somebody can write to the file. The lowest bits of a sealed file's time stamp
are derived from its name and from the boot of the machine. Writing to the file sets another time,
and after a restart every seal is broken; only what a disk loses unnoticed stays unnoticed.
"""

from __future__ import annotations

import functools
from pathlib import Path

from envstore.store.digest import digest

_BITS = 20  # about a millisecond: what the stamp loses as a time
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def seal(name: bytes, now_ns: int) -> int:
    """Return the time stamp close to ``now_ns`` that seals the file called ``name``."""
    boot = _boot()
    return now_ns if boot is None else now_ns >> _BITS << _BITS | _mark(boot, name)


def is_sealed(name: bytes, stamp_ns: int) -> bool:
    """Return whether ``stamp_ns`` seals ``name``; by accident it does once in a million times."""
    boot = _boot()
    return boot is not None and stamp_ns & (1 << _BITS) - 1 == _mark(boot, name)


def _mark(boot: bytes, name: bytes) -> int:
    return int.from_bytes(digest(boot + name)[:4], "little") & (1 << _BITS) - 1


@functools.cache
def _boot() -> bytes | None:
    """Return what tells this start of the machine from all others, if it can be known."""
    try:
        return _BOOT_ID.read_bytes().strip() or None
    except OSError:
        return None
