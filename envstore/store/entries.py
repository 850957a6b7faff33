"""Entries: what a manifest says of each file, directory and symbolic link."""

from __future__ import annotations

from dataclasses import dataclass

from envstore.store.digest import DIGEST_SIZE, EMPTY
from envstore.store.source import Kind

NORMAL_MTIME_NS = 315_619_200 * 1_000_000_000
"""Time of every entry of a normalised tree: 1980-01-02 UTC, which zip archives can hold in any
time zone. Bytecode in such a tree is of the unchecked-hash kind: nothing compares it with this."""
HOLE = bytes(DIGEST_SIZE)
"""Stands for a digest where a run of zeros is not stored."""
MAX_HOLE = 1 << 31
"""Bytes of one hole reference; longer runs take several."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link of a tree.

    ``refs`` are the ``(digest, size)`` of its chunks in order, a hole having the digest ``HOLE``.
    ``link`` is the path of the first name of a hard-linked file on every further name. ``mode``
    and ``mtime_ns`` are ``None`` in normalised trees. ``relocation`` is an encoded ``Relocation``
    of a file that holds the path it was made for; of a link, that path at the start of its target.
    """

    path: bytes
    kind: Kind
    executable: bool = False
    size: int = 0
    digest: bytes = EMPTY
    refs: tuple[tuple[bytes, int], ...] = ()
    target: bytes = b""
    mode: int | None = None
    mtime_ns: int | None = None
    link: bytes = b""
    relocation: bytes = b""


def sort_key(path: bytes) -> bytes:
    """Return the key that puts a directory directly before all that is in it."""
    return path.replace(b"/", b"\0")
