from __future__ import annotations

import bz2
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import EnvstoreError
from envstore.resolver.lock import CondaPackage, PythonFacts
from envstore.resolver.packages.conda_archive import unpack_conda
from envstore.resolver.packages.extract import PackageError
from envstore.resolver.packages.unpacked import Unpacked
from envstore.store.source import Kind
from tests.channel.broken import OUTSIDE
from tests.channel.conda import Channel
from tests.channel.content import GENERIC, PURE, write
from tests.channel.interpreter import SITE_PACKAGES, VERSION
from tests.channel.packing import PLACEHOLDER, SUBDIR, About, Package, pack
from tests.channel.solving import install
from tests.resolver.packages.layouts import assert_same, installed, locked, prefix_of, served

PYTHON = PythonFacts(VERSION, SITE_PACKAGES)
EVERYTHING = [
    *("python", "hello-pkg", "binprefix", "speedup", "settings", "legacy", "python_abi"),
    *("clobber-a", "post-link"),
]
REAL = ["python", "numpy", "click", "six", "python-dateutil", "tzdata"]


class Maker:
    """Makes packages of a few files and unpacks them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.tree.mkdir()

    def pack(self, about: About, *extra: tarfile.TarInfo) -> Package:
        return Package.of(about, pack(self.folder / "made", self.tree, about, extra=extra))

    def unpack(self, about: About, *extra: tarfile.TarInfo) -> Unpacked:
        package = self.pack(about, *extra)
        return unpack_conda(package.path, self.folder / "out", locked(package), PYTHON)


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def unpack_all(channel: Channel, versions: dict[str, str], into: Path) -> Iterator[Unpacked]:
    for name, version in sorted(versions.items()):
        package = channel.package(name, version)
        yield unpack_conda(package.path, into / name, locked(package), PYTHON)


@pytest.mark.parametrize("length", [13, 18, 145])
def test_everything_is_what_rattler_installs(
    conda_channel: Channel, length: int, tmp_path: Path
) -> None:
    compare(conda_channel, EVERYTHING, length, tmp_path)


@pytest.mark.parametrize("length", [13, 18, 80])
def test_a_short_placeholder_is_what_rattler_installs(
    conda_channel: Channel, length: int, tmp_path: Path
) -> None:
    compare(conda_channel, ["shortprefix"], length, tmp_path)


def test_real_packages_are_what_rattler_installs(numpy_channel: Channel, tmp_path: Path) -> None:
    compare(numpy_channel, REAL, 145, tmp_path)


def compare(channel: Channel, specs: list[str], length: int, tmp_path: Path) -> None:
    with prefix_of(length) as prefix:
        versions = install([channel.url], specs, prefix, tmp_path / "cache", platform=SUBDIR)
        packages = list(unpack_all(channel, versions, tmp_path))
        theirs, ours = installed(prefix), served(packages, str(prefix))
        theirs = {
            path: found
            for path, found in theirs.items()
            if not path.startswith("conda-meta/") and path != "CACHEDIR.TAG"
        }
        absolute = [path for path in ours if path.endswith("/absolute")]
        for path in absolute:
            # rattler leaves links to the place where the package was built.
            assert ours[path][2].startswith(os.fsencode(prefix) + b"/share/")
            theirs[path] = ours[path]
        assert_same(ours, theirs)
        check_times(packages, prefix)
        check_records(packages, prefix)


def check_times(packages: list[Unpacked], prefix: Path) -> None:
    """Bytecode in packages is compared with the times of its sources."""
    for package in packages:
        for entry in package.entries:
            path = os.fsdecode(entry.path)
            if entry.kind is Kind.FILE and not entry.relocation:
                ours = (package.root / path).stat().st_mtime_ns
                assert ours == (prefix / path).stat().st_mtime_ns


def check_records(packages: list[Unpacked], prefix: Path) -> None:
    """What the facts say of paths is what rattler writes down."""
    for package in packages:
        index = package.facts["index"]
        name = f"{index['name']}-{index['version']}-{index['build']}.json"
        theirs = json.loads((prefix / "conda-meta" / name).read_text())["paths_data"]["paths"]
        wanted = {path["_path"]: path for path in theirs}
        assert [path["_path"] for path in package.facts["paths"]] == sorted(wanted)
        for path in package.facts["paths"]:
            kept = {"path_type", "prefix_placeholder", "file_mode"}
            if path["path_type"] == "hardlink" and "file_mode" not in path:
                kept |= {"sha256", "size_in_bytes"}
            for key in kept:
                assert path.get(key) == wanted[path["_path"]].get(key), path["_path"]


def test_facts_say_what_later_steps_need(conda_channel: Channel, tmp_path: Path) -> None:
    names = ["hello-pkg", "settings", "post-link", "python", "speedup"]
    versions = {name: conda_channel.package(name).about.version for name in names}
    facts = {
        package.facts["index"]["name"]: package.facts
        for package in unpack_all(conda_channel, versions, tmp_path)
    }
    assert facts["hello-pkg"]["distributions"] == [
        {
            "name": "hello-pkg",
            "version": "1.1",
            "path": f"{SITE_PACKAGES}/hello_pkg-1.1.dist-info",
        }
    ]
    assert facts["settings"]["activation"] == [
        "etc/conda/activate.d/10_settings.sh",
        "etc/conda/activate.d/20_settings.sh",
        "etc/conda/activate.d/30_settings.fish",
        "etc/conda/deactivate.d/10_settings.sh",
        "etc/conda/env_vars.d/settings.json",
    ]
    assert facts["post-link"]["link_scripts"] == [
        "bin/.post-link-post-link.sh",
        "bin/.post-link-pre-unlink.sh",
    ]
    assert any("_sysconfigdata" in path for path in facts["python"]["no_bytecode"])
    assert all(path.endswith(".py") for path in facts["python"]["no_bytecode"])
    assert facts["speedup"]["no_bytecode"] == []
    json.dumps(facts)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("truncated", "ends too early|no zip archive"),
        ("garbage", "no zip archive"),
        ("twice", "share/twice/file.txt is there twice"),
        ("escaping", "leads out of the package"),
        ("escaping-inside", "leads out of the package"),
        ("absolute", "is an absolute path"),
        ("through-symlink", "share/way-out"),
        ("hardlink-outside", "/etc/passwd is an absolute path"),
        ("device", "share/null is a character device"),
        ("fifo", "share/fifo is a FIFO"),
        ("paths-wrong-sha256", "file.txt does not have the SHA-256"),
        ("paths-wrong-size", "file.txt has 29 bytes instead of 1"),
        ("paths-missing", "share/not/there is listed, but not in it"),
        ("paths-escaping", "leads out of the package"),
        ("paths-bad-mode", "says nothing valid of"),
        ("paths-garbage", "paths.json is not valid JSON"),
        ("index-garbage", "index.json is not"),
        ("index-other-name", "holds name 'x' instead of"),
        ("entry-point-escaping", "is no name of a command"),
        ("entry-point-code", "os:system.* is not valid"),
    ],
)
def test_broken_and_hostile_packages_are_refused(
    broken_channel: Channel, tmp_path: Path, name: str, said: str
) -> None:
    package = broken_channel.package(name)
    into = tmp_path / "a" / "b" / "out"
    with pytest.raises(PackageError, match=said) as caught:
        unpack_conda(package.path, into, locked(package), PYTHON)
    assert package.about.filename in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(OUTSIDE))
    assert not os.path.lexists(f"/tmp/{OUTSIDE}")


@pytest.mark.parametrize("name", ["sound", "paths-unlisted", "paths-no-placeholder"])
def test_what_installers_forgive_is_forgiven(
    broken_channel: Channel, tmp_path: Path, name: str
) -> None:
    package = broken_channel.package(name)
    unpacked = unpack_conda(package.path, tmp_path / "out", locked(package), PYTHON)
    files = [entry for entry in unpacked.entries if entry.kind is Kind.FILE]
    assert len(files) == (name != "paths-unlisted")
    assert not any(entry.relocation for entry in files)


def test_any_python_needs_one(conda_channel: Channel, tmp_path: Path) -> None:
    package = conda_channel.package("hello-pkg")
    with pytest.raises(PackageError, match="the environment has none"):
        unpack_conda(package.path, tmp_path / "out", locked(package), None)


def test_the_directories_of_the_interpreter_are_its_own(
    conda_channel: Channel, tmp_path: Path
) -> None:
    package = conda_channel.package("hello-pkg")
    python = PythonFacts("3.13.1", "lib/python3.13t/site-packages")
    unpacked = unpack_conda(package.path, tmp_path / "out", locked(package), python)
    paths = {entry.path for entry in unpacked.entries}
    assert b"lib/python3.13t/site-packages/hello_pkg/__init__.py" in paths
    assert b"/bin/python3.13\n" in (unpacked.root / "bin/hello").read_bytes()
    assert b"bin/hello-script" in paths
    assert not {b"site-packages", b"python-scripts"} & paths
    assert not (unpacked.root / "site-packages").exists()


def test_another_version_than_the_locked_one_is_refused(maker: Maker) -> None:
    package = maker.pack(About("thing", **GENERIC))
    wanted = replace(locked(package), version="2.0")
    with pytest.raises(PackageError, match=r"holds version '1\.0' instead of '2\.0'"):
        unpack_conda(package.path, maker.folder / "out", wanted, None)


@pytest.mark.parametrize("legacy", [False, True])
def test_packages_without_paths_json_are_laid_out_by_their_lists(
    maker: Maker, legacy: bool
) -> None:
    old = "/opt/anaconda1anaconda2anaconda3"
    write(maker.tree, "bin/run", f"#!{old}/bin/sh\n", 0o755)
    write(maker.tree, "etc/two words", f"{PLACEHOLDER}/etc\n")
    write(maker.tree, "lib/data.bin", PLACEHOLDER.encode() + b"/x\0y")
    (maker.tree / "lib/link").symlink_to("data.bin")
    has_prefix = (
        f'bin/run\n{PLACEHOLDER} text "etc/two words"\n"{PLACEHOLDER}" "binary" "lib/data.bin"\n'
    )
    about = About("old", legacy=legacy, **GENERIC)
    unpacked = maker.unpack(replace(about, info={"has_prefix": has_prefix.encode()}))
    without = rewritten(maker, about, has_prefix)
    assert [entry.path for entry in unpacked.entries] == [entry.path for entry in without.entries]
    found = served([without], "/short")
    assert found["bin/run"] == (Kind.FILE, True, b"#!/short/bin/sh\n")
    assert found["etc/two words"] == (Kind.FILE, False, b"/short/etc\n")
    assert found["lib/data.bin"][2].rstrip(b"y").rstrip(b"\0") == b"/short/x"
    assert found["lib/link"] == (Kind.SYMLINK, False, b"data.bin")


def rewritten(maker: Maker, about: About, has_prefix: str) -> Unpacked:
    """Unpack the same package after paths.json was taken out of it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin/run", "etc/two words", "lib/data.bin", "lib/link"):
            tar.add(maker.tree / name, f"./{name}")
        index = {"name": "old", "version": "1.0", "build": "0", "depends": []}
        files = "bin/run\netc/two words\nlib/data.bin\nlib/link\n"
        for name, text in (
            ("index.json", json.dumps(index)),
            ("files", files),
            ("has_prefix", has_prefix),
        ):
            member = tarfile.TarInfo(f"info/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    path = maker.folder / "old.tar.bz2"
    path.write_bytes(bz2.compress(buffer.getvalue()))
    package = Package.of(replace(about, legacy=True), path)
    return unpack_conda(path, maker.folder / "without", locked(package), None)


def test_a_list_that_names_what_is_not_there_is_refused(maker: Maker) -> None:
    write(maker.tree, "bin/run", "x")
    for name in ("etc/two words", "lib/data.bin", "lib/link"):
        write(maker.tree, name, "x")
    with pytest.raises(PackageError, match="has_prefix has a line that is not valid"):
        rewritten(maker, About("old", **GENERIC), "one two")


def member(path: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(path)
    made.type, made.linkname = kind, target
    return made


def test_hard_links_and_empty_directories_are_kept(maker: Maker) -> None:
    write(maker.tree, "share/first", f"at {PLACEHOLDER}\n", 0o755)
    said = {"path_type": "hardlink", "prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
    paths = {
        "share/second": said,
        "share/empty": {"path_type": "directory"},
        "share/made": {"path_type": "directory"},
    }
    unpacked = maker.unpack(
        About("links", paths=paths, **GENERIC),
        member("share/second", tarfile.LNKTYPE, "share/first"),
        member("share/empty", tarfile.DIRTYPE),
        member("share/unlisted", tarfile.DIRTYPE),
    )
    found = served([unpacked], "/p")
    assert found["share/first"] == found["share/second"] == (Kind.FILE, True, b"at /p\n")
    folders = [entry.path for entry in unpacked.entries if entry.kind is Kind.DIRECTORY]
    assert folders == [b"share", b"share/empty", b"share/made"]


@pytest.mark.parametrize(
    ("target", "at"),
    [
        (f"{PLACEHOLDER}/share/file", b"/p/share/file"),
        (PLACEHOLDER, b"/p"),
        (f"{PLACEHOLDER}else/x", f"{PLACEHOLDER}else/x".encode()),
        ("/bin/sh", b"/bin/sh"),
        ("file", b"file"),
    ],
)
def test_links_into_the_build_prefix_move_with_it(maker: Maker, target: str, at: bytes) -> None:
    write(maker.tree, "share/file", f"at {PLACEHOLDER}\n")
    (maker.tree / "share/link").symlink_to(target)
    unpacked = maker.unpack(About("links", **GENERIC))
    assert served([unpacked], "/p")["share/link"] == (Kind.SYMLINK, False, at)


def test_links_that_climb_out_are_refused(maker: Maker) -> None:
    write(maker.tree, "share/file", "x")
    (maker.tree / "share/link").symlink_to("../../etc")
    with pytest.raises(PackageError, match="share/link is a link that leads out"):
        maker.unpack(About("links", **GENERIC))


def test_an_entry_point_wins_over_a_file_of_its_name(maker: Maker) -> None:
    write(maker.tree, "python-scripts/tool", "packaged", 0o755)
    write(maker.tree, "site-packages/tool.py", "def main(): pass\n")
    unpacked = maker.unpack(About("tool", entry_points=("tool = tool:main",), **PURE))
    script = served([unpacked], "/p")["bin/tool"]
    assert script[2].startswith(b"#!/p/bin/python")
    assert script[1]
    (fact,) = (path for path in unpacked.facts["paths"] if path["_path"] == "bin/tool")
    assert fact["path_type"] == "unix_python_entry_point"


def test_two_files_for_one_place_are_refused(maker: Maker) -> None:
    write(maker.tree, "site-packages/tool.py", "one")
    write(maker.tree, f"{SITE_PACKAGES}/tool.py", "two")
    with pytest.raises(PackageError, match=r"tool\.py is there twice"):
        maker.unpack(About("tool", **PURE))


@pytest.mark.parametrize("name", ["lib/python3.9/site-packages/x.egg-info", "x.egg-info/PKG-INFO"])
def test_distributions_of_older_kinds_are_found(maker: Maker, name: str) -> None:
    write(maker.tree, name, "Metadata-Version: 1.1\nName: Old.Thing\nVersion: 3\n\nText\n")
    unpacked = maker.unpack(About("old-thing", **GENERIC))
    path = name.removesuffix("/PKG-INFO")
    wanted = [{"name": "Old.Thing", "version": "3", "path": path}]
    assert unpacked.facts["distributions"] == wanted


def damaged(package: Package, change: Callable[[bytes], bytes]) -> Path:
    package.path.write_bytes(change(package.path.read_bytes()))
    return package.path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_damage_anywhere_is_an_error(maker: Maker, legacy: bool, place: float) -> None:
    write(maker.tree, "share/file", os.urandom(20_000))
    package = maker.pack(About("thing", legacy=legacy, **GENERIC))

    def flip(data: bytes) -> bytes:
        at = int(len(data) * place)
        return data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 8]) + data[at + 8 :]

    path = damaged(package, flip)
    with pytest.raises(EnvstoreError, match=r"thing-1\.0-0"):
        unpack_conda(path, maker.folder / "out", locked(package), None)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_length_that_was_cut_off_is_an_error(maker: Maker, legacy: bool) -> None:
    write(maker.tree, "share/file", os.urandom(3000))
    package = maker.pack(About("thing", legacy=legacy, **GENERIC))
    whole = package.path.read_bytes()
    for number, length in enumerate(range(0, len(whole), max(1, len(whole) // 40))):
        package.path.write_bytes(whole[:length])
        with pytest.raises(EnvstoreError, match=r"thing-1\.0-0"):
            unpack_conda(package.path, maker.folder / f"out{number}", locked(package), None)


def test_a_bomb_is_refused_before_it_is_written(maker: Maker) -> None:
    header = tarfile.TarInfo("bomb")
    header.size = 100 << 30
    path = maker.folder / "bomb-1.0-0.conda"
    pieces = zstandard.compress(header.tobuf() + bytes(1 << 20))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("info-bomb-1.0-0.tar.zst", zstandard.compress(bytes(1024)))
        archive.writestr("pkg-bomb-1.0-0.tar.zst", pieces)
    package = Package.of(About("bomb", **GENERIC), path)
    with pytest.raises(PackageError, match="with bomb it becomes more than 512 MiB"):
        unpack_conda(path, maker.folder / "out", locked(package), None)
    assert not list((maker.folder / "out").iterdir())


def test_one_part_of_each_kind_is_wanted(maker: Maker) -> None:
    path = maker.folder / "odd-1.0-0.conda"
    part = zstandard.compress(bytes(1024))
    package_of = lambda: Package.of(About("odd", **GENERIC), path)  # noqa: E731
    for names in (["info-odd.tar.zst"], ["info-a.tar.zst", "info-b.tar.zst", "pkg-a.tar.zst"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, part)
        with pytest.raises(PackageError, match="or several"):
            unpack_conda(path, maker.folder / names[-1], locked(package_of()), None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "_path": st.sampled_from(["share/file", "share", "site-packages/x", "..", "a\ud800"])
        | JSON,
        "path_type": st.sampled_from(["hardlink", "softlink", "directory"]) | JSON,
        "sha256": JSON,
        "size_in_bytes": JSON,
        "prefix_placeholder": st.sampled_from(["/opt/x", "x", "/a\n", "/a\0"]) | JSON,
        "file_mode": st.sampled_from(["text", "binary"]) | JSON,
    },
)
PATHS_JSON = st.fixed_dictionaries({"paths": st.lists(ENTRY, max_size=4) | JSON}) | JSON
NOARCH = st.fixed_dictionaries({"entry_points": st.lists(st.text()) | JSON}) | JSON
LINK_JSON = st.fixed_dictionaries({"noarch": NOARCH}) | JSON


@given(PATHS_JSON, LINK_JSON)
@settings(max_examples=200)
def test_whatever_a_package_says_is_read_or_refused(paths: object, link: object) -> None:
    buffer = io.BytesIO()
    index = {"name": "x", "version": "1", "build": "0", "noarch": "python"}
    info = {"info/paths.json": paths, "info/link.json": link, "info/index.json": index}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        members = {name: json.dumps(said).encode() for name, said in info.items()}
        for name, data in (members | {"share/file": b"/opt/x"}).items():
            made = tarfile.TarInfo(name)
            made.size = len(data)
            tar.addfile(made, io.BytesIO(data))
    package = CondaPackage("x", "1", "0", "noarch", "https://a.example/noarch/x-1-0.tar.bz2", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar.bz2")
        path.write_bytes(bz2.compress(buffer.getvalue()))
        with suppress(EnvstoreError):
            json.dumps(unpack_conda(path, Path(folder, "out"), package, PYTHON).facts)
        assert {entry.name for entry in Path(folder).iterdir()} <= {"x.tar.bz2", "out"}
