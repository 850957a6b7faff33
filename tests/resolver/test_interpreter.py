"""What the files of an environment say about its interpreter."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from envstore.resolver.interpreter import elf_machine, facts, find_interpreter, own_interpreter


def library(root: Path, minor: int, *, parent: str = "lib") -> None:
    (root / parent / f"python3.{minor}").mkdir(parents=True)


def program(root: Path, name: str, text: str = "#!/bin/sh\n") -> Path:
    path = root / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def elf(path: Path, machine: int, *, big: bool = False, abi: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    order = ">" if big else "<"
    ident = b"\x7fELF" + bytes([2, 2 if big else 1, 1, abi]) + bytes(8)
    path.write_bytes(ident + struct.pack(order + "HH", 3, machine) + bytes(44))
    path.chmod(0o755)


def test_no_library_no_interpreter(tmp_path: Path) -> None:
    program(tmp_path, "python3")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "python3.11").write_text("a file")
    (tmp_path / "lib" / "python2.7").mkdir()
    (tmp_path / "lib" / "python3").mkdir()
    assert find_interpreter(tmp_path) is None
    assert facts(tmp_path) == {}


def test_one_library(tmp_path: Path) -> None:
    library(tmp_path, 11)
    program(tmp_path, "python")
    program(tmp_path, "python3")
    found = find_interpreter(tmp_path)
    assert found is not None
    assert (found.minor, found.tag, found.libraries) == (11, "cpython-311", (b"lib/python3.11",))
    assert found.program == tmp_path / "bin/python3"
    assert found.trouble == ""


@pytest.mark.parametrize("how", ["pyvenv", "conda", "link", "programs"])
def test_which_of_two_libraries(tmp_path: Path, how: str) -> None:
    for minor in (9, 11, 13):
        library(tmp_path, minor)
    if how == "pyvenv":
        (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.4\n")
    elif how == "conda":
        (tmp_path / "conda-meta").mkdir()
        for name in ("python-3.11.4-hab00c5b_0_cpython", "python-dateutil-2.9.0-py_0", "history"):
            (tmp_path / "conda-meta" / f"{name}.json").touch()
    elif how == "link":
        program(tmp_path, "python3.11")
        program(tmp_path, "python3.13")
        (tmp_path / "bin" / "python3").symlink_to("python3.11")
    else:
        program(tmp_path, "python3.9")
        program(tmp_path, "python3.11")
    found = find_interpreter(tmp_path)
    assert found is not None
    assert found.libraries == (b"lib/python3.11",)


def test_lib64_counts_if_it_is_no_link(tmp_path: Path) -> None:
    library(tmp_path, 11)
    library(tmp_path, 11, parent="lib64")
    found = find_interpreter(tmp_path)
    assert found is not None
    assert found.libraries == (b"lib/python3.11", b"lib64/python3.11")


def test_what_keeps_it_from_running(tmp_path: Path) -> None:
    library(tmp_path, 11)

    def trouble() -> str:
        found = find_interpreter(tmp_path)
        assert found is not None
        assert found.program is None
        return found.trouble

    assert trouble() == "there is no bin/python3.11"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/nonexistent/python3")
    assert trouble() == "bin/python3 leads to /nonexistent/python3, which is not there"
    program(tmp_path, "python3.11").chmod(0o644)
    assert trouble().startswith("bin/python3")
    (tmp_path / "bin" / "python3").unlink()
    assert trouble() == "bin/python3.11 is not executable"
    theirs, name = (
        (183, "aarch64")
        if elf_machine(Path(sys.executable)) != "aarch64"
        else (
            62,
            "x86_64",
        )
    )
    elf(tmp_path / "bin" / "python3.11", theirs)
    assert trouble() == f"bin/python3.11 is for {name}"


def test_versions_before_hashed_bytecode(tmp_path: Path) -> None:
    library(tmp_path, 6)
    program(tmp_path, "python3.6")
    found = find_interpreter(tmp_path)
    assert found is not None
    assert found.program is None
    assert "3.6" in found.trouble


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"pyvenv.cfg": "home = /x\nversion = 3.11.4\n"}, "3.11.4"),
        ({"pyvenv.cfg": "home = /x\nversion_info = 3.11.4.final.0\n"}, "3.11.4"),
        ({"pyvenv.cfg": "home = /x\nversion_info = 3.11\n"}, "3.11"),
        ({"pyvenv.cfg": "home = /x\nversion = 3.12.1\n"}, "3.11"),
        ({"pyvenv.cfg": "\xff\n"}, "3.11"),
        ({"conda-meta/python-3.11.9-hb806964_0_cpython.json": ""}, "3.11.9"),
        ({"include/python3.11/patchlevel.h": '#define PY_VERSION      "3.11.2+"\n'}, "3.11.2"),
        ({}, "3.11"),
    ],
)
def test_the_version(tmp_path: Path, files: dict[str, str], version: str) -> None:
    library(tmp_path, 11)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert facts(tmp_path) == {"python": version}


def test_the_platform(tmp_path: Path) -> None:
    library(tmp_path, 11)
    elf(tmp_path / "bin" / "python3.11", 62)
    assert facts(tmp_path)["platform"] == "linux-x86_64"
    elf(tmp_path / "bin" / "python3.11", 22, big=True, abi=3)
    assert facts(tmp_path)["platform"] == "linux-s390x"
    for strange in ({"machine": 9999}, {"machine": 62, "abi": 9}):
        elf(tmp_path / "bin" / "python3.11", **strange)
        assert "platform" not in facts(tmp_path)
    (tmp_path / "bin" / "python3.11").write_bytes(b"\x7fELF")
    assert "platform" not in facts(tmp_path)


def test_the_running_interpreter_stands_in_for_its_own_version_only() -> None:
    assert own_interpreter(sys.implementation.cache_tag) == Path(sys.executable)
    assert own_interpreter("cpython-38") is None
