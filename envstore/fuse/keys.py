"""Content keys: names for what files hold, the same in every snapshot, and how to find them.

The key of a file of one stored chunk is the chunk's digest, that of an empty file ``EMPTY``.
All others are named by their chunk list, as the digest of a whole file is only claimed by a
manifest and not checked when reading. The hash of lists is another one than the hash of chunks:
else somebody could store the encoding of a list as a file and take that list's name with it. What
is relocated is named by what is stored, and by how and for where it is changed.
"""

from __future__ import annotations

from array import array

from blake3 import blake3

from envstore.store.binary import U32, pack_array

_CONTEXT = "envstore 2026-11-21 content key of a chunk list"
_RELOCATED = "envstore 2026-11-21 content key of a relocated file"
_PLACED = "envstore 2026-11-21 manifest at a prefix"
_ALL = (1 << 64) - 1


def list_key(digests: bytes | bytearray | memoryview, sizes: array[int]) -> bytes:
    """Return the key of a file of these chunks: their digests, joined, and their sizes ("Q").

    A hole is a chunk, too, with the digest ``HOLE``.
    """
    hashed = blake3(derive_key_context=_CONTEXT)
    hashed.update(digests)
    hashed.update(pack_array(sizes))
    return hashed.digest()


def relocated_key(stored: bytes, plan: bytes, prefix: bytes) -> bytes:
    """Return the key of the file whose ``stored`` bytes' key, relocation and prefix are these."""
    hashed = blake3(derive_key_context=_RELOCATED)
    hashed.update(stored + U32.pack(len(prefix)) + prefix + plan)
    return hashed.digest()


def placed_key(manifest: bytes, prefix: bytes) -> bytes:
    """Return a name for the tree of ``manifest`` at ``prefix``; of one that is the same at all
    prefixes, for which that is empty, the manifest's own.
    """
    if not prefix:
        return manifest
    return blake3(manifest + prefix, derive_key_context=_PLACED).digest()


def place(word: int, multiplier: int, bits: int) -> int:
    """Return where in a table of ``1 << bits`` places the search for a key begins.

    ``word`` are the key's first eight bytes. With a random odd ``multiplier`` nobody can choose
    keys that all begin at one place.
    """
    return (word * multiplier & _ALL) >> (64 - bits)
