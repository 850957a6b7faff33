"""The kernel's calls that take privileges away."""

from __future__ import annotations

import ctypes
import os


def prctl(option: int, *arguments: int) -> int:
    """Do prctl(2); raises ``OSError``."""
    words = (*arguments, 0, 0, 0, 0)[:4]
    return _checked("prctl", ctypes.c_int(option), *map(ctypes.c_ulong, words))


def system(number: int, *arguments: object) -> int:
    """Do a system call by number, with what ctypes takes as arguments; raises ``OSError``."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _checked("syscall", ctypes.c_long(number), *words)


def _checked(name: str, *arguments: object) -> int:
    function = ctypes.CDLL(None, use_errno=True)[name]
    function.restype = ctypes.c_long
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
