"""What is read of an ELF file is what binutils read, and no file is too broken to be read."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError
from envstore.resolver.abi.facts import ElfFacts, elf_facts, from_json, symbol_hash, to_json
from envstore.resolver.abi.names import PROMISED
from tests.resolver.abi.builds import Build

LIBRARY = """
int answer = 42;
static int hidden_one(void) { return 1; }
__attribute__((visibility("hidden"))) int hidden(void) { return hidden_one(); }
__attribute__((weak)) int maybe_mine(void) { return 2; }
int maybe_yours(void) __attribute__((weak));
int wanted(void);
int function(void) { return wanted() + hidden() + (maybe_yours ? maybe_yours() : 0); }
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs a compiler")
    script = "ONE_1.0 { function; answer; }; ONE_2.0 { maybe_mine; } ONE_1.0;"
    options = ("-Wl,-rpath,$ORIGIN:/x", "-lm")
    return Build(tmp_path / "env").library("lib/libone.so.1", LIBRARY, *options, script=script)


def test_the_facts_of_a_library(library: Path) -> None:
    facts = elf_facts(library)
    assert facts is not None
    assert facts.soname == "libone.so.1"
    assert facts.needed == ("libm.so.6", "libc.so.6")
    assert facts.runpath == ("$ORIGIN", "/x")
    assert facts.rpath == ()
    assert facts.verdef == ("ONE_1.0", "ONE_2.0")
    assert not facts.program
    assert facts.undefined == ("wanted",)
    names = (b"answer", b"function", b"maybe_mine", b"ONE_1.0", b"ONE_2.0")
    assert facts.offers() == {symbol_hash(name) for name in names}


@pytest.mark.parametrize("path", [sys.executable, "libc", "libpython"])
def test_real_files_are_read_as_nm_reads_them(path: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs binutils")
    if path.startswith("lib"):
        loaded = Path("/proc/self/maps").read_text().split()
        found = [word for word in loaded if "/" in word and f"/{path}" in word]
        if not found:
            pytest.skip(f"no {path} is loaded")
        path = found[0]
    facts = elf_facts(Path(os.path.realpath(path)))
    assert facts is not None
    covered = {version for library, version, _ in facts.verneed if library in PROMISED}
    wanted, offered = set(), set()
    listed = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        *_, kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        if kind == "U" and version.lstrip("@") not in covered:
            wanted.add(name)
        elif kind not in "Uwv":
            offered.add(symbol_hash(name.encode()))
    assert set(facts.undefined) == wanted
    assert facts.offers() == offered


def test_facts_survive_being_kept(library: Path) -> None:
    facts = elf_facts(library)
    program = elf_facts(Path(os.path.realpath(sys.executable)))
    assert facts is not None
    assert program is not None
    assert program.program
    assert program.interpreter.startswith("/")
    files = {"lib/libone.so.1": facts, "bin/python": program, "bin/again": program}
    text = json.dumps(to_json(files))
    assert from_json(json.loads(text)) == files
    assert json.dumps(to_json(dict(reversed(files.items())))) == text
    assert from_json(to_json({})) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.pop("names"),
        lambda value: value.update(files=3),
        lambda value: value["files"].update(x={"machine": "y"}),
        lambda value: value["files"]["a"].update(undefined="no base 85 \x00"),
        lambda value: value["files"]["a"].update(undefined=base64.b85encode(b"\5").decode()),
        lambda value: value["files"]["a"].update(undefined=base64.b85encode(b"\x80" * 99).decode()),
        lambda value: value["files"]["a"].update(verneed=["x"]),
        lambda value: value.update(version=99),
    ],
)
def test_facts_that_are_damaged_are_refused(damage: object) -> None:
    value = to_json({"a": ElfFacts(62, 64, undefined=("one", "two"))})
    assert callable(damage)
    damage(value)
    with pytest.raises(EnvstoreError):
        from_json(value)


def test_facts_that_are_none_at_all_are_refused() -> None:
    for value in (None, [], "x", {}):
        with pytest.raises(CorruptError):
            from_json(value)


def test_other_files_have_none(tmp_path: Path) -> None:
    assert elf_facts(b"") is None
    assert elf_facts(b"\x7fELF") is None
    assert elf_facts(b"\x7fELF" + bytes(100)) is None
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert elf_facts(script) is None
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="Illegal seek"):
        elf_facts(fifo)


def test_damaged_files_are_read_or_refused_and_never_more(library: Path) -> None:
    whole = library.read_bytes()
    chance = random.Random(1)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(chance.choice((64, 1024, len(data))))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        facts = elf_facts(bytes(data))
        if facts is not None:
            assert from_json(to_json({"x": facts})) == {"x": facts}


@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (64, ">"), (32, "<"), (32, ">")])
def test_every_class_and_byte_order_is_read(bits: int, order: str) -> None:
    facts = elf_facts(craft(bits, order, symbols=[("wanted", 0), ("given", 1)]))
    assert facts is not None
    assert (facts.machine, facts.bits, facts.big_endian) == (62, bits, order == ">")
    assert facts.needed == ("libneeded.so.1",)
    assert facts.soname == "libcrafted.so"
    assert facts.undefined == ("wanted",)
    assert facts.offers() == {symbol_hash(b"given")}


def test_names_without_end_take_no_memory() -> None:
    # Each of the names would be all of the table.
    assert elf_facts(craft(64, "<", symbols=[("x" * 70_000, 1)] * 100)) is None
    many = craft(64, "<", symbols=[("x" * 60_000, 1)] * 20_000)
    assert elf_facts(many) is None


def craft(bits: int, order: str, symbols: list[tuple[str, int]]) -> bytes:
    """Return a shared library with nothing but a dynamic section, mapped as it lies."""
    word = "Q" if bits == 64 else "I"
    strings = b"\0libneeded.so.1\0libcrafted.so\0"
    places = {}
    for name, _ in symbols:
        if name not in places:
            places[name] = len(strings)
            strings += name.encode() + b"\0"
    table = b""
    shape = order + ("IBBHQQ" if bits == 64 else "IIIBBH")
    for name, section in [("", 0), *symbols]:
        at, info = places.get(name, 0), 0x12 if name else 0
        row = (at, info, 0, section, 0, 0) if bits == 64 else (at, 0, 0, info, 0, section)
        table += struct.pack(shape, *row)
    head = 64 + 2 * 56
    where = {"symbols": head, "strings": head + len(table)}
    where["dynamic"] = where["strings"] + len(strings)
    tags = [(1, 1), (14, 16), (5, where["strings"]), (6, head), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack(f"{order}2{word}", *tag) for tag in tags)
    size = where["dynamic"] + len(dynamic)
    ident = b"\x7fELF" + bytes((bits // 32, 1 if order == "<" else 2, 1)) + bytes(9)
    header = ident + struct.pack(
        f"{order}HHI3{word}I6H", 3, 62, 1, 0, 64, 0, 0, 64, 56 if bits == 64 else 32, 2, 0, 0, 0
    )

    def segment(kind: int, offset: int, length: int) -> bytes:
        if bits == 64:
            return struct.pack(
                f"{order}IIQQQQQQ", kind, 4, offset, offset, offset, length, length, 8
            )
        return struct.pack(f"{order}8I", kind, offset, offset, offset, length, length, 4, 4)

    segments = segment(1, 0, size) + segment(2, where["dynamic"], len(dynamic))
    return (header.ljust(64, b"\0") + segments).ljust(head, b"\0") + table + strings + dynamic
