"""A FUSE file system of files by content key, which writes down every request it gets.

python objects.py MOUNTPOINT SOURCE LOG    # serves the tree at SOURCE until killed
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pyfuse3
import trio

_FOREVER = 1 << 30


class Objects(pyfuse3.Operations):
    """Serves a directory of directories of files; requests but those of starting are logged."""

    def __init__(self, source: Path, log: Path) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: source}
        self._inodes = {source: int(pyfuse3.ROOT_INODE)}
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _say(self, what: str, path: Path) -> None:
        os.write(self._log, f"{what} {path.name}\n".encode())

    def _attributes(self, path: Path) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        try:
            st = path.stat()
        except FileNotFoundError:
            raise pyfuse3.FUSEError(2) from None
        entry.st_ino = self._inodes.setdefault(path, len(self._inodes) + 1)
        self._paths[entry.st_ino] = path
        entry.st_mode = stat.S_IFMT(st.st_mode) | 0o555
        entry.st_size = st.st_size
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        return entry

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        self._say("getattr", self._paths[inode])
        return self._attributes(self._paths[inode])

    async def lookup(self, parent, name, ctx=None):  # type: ignore[no-untyped-def]
        path = self._paths[parent] / os.fsdecode(name)
        self._say("lookup", path)
        return self._attributes(path)

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        self._say("opendir", self._paths[inode])
        return inode

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        self._say("open", self._paths[inode])
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        self._say("read", self._paths[fh])
        return self._paths[fh].read_bytes()[off : off + size]

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_namemax = 255
        return found


def main() -> None:
    mountpoint, source, log = sys.argv[1:]
    pyfuse3.init(Objects(Path(source), Path(log)), mountpoint, {"default_permissions", "ro"})
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    main()
