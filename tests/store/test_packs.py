from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError
from envstore.store import packs
from envstore.store.binary import U32
from envstore.store.digest import digest
from envstore.store.frames import decode_frame, encode_frame, encode_table
from envstore.store.objects.body import joined
from envstore.store.packs import (
    FOOTER,
    FOOTER_SIZE,
    HEADER,
    OLD_FOOTER,
    OLD_HEADER,
    Pack,
    PackBuilder,
    frame_bytes,
    pack_key,
    parse_pack,
    read_table,
)
from tests.damage import assert_noticed
from tests.trees import noise, prose

_groups = st.lists(
    st.lists(
        st.one_of(
            st.binary(max_size=100),
            st.builds(noise, st.integers(0, 9), st.integers(0, 20_000)),
            st.builds(prose, st.integers(0, 9), st.integers(0, 20_000)),
        ),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=6,
)


def _build(groups: list[list[bytes]]) -> tuple[Pack, bytes]:
    builder = PackBuilder()
    for contents in groups:
        builder.add(*encode_frame([(digest(data), data) for data in contents]))
    finished = builder.finish()
    assert finished is not None
    return finished[0], joined(finished[1])


def _as_version_1(data: bytes) -> tuple[Pack, bytes]:
    old = OLD_HEADER + data[len(HEADER) : -len(FOOTER)] + OLD_FOOTER
    return parse_pack(old, digest(old)), old


_SMALL = _build([[prose(1, 3000), noise(1, 400)], [noise(2, 700)], [prose(3, 2000)]])


@given(_groups)
def test_packs_round_trip(groups: list[list[bytes]]) -> None:
    pack, data = _build(groups)
    assert pack.size == len(data)
    assert parse_pack(data, pack.digest) == pack
    for contents, (frame, stored) in zip(groups, frame_bytes(pack, data), strict=True):
        raw = decode_frame(stored, frame.codec, frame.raw, frame.digest)
        assert raw == b"".join(contents)


@given(_groups)
@settings(max_examples=30)
def test_offsets_say_where_frames_lie(groups: list[list[bytes]]) -> None:
    pack, data = _build(groups)
    for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
        stored = data[offset : offset + frame.stored]
        decode_frame(stored, frame.codec, frame.raw, frame.digest)


def _read(data: bytes, name: bytes) -> list[bytes]:
    return [
        decode_frame(stored, frame.codec, frame.raw, frame.digest)
        for frame, stored in frame_bytes(parse_pack(data, name), data)
    ]


@pytest.mark.parametrize("name", [None, "old"])
def test_damaged_packs_are_refused(name: str | None) -> None:
    pack, data = _SMALL if name is None else _as_version_1(_SMALL[1])
    assert_noticed(lambda damaged: _read(damaged, pack.digest), data)


def test_a_pack_under_another_name_is_refused() -> None:
    for _, data in (_SMALL, _as_version_1(_SMALL[1])):
        with pytest.raises(CorruptError, match="does not match its name"):
            parse_pack(data, digest(b"other"))
    with pytest.raises(CorruptError, match="does not match its name"):
        read_table(_SMALL[1], len(_SMALL[1]), digest(_SMALL[1]))


def test_the_name_covers_what_the_frames_hold_and_not_how_well_they_were_compressed() -> None:
    pack, _ = _build([[prose(1, 3000)], [prose(2, 3000)]])
    assert pack.digest == digest(encode_table(pack.frames))
    other, _ = _build([[prose(1, 3000)], [prose(3, 3000)]])
    assert other.digest != pack.digest


def test_packs_of_version_1_are_read() -> None:
    pack, data = _as_version_1(_SMALL[1])
    assert parse_pack(data, pack.digest) == pack
    assert pack.frames == _SMALL[0].frames
    for mixed in (HEADER + data[8:], data[:-8] + FOOTER):
        with pytest.raises(CorruptError, match="start and end"):
            parse_pack(mixed, pack.digest)


@given(st.integers(0, len(_SMALL[1])))
def test_the_table_is_read_from_the_end(length: int) -> None:
    pack, data = _SMALL
    tail = data[len(data) - length :]
    if length < FOOTER_SIZE:
        with pytest.raises(CorruptError, match="truncated"):
            read_table(tail, len(data), pack.digest)
        return
    found = read_table(tail, len(data), pack.digest)
    if isinstance(found, int):
        assert found > length
        found = read_table(data[len(data) - found :], len(data), pack.digest)
    assert found == pack.frames


def test_damaged_tables_are_refused() -> None:
    pack, data = _SMALL
    needed = read_table(data[-FOOTER_SIZE:], len(data), pack.digest)
    assert isinstance(needed, int)

    def read(tail: bytes) -> object:
        found = read_table(tail, len(data), pack.digest)
        if isinstance(found, int):
            # What a reader does then: it asks for more, and here there is no more.
            raise CorruptError("a longer table than there is")
        return found

    assert_noticed(read, data[-needed:])


@pytest.mark.parametrize("size", [0, 1, FOOTER_SIZE, 100, len(_SMALL[1]) - 1, len(_SMALL[1]) + 1])
def test_a_pack_of_another_size_than_its_table_says_is_refused(size: int) -> None:
    with pytest.raises(CorruptError):
        read_table(_SMALL[1], size, _SMALL[0].digest)


def test_a_table_longer_than_the_pack_is_refused() -> None:
    pack, data = _SMALL
    data = data[:-FOOTER_SIZE] + U32.pack(0xFFFFFFFF) + FOOTER
    with pytest.raises(CorruptError, match="longer than itself"):
        read_table(data, len(data), pack.digest)


def test_bytes_between_frames_and_table_are_refused() -> None:
    # Such a pack would have its name; the table must account for every byte.
    pack, data = _SMALL
    needed = read_table(data[-FOOTER_SIZE:], len(data), pack.digest)
    assert isinstance(needed, int)
    padded = data[:-needed] + b"hidden" + data[-needed:]
    with pytest.raises(CorruptError, match="not as long as its table says"):
        parse_pack(padded, pack.digest)


def test_a_pack_without_its_header_is_refused() -> None:
    data = b"ESPACK99" + _SMALL[1][len(HEADER) :]
    with pytest.raises(CorruptError, match="does not start"):
        parse_pack(data, _SMALL[0].digest)


def test_an_empty_builder_makes_no_pack() -> None:
    assert PackBuilder().finish() is None


def test_a_builder_is_full_at_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 100_000)
    builder = PackBuilder()
    added = 0
    while not builder.full:
        builder.add(*encode_frame([(digest(b"x"), noise(added, 30_000))]))
        added += 1
    assert added == 4


def test_keys_spread_packs_over_folders() -> None:
    name = digest(b"pack")
    assert pack_key(name) == f"packs/{name.hex()[:2]}/{name.hex()}"
