"""Codecs for numbers: any bytes come back, hostile ones are refused, and it is worth it."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError
from envstore.store.codecs import WIDTHS, split, unsplit
from envstore.store.digest import digest
from envstore.store.frames import Codec, decode_frame, encode_frame
from tests.damage import assert_noticed
from tests.store import independent_reader
from tests.trees import noise, prose


def floats(count: int, seed: int = 1, code: str = "f") -> bytes:
    """Return numbers as the weights of a model are."""
    rng = random.Random(seed)
    return struct.pack(f"<{count}{code}", *(rng.gauss(0, 0.02) for _ in range(count)))


_contents = st.one_of(
    st.binary(max_size=70),
    st.builds(noise, st.integers(0, 9), st.integers(0, 3000)),
    st.builds(prose, st.integers(0, 9), st.integers(0, 200_000)),
    st.builds(floats, st.integers(0, 40_000), st.integers(0, 9), st.sampled_from("efd")),
    st.builds(
        lambda head, body: head + body, st.binary(max_size=9), st.builds(floats, st.just(9000))
    ),
)


@given(_contents)
def test_what_was_split_comes_back(data: bytes) -> None:
    stored = split(memoryview(data))
    assert unsplit(stored, len(data), "it") == data
    assert len(stored) <= len(data) + 1 + 4 * max(WIDTHS)


@given(st.lists(_contents, min_size=1, max_size=3))
def test_split_frames_round_trip(contents: list[bytes]) -> None:
    chunks = [(digest(data), memoryview(data)) for data in contents]
    frame, stored = encode_frame(chunks, codec=Codec.SPLIT)
    assert frame.stored == len(stored) <= frame.raw
    assert decode_frame(stored, frame.codec, frame.raw, frame.digest) == b"".join(contents)
    again = independent_reader.open_frame(frame.codec, bytes(stored), frame.raw, frame.digest)
    assert again == b"".join(contents)


@pytest.mark.parametrize(("code", "width"), [("e", 2), ("f", 4), ("d", 8)])
def test_the_width_is_that_of_the_numbers(code: str, width: int) -> None:
    data = floats(100_000, 3, code)
    stored = split(data)
    assert stored[0] == width
    plain = zstandard.ZstdCompressor(level=1).compress(data)
    assert len(stored) < 0.97 * len(plain)


def test_text_is_not_split_and_noise_not_stored_so() -> None:
    assert split(prose(1, 100_000))[0] == 1
    data = memoryview(noise(1, 2 << 20))
    frame, stored = encode_frame([(digest(data), data)], codec=Codec.SPLIT)
    assert frame.codec == Codec.RAW
    assert stored is data


def test_damaged_split_frames_are_refused() -> None:
    for data in (floats(2000), prose(1, 5000)):
        frame, stored = encode_frame([(digest(data), data)], codec=Codec.SPLIT)
        assert frame.codec == Codec.SPLIT
        row = frame.codec, frame.raw, frame.digest
        assert_noticed(
            lambda damaged, row=row: decode_frame(damaged, *row), bytes(stored), most=500
        )


def _hostile(width: int, *planes: bytes, sizes: list[int] | None = None) -> bytes:
    lengths = sizes or [len(plane) for plane in planes]
    return bytes([width]) + struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(planes)


_BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 20))


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\4",
        _hostile(0),
        _hostile(3, b"abc", b"abc", b"ab"),
        _hostile(16, *[b"x"] * 16),
        _hostile(2, b"abcde", b"abc"),
        _hostile(2, b"abcd", b"abcd", sizes=[4, 0xFFFFFFFF]),
        _hostile(2, b"abcd", b"abcd") + b"x",
        _hostile(2, b"abcd", b"ab"),
        _hostile(1, _BOMB, sizes=[len(_BOMB)]),
        _hostile(2, b"abcd", b""),
    ],
)
def test_planes_that_do_not_fit_are_refused(stored: bytes) -> None:
    with pytest.raises(CorruptError):
        unsplit(stored, 8, "it")


def test_a_plane_that_unpacks_to_more_is_refused() -> None:
    for held in (1000, 1 << 20):
        with pytest.raises(CorruptError, match="unpacks to"):
            unsplit(_hostile(2, _BOMB, bytes(held)), 2 * held + 2, "it")


def test_a_split_frame_beyond_the_limit_is_refused_before_it_is_unpacked() -> None:
    stored = _hostile(1, zstandard.ZstdCompressor().compress(bytes(9 << 20)))
    with pytest.raises(CorruptError, match="more than"):
        decode_frame(stored, Codec.SPLIT, 9 << 20, digest(bytes(9 << 20)))
