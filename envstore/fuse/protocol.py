"""The kernel's FUSE protocol, as much of it as a read-only file system needs (linux/fuse.h).

Numbers are in the machine's own byte order and nothing is aligned beyond what is written here.
"""

from __future__ import annotations

import struct

MAJOR, MINOR = 7, 38
OLDEST_MINOR = 31
"""Linux 5.4. Older kernels lay out nothing of this differently, but nobody tries them."""


class Op:
    """Request numbers."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    COPY_FILE_RANGE = 47
    TMPFILE = 51


class Flag:
    """What the kernel offers and the server accepts in INIT."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
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

READ_IN = struct.Struct("=8xQI")
"""offset, size; the handle before them is not used."""

_ATTR = "QQQQQQIIIIIIIIII"
ENTRY = struct.Struct("=QQQQII" + _ATTR)
"""node, generation, seconds the name and the attributes stay valid, nanoseconds of both; then
inode, size, blocks, atime, mtime, ctime, their nanoseconds, mode, links, uid, gid, device, block
size, flags."""

ATTR_OUT = struct.Struct("=QII" + _ATTR)
"""seconds and nanoseconds the attributes stay valid, padding; then as in ``ENTRY``."""

DIRENT = struct.Struct("=QQII")
"""inode, offset of the next entry, length of the name, type; the name follows, padded to 8."""

STATFS_OUT = struct.Struct("=QQQQQIIII24x")
"""blocks, free, available, files, free files, block size, longest name, fragment, padding."""


def dirent(inode: int, offset: int, name: bytes, mode: int) -> bytes:
    """Return one directory entry for READDIR."""
    length = len(name)
    return DIRENT.pack(inode, offset, length, mode >> 12) + name + bytes(-length % 8)
