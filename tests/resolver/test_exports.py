"""Exports are right if the tools they are for take them."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.pylock import Pylock

from envstore.errors import UsageError
from envstore.resolver.exports import FORMATS, export_lock
from envstore.resolver.lock import Build, LocalPython, Lock, PypiPackage
from envstore.resolver.lockfile import LockError, encode_lock
from envstore.resolver.request import PypiRequest, Request
from tests.channel.wheelmaking import make_sdist, make_wheel
from tests.locks import conda, full_lock, local_lock, sha256

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


def located(path: Path, name: str, version: str, **more: Any) -> PypiPackage:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return PypiPackage(name, version, path.name, path.as_uri(), digest, len(data), **more)


@pytest.fixture
def lock(tmp_path: Path) -> Lock:
    """Return a lock of both kinds whose wheels are in a directory here."""
    files = tmp_path / "wheels"
    leaf = make_wheel(files, "leaf", "1.0+local.1", {"leaf.py": ""})
    tool = make_wheel(files, "tool-pkg", "2.0", {"tool.py": ""}, requires=["leaf", "numpy"])
    apart = make_wheel(tmp_path / "apart", "apart", "3", {"apart.py": ""})
    sdist = make_sdist(tmp_path / "sdists", "made", "4", {"made.py": ""})
    source = sdist.as_uri()
    return Lock(
        "linux-64",
        (
            conda("python", f"{MINOR}.7", depends=("libzlib >=1", "tzdata")),
            conda("libzlib", "1.3"),
            conda("tzdata", "2026a", noarch="generic", subdir="noarch"),
            conda("numpy", "2.1.3", depends=("python",), md5="0" * 32),
            located(leaf, "leaf", "1.0+local.1"),
            located(tool, "tool-pkg", "2.0", requires=("leaf", "numpy"), requires_python=">=3.8"),
            located(apart, "apart", "3", direct=apart.as_uri()),
            PypiPackage(
                "made",
                "4",
                "made-4-py3-none-any.whl",
                "",
                sha256("made"),
                build=Build(source, hashlib.sha256(sdist.read_bytes()).hexdigest(), "backend"),
            ),
        ),
        virtual={"__glibc": "2.28", "__archspec": "1=x86_64"},
        request=Request(
            pypi=PypiRequest(("tool-pkg", "made"), find_links=(files.as_uri(),), no_index=True)
        ),
    )


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("venv") / "venv"
    uv("venv", "--quiet", "--python", sys.executable, str(path))
    return path / "bin" / "python"


def uv(*arguments: str) -> str:
    from uv import find_uv_bin

    done = subprocess.run(
        [find_uv_bin(), "--offline", "--no-config", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def planned(venv: Path, *arguments: str) -> set[str]:
    said = uv("pip", "install", "--python", str(venv), "--dry-run", "--no-deps", *arguments)
    lines = [line.strip() for line in said.splitlines()]
    return {line.removeprefix("+ ").split("==")[0].split(" ")[0] for line in lines if "+ " in line}


def test_uv_takes_pylock(lock: Lock, venv: Path, tmp_path: Path) -> None:
    path = tmp_path / "pylock.toml"
    path.write_bytes(export_lock(lock, "pylock"))
    assert planned(venv, "-r", str(path)) == {"leaf", "tool-pkg", "apart", "made"}
    content = tomllib.loads(path.read_text())
    assert len(Pylock.from_dict(content).packages) == 4
    assert content["lock-version"] == "1.0"
    assert content["requires-python"] == f"=={MINOR}.*"
    leaf, tool, apart, made = content["packages"]
    assert leaf["wheels"][0]["hashes"] == {"sha256": lock.pypi()[0].sha256}
    assert leaf["wheels"][0]["size"] == lock.pypi()[0].size
    assert tool["requires-python"] == ">=3.8"
    assert apart["archive"]["url"] == lock.pypi()[2].direct
    assert made["sdist"]["name"] == "made-4.tar.gz"
    assert "#   numpy 2.1.3\n" in path.read_text()


def test_uv_checks_the_hashes_of_pylock(lock: Lock, venv: Path, tmp_path: Path) -> None:
    path = tmp_path / "pylock.toml"
    wrong = replace(lock.pypi()[0], sha256="0" * 64)
    path.write_bytes(export_lock(replace(lock, packages=(wrong,)), "pylock"))
    with pytest.raises(AssertionError, match=r"[Hh]ash mismatch"):
        uv("pip", "install", "--python", str(venv), "-r", str(path))


def test_uv_takes_requirements_with_hashes(lock: Lock, venv: Path, tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_bytes(export_lock(lock, "requirements"))
    found = planned(venv, "--require-hashes", "-r", str(path))
    assert found == {"leaf", "tool-pkg", "apart", "made"}
    assert "#   numpy 2.1.3\n" in path.read_text()


def test_requirements_name_the_indexes_of_the_request() -> None:
    lock = full_lock()
    asked = replace(lock.request.pypi, no_index=False)
    lines = export_lock(replace(lock, request=replace(lock.request, pypi=asked)), "requirements")
    assert b"\n--index-url https://index.example/simple\n" in lines
    assert b"\n--extra-index-url https://other.example/simple\n" in lines
    assert b"\ndemo[fast] @ https://files.example/demo-1.2.tar.gz \\\n    --hash=sha256:" in lines


def test_rattler_takes_pixi_lock(lock: Lock, tmp_path: Path) -> None:
    from rattler import LockFile

    path = tmp_path / "pixi.lock"
    path.write_bytes(export_lock(lock, "pixi"))
    environment = LockFile.from_path(path).default_environment()
    assert environment is not None
    (platform,) = environment.platforms()
    assert platform.name == "linux-64"
    found = {(p.name, str(p.version)) for p in environment.packages(platform) or ()}
    assert found == {(p.name, p.version) for p in (*lock.conda(), *lock.pypi())}
    records = environment.conda_repodata_records_for_platform(platform) or []
    by_name = {record.name.source: record for record in records}
    assert {name: (record.sha256 or b"").hex() for name, record in by_name.items()} == {
        package.name: package.sha256 for package in lock.conda()
    }
    assert by_name["python"].depends == ["libzlib >=1", "tzdata"]
    assert by_name["tzdata"].noarch.generic
    text = path.read_text()
    packages = {package.name: package for package in environment.packages(platform) or ()}
    for package in lock.pypi():
        digest = package.build.sha256 if package.build else package.sha256
        assert packages[package.name].hashes.sha256 == bytes.fromhex(digest)
    tool = packages["tool-pkg"]
    assert tool.requires_dist == ["leaf", "numpy"]
    assert str(tool.requires_python) == ">=3.8"
    assert "__archspec=1=x86_64" in text
    asyncio.run(asyncio.sleep(0.02))


def test_rattler_takes_an_explicit_list(lock: Lock) -> None:
    from rattler.explicit_environment import ExplicitEnvironmentSpec

    text = export_lock(lock, "explicit").decode()
    found = ExplicitEnvironmentSpec.from_str(text)
    assert str(found.platform) == "linux-64"
    assert [item.url for item in found.packages] == [
        f"{package.url}#sha256:{package.sha256}" for package in lock.conda()
    ]
    assert "tool-pkg 2.0" in text


def test_a_git_source_is_named_by_its_commit() -> None:
    build = Build(f"git+https://code.example/demo.git@{'1f' * 20}#subdirectory=src", "")
    demo = replace(full_lock().pypi()[2], build=build)
    (package,) = tomllib.loads(export_lock(Lock("linux-64", (demo,)), "pylock").decode())[
        "packages"
    ]
    Pylock.from_dict(tomllib.loads(export_lock(Lock("linux-64", (demo,)), "pylock").decode()))
    assert package["vcs"] == {
        "type": "git",
        "url": "https://code.example/demo.git",
        "commit-id": "1f" * 20,
        "subdirectory": "src",
    }


@pytest.mark.parametrize("form", ["pylock", "requirements", "pixi"])
def test_what_was_built_from_nothing_that_can_be_named_is_refused(form: str) -> None:
    demo = replace(full_lock().pypi()[2], build=Build("file:///srv/demo", ""), direct="")
    with pytest.raises(UsageError, match="demo: it was built from a source that has no digest"):
        export_lock(Lock("linux-64", (demo,)), form)


def test_what_a_format_cannot_hold_is_said() -> None:
    only_conda = Lock("linux-64", (conda("zlib"),))
    for form in ("pylock", "requirements"):
        with pytest.raises(UsageError, match="this lock has none"):
            export_lock(only_conda, form)
    with pytest.raises(UsageError, match="@EXPLICIT list holds conda packages"):
        export_lock(Lock("linux-64", full_lock().pypi()), "explicit")
    with pytest.raises(UsageError, match="cannot hold an interpreter of this machine"):
        export_lock(local_lock(), "pixi")


def test_an_interpreter_of_this_machine_is_said_beside_wheels() -> None:
    python = LocalPython("3.11.2", sha256("p"), "lib/python3.11/site-packages")
    lock = Lock("linux-64", (python, *full_lock().pypi()))
    assert b"# For Python 3.11.2.\n" in export_lock(lock, "requirements")


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_incomplete_is_exported(form: str) -> None:
    lock = Lock("linux-64", (replace(conda("zlib"), sha256=""),))
    with pytest.raises(LockError, match=r"zlib 1\.0 cannot be locked"):
        export_lock(lock, form)


def test_its_own_format_is_one_of_them() -> None:
    assert export_lock(full_lock(), "envstore") == encode_lock(full_lock())
