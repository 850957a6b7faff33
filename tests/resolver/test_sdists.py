from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnavailableError
from envstore.resolver.conda import solve
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import Build, PypiPackage
from envstore.resolver.request import PypiRequest
from envstore.resolver.sdists import Builder, make_wheel, make_wheels
from envstore.resolver.target import make_target
from tests.channel.conda import Channel
from tests.channel.pypi import Index
from tests.channel.server import serving
from tests.channel.wheelmaking import make_sdist
from tests.resolver.surroundings import _no_settings

__all__ = ["_no_settings"]

PLATLIB = """
import zipfile, os

def get_requires_for_build_wheel(config_settings=None):
    return []

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    import sysconfig
    name = "compiled-1.0-py3-none-" + sysconfig.get_platform().replace("-", "_") + ".whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        archive.writestr("compiled-1.0.dist-info/METADATA", open("PKG-INFO").read())
        archive.writestr("compiled-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\n")
        archive.writestr("compiled-1.0.dist-info/RECORD", "")
    return name
"""
UNSTABLE = PLATLIB.replace('"compiled-1.0.dist-info/RECORD", ""', '"x", os.urandom(8).hex()')


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(path: Path, name: str = "", url: str = "") -> PypiPackage:
    build = Build(url or path.as_uri(), digest(path) if path.is_file() else "")
    return PypiPackage(
        name or path.name.split("-")[0].replace("_", "-"), "", "", "", "", build=build
    )


def builder(cache: Path, **more: object) -> Builder:
    request = PypiRequest(no_index=True)
    return Builder(platform.python_version(), make_target(), cache, request, **more)  # type: ignore[arg-type]


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    make_sdist(tmp_path, "from-source", "1.0", {"from_source.py": "VALUE = 7\n"})
    return tmp_path / "from_source-1.0.tar.gz"


def test_a_source_is_built_once(sdist: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        asked = source(sdist, url=f"{server.url}/{sdist.name}")
        made, path = make_wheel(asked, builder(tmp_path / "cache"))
        again, same = make_wheel(asked, builder(tmp_path / "cache"))
        assert len(server.paths(".tar.gz")) == 1
    assert (made, path) == (again, same)
    assert made.filename == "from_source-1.0-py3-none-any.whl"
    assert made.version == "1.0"
    assert made.url == ""
    assert made.sha256 == digest(path)
    assert made.size == path.stat().st_size
    assert made.build == Build(f"{server.url}/{sdist.name}", digest(sdist), "backend", ())
    # Where it was built it is found by its own digest, whatever became of the source.
    assert make_wheel(made, builder(tmp_path / "cache")) == (made, path)


def test_a_wheel_that_was_damaged_is_built_again(sdist: Path, tmp_path: Path) -> None:
    made, path = make_wheel(source(sdist), builder(tmp_path / "cache"))
    path.write_bytes(b"damaged")
    again, path = make_wheel(source(sdist), builder(tmp_path / "cache"))
    assert again == made
    assert digest(path) == made.sha256
    (record,) = (tmp_path / "cache/built").glob("*/cp*.json")
    record.write_text("{")
    assert make_wheel(source(sdist), builder(tmp_path / "cache"))[0] == made


def test_what_killed_builds_left_is_removed_in_time(sdist: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache/built"
    for name in ("making-old", "making-new"):
        (place / name / "source").mkdir(parents=True)
    os.utime(place / "making-old", (0, 0))
    make_wheel(source(sdist), builder(tmp_path / "cache"))
    assert [path.name for path in place.glob("making-*")] == ["making-new"]


def test_the_same_source_gives_the_same_wheel_elsewhere(sdist: Path, tmp_path: Path) -> None:
    made, _ = make_wheel(source(sdist), builder(tmp_path / "a"))
    other, path = make_wheel(made, builder(tmp_path / "b"))
    assert other == made
    assert path.is_relative_to(tmp_path / "b")


def test_a_build_that_gives_another_wheel_is_refused(tmp_path: Path) -> None:
    make_sdist(tmp_path, "compiled", "1.0", {}, backend=UNSTABLE)
    asked = source(tmp_path / "compiled-1.0.tar.gz")
    made, _ = make_wheel(asked, builder(tmp_path / "a"))
    with pytest.raises(CorruptError, match="another wheel than the lock has"):
        make_wheel(made, builder(tmp_path / "b"))


def test_a_failing_build_leaves_its_log(wheel_index: Index, tmp_path: Path) -> None:
    path = wheel_index.file("broken-source", "1.0")
    with pytest.raises(EnvstoreError, match=r"libnowhere\.h was not found") as caught:
        make_wheel(source(path), builder(tmp_path / "cache"))
    assert "broken-source" in str(caught.value)
    assert "\n" not in str(caught.value)
    (log,) = (tmp_path / "cache/built/logs").iterdir()
    assert str(log) in str(caught.value)
    assert "looking for the library" in log.read_text()
    assert not list((tmp_path / "cache/built").glob("*/*.json"))
    assert not list((tmp_path / "cache/built").glob("making-*"))


def test_build_requirements_that_cannot_be_had(tmp_path: Path) -> None:
    tree = tmp_path / "thing"
    tree.mkdir()
    (tree / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["no-such-backend"]\nbuild-backend = "no_such"\n'
    )
    with pytest.raises(UnsatisfiableError, match=r"^thing cannot be built: .*no-such-backend"):
        make_wheel(source(tree), builder(tmp_path / "cache"))


def test_what_is_no_project_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with pytest.raises(EnvstoreError, match=r"cannot be built: .*not appear to be a Python proj"):
        make_wheel(source(tmp_path / "thing"), builder(tmp_path / "cache"))


def test_a_source_with_another_digest_is_refused(sdist: Path, tmp_path: Path) -> None:
    asked = source(sdist)
    assert asked.build is not None
    wrong = dataclasses.replace(asked, build=dataclasses.replace(asked.build, sha256="0" * 64))
    with pytest.raises(CorruptError):
        make_wheel(wrong, builder(tmp_path / "cache"))


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    asked = source(tmp_path, "gone", url=(tmp_path / "gone-1.0.tar.gz").as_uri())
    with pytest.raises(NotFoundError):
        make_wheel(asked, builder(tmp_path / "cache"))


def test_what_is_compiled_here_may_not_run_elsewhere(tmp_path: Path) -> None:
    make_sdist(tmp_path, "compiled", "1.0", {}, backend=PLATLIB)
    make_sdist(tmp_path, "pure", "1.0", {"pure.py": ""})
    here = builder(tmp_path / "cache")
    made, _ = make_wheel(source(tmp_path / "compiled-1.0.tar.gz"), here)
    assert made.filename.startswith("compiled-1.0-py3-none-linux_")
    older = dataclasses.replace(here, target=make_target(glibc="2.17"))
    said = r"compiled 1\.0 has no wheel for .* with glibc 2\.17, .* may not run there .*-binary"
    with pytest.raises(EnvstoreError, match=said):
        make_wheel(source(tmp_path / "compiled-1.0.tar.gz"), older)
    assert make_wheel(source(tmp_path / "pure-1.0.tar.gz"), older)[0].filename.endswith("any.whl")
    foreign = dataclasses.replace(here, target=make_target("linux-s390x"))
    with pytest.raises(EnvstoreError, match="does not fit"):
        make_wheel(source(tmp_path / "compiled-1.0.tar.gz"), foreign)


def test_directories_are_built_without_a_trace_in_them(tmp_path: Path) -> None:
    make_sdist(tmp_path, "from-source", "1.0", {"from_source.py": ""})
    subprocess.run(["tar", "xf", "from_source-1.0.tar.gz"], cwd=tmp_path, check=True)
    tree = tmp_path / "from_source-1.0"
    before = sorted(tree.rglob("*"))
    made, path = make_wheel(source(tree, "from-source"), builder(tmp_path / "cache"))
    assert made.version == "1.0"
    assert made.build == Build(tree.as_uri(), "", "backend", ())
    assert sorted(tree.rglob("*")) == before
    (tree / "src/from_source.py").write_text("VALUE = 8\n")
    changed, other = make_wheel(source(tree, "from-source"), builder(tmp_path / "cache"))
    assert changed.sha256 != made.sha256
    assert path.is_file()
    assert other.is_file()


def test_repositories_are_built_at_a_commit(tmp_path: Path) -> None:
    make_sdist(tmp_path, "from-source", "1.0", {"from_source.py": ""})
    subprocess.run(["tar", "xf", "from_source-1.0.tar.gz"], cwd=tmp_path, check=True)
    tree = tmp_path / "from_source-1.0"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=me", "-c", "user.email=me@mail.example"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tree, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tree / "src/from_source.py").write_text("later\n")
    place = f"git+{tree.as_uri()}@{commit}"
    made, _ = make_wheel(source(tree, "from-source", place), builder(tmp_path / "cache"))
    assert made.filename == "from_source-1.0-py3-none-any.whl"
    assert made.build is not None
    assert made.build.source == place
    absent = f"git+{tree.as_uri()}@{'0' * 40}"
    with pytest.raises(UnavailableError, match="git cannot fetch"):
        make_wheel(source(tree, "from-source", absent), builder(tmp_path / "cache"))
    command = f"git+ext::sh -c touch% {tmp_path}/made@{commit}"
    with pytest.raises(UnavailableError, match="not allowed"):
        make_wheel(source(tree, "from-source", command), builder(tmp_path / "cache"))
    assert not (tmp_path / "made").exists()
    outside = f"{place}#subdirectory=../.."
    with pytest.raises(NotFoundError, match="no directory"):
        make_wheel(source(tree, "from-source", outside), builder(tmp_path / "cache"))


def test_only_what_has_no_wheel_is_built(sdist: Path, tmp_path: Path) -> None:
    ready = PypiPackage("ready", "1.0", "ready-1.0-py3-none-any.whl", "https://x.example/r", "aa")
    told: list[tuple[str, int, int]] = []
    packages, local = make_wheels(
        [ready, source(sdist)], builder(tmp_path / "cache"), lambda *what: told.append(what)
    )
    assert packages[0] == ready
    assert list(local) == [packages[1].sha256]
    assert told == [("build", 0, 1), ("build", 1, 1)]
    record = next((tmp_path / "cache/built").glob("*/cp*.json"))
    assert json.loads(record.read_text())["sha256"] == packages[1].sha256
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in record.name


def test_the_environments_own_interpreter_builds(
    conda_channel: Channel, sdist: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    found = solve(["speedup"], [conda_channel.url], make_target(), cache=cache / "repodata")
    own = builder(cache, conda=found)
    program = Path(own.program())
    assert program.is_relative_to(cache)
    said = subprocess.run(
        [program, "-c", "import sys; print(sys.prefix)"], check=True, capture_output=True, text=True
    )
    assert said.stdout.strip() == str(program.parent.parent)
    assert not (program.parent.parent / "lib/speedup").exists()
    first = program.stat().st_ino
    assert make_wheel(source(sdist), own)[0].filename == "from_source-1.0-py3-none-any.whl"
    assert Path(own.program()).stat().st_ino == first
    gone = [
        dataclasses.replace(item, url=item.url.replace("/channel/", "/gone/")) for item in found
    ]
    with pytest.raises(NotFoundError):
        builder(tmp_path / "other", conda=tuple(gone)).program()


def test_an_interpreter_that_is_not_there(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    later = dataclasses.replace(builder(tmp_path / "cache"), python="3.99.1")
    with pytest.raises(NotFoundError, match=r"no Python 3\.99 is there to build from-source"):
        make_wheel(source(sdist), later)
