"""Damages bytes in every way a disk or a network might, to see that a decoder notices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from envstore.errors import CorruptError, UnsupportedFormatError

_ENDS = 300


def damages(data: bytes, *, seed: int = 0, most: int = 1500) -> Iterator[bytes]:
    """Yield altered copies of ``data``: bytes changed, cut off, added, doubled and left out.

    Every byte near both ends is altered and a sample, ``most`` in number, of those between.
    """
    rng = random.Random(seed)
    places = list(range(len(data)))
    if len(data) > most + 2 * _ENDS:
        inner = rng.sample(range(_ENDS, len(data) - _ENDS), most)
        places = [*places[:_ENDS], *sorted(inner), *places[-_ENDS:]]
    for at in places:
        mask = rng.choice((1, 0x80, 0xFF, rng.randrange(1, 256)))
        yield data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]
        if at % 4 == 0:
            yield data[:at]
        if at % 16 == 0:
            yield data[:at] + data[at + 1 :]
            yield data[:at] + data[at : at + 1] + data[at:]
    yield b""
    yield data + b"\0"
    yield data + data


def assert_noticed(
    decode: Callable[[bytes], object], data: bytes, *, most: int = 1500, share: float = 0.95
) -> None:
    """Check that every damage is refused as such, or does not alter what is decoded.

    At least ``share`` of them must be refused: a decoder that took nearly everything for the same
    would not be looking.
    """
    whole = decode(data)
    refused = tried = 0
    for damaged in damages(data, most=most):
        tried += 1
        try:
            found = decode(damaged)
        except (CorruptError, UnsupportedFormatError):
            refused += 1
        else:
            assert found == whole
    assert refused > share * tried
