"""Content keys: names for what files hold, the same in every snapshot, and how to find them.

The key of a file of one stored chunk is the chunk's digest, that of an empty file ``EMPTY``.
All others are named by their chunk list, as the digest of a whole file is only claimed by a
manifest and not checked when reading. The hash of lists is another one than the hash of chunks:
else somebody could store the encoding of a list as a file and take that list's name with it.
"""

from __future__ import annotations

from array import array

from blake3 import blake3

from envstore.store.binary import pack_array

_CONTEXT = "envstore 2026-11-21 content key of a chunk list"
_ALL = (1 << 64) - 1


def list_key(digests: bytes | bytearray | memoryview, sizes: array[int]) -> bytes:
    """Return the key of a file of these chunks: their digests, joined, and their sizes ("Q").

    A hole is a chunk, too, with the digest ``HOLE``.
    """
    hashed = blake3(derive_key_context=_CONTEXT)
    hashed.update(digests)
    hashed.update(pack_array(sizes))
    return hashed.digest()


def place(word: int, multiplier: int, bits: int) -> int:
    """Return where in a table of ``1 << bits`` places the search for a key begins.

    ``word`` are the key's first eight bytes. With a random odd ``multiplier`` nobody can choose
    keys that all begin at one place.
    """
    return (word * multiplier & _ALL) >> (64 - bits)
