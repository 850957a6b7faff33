"""Writes the names and attributes of a tree as an EROFS image, which the kernel serves by itself.

The image holds no file content: a file that is not empty is one hole of its size with the two
attributes that make overlayfs take its bytes from ``/xx/<hex content key>`` of a layer below.
Layout: superblock (with the one shared attribute behind it) in the first block; inodes in the
order of the tree, each with its attributes and, where they are short, its directory entries or
link target; then the directory blocks that stand alone. Then, unknown to EROFS, our own seal.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blake3 import blake3

from envstore.errors import EnvstoreError
from envstore.fuse.tree import ROOT, Attributes, Tree
from envstore.store.entries import NORMAL_MTIME_NS
from envstore.store.private import make_private, private

FORMAT = 1
"""Raised when the same tree would give another image; part of every image's name."""
NAME_MAX = 255
IMAGES_KEPT = 256 << 20
"""Bytes of images not used lately that are left in a directory of images."""

_BLOCK, _SLOT = 4096, 32
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_SUPER_AT, _MAGIC = 1024, 0xE0F5E1E2
_COMPAT_CHECKSUM, _COMPAT_MTIME, _INCOMPAT_CHUNKED = 1, 2, 4
_COMPACT = struct.Struct("<HHHHI4xIIHH4x")
_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")
_XATTRS = struct.Struct("<IB7xI")
_XATTR = struct.Struct("<BBH")
_PLAIN, _INLINE, _CHUNKS = 0, 2, 4
_CHUNK_BITS_MAX = 31
_TRUSTED = 4
_NOWHERE = 0xFFFFFFFF
_INLINE_MOST = 2048
"""Longer tails get a block of their own, rather than leaving half of one empty before them."""
_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}

_REDIRECT, _METACOPY = b"overlay.redirect", b"overlay.metacopy"
_METACOPY_AT = _SUPER_AT + _SUPER.size
_REDIRECT_SIZE = len("/xx/") + 64
_FILE_XATTRS = (
    _XATTRS.pack(0, 1, _METACOPY_AT // 4)
    + _XATTR.pack(len(_REDIRECT), _TRUSTED, _REDIRECT_SIZE)
    + _REDIRECT
)
_FILE_XATTRS_SIZE = len(_FILE_XATTRS) + _REDIRECT_SIZE
_FILE_XATTRS_COUNT = 1 + (_FILE_XATTRS_SIZE - 12) // 4

_SEAL = struct.Struct("<8s32s")
_SEAL_MAGIC = b"ESEROF01"


class NotRepresentableError(EnvstoreError):
    """A tree holds something that EROFS has no place for."""


class _Entry(NamedTuple):
    name: bytes
    node: int


def ensure_image(tree: Tree, manifest: bytes, directory: Path) -> Path:
    """Return the image of the tree of ``manifest``, verified, written first if need be.

    Images of other manifests that were not used lately are removed from ``directory`` when they
    take more than ``IMAGES_KEPT`` bytes; mounts that use one go on. Raises
    ``NotRepresentableError``, and ``EnvstoreError`` if it cannot be written.
    """
    found = find_image(manifest, directory)
    if found is not None:
        return found
    path = _path(manifest, directory)
    partial = directory / f".{secrets.token_hex(8)}.partial"
    try:
        make_private(directory)
        try:
            with open(partial, "x+b", opener=private) as out:
                write_image(tree, manifest, out)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _prune(directory, path)
    except OSError as error:
        raise EnvstoreError(
            f"cannot write the image {path}: {error.strerror}",
            hint="free space or move the cache with ENVSTORE_CACHE_DIR",
        ) from error
    return path


def find_image(manifest: bytes, directory: Path) -> Path | None:
    """Return the image of ``manifest`` if it is there and as it was written; that is a use."""
    path = _path(manifest, directory)
    try:
        with path.open("rb") as image:
            if _read_seal(image) != _digest(image):
                return None
        os.utime(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvstoreError(f"cannot read the image {path}: {error.strerror}") from error
    return path


def write_image(tree: Tree, manifest: bytes, out: BinaryIO) -> None:
    """Write the image of ``tree`` to ``out``, and what proves it intact.

    ``out`` is an empty file open for reading too. The bytes depend on the tree and ``manifest``
    alone. Everything belongs to root, as only root can mount it.

    Raises ``NotRepresentableError``, ``OSError``.
    """
    layout = _Layout(tree)
    _write_super(out, layout, manifest)
    _Writer(tree, layout, out).write()
    out.truncate(layout.blocks * _BLOCK)
    out.flush()
    seal = _SEAL.pack(_SEAL_MAGIC, _digest(out))
    out.seek(0, os.SEEK_END)
    out.write(seal)
    out.flush()


class _Layout:
    """Where everything lies: slots of inodes by node, sizes and blocks of directories."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.nids = array("I", bytes(4 * (len(tree) + 1)))
        self.types = bytearray(b"\1") * (len(tree) + 1)
        self.parents = {ROOT: ROOT}
        self.sizes: dict[int, int] = {}
        self.first_block: dict[int, int] = {}
        self.inodes = 0
        blocks = 0
        at = _BLOCK
        for node in range(ROOT, len(tree) + 1):
            if tree.inode(node) != node:
                continue
            found = tree.attributes(node)
            self.types[node] = _TYPES[stat.S_IFMT(found.mode)]
            head, tail, plain = self._measure(node, found)
            if plain:
                self.first_block[node] = blocks
                blocks += plain
            if tail and (at + head) // _BLOCK != (at + head + tail - 1) // _BLOCK:
                at = _up(at, _BLOCK)
            self.nids[node] = at // _SLOT
            self.inodes += 1
            at = _up(at + head + tail, _SLOT)
        for node in range(ROOT, len(tree) + 1):
            if not self.nids[node]:
                self.nids[node] = self.nids[tree.inode(node)]
        self.data = _up(at, _BLOCK) // _BLOCK
        self.blocks = self.data + blocks
        if self.blocks >= _NOWHERE:
            raise NotRepresentableError("the tree is too large for an EROFS image")

    def _measure(self, node: int, found: Attributes) -> tuple[int, int, int]:
        """Return bytes of the inode with attributes, bytes inline behind it, blocks elsewhere."""
        head = _inode_size(found)
        kind = stat.S_IFMT(found.mode)
        if kind == stat.S_IFREG:
            if found.size:
                head += _FILE_XATTRS_SIZE + 4 * _chunks(found.size)[1]
            return head, 0, 0
        size = found.size
        if kind == stat.S_IFLNK and size >= _BLOCK:
            raise NotRepresentableError(f"a link target of {size} bytes is too long for Linux")
        if kind == stat.S_IFDIR:
            size = self.sizes[node] = self._directory_size(node)
        inline = _inline(head, size)
        return head, inline, _up(size - inline, _BLOCK) // _BLOCK

    def _directory_size(self, node: int) -> int:
        full = used = 0
        for name, child in self.entries(node):
            if len(name) > NAME_MAX:
                raise NotRepresentableError(
                    f"a name of {len(name)} bytes is too long for EROFS: {os.fsdecode(name)[:60]}"
                )
            self.parents.setdefault(child, node)
            need = _DIRENT.size + len(name)
            if used + need > _BLOCK:
                full, used = full + _BLOCK, 0
            used += need
        return full + used

    def entries(self, node: int) -> Iterator[_Entry]:
        """Yield the entries of a directory by name, with the two that no tree holds."""
        tree = self._tree
        dots = [_Entry(b"..", self.parents[node]), _Entry(b".", node)]
        for position in range(tree.child_count(node)):
            child = tree.child(node, position)
            name = tree.name(child)
            while dots and dots[-1].name < name:
                yield dots.pop()
            yield _Entry(name, child)
        yield from reversed(dots)


class _Writer:
    """Writes inodes and directory blocks, each in order, through two buffers."""

    def __init__(self, tree: Tree, layout: _Layout, out: BinaryIO) -> None:
        self._tree = tree
        self._layout = layout
        self._inodes = _Stream(out.fileno(), _BLOCK)
        self._blocks = _Stream(out.fileno(), layout.data * _BLOCK)

    def write(self) -> None:
        tree, layout, inodes = self._tree, self._layout, self._inodes
        for node in range(ROOT, len(tree) + 1):
            if tree.inode(node) != node:
                continue
            inodes.pad(layout.nids[node] * _SLOT)
            found = tree.attributes(node)
            kind = stat.S_IFMT(found.mode)
            if kind == stat.S_IFREG:
                self._write_file(node, found)
            elif kind == stat.S_IFDIR:
                size = layout.sizes[node]
                self._write_blocks(node, found, size, self._directory_blocks(node))
            else:
                self._write_blocks(node, found, found.size, [tree.target(node)])
        inodes.pad(layout.data * _BLOCK)
        inodes.flush()
        self._blocks.flush()

    def _write_file(self, node: int, found: Attributes) -> None:
        put = self._inodes.put
        if not found.size:
            put(_inode(node, found, 0, _PLAIN, 0, 0))
            return
        bits, count = _chunks(found.size)
        key = self._tree.content_key(node).hex().encode()
        put(_inode(node, found, found.size, _CHUNKS, bits, _FILE_XATTRS_COUNT))
        put(_FILE_XATTRS)
        put(b"/%b/%b" % (key[:2], key))
        put(b"\xff\xff\xff\xff" * count)

    def _write_blocks(
        self, node: int, found: Attributes, size: int, blocks: Iterable[bytes]
    ) -> None:
        inline = _inline(_inode_size(found), size)
        first = self._layout.data + self._layout.first_block.get(node, 0)
        if size == inline:
            first = 0
        self._inodes.put(_inode(node, found, size, _INLINE if inline else _PLAIN, first, 0))
        left = size
        for block in blocks:
            if left == inline:
                self._inodes.put(block)
            else:
                self._blocks.put(block)
                self._blocks.pad(_up(self._blocks.at, _BLOCK))
            left -= min(left, _BLOCK)

    def _directory_blocks(self, node: int) -> Iterator[bytes]:
        """Yield a directory's blocks, of which only the last may be short."""
        held: list[_Entry] = []
        used = 0
        for entry in self._layout.entries(node):
            need = _DIRENT.size + len(entry.name)
            if used + need > _BLOCK:
                yield self._directory_block(held).ljust(_BLOCK, b"\0")
                held, used = [], 0
            held.append(entry)
            used += need
        yield self._directory_block(held)

    def _directory_block(self, held: list[_Entry]) -> bytes:
        nids, types = self._layout.nids, self._layout.types
        starts = accumulate((len(entry.name) for entry in held), initial=_DIRENT.size * len(held))
        parts = [
            _DIRENT.pack(nids[entry.node], start, types[entry.node])
            for entry, start in zip(held, starts, strict=False)
        ]
        parts += [entry.name for entry in held]
        return b"".join(parts)


class _Stream:
    """Appends to a file from ``at`` on, a mebibyte at a time."""

    def __init__(self, fd: int, at: int) -> None:
        self._fd = fd
        self.at = at
        self._held = bytearray()

    def put(self, data: bytes) -> None:
        self._held += data
        self.at += len(data)
        if len(self._held) >= 1 << 20:
            self.flush()

    def pad(self, at: int) -> None:
        """Fill with zeros up to byte ``at``."""
        if at > self.at:
            self.put(bytes(at - self.at))

    def flush(self) -> None:
        start = self.at - len(self._held)
        done = 0
        with memoryview(self._held) as view:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start + done)
        self._held.clear()


def _is_extended(found: Attributes) -> bool:
    """Whether an inode needs more room than the short form has; which has no time of its own."""
    return found.mtime_ns != NORMAL_MTIME_NS or found.links > 0xFFFF or found.size > 0xFFFFFFFF


def _inode_size(found: Attributes) -> int:
    return _EXTENDED.size if _is_extended(found) else _COMPACT.size


def _inode(node: int, found: Attributes, size: int, layout: int, where: int, xattrs: int) -> bytes:
    """Return the inode; ``where`` is its first block, or the format of its chunks."""
    if not _is_extended(found):
        return _COMPACT.pack(layout << 1, xattrs, found.mode, found.links, size, where, node, 0, 0)
    seconds, nanoseconds = divmod(found.mtime_ns, 1_000_000_000)
    return _EXTENDED.pack(
        layout << 1 | 1, xattrs, found.mode, 0, size, where, node, 0, 0, seconds, nanoseconds,
        found.links,
    )  # fmt: skip


def _inline(head: int, size: int) -> int:
    """Return how many of an inode's ``size`` bytes lie behind its ``head``: the last or none."""
    tail = size % _BLOCK
    return tail if tail <= _INLINE_MOST and head + tail <= _BLOCK else 0


def _chunks(size: int) -> tuple[int, int]:
    """Return the size (as a power of two of blocks) and number of a file's chunks: mostly one."""
    bits = min(max((size - 1).bit_length() - _BLOCK.bit_length() + 1, 0), _CHUNK_BITS_MAX)
    return bits, -(-size >> bits + _BLOCK.bit_length() - 1)


def _write_super(out: BinaryIO, layout: _Layout, manifest: bytes) -> None:
    seconds, nanoseconds = divmod(NORMAL_MTIME_NS, 1_000_000_000)
    fields = (
        _COMPAT_CHECKSUM | _COMPAT_MTIME, _BLOCK.bit_length() - 1, 0, layout.nids[ROOT],
        layout.inodes, seconds, nanoseconds, layout.blocks, 0, 0, manifest[:16],
        b"envstore", _INCOMPAT_CHUNKED, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    shared = _XATTR.pack(len(_METACOPY), _TRUSTED, 0) + _METACOPY
    rest = _BLOCK - _SUPER_AT
    # The checksum is that of the block with zero in its place.
    blank = _SUPER.pack(_MAGIC, 0, *fields) + shared
    body = _SUPER.pack(_MAGIC, _crc32c(blank.ljust(rest, b"\0")), *fields) + shared
    out.write(bytes(_SUPER_AT) + body.ljust(rest, b"\0"))
    out.flush()


def _crc32c(data: bytes) -> int:
    """Return the Castagnoli CRC as EROFS has it: from all ones, not inverted at the end."""
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def _digest(image: BinaryIO) -> bytes | None:
    """Return the digest of an image up to its seal, of any whole number of blocks."""
    size = os.fstat(image.fileno()).st_size // _BLOCK * _BLOCK
    hasher = blake3(b"envstore image")
    at = 0
    while at < size:
        data = os.pread(image.fileno(), min(1 << 20, size - at), at)
        if not data:
            return None
        hasher.update(data)
        at += len(data)
    return hasher.digest()


def _read_seal(image: BinaryIO) -> bytes:
    size = os.fstat(image.fileno()).st_size
    data = os.pread(image.fileno(), _BLOCK, size // _BLOCK * _BLOCK)
    if len(data) != _SEAL.size or not data.startswith(_SEAL_MAGIC):
        return b""
    return bytes(_SEAL.unpack(data)[1])


def _path(manifest: bytes, directory: Path) -> Path:
    return directory / f"{manifest.hex()}.{FORMAT}"


def _prune(directory: Path, newest: Path) -> None:
    """Remove what was used longest ago, and what writers that were killed have left."""
    found = []
    for path in directory.iterdir():
        if path != newest:
            with suppress(FileNotFoundError):
                st = path.stat()
                found.append((st.st_mtime_ns, st.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= IMAGES_KEPT:
            break
        path.unlink(missing_ok=True)
        total -= size


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
