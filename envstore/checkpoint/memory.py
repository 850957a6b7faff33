"""Mapped files of shared memory: room that is really there, faulted in early, copied fast."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


def fault_in(mapping: mmap.mmap) -> None:
    """Give each page of a writable mapping its memory now, without the GIL, contents unchanged.

    Else the first copy would take a fault for each 4 KiB, four times as slow as the copy itself.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if _libc.madvise(address, len(mapping), _MADV_POPULATE_WRITE) == 0:
        return
    # An older kernel. What a page holds is written back to it: nobody else writes meanwhile.
    for offset in range(0, len(mapping), _PAGE):
        mapping[offset] = mapping[offset]


def make_room(fd: int, size: int) -> None:
    """Make the file at least ``size`` bytes long, with memory for every page of it.

    Raises ``OSError`` (``ENOSPC``) with the file as long as before.
    """
    before = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, before)
        raise


def copy(target: memoryview, source: memoryview) -> None:
    """Copy ``source`` to ``target`` without holding the GIL, as a slice assignment would.

    Both are writable memory (ctypes takes the address of no other), contiguous and equally long.
    """
    if target.nbytes != source.nbytes:
        raise ValueError(f"{source.nbytes} bytes do not fit {target.nbytes}")
    if target.nbytes:
        ctypes.memmove(_address(target), _address(source), target.nbytes)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
