"""Little-endian building blocks shared by the binary formats, and the envelope around objects."""

from __future__ import annotations

import struct
import sys
from array import array

import zstandard

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store.digest import DIGEST_SIZE, digest

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

_ENVELOPE = struct.Struct("<8sI32s")
_MAX_RATIO = (128 << 10) // 4
"""Bytes that one byte of zstd can become: a block of four stands for 128 KiB of one value."""
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SWAP = sys.byteorder == "big"


def pack_array(values: array[int]) -> bytes:
    """Return the items of ``values`` as little-endian bytes."""
    if _SWAP:
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()


def unpack_array(data: bytes | memoryview, width: int, *, signed: bool = False) -> array[int]:
    """Return the integers of ``width`` bytes in ``data``. Raises ``CorruptError`` on odd length."""
    if len(data) % width:
        raise CorruptError(f"a column of {len(data)} bytes does not hold {width}-byte numbers")
    code = _CODES[width]
    values = array(code.lower() if signed else code)
    values.frombytes(data)
    if _SWAP:
        values.byteswap()
    return values


class Cursor:
    """Reads fields off a byte string, refusing to run past its end."""

    __slots__ = ("_at", "_view")

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self._at = 0

    def take(self, size: int) -> memoryview:
        """Return the next ``size`` bytes. Raises ``CorruptError`` past the end."""
        end = self._at + size
        if end > len(self._view):
            raise CorruptError(f"truncated: {size} bytes wanted, {len(self._view) - self._at} left")
        view = self._view[self._at : end]
        self._at = end
        return view

    def u32(self) -> int:
        """Return the next 32-bit number."""
        return int(U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """Return the next 64-bit number."""
        return int(U64.unpack(self.take(8))[0])

    def digest(self) -> bytes:
        """Return the next 32-byte digest."""
        return bytes(self.take(DIGEST_SIZE))

    def array(self, count: int, width: int) -> array[int]:
        """Return the next ``count`` integers of ``width`` bytes."""
        return unpack_array(self.take(count * width), width)

    def finish(self) -> None:
        """Raise ``CorruptError`` if bytes are left."""
        if self._at != len(self._view):
            raise CorruptError(f"{len(self._view) - self._at} stray bytes at the end")


def seal(magic: bytes, body: bytes, *, level: int = 3) -> bytes:
    """Wrap ``body`` (below 4 GiB) as magic, raw length, BLAKE3 of the body, one zstd frame."""
    packed = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(body)
    return _ENVELOPE.pack(magic, len(body), digest(body)) + packed


def unseal(magic: bytes, data: bytes, *, limit: int, what: str) -> tuple[bytes, bytes]:
    """Return ``(body, digest of body)`` of a sealed object, verified.

    ``limit`` bounds the raw length before anything is allocated. ``what`` names the object in
    errors: ``CorruptError``, or ``UnsupportedFormatError`` for another version of the magic.
    """
    if len(data) < _ENVELOPE.size:
        raise CorruptError(f"{what} is truncated to {len(data)} bytes")
    found, length, expected = _ENVELOPE.unpack_from(data)
    if found != magic:
        if found[:6] == magic[:6]:
            raise UnsupportedFormatError(
                f"{what} has format {found[6:]!r}, this version reads {magic[6:]!r}",
                hint="upgrade envstore",
            )
        raise CorruptError(f"{what} does not start with its magic number")
    if length > limit:
        raise CorruptError(f"{what} claims {length} bytes, more than the limit of {limit}")
    body = inflate(memoryview(data)[_ENVELOPE.size :], length, what)
    if digest(body) != expected:
        raise CorruptError(f"{what} does not match its checksum")
    return body, expected


def inflate(data: bytes | memoryview, size: int, what: str) -> bytes:
    """Return the ``size`` bytes that the single zstd frame ``data`` holds, and never more.

    Nothing is allocated that so few bytes cannot become.
    """
    if size > len(data) * _MAX_RATIO:
        raise CorruptError(f"{what} claims that {len(data)} bytes become {size}")
    try:
        header = zstandard.get_frame_parameters(data)
        if header.content_size != size:
            raise CorruptError(f"{what} unpacks to {header.content_size} bytes, not {size}")
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CorruptError(f"{what} does not decompress: {error}") from None
