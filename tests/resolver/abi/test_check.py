"""What is an error, what a warning, and what nothing at all."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.abi.check import check, glibc_floor
from envstore.resolver.abi.facts import ElfFacts
from envstore.resolver.abi.findings import Finding
from envstore.resolver.abi.host import AbiTarget, gcc_promised, glibc_of
from envstore.resolver.abi.machine import MachineLibraries
from envstore.resolver.abi.names import glibc_symbols, is_run_time, providers
from envstore.resolver.abi.reading import directory_tree, owner_of
from envstore.resolver.abi.search import Tree
from tests.resolver.abi.builds import SITE, TO_LIB, Build, own_platform

X86 = {"machine": 62, "bits": 64}
MODULE = f"{SITE}/_module.so"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    if shutil.which("gcc") is None:
        pytest.skip("needs a compiler")
    return Build(tmp_path / "env")


def _codes(tree: dict[str, ElfFacts], **target: str) -> list[tuple[str, str, str]]:
    files = {path: (owner_of(path), facts) for path, facts in tree.items()}
    found = check(Tree(files), AbiTarget("linux-64", **target))
    return [(finding.level, finding.code, finding.subject) for finding in found]


def test_a_glibc_that_is_too_new_is_named_with_who_needs_it(build: Build) -> None:
    program = build.interpreter()
    listed = subprocess.run(["readelf", "-V", program], capture_output=True, text=True, check=True)
    versions = re.findall(r"Name: GLIBC_([0-9.]+)", listed.stdout)
    newest = max(versions, key=lambda text: [int(part) for part in text.split(".")])
    assert glibc_floor(directory_tree(build.root)) == newest
    assert build.check(glibc=newest) == build.check() == []
    (finding,) = build.errors(glibc="2.1")
    assert (finding.code, finding.subject) == ("GLIBC_TOO_NEW", f"GLIBC_{newest}")
    said = f"libc.so.6: version `GLIBC_{newest}' not found (required by bin/python3.11)"
    assert finding.message == said
    assert f"--glibc {newest}" in finding.hint


def test_features_and_private_versions_of_glibc() -> None:
    assert glibc_of("GLIBC_2.2.5") == (2, 2, 5)
    assert glibc_of("GLIBC_ABI_DT_RELR") == (2, 36)
    assert glibc_of("GLIBC_PRIVATE") is None
    facts = ElfFacts(
        **X86,
        verneed=(("libc.so.6", "GLIBC_2.99", True), ("libc.so.6", "GLIBC_ABI_DT_RELR", False)),
    )
    assert _codes({MODULE: facts}, glibc="2.36") == []
    assert _codes({MODULE: facts}, glibc="2.35") == [
        ("error", "GLIBC_TOO_NEW", "GLIBC_ABI_DT_RELR")
    ]


@pytest.mark.parametrize(
    ("version", "glibc", "promised"),
    [
        ("GLIBCXX_3.4.25", "2.28", True),
        ("GLIBCXX_3.4.26", "2.28", False),
        ("GLIBCXX_3.4.29", "2.34", True),
        ("GLIBCXX_3.4.19", "2.17", True),
        ("GLIBCXX_3.4.20", "2.17", False),
        ("GLIBCXX_3.4", "2.5", True),
        ("GLIBCXX_3.4.33", "2.99", True),
        ("CXXABI_1.3.13", "2.28", False),
        ("CXXABI_TM_1", "2.17", True),
        ("GCC_7.0.0", "2.28", True),
        ("GCC_12.0.0", "2.28", False),
        ("GLIBCXX_3.4.99", "", True),
    ],
)
def test_what_a_machine_promises_of_gcc(version: str, glibc: str, promised: bool) -> None:
    assert gcc_promised(version, glibc) is promised


def test_the_environments_own_run_time_library_counts_for_more_than_promises() -> None:
    facts = ElfFacts(
        **X86,
        needed=("libstdc++.so.6",),
        rpath=("$ORIGIN/../..",),
        verneed=(("libstdc++.so.6", "GLIBCXX_3.4.32", False),),
    )
    path = "lib/python3.11/_module.so"
    missing = [("error", "VERSION_MISSING", "GLIBCXX_3.4.32")]
    assert _codes({path: facts}, glibc="2.28") == missing
    new = ElfFacts(**X86, soname="libstdc++.so.6", verdef=("GLIBCXX_3.4.32",))
    assert _codes({path: facts, "libstdc++.so.6": new}, glibc="2.28") == []
    # Off the path the machine's is taken.
    assert _codes({path: facts, "far/libstdc++.so.6": new}, glibc="2.28") == missing
    old = ElfFacts(**X86, soname="libstdc++.so.6", verdef=("GLIBCXX_3.4.21",))
    assert _codes({path: facts, "libstdc++.so.6": old}, glibc="2.99") == missing


def test_a_weak_version_may_be_missing() -> None:
    one = ElfFacts(**X86, soname="libone.so", verdef=("ONE_1.0",))

    def wants(weak: bool) -> list[tuple[str, str, str]]:
        facts = ElfFacts(
            **X86,
            needed=("libone.so",),
            runpath=("$ORIGIN",),
            verneed=(("libone.so", "ONE_2.0", weak),),
        )
        return _codes({f"{SITE}/_module.so": facts, f"{SITE}/libone.so": one})

    assert wants(weak=True) == []
    assert wants(weak=False) == [("error", "VERSION_MISSING", "ONE_2.0")]


def test_libraries_of_the_machine_are_a_warning() -> None:
    facts = ElfFacts(**X86, needed=("libc.so.6", "libssl.so.3", "libz.so.1", "libcuda.so.1"))
    ssl = ("warning", "HOST_LIBRARY", "libssl.so.3")
    assert _codes({MODULE: facts}) == [("warning", "HOST_LIBRARY", "libcuda.so.1"), ssl]
    assert _codes({MODULE: facts}, cuda="12.4") == [ssl]


def test_what_may_be_in_such_a_library_is_no_undefined_symbol() -> None:
    facts = ElfFacts(**X86, needed=("libssl.so.3",), undefined=("SSL_new",))
    assert _codes({MODULE: facts}) == [("warning", "HOST_LIBRARY", "libssl.so.3")]


@pytest.mark.parametrize(
    ("path", "level"),
    [
        (f"{SITE}/pkg/_core.abi3.so", "error"),
        ("lib/libpublic.so.1", "error"),
        ("bin/program", "error"),
        (f"{SITE}/pkg/plugins/_sql.so", "warning"),
        (f"{SITE}/pkg/libbackend.so", "warning"),
        (f"{SITE}/numba/np/ufunc/tbbpool.cpython-311-x86_64-linux-gnu.so", "warning"),
        ("share/tool/x.so", "warning"),
    ],
)
def test_only_what_is_surely_loaded_stops_a_push(path: str, level: str) -> None:
    facts = ElfFacts(**X86, needed=("libunheard.so.1",), undefined=("unheard",))
    assert (level, "NEEDED_MISSING", "libunheard.so.1") in _codes({path: facts})
    facts = ElfFacts(**X86, undefined=("unheard",))
    found = _codes({path: facts})
    assert found in ([(level, "UNDEFINED_SYMBOL", "unheard")], [])
    assert found or level == "warning"


def test_what_a_module_needs_is_loaded_as_surely_as_itself() -> None:
    module = ElfFacts(**X86, needed=("libpart.so",), rpath=("$ORIGIN",))
    part = ElfFacts(**X86, soname="libpart.so", needed=("libunheard.so.1",))
    found = _codes({f"{SITE}/pkg/_core.so": module, f"{SITE}/pkg/libpart.so": part})
    assert found == [("error", "NEEDED_MISSING", "libunheard.so.1")]


def test_variants_for_several_versions_of_a_library_need_not_all_work() -> None:
    def variant(number: int) -> ElfFacts:
        return ElfFacts(**X86, needed=(f"libunheard.so.{number}",))

    files = {f"{SITE}/pkg/_for{number}.so": variant(number) for number in (4, 5)}
    assert {level for level, _, _ in _codes(files)} == {"warning"}
    assert {level for level, _, _ in _codes({f"{SITE}/pkg/_for4.so": variant(4)})} == {"error"}


def test_files_for_other_machines() -> None:
    arm = {"machine": 183, "bits": 64}
    other = "AArch64 (64 bits)"
    assert _codes({MODULE: ElfFacts(**arm)}) == [("error", "ARCH_MISMATCH", other)]
    data = {f"{SITE}/pkg/data/agent.so.bin": ElfFacts(**arm)}
    assert _codes(data) == [("warning", "ARCH_MISMATCH", other)]
    assert _codes({"x/sysroot/lib64/libc.so.6": ElfFacts(**arm)}) == []
    files = {MODULE: ("package", ElfFacts(**arm))}
    assert check(Tree(files), AbiTarget("linux-aarch64")) == []


def test_two_libraries_of_one_name_are_a_warning_if_they_differ() -> None:
    module = ElfFacts(**X86, needed=("libgomp.so.1",), rpath=("$ORIGIN",))
    one = ElfFacts(**X86, soname="libgomp.so.1", verdef=("GOMP_4.0",))
    two = ElfFacts(**X86, soname="libgomp.so.1", verdef=("GOMP_4.0", "GOMP_5.0"))
    files = {f"{SITE}/a/_a.so": module, f"{SITE}/a/libgomp.so.1": one}
    assert _codes({**files, f"{SITE}/b/libgomp.so.1": one}) == []
    found = _codes({**files, f"{SITE}/b/libgomp.so.1": two})
    assert found == [("warning", "DUPLICATE_SONAME", "libgomp.so.1")]


def test_the_cuda_runtime_must_not_be_newer_than_the_driver(build: Build) -> None:
    build.library(f"{SITE}/nvidia/lib/libcudart.so.13", "")
    assert build.check() == build.check(cuda="13.0") == build.check(cuda="14.1") == []
    finding = build.only(cuda="12.8")
    assert (finding.level, finding.code) == ("error", "CUDA_MISMATCH")
    assert (finding.package, finding.subject) == ("nvidia", "libcudart.so.13")
    assert "driver runs 12.8" in finding.message


def test_a_package_may_say_which_cuda_it_is_for() -> None:
    def found(driver: str) -> list[tuple[str, str]]:
        target = AbiTarget("linux-64", cuda=driver)
        return [
            (finding.level, finding.line.partition(": CUDA")[0])
            for finding in check(Tree({}), target, {"pytorch-cuda": "12.4", "numpy": "13.0"})
        ]

    assert found("11.8") == [("error", "pytorch-cuda: pytorch-cuda 12.4")]
    assert found("12.0") == []


def test_two_cuda_runtimes_are_a_warning() -> None:
    files = {
        f"{SITE}/nvidia/lib/libcudart.so.{major}": ElfFacts(**X86, soname=f"libcudart.so.{major}")
        for major in (12, 13)
    }
    assert _codes(files) == [("warning", "CUDA_MISMATCH", "libcudart.so.13")]


def test_the_same_trouble_of_many_files_is_told_once() -> None:
    facts = ElfFacts(**X86, needed=("libunheard.so.1",))
    files = {f"{SITE}/pkg/_m{letter}.so": ("pkg", facts) for letter in "abc"}
    (finding,) = check(Tree(files), AbiTarget("linux-64"))
    assert finding.files == 3
    assert finding.path == f"{SITE}/pkg/_ma.so"


def test_this_machines_libraries_count_if_asked_for(build: Build) -> None:
    library = build.library("lib/libunheard.so.1", "")
    build.library(MODULE, "", str(library), "-lm", "-ldl", TO_LIB)
    library.unlink()
    tree = directory_tree(build.root)
    target = AbiTarget(own_platform())
    machine = MachineLibraries(*target.architecture[:2])
    libc = machine.find("libc.so.6")
    assert libc is not None
    assert "GLIBC_2.17" in libc.verdef
    assert machine.find("libunheard.so.1") is None
    (finding,) = check(tree, target, machine=machine)
    assert (finding.level, finding.subject) == ("error", "libunheard.so.1")


def test_targets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="osx-arm64"):
        AbiTarget("osx-arm64")
    with pytest.raises(UsageError, match="no version of glibc"):
        AbiTarget("linux-64", "new")
    with pytest.raises(UsageError, match="no version of CUDA"):
        AbiTarget("linux-64", cuda="12.x")


def test_who_provides_what() -> None:
    assert providers("libcudart.so.12") == "cuda-cudart (conda) or nvidia-cuda-runtime-cu12 (PyPI)"
    assert providers("libcudart.so.13") == "cuda-cudart (conda) or nvidia-cuda-runtime (PyPI)"
    assert providers("libssl.so.3") == "openssl (conda)"
    assert providers("libstdc++.so.6") == "libstdcxx (conda)"
    assert providers("libunheard.so.1") == ""
    assert {"cbrt", "malloc", "dlopen", "pthread_create"} <= glibc_symbols()


def test_symbols_of_run_time_libraries_are_known_by_their_looks() -> None:
    theirs = (
        "_ZNSt6localeC1Ev _ZdlPv _Znwm _ZTTNSt7__cxx1118basic_stringstreamIcE _ZTIi _ZTSPKc "
        "_ZTVN10__cxxabiv117__class_type_infoE _ZN9__gnu_cxx6__stoaE __cxa_throw __udivti3 "
        "_ZThn16_NSdD0Ev _ZTv0_n24_NSdD0Ev _Unwind_Resume __gxx_personality_v0 __floattisf "
        "_ZGVNSt7collateIcE2idE __cpu_model __mulsc3"
    )
    assert [name for name in theirs.split() if not is_run_time(name)] == []
    others = "no_such_symbol _ZN3FooC1Ev _ZTV3Foo PyLong_X __my_add __fixture _ZTI3Foo cudaFree"
    assert [name for name in others.split() if is_run_time(name)] == []
    facts = ElfFacts(**X86, undefined=("_ZNSt6localeC1Ev", "cuCtxGetCurrent", "malloc"))
    assert _codes({MODULE: facts}) == []


def test_links_that_lead_nowhere_are_followed_no_further() -> None:
    links = {
        "a": "b",
        "b": "a",
        "up": "../../x",
        "out": "/usr/lib",
        "in": "/p/lib",
        "dir": "lib/..",
    }
    tree = Tree({}, links, "/p")
    assert tree.real("a/x") is None
    assert tree.real("up") is None
    assert tree.real("out/libc.so") is None
    assert tree.real("in/../in/x") == "lib/x"
    assert tree.real("dir/lib//./x") == "lib/x"
    assert Tree({}, {"l": "/envstore-prefix-" + "0" * 32 + "/lib"}).real("l/x") == "lib/x"
    assert Tree({}, {"l": "/b/_h_env_placehold_placehold/lib"}).real("l/x") == "lib/x"


def test_the_document_has_every_code() -> None:
    root = Path(__file__).parents[3]
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", (root / "docs/check.md").read_text(), re.M))
    source = "".join(path.read_text() for path in (root / "envstore/resolver/abi").glob("*.py"))
    assert documented == set(re.findall(r"[A-Z]+_[A-Z_]+", Finding.__doc__ or ""))
    assert all(f'"{code}"' in source for code in documented)
