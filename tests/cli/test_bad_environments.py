"""Environments that cannot be: one clear line each, and nothing is stored or left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.channel.broken import NAMES, OUTSIDE
from tests.channel.conda import Channel
from tests.channel.pypi import Index
from tests.channel.server import serving
from tests.commands import Cli

# These say something odd, and hold all that they say.
SOUND = {"sound", "paths-unlisted", "paths-no-placeholder"}
NOT_AS_LISTED = {
    "wrong-sha256": "sha256",
    "wrong-size": "12345",
    "vanished": "not there",
    "truncated": "cut off",
    "garbage": "no zip archive",
    "twice": "twice",
    "escaping": "leads out",
    "escaping-inside": "leads out",
    "absolute": "absolute",
    "through-symlink": "leads out",
    "hardlink-outside": "/etc/passwd",
    "device": "device",
    "fifo": "FIFO",
    "paths-wrong-sha256": "SHA-256",
    "paths-wrong-size": "29 bytes",
    "paths-missing": "share/not/there",
    "paths-escaping": "leads out",
    "paths-bad-mode": "paths.json",
    "paths-garbage": "paths.json",
    "index-garbage": "index.json",
    "index-other-name": "holds name 'x'",
    "entry-point-escaping": "../",
    "entry-point-code": "os:system",
}


def conda(cli: Cli, specs: list[str], *channels: str) -> Path:
    path = cli.root / "environment.yml"
    path.write_text(f"channels: {json.dumps(channels)}\ndependencies: {json.dumps(specs)}\n")
    return path


def pip(cli: Cli, url: str, *lines: str) -> Path:
    path = cli.root / "requirements.txt"
    path.write_text("\n".join([f"--index-url {url}/simple/", *lines]) + "\n")
    return path


@pytest.fixture
def empty(cli: Cli) -> Cli:
    cli.ok("init")
    return cli


def nothing_is_there(cli: Cli) -> None:
    assert cli.refs() == {}
    assert cli.json("verify")["problems"] == []
    there = {path.name for path in cli.root.iterdir()}
    assert there <= {"store", "home", "environment.yml", "requirements.txt"}
    for folder in (cli.root, cli.root.parent, Path("/"), Path("/tmp")):
        assert not (folder / OUTSIDE).exists()


def test_what_is_wrong_is_known_of_all_that_is_broken() -> None:
    assert set(NAMES) == SOUND | set(NOT_AS_LISTED)


def test_broken_packages(empty: Cli, broken_channel: Channel, conda_channel: Channel) -> None:
    for name, says in NOT_AS_LISTED.items():
        spec = conda(empty, ["python", name], broken_channel.url, conda_channel.url)
        if not name.startswith("entry-point"):
            spec = conda(empty, [name], broken_channel.url)
        empty.fails(1, "push", "bad", spec, says=[name, says])
    nothing_is_there(empty)
    empty.ok("push", "good", conda(empty, sorted(SOUND), broken_channel.url))


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["nothing-like-it"], ["nothing-like-it"]),
        (["greeting 9.*"], ["greeting 9.*"]),
        (["needs-cuda"], ["__cuda >=12.0", "--cuda"]),
        (["needs-new-glibc"], ["__glibc >=2.99", "--glibc"]),
        (["wants-missing"], ["wants-missing", "not-in-the-channel"]),
        (["wants-old-greeting", "wants-new-greeting"], ["greeting 1.*", "greeting 2.*"]),
        (["post-link-fails"], ["status 3", "cannot do it", "--no-scripts"]),
    ],
)
def test_conda_packages_that_do_not_fit(
    empty: Cli, conda_channel: Channel, specs: list[str], says: list[str]
) -> None:
    empty.fails(1, "push", "bad", conda(empty, specs, conda_channel.url), says=says)
    nothing_is_there(empty)


def test_channels_that_do_not_answer(empty: Cli, conda_channel: Channel, tmp_path: Path) -> None:
    def fails(url: str, *says: str) -> None:
        empty.fails(1, "push", "bad", conda(empty, ["greeting"], url), says=says)

    fails((tmp_path / "nowhere").as_uri(), "nowhere")
    with serving(tmp_path) as server:
        fails(server.url, server.url, "404")
    fails(server.url, "cannot reach", server.url)
    with serving(conda_channel.path, token="c0ffee") as server:
        fails(server.url, "needs credentials", "401")
    nothing_is_there(empty)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["no-such"], ["no-such"]),
        (["leaf ==9"], ["leaf==9"]),
        (["yanked-pkg >=1.1"], ["yanked", "it eats data"]),
        (["wrong-hash"], ["wrong-hash-1.0", "sha256"]),
        (["vanished"], ["vanished", "404"]),
        (["too-new"], ["3.99"]),
        (["foreign"], ["foreign", "platform"]),
        (["wants-missing"], ["not-in-the-index"]),
        (["wants-old-leaf", "wants-new-leaf"], ["leaf>=1.1", "leaf==1.0"]),
        (["broken-source"], ["libnowhere.h was not found", "log: "]),
        ([f"leaf ==1.0 --hash=sha256:{'0' * 64}"], ["leaf 1.0", "hash"]),
    ],
)
def test_python_packages_that_do_not_fit(
    empty: Cli, wheel_index: Index, lines: list[str], says: list[str]
) -> None:
    with serving(wheel_index.path) as server:
        empty.fails(1, "push", "bad", pip(empty, server.url, *lines), says=says)
    nothing_is_there(empty)


def test_indexes_that_do_not_answer(empty: Cli, wheel_index: Index) -> None:
    with serving(wheel_index.path, user="joe", password="c0ffee") as server:
        spec = pip(empty, server.url, "leaf")
        empty.fails(1, "push", "bad", spec, says=["needs credentials", "401"])
        line = empty.fails(2, "push", "bad", pip(empty, server.url_as("joe", "c0ffee"), "leaf"))
        assert "c0ffee" not in line
    spec = pip(empty, server.url, "leaf")
    empty.fails(1, "push", "bad", spec, says=["cannot reach", server.url])
    nothing_is_there(empty)


def test_credentials_are_found_where_it_says_and_stored_nowhere(
    empty: Cli, wheel_index: Index, conda_channel: Channel
) -> None:
    (empty.home / ".netrc").write_text("machine 127.0.0.1 login joe password s3cr3t-one\n")
    (empty.home / ".netrc").chmod(0o600)
    with serving(wheel_index.path, user="joe", password="s3cr3t-one") as server:
        empty.ok("push", "pip", pip(empty, server.url, "leaf"))
    tokens = empty.home / "auth.json"
    tokens.write_text(json.dumps({"127.0.0.1": {"BearerToken": "s3cr3t-two"}}))
    with serving(conda_channel.path, token="s3cr3t-two") as server:
        spec = conda(empty, ["greeting"], server.url)
        env = {"RATTLER_AUTH_FILE": str(tokens)}
        empty.ok("lock", spec, "-o", "a.lock", env=env)
        empty.ok("push", "conda", "a.lock", env=env)
    empty.ok("pull", "conda", "pulled")
    assert (empty.root / "pulled/share/greeting/text").read_text() == "greetings, 2.0\n"
    kept = [tokens, empty.home / ".netrc"]
    for path in empty.root.rglob("*"):
        if path.is_file() and path not in kept:
            assert b"s3cr3t" not in path.read_bytes(), path
    for name in ("pip", "conda"):
        assert "s3cr3t" not in empty.ok("show", name, "--lock")
