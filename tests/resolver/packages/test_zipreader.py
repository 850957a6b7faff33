from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.resolver.packages.zipreader import ZipError, ZipReader

FILES = {"a/one.txt": b"one" * 1000, "a/empty": b"", "zwei/ü": os.urandom(5000)}


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path.read_bytes()


def read(path: Path) -> dict[str, bytes]:
    with ZipReader(path) as reader:
        return {member.name: reader.read(member) for member in reader.members}


def refused(path: Path, data: bytes, said: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ZipError, match=said):
        read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_those_that_were_written(tmp_path: Path, method: int) -> None:
    packed(tmp_path / "a.zip", FILES, method)
    assert read(tmp_path / "a.zip") == FILES


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)


@given(st.dictionaries(NAMES, st.binary(max_size=3000), max_size=8))
def test_any_names_and_contents_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, b"" if name.endswith("/") else data)
    with zipfile.ZipFile(path) as archive:
        wanted = {item.filename: archive.read(item) for item in archive.infolist()}
    assert read(path) == wanted


def test_modes_and_directories_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        item = zipfile.ZipInfo("run")
        item.external_attr = 0o100755 << 16
        archive.writestr(item, b"#!")
        archive.writestr("folder/", b"")
    with ZipReader(tmp_path / "a.zip") as reader:
        run, folder = reader.members
    assert (run.mode, run.is_directory) == (0o100755, False)
    assert folder.is_directory


def test_an_archive_written_to_a_pipe_is_read(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    (tmp_path / "a.zip").write_bytes(pipe.data)
    assert read(tmp_path / "a.zip") == FILES


def test_large_sizes_are_read_from_their_own_field(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2")
    name_size = struct.unpack_from("<H", data, at + 28)[0]
    packed_size, size = struct.unpack_from("<LL", data, at + 20)
    extra = struct.pack("<2H2Q", 1, 16, size, packed_size)
    struct.pack_into("<LL", data, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, at + 30, len(extra))
    data[at + 46 + name_size : at + 46 + name_size] = extra
    end = data.rfind(b"PK\5\6")
    directory = struct.unpack_from("<L", data, end + 12)[0] + len(extra)
    struct.pack_into("<L", data, end + 12, directory)
    path.write_bytes(data)
    assert read(path) == FILES


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"f{number}"), b"")
    with ZipReader(path) as reader:
        assert len(reader.members) == 70_000
        assert reader.members[-1].name == "f69999"


@given(st.data())
def test_damage_is_told_and_nothing_else_happens(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    archive = bytearray(packed(path, FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    path.write_bytes(archive)
    with suppress(ZipError):
        for member, content in read(path).items():
            if member in FILES:
                assert content == FILES[member]


@given(st.integers(0, 10_000))
def test_an_archive_that_was_cut_off_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.zip"
    whole = packed(path, FILES)
    refused(path, whole[: -1 - cut % len(whole)], ".")


def test_what_stands_before_or_behind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    whole = packed(path, FILES)
    refused(path, b"#!/bin/sh\n" + whole, "directory is not at its end")
    refused(path, whole + b"x", "follows its end")
    refused(path, b"no archive at all" * 10, "no zip archive")
    refused(path, b"", "no zip archive|ends too early")


def test_members_that_share_their_data_are_refused(tmp_path: Path) -> None:
    # How an archive of kilobytes becomes petabytes without any extreme ratio.
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"a": bytes(1000), "b": bytes(1000)}))
    second = data.rfind(b"PK\1\2")
    struct.pack_into("<L", data, second + 42, 0)
    refused(path, bytes(data), "overlapping")


def test_a_member_with_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"good": b"x"}))
    at = data.rfind(b"good")
    data[at : at + 4] = b"evil"
    refused(path, bytes(data), "evil is not where the directory says")


def test_a_member_that_is_longer_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"bomb": bytes(50_000_000)}))
    struct.pack_into("<L", data, data.rfind(b"PK\1\2") + 24, 10)
    path.write_bytes(data)
    with ZipReader(path) as reader:
        pieces = reader.pieces(reader.members[0])
        with pytest.raises(ZipError, match="longer than it says"):
            next(pieces)


def test_a_member_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"short": bytes(5000)}))
    struct.pack_into("<L", data, data.rfind(b"PK\1\2") + 24, 6000)
    refused(path, bytes(data), "5000 bytes instead of 6000")


def test_another_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"a": b"x" * 100}, zipfile.ZIP_STORED))
    data[40] ^= 1
    refused(path, bytes(data), "checksum of a is wrong")


def test_data_after_the_compressed_stream_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    raw = packed(path, {"a": b"x" * 100})
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = deflate.compress(b"x" * 100) + deflate.flush()
    at = raw.find(stream)
    data = bytearray(raw)
    data[at + len(stream) : at + len(stream)] = b"hidden"
    directory = data.find(b"PK\1\2")
    struct.pack_into("<L", data, directory + 20, len(stream) + 6)
    struct.pack_into("<L", data, data.rfind(b"PK\5\6") + 16, directory)
    refused(path, bytes(data), "not the compressed data")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [(8, 1, "encrypted"), (10, 12, "method 12"), (10, 99, "method 99"), (10, 0, "contradictory")],
)
def test_what_wheels_cannot_be_is_refused(
    tmp_path: Path, field: int, value: int, said: str
) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, {"a": b"x" * 100}))
    struct.pack_into("<H", data, data.rfind(b"PK\1\2") + field, value)
    refused(path, bytes(data), said)


def test_a_part_of_several_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = bytearray(packed(path, FILES))
    struct.pack_into("<H", data, data.rfind(b"PK\5\6") + 4, 1)
    refused(path, bytes(data), "part of several")
