from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from conda_package_streaming.package_streaming import stream_conda_component

from tests.channel.broken import NAMES
from tests.channel.conda import Channel, build_channel, upload_channel
from tests.channel.interpreter import MINOR, SITE_PACKAGES, VERSION
from tests.channel.packing import PLACEHOLDER, SUBDIR
from tests.channel.server import serving
from tests.channel.solving import UnsolvableError, install
from tests.s3server import S3Server

LEAN = ["python", "hello-pkg", "binprefix", "shortprefix", "speedup", "settings", "legacy"]


def run(prefix: Path, *command: str) -> str:
    program = str(prefix / "bin" / command[0])
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prefix(conda_channel: Channel, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("installed") / "env"
    install([conda_channel.url], LEAN, path, cache, platform=SUBDIR)
    return path


def test_the_interpreter_runs_from_where_it_was_installed(prefix: Path) -> None:
    said = run(
        prefix,
        "python",
        "-Ic",
        "import sys, ssl, sqlite3, sysconfig, platform\n"
        "print(sys.prefix, platform.python_version(), sysconfig.get_path('purelib'), *sys.path)",
    ).split()
    purelib = str(prefix / SITE_PACKAGES)
    assert said[:3] == [str(prefix), VERSION, purelib]
    assert purelib in said[3:]
    assert all(path.startswith(str(prefix)) for path in said[3:])


def test_what_python_was_configured_with_is_the_prefix(prefix: Path) -> None:
    said = run(
        prefix,
        "python",
        "-Ic",
        "import sysconfig; print(*sysconfig.get_config_vars('CONFIG_ARGS', 'INCLUDEPY'))",
    )
    assert str(prefix) in said
    assert PLACEHOLDER not in said
    assert run(prefix, f"pydoc{MINOR}", "textwrap").startswith("Help on module textwrap")


def test_entry_points_and_scripts_run(prefix: Path) -> None:
    assert run(prefix, "hello", "a b") == f"hello 1.1 from {prefix} ['a b']\n"
    assert run(prefix, "hello-script") == f"script 1.1 {prefix}/bin/python\n"
    assert run(prefix, "greet") == "greetings, 2.0\n"
    assert run(prefix, "python", "-c", "import speedup; print(speedup.answer())") == "42\n"


def test_prefixes_are_replaced_in_binaries_scripts_and_text(prefix: Path) -> None:
    assert run(prefix, "bpshow") == f"{prefix}\n{prefix}/share:{prefix}/lib\n"
    assert run(prefix, "spshow") == f"{prefix}\n{prefix}/share:{prefix}/lib\n"
    assert run(prefix, "bpshell") == f"shell {prefix}/bin/bpshell {prefix}\n"
    assert run(prefix, "bpscript") == f"script {prefix} {prefix}\n"
    assert f"prefix={prefix}\n" in (prefix / "share/binprefix/conf.ini").read_text()
    assert (prefix / "share/legacy/conf").read_text() == f"prefix = {prefix}\n"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("needs-cuda", "__cuda"),
        ("needs-new-glibc", "__glibc"),
        ("wants-missing", "not-in-the-channel"),
        ("nothing-like-it", "nothing-like-it"),
    ],
)
def test_what_cannot_be_solved_is_not(
    conda_channel: Channel, cache: Path, spec: str, why: str
) -> None:
    with pytest.raises(UnsolvableError, match=why):
        install([conda_channel.url], [spec], None, cache, platform=SUBDIR)


def test_packages_that_exclude_each_other(conda_channel: Channel, cache: Path) -> None:
    both = ["wants-old-greeting", "wants-new-greeting"]
    with pytest.raises(UnsolvableError, match="greeting"):
        install([conda_channel.url], both, None, cache, platform=SUBDIR)


def test_an_older_friend_asks_for_an_older_version(conda_channel: Channel, cache: Path) -> None:
    found = install(
        [conda_channel.url], ["hello-pkg", "greeting 1.*"], None, cache, platform=SUBDIR
    )
    assert found == {"hello-pkg": "1.0", "greeting": "1.0", "python": VERSION}


def test_post_link_scripts_run_if_asked_for(
    conda_channel: Channel, cache: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "env"
    install([conda_channel.url], ["post-link"], prefix, cache, platform=SUBDIR, scripts=True)
    assert (prefix / "share/post-link/made.txt").read_text() == "post-link 1.0\n"


def test_real_numpy_and_click(numpy_channel: Channel, cache: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "env"
    specs = ["numpy", "click", "python-dateutil", "hello-pkg"]
    install([numpy_channel.url], specs, prefix, cache, platform=SUBDIR)
    program = "import numpy, click, ssl, sqlite3, dateutil; print(numpy.arange(4).sum())"
    assert run(prefix, "python", "-c", program) == "6\n"
    assert run(prefix, "hello").startswith("hello 1.1 from")
    assert str(prefix) in run(prefix, "numpy-config", "--pkgconfigdir")


def test_a_channel_on_s3(conda_channel: Channel, s3_server: S3Server, tmp_path: Path) -> None:
    prefix = tmp_path / "env"
    channels = [upload_channel(conda_channel, s3_server)]
    install(channels, ["legacy"], prefix, tmp_path / "cache", platform=SUBDIR, s3=s3_server)
    assert (prefix / "share/legacy/conf").read_text() == f"prefix = {prefix}\n"


@pytest.mark.parametrize("name", ["wrong-sha256", "truncated", "garbage", "vanished"])
def test_rattler_refuses_broken_packages_too(
    broken_channel: Channel, tmp_path: Path, name: str
) -> None:
    # Over HTTP: it does not compare the hashes of packages in a directory.
    with serving(broken_channel.path) as server:
        channels, cache = [server.url], tmp_path / "cache"
        install(channels, ["sound"], tmp_path / "env", cache, platform=SUBDIR)
        assert (tmp_path / "env/share/sound/file.txt").is_file()
        with pytest.raises(UnsolvableError, match=name):
            install(channels, [name], tmp_path / "other", cache, platform=SUBDIR)


def test_hostile_packages_are_what_they_are_called(broken_channel: Channel) -> None:
    def members(name: str) -> dict[str, tarfile.TarInfo]:
        path = broken_channel.package(name).path
        with path.open("rb") as archive:
            streamed = stream_conda_component(path.name, archive, "pkg")
            return {member.name: member for _, member in streamed}

    assert "../envstore-tests-escaped" in members("escaping")
    assert "/tmp/envstore-tests-escaped" in members("absolute")
    assert members("device")["share/null"].ischr()
    assert members("hardlink-outside")["share/passwd"].linkname == "/etc/passwd"
    through = members("through-symlink")
    assert through["share/way-out"].linkname == "../../.."
    assert "share/way-out/envstore-tests-escaped" in through
    assert set(NAMES) == {one.about.name for one in broken_channel.packages.values()}


def test_packages_are_the_same_bytes_whenever_they_are_packed(
    conda_channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["hello-pkg", "speedup", "binprefix", "shortprefix"]
    monkeypatch.setattr("tests.channel.conda.CACHE", tmp_path / "empty")
    again = build_channel(tmp_path / "channel", names)
    for name, package in again.packages.items():
        assert package.sha256 == conda_channel.packages[name].sha256, name


def test_a_channel_has_only_what_was_asked_for(tmp_path: Path) -> None:
    channel = build_channel(tmp_path / "channel", ["greeting"])
    assert set(channel.packages) == {"greeting-1.0-0.conda", "greeting-2.0-0.conda"}
    assert channel.package("greeting").about.version == "2.0"
    with zipfile.ZipFile(channel.package("greeting", "1.0").path) as archive:
        assert archive.namelist()[0] == "metadata.json"
