"""Counts that outlive the process that counts: in memory that others hold open, too.

A descriptor has two slots, written in turn. A writer that is killed in the middle leaves the
other slot whole, and a checksum tells which is.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any

SLOT = 1 << 20
"""Bytes from one slot to the next, and more than a value may take."""

_HEAD = struct.Struct("<QII")  # how often written, then length and CRC-32 of what follows


def write_counts(fd: int, value: Mapping[str, Any]) -> None:
    """Leave ``value``, plain JSON, in a descriptor that can be written at any place."""
    body = json.dumps(value, separators=(",", ":")).encode()
    if len(body) > SLOT - _HEAD.size:
        raise ValueError(f"{len(body)} bytes of counts")
    times = max(_times(fd, 0), _times(fd, 1)) + 1
    checksum = zlib.crc32(body, times & 0xFFFFFFFF)
    os.pwrite(fd, _HEAD.pack(times, len(body), checksum) + body, times % 2 * SLOT)


def read_counts(fd: int) -> dict[str, Any] | None:
    """Return what was written last and whole; ``None`` if nothing ever was."""
    found = [(_times(fd, slot), slot) for slot in (0, 1)]
    times, slot = max(found)
    if not times:
        return None
    _, length, _ = _HEAD.unpack(os.pread(fd, _HEAD.size, slot * SLOT))
    try:
        value = json.loads(os.pread(fd, length, slot * SLOT + _HEAD.size))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _times(fd: int, slot: int) -> int:
    """Return the number under which a slot was written, 0 if it is not whole."""
    head = os.pread(fd, _HEAD.size, slot * SLOT)
    if len(head) < _HEAD.size:
        return 0
    times, length, checksum = _HEAD.unpack(head)
    if not times or length > SLOT:
        return 0
    body = os.pread(fd, length, slot * SLOT + _HEAD.size)
    whole = len(body) == length and zlib.crc32(body, times & 0xFFFFFFFF) == checksum
    return int(times) if whole else 0
