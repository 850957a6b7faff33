from __future__ import annotations

import random
from array import array

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store import binary, canonical
from envstore.store.binary import Cursor, inflate, pack_array, seal, unpack_array, unseal
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.frames import (
    MAX_SIZE,
    Codec,
    Frame,
    decode_frame,
    decode_table,
    encode_frame,
    encode_table,
)
from tests.damage import assert_noticed, damages
from tests.trees import noise, prose

_MAGIC = b"ESTEST01"

_contents = st.one_of(
    st.binary(max_size=300),
    st.builds(noise, st.integers(0, 99), st.integers(0, 70_000)),
    st.builds(prose, st.integers(0, 99), st.integers(0, 70_000)),
    st.builds(bytes, st.integers(0, 300_000)),
)
_chunk_lists = st.lists(_contents, min_size=1, max_size=8)


def _named(contents: list[bytes]) -> list[tuple[bytes, bytes | memoryview]]:
    return [(digest(data), memoryview(data)) for data in contents]


@given(_chunk_lists, st.sampled_from([1, 3, 9]))
def test_frames_round_trip(contents: list[bytes], level: int) -> None:
    frame, stored = encode_frame(_named(contents), level)
    raw = decode_frame(stored, frame.codec, frame.raw, frame.digest)
    assert raw == b"".join(contents)
    assert frame.stored == len(stored) <= frame.raw
    assert frame.digest == digest(raw)
    for content, (name, start, size) in zip(contents, frame.chunks(), strict=True):
        assert raw[start : start + size] == content
        assert name == digest(content)


def test_what_does_not_shrink_is_kept_raw() -> None:
    frame, stored = encode_frame(_named([noise(1, 100_000)]))
    assert frame.codec == Codec.RAW
    assert stored == noise(1, 100_000)
    frame, stored = encode_frame(_named([prose(1, 100_000)]))
    assert frame.codec == Codec.ZSTD
    assert len(stored) < 60_000


@pytest.mark.parametrize("content", [prose(2, 9_000), noise(2, 3_000)], ids=["zstd", "raw"])
def test_damaged_frames_are_refused(content: bytes) -> None:
    frame, stored = encode_frame(_named([content]))
    assert_noticed(lambda data: decode_frame(data, frame.codec, frame.raw, frame.digest), stored)


def test_wrong_facts_about_a_frame_are_refused() -> None:
    frame, stored = encode_frame(_named([prose(3, 9_000)]))
    for codec, raw, name in (
        (Codec.RAW, frame.raw, frame.digest),
        (frame.codec, frame.raw - 1, frame.digest),
        (frame.codec, frame.raw + 1, frame.digest),
        (frame.codec, 0, frame.digest),
        (frame.codec, frame.raw, digest(b"other")),
    ):
        with pytest.raises(CorruptError):
            decode_frame(stored, codec, raw, name)


@pytest.mark.parametrize("codec", [4, 255])
def test_unknown_codecs_are_not_guessed(codec: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"codec {codec}"):
        decode_frame(b"x", codec, 1, digest(b"x"))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_SIZE + 1))
    assert len(bomb) < 2000
    with pytest.raises(CorruptError, match="more than"):
        decode_frame(bomb, Codec.ZSTD, MAX_SIZE + 1, digest(bytes(MAX_SIZE + 1)))
    # The frame's own header says more than the table does.
    with pytest.raises(CorruptError, match="unpacks to"):
        decode_frame(bomb, Codec.ZSTD, 1000, digest(bytes(1000)))


def test_a_frame_that_hides_its_size_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    with pytest.raises(CorruptError):
        decode_frame(hidden, Codec.ZSTD, 5000, digest(bytes(5000)))


def test_two_frames_in_one_are_refused() -> None:
    one = zstandard.ZstdCompressor(write_content_size=True).compress(b"a" * 1000)
    with pytest.raises(CorruptError):
        inflate(one + one, 1000, "two")


def _frames(seed: int, count: int) -> list[Frame]:
    rng = random.Random(seed)
    frames = []
    for _ in range(count):
        sizes = array("I", (rng.randrange(1, 5000) for _ in range(rng.randrange(1, 5))))
        raw = sum(sizes)
        names = rng.randbytes(DIGEST_SIZE * len(sizes))
        stored = rng.randrange(1, raw + 1)
        frames.append(Frame(rng.randrange(2), stored, raw, rng.randbytes(32), sizes, names))
    return frames


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_tables_round_trip(seed: int, count: int) -> None:
    frames = _frames(seed, count)
    data = encode_table(frames)
    assert decode_table(data) == frames
    assert encode_table(decode_table(data)) == data


@given(st.binary(max_size=300))
def test_tables_of_arbitrary_bytes_never_raise_anything_else(data: bytes) -> None:
    try:
        frames = decode_table(data)
    except CorruptError:
        return
    assert encode_table(frames) == data


def test_damaged_tables_never_raise_anything_else() -> None:
    # The table has no checksum of its own: it lies in a sealed object.
    refused = 0
    for damaged in damages(encode_table(_frames(4, 9))):
        try:
            frames = decode_table(damaged)
        except CorruptError:
            refused += 1
        else:
            assert all(sum(frame.sizes) == frame.raw <= MAX_SIZE for frame in frames)
            assert encode_table(frames) == damaged
    assert refused


def test_a_table_cannot_make_a_reader_ask_for_gigabytes() -> None:
    (frame,) = _frames(5, 1)
    data = encode_table([frame])
    at = 9  # behind both counts and the codec: bytes stored
    huge = data[:at] + (0xFFFFFFFF).to_bytes(4, "little") + data[at + 4 :]
    with pytest.raises(CorruptError):
        decode_table(huge)


@given(st.binary(max_size=5000))
def test_sealed_bodies_round_trip(body: bytes) -> None:
    assert unseal(_MAGIC, seal(_MAGIC, body), limit=5000, what="it") == (body, digest(body))


def test_damaged_seals_are_refused() -> None:
    def read(data: bytes) -> object:
        return unseal(_MAGIC, data, limit=10_000, what="it")

    for body in (b"x", prose(6, 4000), noise(6, 1000)):
        assert_noticed(read, seal(_MAGIC, body))
    # Of nothing, zstd looks at no more than the header.
    assert_noticed(read, seal(_MAGIC, b""), share=0.8)


def test_seals_name_what_is_wrong() -> None:
    sealed = seal(_MAGIC, b"body")
    with pytest.raises(UnsupportedFormatError, match="it has format b'02'"):
        unseal(_MAGIC, b"ESTEST02" + sealed[8:], limit=100, what="it")
    with pytest.raises(CorruptError, match="it does not start with its magic"):
        unseal(_MAGIC, b"ESOTHE01" + sealed[8:], limit=100, what="it")
    with pytest.raises(CorruptError, match="it claims 4 bytes, more than the limit of 3"):
        unseal(_MAGIC, sealed, limit=3, what="it")


def test_a_seal_claiming_gigabytes_is_refused_before_allocating(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> bytes:
        raise AssertionError("unpacked")

    bomb = seal(_MAGIC, bytes(64 << 20))
    monkeypatch.setattr(binary, "inflate", never)
    with pytest.raises(CorruptError, match="limit"):
        unseal(_MAGIC, bomb, limit=1 << 20, what="it")


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_columns_are_little_endian(numbers: list[int], signed: list[int]) -> None:
    data = pack_array(array("Q", numbers))
    assert data == b"".join(number.to_bytes(8, "little") for number in numbers)
    assert list(unpack_array(data, 8)) == numbers
    data = pack_array(array("q", signed))
    assert list(unpack_array(data, 8, signed=True)) == signed


def test_columns_on_a_big_endian_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_SWAP", True)
    values = array("I", [1, 2**31])
    assert pack_array(values) == b"\0\0\0\1\x80\0\0\0"
    assert list(values) == [1, 2**31]  # the caller's own stays as it is
    assert unpack_array(b"\0\0\0\1", 4) == array("I", [1])


def test_a_cursor_never_runs_past_the_end() -> None:
    cursor = Cursor(b"\1\0\0\0abc")
    assert cursor.u32() == 1
    with pytest.raises(CorruptError, match="3 left"):
        cursor.u64()
    with pytest.raises(CorruptError):
        cursor.array(2**32 - 1, 8)
    with pytest.raises(CorruptError, match="3 stray bytes"):
        cursor.finish()
    assert bytes(cursor.take(3)) == b"abc"
    cursor.finish()


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_arbitrary_json_never_raises_anything_else(data: bytes) -> None:
    try:
        value = canonical.decode(data, "it")
    except CorruptError:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"1", b"null", b"{", b'{"a":}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"a":' + b"9" * 10_000 + b"}", b'{"a":"\xff"}', b'"' + b"x" * canonical.MAX_BODY + b'"',
    ],
    ids=range(11),
)  # fmt: skip
def test_bad_json_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^it "):
        canonical.decode(data, "it")


def test_canonical_json() -> None:
    value = {"b": 1, "a": {"é": [True, None, "\n"]}}
    data = '{"a":{"é":[true,null,"\\n"]},"b":1}'.encode()
    assert canonical.encode(value) == data
    assert canonical.decode(data, "it") == value


def test_fields_have_their_type() -> None:
    value = {"number": 1, "truth": True, "text": "x"}
    assert canonical.field(value, "number", int, "it") == 1
    for name, kind in (("truth", int), ("text", int), ("number", str), ("absent", str)):
        with pytest.raises(CorruptError, match=f"it has no valid '{name}'"):
            canonical.field(value, name, kind, "it")
