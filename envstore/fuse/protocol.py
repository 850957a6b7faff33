"""The kernel's FUSE protocol, as much of it as making a mount needs (linux/fuse.h).

Numbers are in the machine's own byte order and nothing is aligned beyond what is written here.
"""

from __future__ import annotations

import struct

MAJOR, MINOR = 7, 38
OLDEST_MINOR = 31
"""Linux 5.4. Older kernels lay out nothing of this differently, but nobody tries them."""

OPCODE_INIT = 26
NOTIFY_RESEND = 7
"""Sent where an answer has its error number (Linux 6.9)."""


class Flag:
    """What the kernel offers and the server accepts in INIT."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


REQUEST_SIZE = 8192
"""Bytes to read at once: the least the kernel accepts, and more than any request without data."""

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""length, operation, unique, node, uid, gid, pid, and two that do not matter."""

OUT_HEADER = struct.Struct("=IiQ")
"""length, negative error number, unique."""

INIT_IN = struct.Struct("=IIIII")
"""major, minor, readahead, flags, more flags."""

INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
"""major, minor, readahead, flags, background requests, congestion threshold, write size, time
granularity, pages of a request, alignment, more flags, stack depth, request time-out."""
