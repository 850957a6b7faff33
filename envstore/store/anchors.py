"""Frames stored as the difference to an earlier one of the same length, their anchor.

An anchor is never a difference itself, so that reading one frame takes at most two. Locations name
the anchor directly behind each such frame: whatever keeps what locations name keeps it too.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable

from envstore.errors import CorruptError
from envstore.store.codecs import measure, split, unsplit, xor
from envstore.store.frames import MAX_SIZE, Codec, Frame, check_frame, decode_frame
from envstore.store.locations import FrameRef
from envstore.store.objects.body import Buffer

_PLACE = struct.Struct("<32sIIIB32s")
_SIMPLE = (Codec.RAW, Codec.ZSTD, Codec.SPLIT)
_WORTH = 0.9


def may_be_anchor(anchor: FrameRef, raw: int) -> bool:
    """Whether a frame of ``raw`` bytes may be stored as the difference to ``anchor``."""
    return anchor.codec in _SIMPLE and anchor.raw == raw


def encode_difference(
    name: bytes, data: Buffer, anchor: FrameRef, base: bytes
) -> tuple[Frame, bytes] | None:
    """Make a frame of one chunk by its difference to ``base``, the raw bytes of ``anchor``.

    Returns ``None`` where that would not save a tenth of what ``Codec.SPLIT`` leaves, as samples
    tell. About 150 MB/s on one core.
    """
    data = bytes(data)
    difference = xor(data, base)
    width, size = measure(difference)
    if size > _WORTH * measure(data)[1]:
        return None
    place = _PLACE.pack(
        anchor.pack, anchor.offset, anchor.stored, anchor.raw, anchor.codec, anchor.digest
    )
    stored = place + split(difference, width)
    if len(stored) > _WORTH * len(data):
        return None
    return Frame(Codec.XOR, len(stored), len(data), name, array("I", [len(data)]), name), stored


def anchor_of(frame: FrameRef, stored: Buffer) -> FrameRef:
    """Return the anchor that the stored bytes of ``frame`` name. Raises ``CorruptError``."""
    what = f"frame {frame.digest.hex()}"
    if len(stored) < _PLACE.size:
        raise CorruptError(f"{what} is too short to name its anchor")
    anchor = FrameRef(*_PLACE.unpack_from(stored))
    if not may_be_anchor(anchor, frame.raw) or anchor.stored > MAX_SIZE:
        raise CorruptError(f"{what} names an anchor that cannot be one")
    return anchor


def decode(frame: FrameRef, stored: Buffer, load: Callable[[FrameRef], bytes]) -> bytes:
    """Return the raw bytes of ``frame``, checked, ``load`` bringing those of its anchor if need be.

    Raises as ``decode_frame`` and ``load`` do.
    """
    if frame.codec != Codec.XOR:
        return decode_frame(stored, frame.codec, frame.raw, frame.digest)
    what = f"frame {frame.digest.hex()}"
    if frame.raw > MAX_SIZE:
        raise CorruptError(f"{what} claims {frame.raw} bytes, more than {MAX_SIZE}")
    base = load(anchor_of(frame, stored))
    difference = unsplit(memoryview(stored)[_PLACE.size :], frame.raw, what)
    return check_frame(xor(difference, base), frame.raw, frame.digest)
