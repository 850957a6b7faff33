from __future__ import annotations

import io
import struct
import tarfile
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.resolver.packages.tarstream import MAX_HEADER, Member, TarError, TarStream, Type

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90)
PATHS = st.lists(NAMES, min_size=1, max_size=5).map("/".join)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def packed(*members: tuple[tarfile.TarInfo, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def one(name: str = "file", **said: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in said.items():
        setattr(member, key, value)
    return member


def read(data: bytes) -> list[tuple[Member, bytes]]:
    stream = TarStream(io.BytesIO(data).read)
    return [(member, b"".join(stream.pieces())) for member in stream]


@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=2000), st.integers(0, 0o777)), max_size=6),
    FORMATS,
    st.integers(0, 2**33),
)
def test_members_are_those_that_were_written(
    files: list[tuple[str, bytes, int]], format_: int, mtime: int
) -> None:
    members = [
        (one(name, size=len(data), mode=mode, mtime=mtime), data) for name, data, mode in files
    ]
    try:
        archive = packed(*members, format_=format_)
    except ValueError:
        assert format_ == tarfile.USTAR_FORMAT  # it has no room for some names
        return
    assert [
        (member.name.decode(), data, member.mode, member.mtime_ns, member.type)
        for member, data in read(archive)
    ] == [(name, data, mode, mtime * 10**9, Type.FILE) for name, data, mode in files]


@given(PATHS, PATHS, FORMATS)
def test_links_and_directories_are_those_that_were_written(
    name: str, target: str, format_: int
) -> None:
    members = [
        (one(name, type=tarfile.SYMTYPE, linkname=target), b""),
        (one(name, type=tarfile.LNKTYPE, linkname=target), b""),
        (one(name, type=tarfile.DIRTYPE), b""),
    ]
    try:
        archive = packed(*members, format_=format_)
    except ValueError:
        return
    link, hard, directory = (member for member, _ in read(archive))
    assert (link.type, link.target) == (Type.SYMLINK, target.encode())
    assert (hard.type, hard.target) == (Type.HARDLINK, target.encode())
    assert directory.type is Type.DIRECTORY
    assert directory.name.rstrip(b"/") == name.encode()


def test_times_with_fractions_are_exact() -> None:
    member = one(mtime=1.5)
    member.pax_headers = {"mtime": "1700000000.123456789"}
    assert read(packed((member, b"")))[0][0].mtime_ns == 1_700_000_000_123_456_789
    member.pax_headers = {"mtime": "-5.25"}
    assert read(packed((member, b"")))[0][0].mtime_ns == -5_250_000_000


def test_what_is_not_read_is_skipped() -> None:
    archive = packed((one("a", size=3000), bytes(3000)), (one("b", size=1), b"b"))
    assert [member.name for member in TarStream(io.BytesIO(archive).read)] == [b"a", b"b"]


def test_a_large_file_comes_in_pieces() -> None:
    data = bytes(range(256)) * 12_000
    stream = TarStream(io.BytesIO(packed((one(size=len(data)), data))).read)
    for _ in stream:
        pieces = list(stream.pieces())
        assert max(map(len, pieces)) <= 1 << 20
        assert b"".join(pieces) == data


def test_global_headers_hold_for_what_follows() -> None:
    buffer = io.BytesIO()
    headers = {"mtime": "77"}
    with tarfile.open(fileobj=buffer, mode="w", pax_headers=headers) as tar:
        tar.addfile(one("a"))
        tar.addfile(one("b"))
    assert [member.mtime_ns for member, _ in read(buffer.getvalue())] == [77 * 10**9] * 2


@given(st.data())
def test_damage_is_told_and_nothing_else_happens(data: st.DataObject) -> None:
    archive = bytearray(
        packed(
            (one("ä" * 120, size=700, mtime=1.5), bytes(700)),
            (one("link", type=tarfile.SYMTYPE, linkname="x" * 150), b""),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    with suppress(TarError):
        read(bytes(archive))


@pytest.mark.parametrize("end", [0, 100, 512, 700, 1024, 1536, 2047])
def test_an_archive_that_was_cut_off_is_refused(end: int) -> None:
    archive = packed((one(size=1000), bytes(1000)))
    with pytest.raises(TarError, match="ends too early"):
        read(archive[:end])


def test_only_zeros_may_follow_the_end() -> None:
    archive = packed((one(size=3), b"abc"))
    assert len(read(archive + bytes(100_000))) == 1
    for more in (bytes(5000) + b"x", packed((one("hidden"), b"")), bytes(17 << 20)):
        with pytest.raises(TarError, match="something follows its end"):
            read(archive + more)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "FIFO"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
        (b"V", "unknown type"),
    ],
)
def test_what_no_package_holds_is_refused(kind: bytes, said: str) -> None:
    with pytest.raises(TarError, match=f"odd is a .*{said}"):
        read(packed((one("odd", type=kind), b"")))


def test_a_sparse_file_of_the_newer_kind_is_refused() -> None:
    member = one("thin")
    member.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(TarError, match="thin is a sparse file"):
        read(packed((member, b"")))


def test_a_link_with_content_is_refused() -> None:
    block = bytearray(packed((one("a", type=tarfile.SYMTYPE, linkname="b"), b""))[:512])
    with pytest.raises(TarError, match="symbolic link with content"):
        read(with_field(block, 124, b"%011o\0" % 600) + bytes(2048))


@pytest.mark.parametrize("size", [b"-0000000001\0", b"0000000009\0 ", b"\xff" + bytes(11)])
def test_a_size_that_is_none_is_refused(size: bytes) -> None:
    block = bytearray(packed((one("a"), b""))[:512])
    with pytest.raises(TarError, match="no valid size"):
        read(with_field(block, 124, size) + bytes(1024))


def test_a_size_above_octal_is_read_and_then_missed() -> None:
    block = bytearray(packed((one("a"), b""))[:512])
    with pytest.raises(TarError, match="ends too early"):
        read(with_field(block, 124, b"\x80" + (1 << 60).to_bytes(11, "big")))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_too_long_is_refused_before_it_is_read(kind: bytes) -> None:
    block = bytearray(packed((one("a", type=kind), b""))[:512])
    said = with_field(block, 124, b"%011o\0" % (MAX_HEADER + 1))

    def read_some(count: int) -> bytes:
        assert count <= 512
        return said

    with pytest.raises(TarError, match="headers are too long"):
        list(TarStream(read_some))


def test_headers_without_end_are_refused() -> None:
    block = bytearray(packed((one("a", type=b"L"), b""))[:512])
    header = with_field(block, 124, b"%011o\0" % MAX_HEADER) + bytes(MAX_HEADER)
    endless = io.BytesIO(header * 10)

    def read_some(count: int) -> bytes:
        data = endless.read(count)
        if len(data) < count:
            endless.seek(0)
            data += endless.read(count - len(data))
        return data

    with pytest.raises(TarError, match="headers are too long"):
        list(TarStream(read_some))


@pytest.mark.parametrize(
    "body", [b"5 a=b\n", b"x a=b\n", b"99 a=b\n", b"6 a=bc", b"0 \n", b"7 path\n"]
)
def test_damaged_records_are_refused(body: bytes) -> None:
    block = bytearray(packed((one("a", type=b"x"), b""))[:512])
    header = with_field(block, 124, b"%011o\0" % len(body)) + body.ljust(512, b"\0")
    with pytest.raises(TarError):
        read(header + packed((one("b"), b"")))


def with_field(block: bytearray, at: int, value: bytes) -> bytes:
    """Return a header with another field, and the checksum that it then has."""
    block = bytearray(block)
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    struct.pack_into("8s", block, 148, b"%06o\0 " % sum(block))
    return bytes(block)
