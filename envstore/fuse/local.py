"""Complete files on this machine, by content key: what a mount's kernel reads without a server.

They lie in the cache's directory ``files`` as ``xx/<hex key>``, under the cap of the cache: the
length of each counts, also of its holes, and those that came first go first, for nobody tells us
when the kernel reads one. A file that goes while a mount uses it stays readable there, and takes
space, until the kernel forgets it. A file has its name only when every chunk of it was compared
with its digest and all of it is on disk, because nobody checks it again.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from envstore.errors import CorruptError
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache, Filling
from envstore.store.digest import digest
from envstore.store.private import make_private

_FEW = 8
"""So many files are written to disk one by one, more by writing out the file system."""


class NewFile:
    """One file on its way into ``LocalFiles``. Chunks may come in any order, from any thread."""

    def __init__(self, cache: BlobCache, tree: Tree, node: int, filling: Filling) -> None:
        self.node = node
        self.key = tree.content_key(node)
        self._cache = cache
        self._tree = tree
        self._filling = filling
        self._missing = {ref for ref in tree.file_refs(node) if not tree.is_hole(ref)}
        refs = tree.file_refs(node)
        self._offsets: dict[int, int] = {}
        self._relocated = tree.relocated(node) if tree.is_relocated(node) else None
        # It is made of what is stored when all of that is there.
        at = self._relocated.base if self._relocated else 0
        for ref in refs:
            self._offsets[ref] = at
            at += tree.chunk_size(ref)

    def write(self, ref: int, data: bytes | memoryview) -> None:
        """Write the chunk of one of the file's references.

        Raises ``CorruptError``, ``NoSpaceError``.
        """
        if len(data) != self._tree.chunk_size(ref) or digest(data) != self._tree.chunk_digest(ref):
            raise CorruptError(
                f"chunk {self._tree.chunk_digest(ref).hex()} is not where its locations say"
            )
        view = memoryview(data)
        start, done = self._offsets[ref], 0
        with self._cache.errors():
            while done < len(view):
                done += os.pwrite(self._filling.fd, view[done:], start + done)
        self._missing.discard(ref)

    def settle(self) -> None:
        """Make of the chunks, all of which were written, what the file holds.

        Raises ``CorruptError``, ``OSError``.
        """
        if self._relocated is not None:
            self._relocated.settle(self._filling.fd)

    @property
    def filling(self) -> Filling:
        """The file itself."""
        return self._filling

    @property
    def complete(self) -> bool:
        """Whether every chunk was written."""
        return not self._missing


class LocalFiles:
    """The complete files of one cache; every method may be called from any thread or process."""

    def __init__(self, cache: BlobCache) -> None:
        self._cache = cache
        self.directory: Path = cache.files
        self._top = os.fsencode(self.directory)

    def path(self, key: bytes) -> bytes:
        """Return where the file of content ``key`` is or would be."""
        return _place(self._top, key)

    def contains(self, key: bytes, size: int) -> bool:
        """Whether the file is there, as long as it should be."""
        with self._cache.errors(), suppress(FileNotFoundError):
            return os.stat(self.path(key)).st_size == size
        return False

    def begin(self, tree: Tree, node: int, *, evict: bool = True) -> NewFile:
        """Return a new file for the content of ``node``, to be filled.

        Give it to ``keep`` or ``abandon``. Without ``evict`` nothing is removed to make room.
        Raises ``CacheFullError``, ``NoSpaceError``.
        """
        filling = self._cache.begin(tree.size(node), evict=evict)
        try:
            return NewFile(self._cache, tree, node, filling)
        except BaseException:
            self._cache.abandon(filling)
            raise

    def keep(self, files: Sequence[NewFile]) -> None:
        """Give complete files their names, once they are safely on disk.

        Raises ``CorruptError`` if one is not complete, ``NoSpaceError``; those that have no name
        by then are abandoned.
        """
        named = 0
        try:
            with self._cache.errors():
                for file in files:
                    if not file.complete:
                        raise CorruptError(f"file {file.key.hex()} is not complete")
                    file.settle()
                    os.fchmod(file.filling.fd, 0o444)
                self._write_out(files)
                now = time.time_ns()
                for file in files:
                    # Last used now, not when its turn in the batch came.
                    os.utime(file.filling.fd, ns=(now, now))
                    named += 1
                    self._cache.finish(file.filling, self.path(file.key))
        finally:
            self.abandon(files[named:])

    def abandon(self, files: Iterable[NewFile]) -> None:
        """Remove files that were begun and will not be complete."""
        for file in files:
            self._cache.abandon(file.filling)

    def pin(self, files: Iterable[tuple[bytes, int]], directory: Path) -> list[bytes]:
        """Keep files, given by key and size, from being evicted.

        They get a second name below ``directory``, on the same disk. A file that is not as long
        as it should be is removed. Returns the keys of which there is no file.
        """
        top = os.fsencode(directory)
        missing = []
        with self._cache.undisturbed():
            for key, size in files:
                path, pin = self.path(key), _place(top, key)
                _remove_unless(path, size)
                _remove_unless(pin, size)
                if not _link(path, pin) and not _link(pin, path):
                    missing.append(key)
        return missing

    def _write_out(self, files: Sequence[NewFile]) -> None:
        if len(files) <= _FEW:
            for file in files:
                os.fdatasync(file.filling.fd)
            return
        library = ctypes.CDLL(None, use_errno=True)
        if library.syncfs(files[0].filling.fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _place(top: bytes, key: bytes) -> bytes:
    name = key.hex().encode()
    return b"%b/%b/%b" % (top, name[:2], name)


def _remove_unless(path: bytes, size: int) -> None:
    with suppress(FileNotFoundError):
        if os.stat(path).st_size != size:
            os.unlink(path)


def _link(existing: bytes, new: bytes) -> bool:
    """Give a file a second name; ``False`` if it has not even one."""
    for _ in range(2):
        try:
            os.link(existing, new)
            return True
        except FileExistsError:
            if os.path.samefile(existing, new):
                return True
            os.unlink(new)
        except FileNotFoundError:
            if not os.path.exists(existing):
                return False
            make_private(os.path.dirname(new))
    os.link(existing, new)
    return True
