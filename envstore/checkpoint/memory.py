"""Mapped files of shared memory: room that is really there, faulted in early, copied fast."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

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


def left() -> int:
    """Return about how many bytes of memory this process may still take before it is killed.

    That is the least of what the machine has available and of what the limits of its control
    groups (version 2) leave, file cache not counted.
    """
    found = [_amounts("/proc/meminfo").get("MemAvailable", 0) << 10]
    group = Path("/sys/fs/cgroup") / _own_group().lstrip("/")
    for directory in (group, *group.parents[: -len(Path("/sys/fs").parts)]):
        with contextlib.suppress(OSError, ValueError):  # no limit, or another kind of group
            limit = int((directory / "memory.max").read_text())
            used = int((directory / "memory.current").read_text())
            amounts = _amounts(str(directory / "memory.stat"))
            cached = amounts.get("active_file", 0) + amounts.get("inactive_file", 0)
            found.append(max(0, limit - used + cached))
    return min(found)


def is_memory(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` lies on a volume in memory (tmpfs)."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[2] == number:
            return rest.split(" ")[0] in ("tmpfs", "ramfs")
    return False


def _own_group() -> str:
    """Return the path of this process's control group, ``/`` if there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def _amounts(path: str) -> dict[str, int]:
    """Return the numbers of a file of the kernel with a name and a number in each line."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, number, *_ = line.split()
        found[name.rstrip(":")] = int(number)
    return found


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
