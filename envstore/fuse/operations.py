"""Answers the kernel's questions about one snapshot; holds no state that a restart would lose.

Node ids, file handles and directory offsets are pure functions of the snapshot, so that another
server of the same snapshot can go on in the middle of anything; FORGET means nothing. Nothing
ever changes, so the kernel may keep every answer (names, attributes, absences, contents) for
years.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FUSEError, InodeT

from envstore.fuse.tree import Attributes, Tree
from envstore.store.source import Kind

FOREVER = 10 * 365 * 86_400
"""Seconds that the kernel may keep an answer."""

BLOCK = 4096
_NAME_MAX = 255
_ENTRIES = 20_000


class Content(Protocol):
    """Where the bytes of files come from. Both raise ``OSError`` and nothing else."""

    def read_now(self, node: int, offset: int, size: int) -> bytes | None:
        """Return a range of a file, clipped to its end; ``None`` if that takes waiting."""
        ...

    async def read(self, node: int, offset: int, size: int) -> bytes:
        """Return a range of a file, clipped to its end."""
        ...


class SnapshotOperations(pyfuse3.Operations):
    """The read-only file system of one ``Tree``."""

    def __init__(self, tree: Tree, content: Content, requests: Counter[str]) -> None:
        """Serve ``tree`` with the bytes of ``content``; ``requests`` counts by name."""
        super().__init__()
        self._tree = tree
        self._content = content
        self._requests = requests
        self._uid, self._gid = os.getuid(), os.getgid()
        self._entries: dict[int, EntryAttributes] = {}
        self._absent = EntryAttributes()
        self._absent.st_ino = InodeT(0)
        self._absent.entry_timeout = self._absent.attr_timeout = FOREVER
        self.on_init: Callable[[], object] = lambda: None

    def init(self) -> None:
        """Called by pyfuse3 when the session starts."""
        self.on_init()

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        """Find a name; that there is none is an answer the kernel may keep, too."""
        self._requests["lookup"] += 1
        node = self._tree.lookup(self._checked(parent_inode), name)
        return self._absent if node is None else self._entry(node)

    async def getattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> EntryAttributes:
        """Return a node's attributes."""
        self._requests["getattr"] += 1
        return self._entry(self._checked(inode))

    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileNameT:
        """Return where a link points."""
        self._requests["readlink"] += 1
        return FileNameT(self._tree.target(self._checked(inode, Kind.SYMLINK)))

    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        """Allow reading; the handle is the node, and what the kernel has cached stays."""
        self._requests["open"] += 1
        node = self._checked(inode, Kind.FILE)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        return FileInfo(fh=FileHandleT(node), keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Return a range of a file.

        Never a view of a mapped file: if that page had to be read while this process is killed,
        the kernel would answer the reader with EIO.
        """
        self._requests["read"] += 1
        node = self._checked(fh, Kind.FILE)
        try:
            data = self._content.read_now(node, off, size)
            return data if data is not None else await self._content.read(node, off, size)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error

    async def release(self, fh: FileHandleT) -> None:
        """Nothing was kept for the handle."""

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        """Allow listing; the handle is the node."""
        self._requests["opendir"] += 1
        return FileHandleT(self._checked(inode, Kind.DIRECTORY))

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from an offset on; offsets count entries."""
        self._requests["readdir"] += 1
        tree, node = self._tree, self._checked(fh, Kind.DIRECTORY)
        for position in range(start_id, tree.child_count(node)):
            child = tree.child(node, position)
            name = FileNameT(tree.name(child))
            if not pyfuse3.readdir_reply(token, name, self._entry(child), position + 1):
                break

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing was kept for the handle."""

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nothing is remembered of what the kernel knows."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the snapshot's size; nothing is free."""
        self._requests["statfs"] += 1
        totals = self._tree.totals
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks = -(-totals.logical // BLOCK)
        data.f_files = totals.entries + 1
        data.f_namemax = _NAME_MAX
        return data

    async def flush(self, fh: FileHandleT) -> None:
        """Say once and for all that closing takes no request."""
        self._requests["flush"] += 1
        raise FUSEError(errno.ENOSYS)

    async def getxattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Say once and for all that there are no extended attributes."""
        self._requests["getxattr"] += 1
        raise FUSEError(errno.ENOSYS)

    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Say once and for all that there are no extended attributes."""
        self._requests["listxattr"] += 1
        raise FUSEError(errno.ENOSYS)

    def _checked(self, node: int, kind: Kind | None = None) -> int:
        """Refuse nodes that are not in the tree, or of another kind."""
        if node not in self._tree:
            raise FUSEError(errno.ESTALE)
        if kind is not None and self._tree.kind(node) is not kind:
            raise FUSEError(errno.EINVAL)
        return node

    def _entry(self, node: int) -> EntryAttributes:
        """Return a node's attributes; making them takes longer than all else in most answers."""
        entry = self._entries.get(node)
        if entry is None:
            if len(self._entries) >= _ENTRIES:
                self._entries.clear()
            entry = self._entries[node] = self._made(self._tree.attributes(node))
        return entry

    def _made(self, attributes: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(attributes.inode)
        entry.st_mode = pyfuse3.ModeT(attributes.mode)
        entry.st_nlink = attributes.links
        entry.st_size = attributes.size
        entry.st_blocks = (attributes.stored + 511) >> 9
        entry.st_blksize = BLOCK
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_mtime_ns = entry.st_atime_ns = entry.st_ctime_ns = attributes.mtime_ns
        entry.entry_timeout = entry.attr_timeout = FOREVER
        return entry
