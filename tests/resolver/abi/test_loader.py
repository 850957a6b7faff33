"""What a check says is what the loader says; each case is tried with the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.resolver.abi.builds import OLD_TAGS, SITE, TO_LIB, Build

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")

MODULE = f"{SITE}/_module.so"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path / "env")


def test_a_missing_symbol_version_is_told_in_the_loaders_words(build: Build) -> None:
    both = "FOO_1.0 { global: first; local: *; }; FOO_2.0 { second; } FOO_1.0;"
    library = build.library("lib/libfoo.so.1", "void first(){} void second(){}", script=both)
    build.library(MODULE, "void second(); void go(){ second(); }", str(library), TO_LIB)
    assert build.check() == []
    assert build.loader(MODULE) == ""

    one = "FOO_1.0 { global: first; local: *; };"
    build.library("lib/libfoo.so.1", "void first(){} void second(){}", script=one)
    finding = build.only()
    said = f"libfoo.so.1: version `FOO_2.0' not found (required by {MODULE})"
    assert (finding.level, finding.code, finding.subject) == ("error", "VERSION_MISSING", "FOO_2.0")
    assert finding.message == said
    assert finding.provider == "lib/libfoo.so.1 of the environment"
    assert said.replace(MODULE, str(build.root / MODULE)) in build.loader(MODULE)


def test_a_library_without_versions_serves_all(build: Build) -> None:
    library = build.library(
        "lib/libfoo.so.1", "void second(){}", script="FOO_2.0 { global: second; local: *; };"
    )
    build.library(MODULE, "void second(); void go(){ second(); }", str(library), TO_LIB)
    build.library("lib/libfoo.so.1", "void second(){}")
    assert build.check() == []
    assert build.loader(MODULE) == ""


def test_a_missing_cuda_runtime_is_told_in_the_loaders_words(build: Build) -> None:
    library = build.library("lib/libcudart.so.12", "void cudaFree(){}")
    source = "void cudaFree(); void go(){ cudaFree(); }"
    build.library(f"{SITE}/gpu/_cuext.so", source, str(library))
    library.unlink()
    finding = build.only()
    assert (finding.level, finding.code) == ("error", "NEEDED_MISSING")
    assert (finding.package, finding.subject) == ("gpu", "libcudart.so.12")
    assert finding.message == build.loader(finding.path)
    assert "nvidia-cuda-runtime-cu12" in finding.hint
    assert "cuda-cudart" in finding.hint


def test_of_another_major_version_it_is_said_who_has_it(build: Build) -> None:
    library = build.library("lib/libcudart.so.11.0", "")
    build.library(MODULE, "", str(library))
    library.unlink()
    build.library(f"{SITE}/nvidia/lib/libcudart.so.12", "")
    finding = build.only()
    assert "nvidia-cuda-runtime-cu11" in finding.hint
    assert "the environment has libcudart.so.12 (nvidia)" in finding.hint


def test_an_undefined_symbol_is_told_in_the_loaders_words(build: Build) -> None:
    build.library(MODULE, "void no_such_symbol(); void go(){ no_such_symbol(); }")
    finding = build.only()
    assert (finding.level, finding.code) == ("error", "UNDEFINED_SYMBOL")
    assert finding.subject == "no_such_symbol"
    assert f"{build.root}/{finding.path}: {finding.message}" == build.loader(MODULE)


def test_symbols_come_from_whatever_is_loaded_with_a_file(build: Build) -> None:
    deep = build.library("lib/libdeep.so", "void deep(){}")
    near = build.library("lib/libnear.so", "", str(deep), "-Wl,-rpath,$ORIGIN")
    # It needs only the one, which needs the other.
    build.library(MODULE, "void deep(); void go(){ deep(); }", str(near), TO_LIB)
    assert build.check() == []
    assert build.loader(MODULE) == ""


def test_a_library_may_want_symbols_of_those_that_load_it(build: Build) -> None:
    needy = build.library("lib/libneedy.so", "void giver(); void needy(){ giver(); }")
    giver = build.library("lib/libgiver.so", "void giver(){}")
    build.library(MODULE, "", str(giver), str(needy), TO_LIB)
    assert build.loader(MODULE) == ""
    assert build.check() == []


def test_symbols_that_only_strangers_have_are_a_warning(build: Build) -> None:
    build.library(MODULE, "void shared(); void go(){ shared(); }")
    build.library(f"{SITE}/other/libother.so", "void shared(){}")
    finding = build.only()
    assert (finding.level, finding.code) == ("warning", "UNDEFINED_SYMBOL")
    assert finding.provider == f"{SITE}/other/libother.so of other"
    assert "undefined symbol: shared" in build.loader(MODULE)


def test_careless_links_to_the_c_library_work(build: Build) -> None:
    # Without -lm the symbol has no version, and comes from what Python has loaded.
    build.library(
        MODULE, "double cbrt(double); double go(double x){ return cbrt(x); }", "-fno-builtin"
    )
    assert build.loader(MODULE) == ""
    assert build.check() == []


def test_the_interpreters_own_symbols_count(build: Build) -> None:
    build.interpreter()
    build.library(MODULE, "int from_the_program(); int go(){ return from_the_program(); }")
    assert build.own_loader(MODULE) == ""
    assert build.check() == []
    build.library(MODULE, "void PyNever_There(); void go(){ PyNever_There(); }")
    assert build.errors()[0].subject == "PyNever_There"
    assert "undefined symbol: PyNever_There" in build.own_loader(MODULE)
    (build.root / "bin/python3.11").unlink()
    assert build.check() == []


def test_modules_for_another_python_are_not_held_against_it(build: Build) -> None:
    build.interpreter()
    source = "void PyNew_InNext(); void go(){ PyNew_InNext(); }"
    build.library(f"{SITE}/_module.cpython-399-x86_64-linux-gnu.so", source)
    assert build.errors() == []


def test_the_rpath_of_whoever_loads_a_file_counts_its_runpath_does_not(build: Build) -> None:
    last = build.library("lib/deep/liblast.so", "void last(){}")
    middle = build.library("lib/libmiddle.so", "void last(); void go(){ last(); }", str(last))
    folders = "-Wl,-rpath,$ORIGIN/../..:$ORIGIN/../../deep"
    build.library(MODULE, "", str(middle), folders, OLD_TAGS)
    assert build.loader(MODULE) == ""
    assert build.check() == []

    build.library(MODULE, "", str(middle), folders)
    finding = build.only()
    assert (finding.level, finding.code) == ("warning", "NEEDED_NOT_ON_PATH")
    assert (finding.path, finding.subject) == ("lib/libmiddle.so", "liblast.so")
    assert finding.provider == "lib/deep/liblast.so of the environment"
    assert finding.message == build.loader(MODULE)


def test_a_runpath_of_its_own_shuts_a_file_off_from_others_rpaths(build: Build) -> None:
    last = build.library("lib/deep/liblast.so", "void last(){}")
    options = (str(last), "-Wl,-rpath,$ORIGIN/nowhere")
    middle = build.library("lib/libmiddle.so", "void last(); void go(){ last(); }", *options)
    folders = "-Wl,-rpath,$ORIGIN/../..:$ORIGIN/../../deep"
    build.library(MODULE, "", str(middle), folders, OLD_TAGS)
    assert build.only().message == build.loader(MODULE)


def test_the_rpath_of_the_interpreter_serves_all_modules(build: Build) -> None:
    library = build.library("lib/libused.so", "void used(){}")
    build.library(MODULE, "void used(); void go(){ used(); }", str(library))
    build.interpreter("-Wl,-rpath,$ORIGIN/../lib", OLD_TAGS)
    assert build.own_loader(MODULE) == ""
    assert build.check() == []

    build.interpreter("-Wl,-rpath,$ORIGIN/../lib")
    finding = build.only()
    assert finding.code == "NEEDED_NOT_ON_PATH"
    assert build.own_loader(MODULE) == finding.message


def test_what_the_interpreter_has_loaded_is_found_by_name(build: Build) -> None:
    library = build.library("lib/libused.so", "void used(){}")
    build.interpreter(str(library), "-Wl,-rpath,$ORIGIN/../lib")
    build.library(MODULE, "void used(); void go(){ used(); }", str(library))
    assert build.own_loader(MODULE) == ""
    assert build.check() == []


def test_links_lead_to_libraries(build: Build) -> None:
    library = build.library("real/libused.so.1.2", "void used(){}", "-Wl,-soname,libused.so.1")
    build.library(MODULE, "void used(); void go(){ used(); }", str(library), TO_LIB)
    (build.root / "lib/libused.so.1").symlink_to("../lib64/libused.so.1.2")
    (build.root / "lib64").symlink_to("real")
    assert build.loader(MODULE) == ""
    assert build.check() == []
    (build.root / "lib64").unlink()
    (build.root / "lib64").symlink_to("lib64")
    assert build.only().code == "NEEDED_NOT_ON_PATH"
    (build.root / "lib64").unlink()
    (build.root / "lib64").symlink_to(build.root / "real")
    assert build.check() == []


def test_a_library_of_another_class_is_passed_by(build: Build) -> None:
    library = build.library("lib/libused.so", "void used(){}")
    build.library(MODULE, "void used(); void go(){ used(); }", str(library), TO_LIB)
    data = bytearray(library.read_bytes())
    data[18:20] = (0xF3).to_bytes(2, "little")
    library.write_bytes(data)
    mismatch, missing = sorted(build.check(), key=lambda finding: finding.code)
    assert (mismatch.level, mismatch.code) == ("error", "ARCH_MISMATCH")
    assert (missing.level, missing.code) == ("error", "NEEDED_MISSING")
    assert missing.message == build.loader(MODULE)
    assert mismatch.message.startswith(build.loader("lib/libused.so").partition(": ")[2])
    assert "lib/libused.so is for" in missing.hint
