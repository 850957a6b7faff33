from __future__ import annotations

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.channel.conda import Channel, build_channel
from tests.channel.packing import SUBDIR
from tests.channel.pypi import Index
from tests.channel.server import serving
from tests.channel.solving import UnsolvableError, install
from tests.channel.wheelhouse import locked_names, locked_version


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("venv") / "venv"
    uv("venv", "--quiet", "--python", sys.executable, str(path))
    return path


def uv(*arguments: str, cache: Path | None = None, ok: bool = True) -> str:
    command = [str(Path(sys.executable).parent / "uv"), *arguments, "--no-config"]
    command += ["--cache-dir", str(cache)] if cache else ["--no-cache"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout + done.stderr


def pip(venv: Path, url: str, *arguments: str, ok: bool = True) -> str:
    index = ["--default-index", f"{url}/simple/"]
    return uv("pip", "install", "--python", str(venv / "bin/python"), *index, *arguments, ok=ok)


def run(venv: Path, *command: str) -> str:
    done = subprocess.run(
        [venv / "bin" / command[0], *command[1:]], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_small_wheels_install_and_run(wheel_index: Index, venv: Path) -> None:
    with serving(wheel_index.path) as server:
        pip(venv, server.url, "tool-pkg[fancy]", "native-pkg", "from-source", "clash-a")
        assert server.bytes_sent > 1000
        assert server.paths(".whl.metadata")
    assert run(venv, "tool", "x") == f"tool 2.0 1.1 {venv} ['x']\n"
    assert run(venv, "schemes-python") == f"{venv}\n"
    assert run(venv, "schemes-shell") == "shell\n"
    program = "import native_pkg, from_source; print(native_pkg.answer(), from_source.VALUE)"
    assert run(venv, "python", "-c", program) == "43 7\n"
    assert (venv / "share/schemes/data.txt").is_file()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("broken-source", "libnowhere.h was not found"),
        ("wrong-hash", "Hash mismatch"),
        ("vanished", "404|vanished"),
        ("too-new", "3.99"),
        ("foreign", "foreign"),
        ("wants-missing", "not-in-the-index"),
        ("wants-old-leaf wants-new-leaf", "leaf"),
        ("yanked-pkg>=1.1", "yanked"),
    ],
)
def test_what_cannot_be_installed_is_not(
    wheel_index: Index, venv: Path, wanted: str, why: str
) -> None:
    with serving(wheel_index.path) as server:
        said = pip(venv, server.url, *wanted.split(), ok=False)
    assert any(one in " ".join(said.split()) for one in why.split("|")), said


def test_yanked_files_and_later_ones_are_passed_over(wheel_index: Index, venv: Path) -> None:
    with serving(wheel_index.path) as server:
        pip(venv, server.url, "yanked-pkg", "leaf", "--exclude-newer", "2025-02-01", "--reinstall")
    program = "import leaf, yanked_pkg; print(leaf.VERSION, yanked_pkg.VERSION)"
    assert run(venv, "python", "-c", program) == "1.0 1.0\n"


def test_find_links(wheel_index: Index, venv: Path) -> None:
    where = ["--no-index", "--find-links", str(wheel_index.find_links), "--reinstall"]
    uv("pip", "install", "--python", str(venv / "bin/python"), *where, "schemes")
    assert run(venv, "schemes-shell") == "shell\n"


def test_credentials(wheel_index: Index, venv: Path) -> None:
    with serving(wheel_index.path, user="joe", password="c0ffee") as server:
        said = pip(venv, server.url, "leaf", "--reinstall", ok=False)
        assert "401" in said or "credentials" in said
        pip(venv, server.url_as("joe", "c0ffee"), "leaf", "--reinstall")


def test_real_wheels_are_the_locked_ones(real_index: Index) -> None:
    for name in locked_names():
        assert real_index.file(name, locked_version(name)).suffix == ".whl"


def test_a_conda_channel_with_a_token(tmp_path: Path) -> None:
    channel = build_channel(tmp_path / "channel", ["greeting"])
    with serving(channel.path, token="c0ffee") as server:
        with pytest.raises(UnsolvableError):
            install([server.url], ["greeting"], None, tmp_path / "cache", platform=SUBDIR)
        request = urllib.request.Request(
            f"{server.url}/noarch/repodata.json", headers={"Authorization": "Bearer c0ffee"}
        )
        with urllib.request.urlopen(request) as answer:
            assert b"greeting" in answer.read()
    with serving(channel.path) as server:
        found = install([server.url], ["greeting"], tmp_path / "env", tmp_path, platform=SUBDIR)
        assert found == {"greeting": "2.0"}
        assert server.paths(".conda") == ["/noarch/greeting-2.0-0.conda"]


def test_ranges_faults_and_cuts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    pair = base64.b64encode(b"joe:c0ffee").decode()
    with serving(tmp_path, user="joe", password="c0ffee") as server:
        headers = {"Authorization": f"Basic {pair}", "Range": "bytes=10-19"}

        def ask() -> bytes:
            request = urllib.request.Request(f"{server.url}/file", headers=headers)
            with urllib.request.urlopen(request) as answer:
                return bytes(answer.read())

        assert ask() == bytes(range(10, 20))
        headers["Range"] = "bytes=-5"
        assert ask() == bytes(range(95, 100))
        server.faults.statuses["/file"] = [503]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask()
        del headers["Range"]
        server.faults.cuts["/file"] = [30]
        with pytest.raises(Exception, match="IncompleteRead"):
            ask()
        assert ask() == bytes(range(100))
        assert [request.status for request in server.requests] == [206, 206, 503, 200, 200]


def test_the_server_gives_nothing_from_elsewhere(conda_channel: Channel) -> None:
    with serving(conda_channel.path / "noarch") as server:
        for path in (f"/../{SUBDIR}/repodata.json", f"/%2e%2e/{SUBDIR}/repodata.json"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(server.url + path)
