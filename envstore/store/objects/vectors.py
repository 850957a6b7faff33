"""Reads a run of bytes of an open file into several buffers at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Buffers of one call: what POSIX calls IOV_MAX, 1024 on Linux.
_AT_ONCE = os.sysconf("SC_IOV_MAX")


def read_into(fd: int, start: int, views: Sequence[memoryview]) -> int:
    """Fill ``views``, one after the other, from offset ``start``; returns how many bytes came.

    Fewer than there is room for where the file ends. Raises ``OSError``.
    """
    got = 0
    first = inside = 0  # the view that is being filled, and how far it is
    while first < len(views):
        rest = [views[first][inside:], *views[first + 1 : first + _AT_ONCE]]
        step = os.preadv(fd, rest, start + got)
        if not step and any(len(view) for view in rest):
            break
        got += step
        inside += step
        # The kernel may give less than there is, and no more than 2 GiB at a time.
        while first < len(views) and inside >= len(views[first]):
            inside -= len(views[first])
            first += 1
    return got
