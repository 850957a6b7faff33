"""BLAKE3-256 digests, the identity of everything in the store."""

from __future__ import annotations

from blake3 import blake3

DIGEST_SIZE = 32
HASH_ID = "blake3-256"

EMPTY = blake3(b"").digest()
"""Digest of the empty string, the identity of every empty file."""


def digest(data: bytes | memoryview) -> bytes:
    """Return the 32-byte BLAKE3 digest of ``data``; releases the GIL on large input."""
    return blake3(data).digest()


def parse_hex(text: str) -> bytes | None:
    """Return the digest that ``text`` spells in 64 lower-case hex digits, else ``None``."""
    if len(text) != 2 * DIGEST_SIZE or text.strip("0123456789abcdef"):
        return None
    return bytes.fromhex(text)
