"""Entries: what a manifest says of each file, directory and symbolic link."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from envstore.store.binary import U32
from envstore.store.digest import DIGEST_SIZE, EMPTY
from envstore.store.source import Kind

NORMAL_MTIME_NS = 315_619_200 * 1_000_000_000
"""Time of every entry of a normalised tree: 1980-01-02 UTC, which zip archives can hold in any
time zone. Bytecode in such a tree is of the unchecked-hash kind: nothing compares it with this."""
HOLE = bytes(DIGEST_SIZE)
"""Stands for a digest where a run of zeros is not stored."""
MAX_HOLE = 1 << 31
"""Bytes of one hole reference; longer runs take several."""

_COMPOSED = "envstore composed file v1"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link of a tree.

    ``refs`` are the ``(digest, size)`` of its chunks in order, a hole having the digest ``HOLE``.
    ``link`` is the path of the first name of a hard-linked file on every further name. ``mode``
    and ``mtime_ns`` are ``None`` in normalised trees. ``relocation`` is an encoded ``Relocation``
    of a file that holds the path it was made for; of a link, that path at the start of its target.

    ``digest`` is that of a file's content; of a ``composed`` file, whose content nobody has read
    in one piece, it is ``composed_digest`` of its references.
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
    composed: bool = False


def named_by_chunk(size: int, refs: tuple[tuple[bytes, int], ...]) -> bool:
    """Whether a file needs no digest of its own: it is empty, or just one chunk."""
    return not size or (len(refs) == 1 and refs[0][1] == size and refs[0][0] != HOLE)


def composed_digest(refs: Iterable[tuple[bytes, int]]) -> bytes:
    """Return the identity of a file that is put together of ``(digest, size)`` references.

    Equal content cut at other places has another.
    """
    hashed = blake3(derive_key_context=_COMPOSED)
    hashed.update(b"".join(name + U32.pack(size) for name, size in refs))
    return hashed.digest()


def composed_entry(
    path: bytes, refs: Iterable[tuple[bytes, int]], *, executable: bool = False
) -> Entry:
    """Return the entry of a file in a normalised tree that is put together of ``refs``.

    One that is empty or just one chunk is an ordinary file, whose digest is known.
    """
    refs = tuple(refs)
    size = sum(size for _, size in refs)
    if named_by_chunk(size, refs):
        return Entry(path, Kind.FILE, executable, size, refs[0][0] if refs else EMPTY, refs)
    return Entry(path, Kind.FILE, executable, size, composed_digest(refs), refs, composed=True)


def sort_key(path: bytes) -> bytes:
    """Return the key that puts a directory directly before all that is in it."""
    return path.replace(b"/", b"\0")
