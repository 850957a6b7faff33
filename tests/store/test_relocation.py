"""Plans and what they make of files, against an installer that has all bytes at once."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, UsageError
from envstore.store.relocated import Relocated, relocated_size
from envstore.store.relocation import (
    MAX_ENCODED,
    PLACEHOLDER,
    Mode,
    Relocation,
    check_prefix,
    link_relocation,
    plan,
    relocated_target,
    tightest,
)
from tests.relocating import BUILD, installed, sample

_BIN = b"/bin/"
_PH = b"/opt/placeholder_placeholder"
_PREFIXES = st.one_of(
    st.sampled_from([b"/a", b"/mnt/env/there", b"/with blank/x", _PH, b"/" + b"l" * 150]),
    st.binary(max_size=40).map(lambda b: b"/" + b.translate(None, b"\0\n").rstrip(b"/") + b"x"),
)
_WORDS = st.sampled_from(
    [
        *(_PH, _PH + _BIN + b"python3.11", _PH[:-1], b"\0", b"\n", b" ", b"/"),
        *(b":", b"abc", b"\xff", b"x" * 130),
    ]
)
_DATA = st.lists(_WORDS, max_size=30).map(b"".join)
_SCRIPTS = st.builds(
    lambda *parts: b"".join(parts),
    st.sampled_from([b"#!", b"#! ", b"#!  ", b""]),
    st.sampled_from([_PH + _BIN, b"/usr" + _BIN, b"/" + b"y" * 140 + _BIN, b""]),
    st.sampled_from([b"python", b"python3.11", b"perl", b"py\\ thon3", b"x" + _PH + b"/python3"]),
    st.sampled_from([b"", b" -s", b"\r", b"\t" + _PH]),
    st.sampled_from([b"", b"\n"]),
    _DATA,
)


_INTERPRETER = re.compile(rb"#! *(?:(?:\\ |[^ \n\r\t])*/)?((?:\\ |[^ \n\r\t/])*)")


def _oracle(data: bytes, mode: Mode, prefix: bytes) -> bytes | None:
    """Return what an installer writes; ``None`` where that says nothing to us."""
    if mode is Mode.TEXT and data.startswith(b"#!"):
        line = data.partition(b"\n")[0]
        try:
            line.decode()
        except UnicodeDecodeError:
            return None  # what becomes of such lines is compared with the installer itself
        name = _INTERPRETER.match(line.replace(_PH, b"\0"))
        if b" " in prefix and name is not None and b"\0" in name[1]:
            return None  # an interpreter called like the directory: whatever is written is nonsense
    return installed(data, _PH, mode, prefix)


@given(
    st.one_of(_DATA, _SCRIPTS),
    st.sampled_from(Mode),
    _PREFIXES,
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 300)), max_size=8),
)
def test_every_range_is_that_of_an_installer(
    data: bytes, mode: Mode, prefix: bytes, ranges: list[tuple[int, int]]
) -> None:
    made = plan(data, _PH, mode, "p-1")
    wanted = _oracle(data, mode, prefix)
    if made is None:
        assert wanted in (data, None)
        return
    assert Relocation.decode(made.encode()) == made
    assert replace(made, package="").encode() == made.nameless()
    if mode is Mode.BINARY and len(prefix) > len(_PH):
        with pytest.raises(UsageError, match="p-1 has room for 28 only"):
            Relocated(made, prefix)
        return
    found = Relocated(made, prefix)
    assert found.size == relocated_size(made, prefix)
    read: list[tuple[int, int]] = []

    def source(offset: int, size: int) -> bytes:
        read.append((offset, size))
        assert 0 <= offset < offset + size <= len(data)
        return data[offset : offset + size]

    whole = found.read(0, found.size + 7, source)
    assert len(whole) == found.size
    assert wanted in (whole, None)
    for offset, size in ranges:
        read.clear()
        assert found.read(offset, size, source) == whole[offset : offset + size]
        # No more is read than lies between the placeholders of the range.
        spans = data.count(_PH) * len(_PH) + len(made.shebang) + size
        assert sum(size for _, size in read) <= spans + len(data) * (mode is Mode.BINARY)


@given(st.one_of(_DATA, _SCRIPTS), st.sampled_from(Mode), _PREFIXES)
def test_in_place(data: bytes, mode: Mode, prefix: bytes) -> None:
    made = plan(data, _PH, mode)
    if made is None or (mode is Mode.BINARY and len(prefix) > len(_PH)):
        return
    found = Relocated(made, prefix)
    fd = os.memfd_create("test")
    try:
        os.pwrite(fd, data, found.base)
        os.ftruncate(fd, found.base + len(data))
        found.settle(fd)
        assert os.fstat(fd).st_size == found.size
        expected = found.read(0, found.size, lambda offset, size: data[offset : offset + size])
        assert os.pread(fd, found.size + 1, 0) == expected
    finally:
        os.close(fd)


def test_in_place_in_many_steps(tmp_path: Path) -> None:
    rng = random.Random(1)
    data = b"".join(BUILD + rng.randbytes(rng.randrange(5000)) for _ in range(1500))
    made = plan(data, BUILD, Mode.TEXT)
    assert made is not None
    for prefix in (b"/x", b"/" + b"y" * 900):
        found = Relocated(made, prefix)
        path = tmp_path / "file"
        path.write_bytes(bytes(found.base) + data)
        fd = os.open(path, os.O_RDWR)
        found.settle(fd)
        os.close(fd)
        assert path.read_bytes() == data.replace(BUILD, prefix)
    path.write_bytes(bytes(found.base) + data[:-1])
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(CorruptError, match="stored bytes"):
        found.settle(fd)
    os.close(fd)


def _plan(data: bytes, placeholder: bytes, mode: Mode, package: str = "") -> Relocation:
    made = plan(data, placeholder, mode, package)
    assert made is not None
    return made


def test_golden_vectors() -> None:
    """These bytes are in stores: they may never change."""
    text = _plan(b"a=/ph/x\nb=/ph\n/ph", b"/ph", Mode.TEXT)
    assert text.encode().hex() == "0100031100" + "03" + "020501"
    script = _plan(b"#!/ph/bin/sh /ph\necho /ph\n", b"/ph", Mode.TEXT, "tool-1.0")
    line = b"#!\n/bin/sh \n"
    expected = "0108" + b"tool-1.0".hex() + "031a" + f"{len(line):02x}" + line.hex() + "0106"
    assert script.encode().hex() == expected
    binary = _plan(b"ELF\0/ph/a:/ph/b\0--" + b"-" * 300 + b"/ph", b"/ph", Mode.BINARY, "lib")
    expected = "02036c6962" + "03" + "c102" + "02" + "02040302" + "01" + "af0200"
    assert binary.encode().hex() == expected
    assert PLACEHOLDER == b"/envstore-prefix-0b1d6f6e7c5a4f0f9f6b2e43d0a7c981"


def test_a_plan_is_small() -> None:
    files = {path: made for path, made in sample().items() if made.mode}
    sizes = {}
    for path, made in files.items():
        assert made.mode is not None
        sizes[path] = len(_plan(made.data, made.placeholder, made.mode, made.package).encode())
    assert sizes.pop(b"etc/many.conf") < 3 * 2000
    assert max(sizes.values()) < 60


@given(st.binary(max_size=60))
def test_what_is_no_plan_is_refused(data: bytes) -> None:
    try:
        found = Relocation.decode(data)
    except CorruptError:
        return
    assert found.encode() == data
    _sound(found)


def _sound(found: Relocation) -> None:
    at = found.head()
    ends = list(found.ends)
    for offset in found.offsets:
        while ends and offset >= ends[0]:
            at = ends.pop(0)
        assert at <= offset
        at = offset + found.placeholder
        assert at <= (ends[0] if ends else found.size)
    assert found.head() <= found.size
    assert found.offsets or found.shebang
    assert found.mode is Mode.BINARY or not found.ends


@given(st.one_of(_DATA, _SCRIPTS), st.sampled_from(Mode), st.data())
def test_altered_plans_are_refused_or_sound(data: bytes, mode: Mode, draw: st.DataObject) -> None:
    made = plan(data, _PH, mode, "package")
    if made is None:
        return
    encoded = bytearray(made.encode())
    at = draw.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = draw.draw(st.integers(0, 255))
    try:
        found = Relocation.decode(bytes(encoded))
    except CorruptError:
        return
    assert found.encode() == encoded
    _sound(found)
    if found.size < 10_000:
        relocated = Relocated(found, b"/" + b"x" * (found.placeholder - 1))
        whole = relocated.read(0, relocated.size, lambda _, size: bytes(size))
        assert len(whole) == relocated.size


def _hostile() -> Iterator[tuple[str, str]]:
    yield "nothing", ""
    yield "no mode", "00"
    yield "another mode", "030003110003020501"
    yield "cut off", "0100031100030205"
    yield "stray bytes", "010003110003020501" + "00"
    yield "a longer form of a number", "01000391000003020501"
    yield "a number without end", "01" + "ff" * 20
    yield "more than 64 bits", "0100" + "03" + "ffffffffffffffffff7f" + "0001" + "00"
    yield "no placeholder", "010000110001" + "02"
    yield "a placeholder longer than a path", "0100ff7f" + "11" + "0001" + "02"
    yield "nothing to do", "010003110000"
    yield "beyond the end", "01000310" + "00" + "03020501"
    yield "a shebang that is none", "01000320" + "03" + "616263" + "00"
    yield "a shebang beyond the end", "010003" + "04" + "03" + "23210a" + "00"
    yield "a package that is no UTF-8", "0101ff" + "03110003020501"
    yield "a string without a placeholder", "0200031102" + "010000" + "0005"
    yield "strings but no placeholder", "0200031100"
    yield "a string beyond the end", "0200031101" + "01000f"
    yield "more places than bytes", "01000311" + "00" + "ffffffff0f"


@pytest.mark.parametrize(("what", "encoded"), [*_hostile()], ids=[what for what, _ in _hostile()])
def test_hostile_plans(what: str, encoded: str) -> None:
    with pytest.raises(CorruptError, match="relocation"):
        Relocation.decode(bytes.fromhex(encoded))


def test_a_plan_that_is_too_long() -> None:
    with pytest.raises(CorruptError, match="too many"):
        Relocation.decode(bytes(MAX_ENCODED + 1))
    with pytest.raises(CorruptError, match="crowded-1: a file holds its prefix in too many places"):
        plan(b"/p" * MAX_ENCODED, b"/p", Mode.TEXT, "crowded-1")


@pytest.mark.parametrize("placeholder", [b"", b"relative", b"/two\nlines", b"/zero\0", b"/" * 5000])
def test_what_is_no_placeholder(placeholder: bytes) -> None:
    with pytest.raises(CorruptError, match="bad-1"):
        plan(b"data", placeholder, Mode.TEXT, "bad-1")


def test_files_without_their_prefix_need_no_plan() -> None:
    assert plan(b"", _PH, Mode.TEXT) is None
    assert plan(b"#!/bin/sh\necho\n", _PH, Mode.TEXT) is None
    assert plan(_PH[:-1] * 9, _PH, Mode.BINARY) is None


def test_long_names_of_packages_are_cut() -> None:
    made = _plan(_PH, _PH, Mode.TEXT, "\N{SNOWMAN}" * 200)
    assert made.package == "\N{SNOWMAN}" * 85
    assert Relocation.decode(made.encode()) == made


def test_links() -> None:
    assert link_relocation(_PH, _PH) == _PH
    assert link_relocation(_PH + b"/x", _PH) == _PH
    for target in (_PH + b"x", b"/x" + _PH, b"x", b""):
        assert link_relocation(target, _PH) == b""
    assert link_relocation(b"/x", b"") == b""
    assert relocated_target(_PH + b"/x", _PH, b"/new") == b"/new/x"


def test_which_file_is_the_tightest() -> None:
    plans = {
        b"text": _plan(b"/ph", b"/ph", Mode.TEXT),
        b"wide": _plan(_PH, _PH, Mode.BINARY),
        b"narrow": _plan(b"/phph", b"/phph", Mode.BINARY),
    }
    assert tightest(plans) == b"narrow"
    assert tightest({b"text": plans[b"text"]}) is None


@pytest.mark.parametrize("prefix", [b"", b"x", b"/", b"/x/", b"/\n", b"/\0", b"/" + b"x" * 4095])
def test_what_is_no_prefix(prefix: bytes) -> None:
    with pytest.raises(UsageError, match="prefix"):
        check_prefix(prefix)
