"""System calls that Python does not know, by number."""

from __future__ import annotations

import ctypes
import os

AT_FDCWD = -100
# The numbers are the same on all architectures but alpha; older C libraries lack the functions.
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
MOVE_EMPTY_SOURCE, MOVE_EMPTY_TARGET = 0x04, 0x40
"""That ``MOVE_MOUNT`` is given descriptors alone, with empty paths."""


def system(number: int, *arguments: int | bytes | None) -> int:
    """Do a system call; raises ``OSError``."""
    return checked("syscall", number, *arguments)


def checked(name: str, *arguments: int | bytes | None) -> int:
    """Call a C library function that reports failure in errno; raises ``OSError``."""
    library = ctypes.CDLL(None, use_errno=True)
    function = library[name]
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(function(*words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
