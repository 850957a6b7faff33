"""Answers the kernel's questions about one snapshot; holds no state that a restart would lose.

Node ids, file handles and directory offsets are pure functions of the snapshot, so that another
server of the same snapshot can go on in the middle of anything; FORGET means nothing. Nothing
ever changes, so the kernel may keep every answer (names, attributes, absences, contents) for
years.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FUSEError, InodeT

from envstore.fuse.complaints import Complaints
from envstore.fuse.forest import Forest
from envstore.fuse.metrics import Metrics
from envstore.fuse.tree import Attributes
from envstore.store.source import Kind

FOREVER = 10 * 365 * 86_400
"""Seconds that the kernel may keep an answer."""

BLOCK = 4096
_NAME_MAX = 255
_ENTRIES = 60_000
_SLOT_SHIFT = 32
_NODE = (1 << _SLOT_SHIFT) - 1

_log = logging.getLogger(__name__)
_complaints = Complaints(_log)


class Files(Protocol):
    """Where the bytes of files come from. Reading raises ``OSError`` and nothing else."""

    def read_now(self, slot: int, node: int, offset: int, size: int) -> bytes | None:
        """Return a range of a file, clipped to its end; ``None`` if that takes waiting."""
        ...

    async def read(self, slot: int, node: int, offset: int, size: int) -> bytes:
        """Return a range of a file, clipped to its end."""
        ...

    def opened(self, slot: int, node: int) -> None:
        """Learn that a file was opened."""
        ...

    async def revive(self, slot: int, known: Callable[[], bool]) -> None:
        """Bring back, if possible, what makes true that something is ``known``."""
        ...


_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


def _counted(handler: _Handler) -> _Handler:
    """Have a request handler counted under its name, with the time it takes."""
    kind = handler.__name__

    @wraps(handler)
    async def counting(self: SnapshotOperations, *arguments: Any) -> Any:
        started = perf_counter()
        try:
            return await handler(self, *arguments)
        except FUSEError:
            raise
        except Exception as error:
            # Let through, it would end this server and, asked again, each next one.
            _complaints.say(f"{kind}: {error!r}")
            _log.debug("%s", kind, exc_info=error)
            raise FUSEError(errno.EIO) from error
        finally:
            self.metrics.requests[kind] += 1
            self.metrics.observe(kind, perf_counter() - started)

    return cast(_Handler, counting)


class SnapshotOperations(pyfuse3.Operations):
    """The read-only file system of one ``Forest``."""

    def __init__(self, forest: Forest, files: Files, metrics: Metrics) -> None:
        """Serve ``forest`` with the bytes of ``files``; ``metrics`` counts requests."""
        super().__init__()
        self._forest = forest
        self._files = files
        self.metrics = metrics
        self._uid, self._gid = os.getuid(), os.getgid()
        self._entries: dict[int, EntryAttributes] = {}
        self._absent = _absence(FOREVER)
        self._absent_now = _absence(0)
        self.on_init: Callable[[], object] = lambda: None

    def init(self) -> None:
        """Called by pyfuse3 when the session starts."""
        self.on_init()

    @_counted
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        """Find a name; that there is none is an answer the kernel may keep, too."""
        await self._know(parent_inode)
        node = self._forest.lookup(parent_inode, name)
        if node is None:
            return self._absent if self._forest.lasting(parent_inode) else self._absent_now
        return self._entry(node)

    @_counted
    async def getattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> EntryAttributes:
        """Return a node's attributes."""
        await self._know(inode)
        return self._entry(inode)

    @_counted
    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileNameT:
        """Return where a link points."""
        await self._know(inode, Kind.SYMLINK)
        return FileNameT(self._forest.target(inode))

    @_counted
    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        """Allow reading; the handle is slot and node, and what the kernel has cached stays."""
        await self._know(inode, Kind.FILE)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        slot, node = self._forest.place(inode)
        self._files.opened(slot, node)
        return FileInfo(fh=FileHandleT(slot << _SLOT_SHIFT | node), keep_cache=True)

    @_counted
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Return a range of a file.

        Never a view of a mapped file: if that page had to be read while this process is killed,
        the kernel would answer the reader with EIO.
        """
        slot, node = fh >> _SLOT_SHIFT, fh & _NODE
        try:
            if self._forest.node(slot, node) is None:
                raise FUSEError(errno.EINVAL)
        except KeyError:
            await self._files.revive(slot, lambda: slot in self._forest.slots)
            if slot not in self._forest.slots or self._forest.node(slot, node) is None:
                raise FUSEError(errno.ESTALE) from None
        try:
            data = self._files.read_now(slot, node, off, size)
            return data if data is not None else await self._files.read(slot, node, off, size)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error

    async def release(self, fh: FileHandleT) -> None:
        """Nothing was kept for the handle."""

    @_counted
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        """Allow listing; the handle is the node."""
        await self._know(inode, Kind.DIRECTORY)
        return FileHandleT(inode)

    @_counted
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from an offset on; offsets count entries."""
        node = InodeT(fh)
        await self._know(node, Kind.DIRECTORY)
        for position, (name, child) in enumerate(self._forest.listing(node, start_id), start_id):
            entry = self._entry(child)
            if not pyfuse3.readdir_reply(token, FileNameT(name), entry, position + 1):
                break

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing was kept for the handle."""

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nothing is remembered of what the kernel knows."""

    @_counted
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the size of all snapshots here; nothing is free."""
        totals = [self._forest.tree(slot).totals for slot in self._forest.slots]
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks = sum(-(-total.logical // BLOCK) for total in totals)
        data.f_files = sum(total.entries + 1 for total in totals)
        data.f_namemax = _NAME_MAX
        return data

    @_counted
    async def flush(self, fh: FileHandleT) -> None:
        """Say once and for all that closing takes no request."""
        raise FUSEError(errno.ENOSYS)

    @_counted
    async def getxattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Say once and for all that there are no extended attributes."""
        raise FUSEError(errno.ENOSYS)

    @_counted
    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Say once and for all that there are no extended attributes."""
        raise FUSEError(errno.ENOSYS)

    async def _know(self, node: int, kind: Kind | None = None) -> None:
        """Refuse ids that are not of this file system, or of another kind than asked for."""
        try:
            found = self._forest.kind(node)
        except KeyError:
            await self._files.revive(node >> _SLOT_SHIFT, lambda: self._forest.knows(node))
            try:
                found = self._forest.kind(node)
            except KeyError:
                raise FUSEError(errno.ESTALE) from None
        if kind is not None and found is not kind:
            raise FUSEError(errno.EINVAL)

    def _entry(self, node: int) -> EntryAttributes:
        """Return a node's attributes; making them takes longer than all else in most answers."""
        entry = self._entries.get(node)
        if entry is None:
            if len(self._entries) >= _ENTRIES:
                self._entries.clear()
            entry = self._entries[node] = self._made(self._forest.attributes(node))
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


def _absence(seconds: int) -> EntryAttributes:
    """Return that there is no such name, which the kernel may believe for so long."""
    absent = EntryAttributes()
    absent.st_ino = InodeT(0)
    absent.entry_timeout = absent.attr_timeout = seconds
    return absent
