"""Manifests: the flat, path-sorted description of one tree.

A manifest is a root, which lists parts, and the parts themselves, which are chunks like any
other. Entries are in depth-first order: sorted by path with ``/`` counted as the lowest byte.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.binary import U32, U64, Cursor, pack_array, seal, unseal
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.entries import HOLE, MAX_HOLE, NORMAL_MTIME_NS, Entry, sort_key
from envstore.store.parts import (
    MAX_PART_REFS,
    MODE_BITS,
    Part,
    PartInfo,
    build_parts,
    checked,
    decode_part,
    read_entries,
)

__all__ = [
    "HOLE",
    "MAX_HOLE",
    "MAX_PART_REFS",
    "NORMAL_MTIME_NS",
    "Entry",
    "Part",
    "PartInfo",
    "build_parts",
    "checked",
    "decode_part",
    "read_entries",
    "sort_key",
]

ROOT_MAGIC = b"ESMANI01"
MAX_ROOT = 256 << 20


def manifest_key(name: bytes) -> str:
    """Return the object key of the manifest root called ``name``."""
    return f"manifests/{name.hex()}"


@dataclass(frozen=True, slots=True)
class Root:
    """The root of a manifest; its digest is the manifest's identity.

    ``entries`` counts files, directories and links; ``logical`` is the sum of all file sizes.
    ``mode`` and ``mtime_ns`` are those of the tree's own directory, zero in normalised trees.
    """

    parts: tuple[PartInfo, ...]
    entries: int
    files: int
    logical: int
    mode: int = 0
    mtime_ns: int = 0

    def encode(self) -> bytes:
        """Return the body that is hashed."""
        columns = (
            array("I", (part.size for part in self.parts)),
            array("I", (part.entries for part in self.parts)),
            array("I", (part.refs for part in self.parts)),
        )
        return b"".join(
            (
                U64.pack(self.entries),
                U64.pack(self.files),
                U64.pack(self.logical),
                U64.pack(self.mode),
                U64.pack(self.mtime_ns & (1 << 64) - 1),
                U32.pack(len(self.parts)),
                b"".join(part.digest for part in self.parts),
                *(pack_array(column) for column in columns),
            )
        )

    @property
    def digest(self) -> bytes:
        """The manifest's identity."""
        return digest(self.encode())

    def seal(self) -> bytes:
        """Return the object to store under ``manifest_key(self.digest)``."""
        return seal(ROOT_MAGIC, self.encode())


def open_root(data: bytes, name: bytes) -> Root:
    """Decode and check the stored manifest root called ``name``. Raises ``CorruptError``."""
    what = f"manifest {name.hex()}"
    body, found = unseal(ROOT_MAGIC, data, limit=MAX_ROOT, what=what)
    if found != name:
        raise CorruptError(f"{what} does not match its name")
    cursor = Cursor(body)
    entries, files, logical, mode, mtime = (cursor.u64() for _ in range(5))
    count = cursor.u32()
    digests = bytes(cursor.take(count * DIGEST_SIZE))
    sizes, numbers, refs = (cursor.array(count, 4) for _ in range(3))
    cursor.finish()
    parts = tuple(
        PartInfo(digests[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE], sizes[i], numbers[i], refs[i])
        for i in range(count)
    )
    if mode > MODE_BITS:
        raise CorruptError(f"{what} has a mode that holds more than permission bits")
    if mtime >> 63:
        mtime -= 1 << 64
    return Root(parts, entries, files, logical, mode, mtime)
