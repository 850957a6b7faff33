from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.resolver.lock import PythonFacts
from envstore.resolver.packages.extract import PackageError
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.packages.wheel import unpack_wheel
from envstore.store.source import Kind
from tests.channel.interpreter import MINOR, SITE_PACKAGES, VERSION
from tests.channel.pypi import Index
from tests.channel.wheelhouse import locked_names, wheel
from tests.channel.wheelmaking import make_wheel
from tests.resolver.packages.layouts import (
    Layout,
    assert_same,
    installed,
    locked_wheel,
    materialise,
    served,
)

PYTHON = PythonFacts(VERSION, SITE_PACKAGES)
UV = Path(sys.executable).with_name("uv")
# Written for one machine or by uv alone, or different on purpose.
OWN = ("/INSTALLER", "/RECORD", "/REQUESTED", "/uv_cache.json", "/direct_url.json")

SCHEMES = {
    "thing/__init__.py": "def main(): pass\n",
    "thing/run.sh": "#!/bin/sh\n",
    "thing.libs/data": b"\0" * 3000,
    "DATA/purelib/pure.py": "pure = 1\n",
    "DATA/platlib/plat.py": "plat = 1\n",
    "DATA/scripts/plain": "#!/bin/sh\necho plain\n",
    "DATA/scripts/python-script": "#!python -E\nprint('it')\n",
    "DATA/scripts/gui-script": "#!pythonw\nprint('gui')\n",
    "DATA/scripts/binary": b"\x7fELF\0\0",
    "DATA/scripts/tool": "#!python\nthe entry point wins\n",
    "DATA/data/etc/thing.conf": "conf\n",
    "DATA/data/share/man/man1/thing.1": "man\n",
    "DATA/headers/thing.h": "#define THING\n",
    "DATA/headers/sub/more.h": "#define MORE\n",
}
ENTRY_POINTS = """\
[console_scripts]
tool = thing:main
dotted = thing.sub : Main.run [extra]
; a comment
[gui_scripts]
window = thing:main
[thing.plugins]
one = thing:plugin
"""


@pytest.fixture
def unpacked(tmp_path: Path) -> Unpacked:
    path = make_wheel(
        tmp_path, "the-thing", "1.0+local.1", SCHEMES, entry_points=ENTRY_POINTS,
        executable=("thing/run.sh",), requires=("click>=8", "six; extra == 'more'"),
        requires_python=">=3.8", more="Provides-Extra: more\n\nThe text\n",
    )  # fmt: skip
    return unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """An interpreter's own prefix, as uv sees it: not a virtual environment."""
    prefix = tmp_path / "env"
    subprocess.run([UV, "venv", "-q", "--no-project", "-p", sys.executable, prefix], check=True)
    yield prefix
    shutil.rmtree(prefix)


def with_uv(prefix: Path, *wheels: Path) -> Layout:
    """Return what uv adds to an environment."""
    before = installed(prefix)
    command = [UV, "pip", "install", "-q", "--python", prefix / "bin/python", "--no-deps"]
    cache = ["--offline", "--no-index", "--cache-dir", prefix.parent / "uv-cache"]
    subprocess.run([*command, *cache, *wheels], check=True, timeout=240)
    added = {path: found for path, found in installed(prefix).items() if path not in before}
    del added[".lock"]
    # What is below include/site in a virtual environment is one level higher elsewhere.
    return {path.replace("include/site/", "include/"): found for path, found in added.items()}


def without_own(layout: Layout) -> Layout:
    return {path: found for path, found in layout.items() if not path.endswith(OWN)}


def test_every_scheme_is_what_uv_installs(
    unpacked: Unpacked, environment: Path, tmp_path: Path
) -> None:
    theirs = with_uv(environment, *tmp_path.glob("*.whl"))
    ours = served([unpacked], str(environment))
    assert f"include/python{MINOR}/the-thing/sub/more.h" in ours
    assert_same(without_own(ours), without_own(theirs))


def test_real_wheels_are_what_uv_installs(
    real_index: Index, environment: Path, tmp_path: Path
) -> None:
    wheels = [wheel(name) for name in locked_names()]
    theirs = with_uv(environment, *wheels)
    ours = served(
        [
            unpack_wheel(path, tmp_path / "out" / path.stem, locked_wheel(path), PYTHON)
            for path in wheels
        ],
        str(environment),
    )
    assert len(ours) > 1000
    assert_same(without_own(ours), without_own(theirs))


def rows(record: bytes) -> dict[str, tuple[str, str]]:
    return {row[0]: (row[1], row[2]) for row in csv.reader(record.decode().splitlines())}


def test_the_record_is_of_what_is_there(unpacked: Unpacked) -> None:
    layout = served([unpacked], "/prefix")
    info = f"{SITE_PACKAGES}/the_thing-1.0+local.1.dist-info"
    assert layout[f"{info}/INSTALLER"][2] == b"envstore\n"
    record = rows(layout[f"{info}/RECORD"][2])
    found = {os.path.normpath(f"{SITE_PACKAGES}/{path}"): said for path, said in record.items()}
    assert sorted(found) == sorted(layout)
    assert list(record) == sorted(record)
    relocated = {os.fsdecode(entry.path) for entry in unpacked.entries if entry.relocation}
    assert relocated == {
        *("bin/python-script", "bin/gui-script", "bin/tool", "bin/dotted", "bin/window"),
    }
    for path, (digest, size) in found.items():
        data = layout[path][2]
        if path in relocated or path.endswith("/RECORD"):
            assert (digest, size) == ("", "")
        else:
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            assert (digest, size) == (f"sha256={hashed.decode()}", str(len(data)))


def test_scripts_run_the_interpreter_of_their_prefix(unpacked: Unpacked) -> None:
    layout = served([unpacked], "/prefix")
    assert layout["bin/python-script"][2] == b"#!/prefix/bin/python\nprint('it')\n"
    assert layout["bin/gui-script"][2] == b"#!/prefix/bin/python\nprint('gui')\n"
    assert b"from thing.sub import Main\n" in layout["bin/dotted"][2]
    assert b"sys.exit(Main.run())\n" in layout["bin/dotted"][2]
    far = served([unpacked], "/" + "x" * 150)
    assert far["bin/tool"][2].startswith(b"#!/bin/sh\n'''exec' \"/xxx")
    assert all(found[1] for path, found in layout.items() if path.startswith("bin/"))


def test_scripts_run_at_any_prefix(tmp_path: Path) -> None:
    files = {"thing.py": "import sys\ndef main(): print(sys.argv[1:], sys.prefix)\n"}
    path = make_wheel(tmp_path, "thing", "1", files, entry_points="[console_scripts]\nt=thing:main")
    unpacked = unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)
    for name in ("short", "with blank", "long" * 50):
        prefix = tmp_path / name
        subprocess.run([UV, "venv", "-q", "--no-project", "-p", sys.executable, prefix], check=True)
        materialise(served([unpacked], str(prefix)), prefix)
        said = subprocess.run([prefix / "bin/t", "a b"], capture_output=True, text=True, check=True)
        assert said.stdout == f"['a b'] {prefix}\n"


def test_facts_say_what_later_steps_need(unpacked: Unpacked) -> None:
    facts = unpacked.facts
    path = f"{SITE_PACKAGES}/the_thing-1.0+local.1.dist-info"
    assert facts["distributions"] == [{"name": "the-thing", "version": "1.0+local.1", "path": path}]
    assert facts["dist_info"] == path
    assert facts["requires_dist"] == ["click>=8", "six; extra == 'more'"]
    assert facts["requires_python"] == ">=3.8"
    assert facts["extras"] == ["more"]
    assert facts["entry_points"]["thing.plugins"] == {"one": "thing:plugin"}
    assert facts["top_level"] == ["plat.py", "pure.py", "thing", "thing.libs"]
    assert facts["tags"] == ["py3-none-any"]


def test_the_same_wheel_gives_the_same_tree(unpacked: Unpacked, tmp_path: Path) -> None:
    (path,) = tmp_path.glob("*.whl")
    again = unpack_wheel(path, tmp_path / "again", locked_wheel(path), PYTHON)
    assert (again.entries, again.facts) == (unpacked.entries, unpacked.facts)
    assert served([again], "/p") == served([unpacked], "/p")


def test_the_interpreter_says_where_packages_lie(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "thing", "1", {"a.py": "", "DATA/headers/a.h": ""})
    python = PythonFacts("3.13.1", "lib/python3.13t/site-packages")
    unpacked = unpack_wheel(path, tmp_path / "out", locked_wheel(path), python)
    paths = {entry.path for entry in unpacked.entries}
    assert b"lib/python3.13t/site-packages/a.py" in paths
    assert b"include/python3.13t/thing/a.h" in paths


def test_pip_gets_the_command_of_this_interpreter(tmp_path: Path) -> None:
    text = "[console_scripts]\npip = a:b\npip3 = a:b\npip3.7 = a:b\n"
    path = make_wheel(tmp_path, "pip", "1", {"a.py": ""}, entry_points=text)
    unpacked = unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)
    names = {entry.path for entry in unpacked.entries if entry.path.startswith(b"bin/")}
    assert names == {b"bin/pip", b"bin/pip3", f"bin/pip{MINOR}".encode()}


def test_what_a_wheel_says_of_its_installation_is_not_believed(tmp_path: Path) -> None:
    files = {"a.py": "", "INFO/INSTALLER": "other", "INFO/direct_url.json": "{}"}
    files |= {"INFO/REQUESTED": "", "INFO/sub/INSTALLER": "kept"}
    path = make_wheel(tmp_path, "thing", "1", files)
    layout = served([unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)], "/p")
    info = f"{SITE_PACKAGES}/thing-1.dist-info"
    names = {path.removeprefix(f"{info}/") for path in layout if path.startswith(info)}
    assert names == {"INSTALLER", "METADATA", "RECORD", "WHEEL", "sub/INSTALLER"}
    assert layout[f"{info}/INSTALLER"][2] == b"envstore\n"


Change = Callable[[dict[str, bytes]], object]


def repacked(path: Path, change: Change, *, record: bool = False) -> Path:
    """Write the wheel again after ``change``; with ``record`` its RECORD is right afterwards."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    if record:
        (name,) = (name for name in files if name.endswith(".dist-info/RECORD"))
        lines = [f"{name},,\n"]
        for other, data in files.items():
            if other != name and not other.endswith("/"):
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
                lines.append(f'"{other}",sha256={digest.decode()},{len(data)}\n')
        files[name] = "".join(lines).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def renamed(old: str, new: str) -> Change:
    return lambda files: files.update({new: files.pop(old)})


def replaced(name: str, old: bytes, new: bytes) -> Change:
    return lambda files: files.update({name: files[name].replace(old, new)})


def added(name: str, data: bytes = b"x") -> Change:
    return lambda files: files.update({name: data})


INFO = "thing-1.dist-info"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced("a.py", b"one", b"two"), r"a\.py is not the file that its RECORD says"),
        (replaced("a.py", b"one", b""), r"a\.py is not the file that its RECORD says"),
        (added("b.py"), r"RECORD has no digest of b\.py"),
        (lambda files: files.pop("a.py"), r"a\.py is in its RECORD, but not in it"),
        (lambda files: files.pop(f"{INFO}/RECORD"), "has no RECORD"),
        (replaced(f"{INFO}/RECORD", b"a.py,sha256", b"a.py,md5"), "proves nothing: md5"),
        (replaced(f"{INFO}/RECORD", b"a.py,sha256=", b"a.py,"), "proves nothing"),
        (added(f"{INFO}/RECORD", b"a.py,sha256=!!!,3\n"), r"nothing valid of a\.py"),
        (added(f"{INFO}/RECORD", b"\xff"), "not valid CSV"),
        (added(f"{INFO}/RECORD", b"a.py,,\na.py,sha256=,3\n"), r"lists a\.py twice"),
    ],
)
def test_a_record_that_is_not_kept_is_refused(tmp_path: Path, change: Change, said: str) -> None:
    path = repacked(make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"}), change)
    with pytest.raises(PackageError, match=said) as caught:
        unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (added("../escaped"), "leads out of the package"),
        (added("a/../../escaped"), "leads out of the package"),
        (added("/tmp/escaped"), "absolute path"),
        (added("thing-1.data/data/../escaped"), "leads out of the package"),
        (added("a.py/below"), "which is no directory"),
        (added("back\\slash"), "not a path of this system"),
        (added("thing-1.data/odd/x"), "of an unknown kind"),
        (added("thing-1.data/scripts/sub/x"), "directory among scripts"),
        (added("thing-1.data/purelib"), "is not a directory"),
        (added("thing-1.data/purelib/a.py"), r"a\.py is there twice"),
        (added("other-2.dist-info/METADATA"), "no .dist-info directory, or several"),
        (lambda files: files.pop(f"{INFO}/WHEEL"), "has no WHEEL"),
        (lambda files: files.pop(f"{INFO}/METADATA"), "has no METADATA"),
        (replaced(f"{INFO}/WHEEL", b"Version: 1.0", b"Version: 2.0"), "has version 2.0"),
        (replaced(f"{INFO}/WHEEL", b"Wheel-Version", b"Other"), "has version unknown"),
        (replaced(f"{INFO}/METADATA", b"Name: thing", b"Name: evil"), "says evil 1 instead of"),
        (replaced(f"{INFO}/METADATA", b"Version: 1\n", b"Version: 2\n"), "says thing 2 instead"),
        (added(f"{INFO}/entry_points.txt", b"[console_scripts]\n../x = a:b\n"), "no name of a"),
        (added(f"{INFO}/entry_points.txt", b"[console_scripts]\nx = a:b()\n"), "is not valid"),
        (added(f"{INFO}/entry_points.txt", b"[console_scripts]\nx = a\n"), "is not valid"),
        (added(f"{INFO}/entry_points.txt", b"no section\n"), "entry_points.txt is not valid"),
        (
            added(f"{INFO}/entry_points.txt", b"[console_scripts]\npython3 = a:b\n"),
            "would replace the interpreter",
        ),
    ],
)
def test_a_wheel_that_is_none_is_refused(tmp_path: Path, change: Change, said: str) -> None:
    made = make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"})
    path = repacked(made, change, record=True)
    into = tmp_path / "deep" / "down" / "out"
    with pytest.raises(PackageError, match=said):
        unpack_wheel(path, into, locked_wheel(path), PYTHON)
    assert not list(tmp_path.rglob("escaped"))
    assert not os.path.lexists("/tmp/escaped")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: int) -> None:
    path = make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"})
    with zipfile.ZipFile(path, "a") as archive:
        item = zipfile.ZipInfo("odd")
        item.external_attr = (kind | 0o777) << 16
        archive.writestr(item, "/etc/passwd")
    with pytest.raises(PackageError, match="odd is neither a file nor a directory"):
        unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.py", "two\n")
    with pytest.raises(PackageError, match=r"a\.py is there twice"):
        unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)


def test_another_wheel_than_the_locked_one_is_refused(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"})
    wanted = locked_wheel(path)
    with pytest.raises(PackageError, match="says thing 1 instead of thing 2"):
        unpack_wheel(path, tmp_path / "out", replace(wanted, version="2"), PYTHON)
    with pytest.raises(PackageError, match="instead of other 1"):
        unpack_wheel(path, tmp_path / "out2", replace(wanted, name="other"), PYTHON)
    same = replace(wanted, version="1.0")
    assert unpack_wheel(path, tmp_path / "out3", same, PYTHON).entries


def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "thing", "1", {"a.py": "one\n"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(1000))
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.rfind(b"PK\1\2") + 24, 600 << 20)
    path.write_bytes(data)
    with pytest.raises(PackageError, match="with bomb it becomes more than 512 MiB"):
        unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)
    assert not list((tmp_path / "out").iterdir())


def test_empty_directories_are_kept(tmp_path: Path) -> None:
    made = make_wheel(tmp_path, "thing", "1", {"a.py": ""})

    def change(files: dict[str, bytes]) -> None:
        files |= {"empty/": b"", "thing-1.data/": b"", "thing-1.data/data/": b""}
        files |= {"thing-1.data/data/var/empty/": b"", "thing-1.data/scripts/": b""}

    path = repacked(made, change, record=True)
    unpacked = unpack_wheel(path, tmp_path / "out", locked_wheel(path), PYTHON)
    folders = {entry.path for entry in unpacked.entries if entry.kind is Kind.DIRECTORY}
    assert {f"{SITE_PACKAGES}/empty".encode(), b"var", b"var/empty"} <= folders
