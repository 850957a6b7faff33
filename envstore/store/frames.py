"""Frames: runs of new chunks compressed together; the unit of ranged fetch."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import zstandard

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store.binary import U32, Cursor, inflate, pack_array
from envstore.store.codecs import split, unsplit
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.objects.body import Buffer

TARGET_SIZE = 1 << 20
"""Raw bytes at which a frame is closed."""
MAX_SIZE = 8 << 20
"""Raw or stored bytes no reader accepts more of, whatever a table claims."""
LEVEL = 3

_WORTH = 0.95


class Codec(enum.IntEnum):
    """How a frame's bytes are stored.

    ``SPLIT`` is for numbers, see ``codecs``; ``XOR`` is the difference to another, see ``anchors``.
    """

    RAW = 0
    ZSTD = 1
    SPLIT = 2
    XOR = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """What a pack's table says of one frame.

    ``digest`` is the BLAKE3 of the raw bytes; ``sizes`` and ``digests`` (32 bytes each, joined)
    are those of its chunks, in order.
    """

    codec: int
    stored: int
    raw: int
    digest: bytes
    sizes: array[int]
    digests: bytes

    def chunks(self) -> list[tuple[bytes, int, int]]:
        """Return ``(digest, offset in the raw frame, size)`` of every chunk."""
        names = self.digests
        starts = accumulate(self.sizes, initial=0)
        return [
            (names[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE], start, size)
            for i, (start, size) in enumerate(zip(starts, self.sizes, strict=False))
        ]


def encode_frame(
    chunks: Sequence[tuple[bytes, Buffer]], level: int = LEVEL, codec: Codec = Codec.ZSTD
) -> tuple[Frame, Buffer]:
    """Make one frame of ``(digest, data)`` chunks; returns its table row and its bytes.

    Kept raw when compression saves less than 5 %, so that reading it costs nothing. Unless
    ``codec`` is ``Codec.ZSTD``, a single chunk that is kept raw is neither copied nor hashed: its
    own data is returned.
    """
    raw = chunks[0][1] if len(chunks) == 1 else b"".join(data for _, data in chunks)
    packed = raw
    if codec == Codec.ZSTD:
        packed = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(raw)
        if len(packed) > _WORTH * len(raw):
            codec, packed = Codec.RAW, bytes(raw)
    elif codec == Codec.SPLIT:
        packed = split(raw)
        if len(packed) > _WORTH * len(raw):
            codec, packed = Codec.RAW, raw
    sizes = array("I", (len(data) for _, data in chunks))
    name = chunks[0][0] if len(chunks) == 1 else digest(raw)
    names = b"".join(name for name, _ in chunks)
    return Frame(codec, len(packed), len(raw), name, sizes, names), packed


def decode_frame(data: bytes | memoryview, codec: int, raw: int, expected: bytes) -> bytes:
    """Return the ``raw`` bytes of a stored frame, checked against its digest.

    Of all but a difference: that takes ``anchors.decode``. Raises ``CorruptError``;
    ``UnsupportedFormatError`` for a codec that is not known here.
    """
    what = f"frame {expected.hex()}"
    if raw > MAX_SIZE:
        raise CorruptError(f"{what} claims {raw} bytes, more than {MAX_SIZE}")
    if codec == Codec.ZSTD:
        body = inflate(data, raw, what)
    elif codec == Codec.RAW:
        body = bytes(data)
    elif codec == Codec.SPLIT:
        body = unsplit(data, raw, what)
    elif codec == Codec.XOR:
        raise CorruptError(f"{what} is a difference where only an anchor may be")
    else:
        raise UnsupportedFormatError(f"{what} uses unknown codec {codec}", hint="upgrade envstore")
    return check_frame(body, raw, expected)


def check_frame(body: bytes, raw: int, expected: bytes) -> bytes:
    """Return the raw frame ``body``, if that is what it is. Raises ``CorruptError``."""
    if len(body) != raw or digest(body) != expected:
        raise CorruptError(f"frame {expected.hex()} does not match its digest")
    return body


def encode_table(frames: Sequence[Frame]) -> bytes:
    """Return the table of ``frames``: columns of frames, then columns of all their chunks."""
    sizes = array("I")
    for frame in frames:
        sizes.extend(frame.sizes)
    return b"".join(
        (
            U32.pack(len(frames)),
            U32.pack(len(sizes)),
            bytes(frame.codec for frame in frames),
            pack_array(array("I", (frame.stored for frame in frames))),
            pack_array(array("I", (frame.raw for frame in frames))),
            pack_array(array("I", (len(frame.sizes) for frame in frames))),
            b"".join(frame.digest for frame in frames),
            pack_array(sizes),
            b"".join(frame.digests for frame in frames),
        )
    )


def decode_table(data: bytes | memoryview) -> list[Frame]:
    """Return the frames of an encoded table. Raises ``CorruptError`` on any inconsistency."""
    cursor = Cursor(data)
    count, chunk_count = cursor.u32(), cursor.u32()
    codecs = bytes(cursor.take(count))
    stored = cursor.array(count, 4)
    raw = cursor.array(count, 4)
    lengths = cursor.array(count, 4)
    frame_names = bytes(cursor.take(count * DIGEST_SIZE))
    sizes = cursor.array(chunk_count, 4)
    names = bytes(cursor.take(chunk_count * DIGEST_SIZE))
    cursor.finish()
    if sum(lengths) != chunk_count:
        raise CorruptError("frame table: chunk counts do not add up")
    frames = []
    at = 0
    for i in range(count):
        end = at + lengths[i]
        part = sizes[at:end]
        if sum(part) != raw[i] or max(raw[i], stored[i]) > MAX_SIZE:
            raise CorruptError(f"frame table: frame {i} does not add up")
        name = frame_names[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE]
        digests = names[at * DIGEST_SIZE : end * DIGEST_SIZE]
        frames.append(Frame(codecs[i], stored[i], raw[i], name, part, digests))
        at = end
    return frames
