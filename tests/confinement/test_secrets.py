"""Secrets that are marked go in by every way there is, and come out by none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.fuse.records import RecordFiles
from envstore.redaction import HIDDEN, redacted
from tests.commands import Cli
from tests.s3server import SECRET_KEY, S3Server

TOKEN = "marked-session-token"
PASSWORD = "marked-password"
USER = "marked-user"
CHANNEL = "tk-marked-channel"
WRONG = "marked-wrong-secret-key"
SECRETS = (SECRET_KEY, TOKEN, PASSWORD, CHANNEL, WRONG)


class Seen:
    """All that was said, by where it was said."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self.texts: dict[str, bytes] = {}

    def run(
        self, *arguments: str | Path, fails: bool = False, plainly: bool = False, **env: str
    ) -> None:
        """Run a command in detail, perhaps also plainly; it may say what it wants."""
        ways = [["-vv"], ["--json"]] if plainly else [["-vv"]]
        for more in ways:
            debug = "1" if more == ["-vv"] else "0"
            done = self.cli(*more, *arguments, env={"ENVSTORE_DEBUG": debug, **env})
            assert bool(done.status) is fails, (arguments, done)
            self.texts[f"{more} {arguments} {sorted(env)}"] = f"{done.out}\n{done.err}".encode()

    def files(self, root: Path) -> None:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                self.texts[str(path)] = path.read_bytes()

    def check(self, count: int) -> None:
        assert len(self.texts) >= count
        for where, text in self.texts.items():
            for secret in SECRETS:
                assert secret.encode() not in text, (where, secret)


@pytest.fixture
def seen(tmp_path: Path, s3_server: S3Server) -> Seen:
    cli = Cli(tmp_path / "cli")
    bucket = s3_server.new_bucket()
    cli.env.update(s3_server.env)
    cli.env["ENVSTORE_URL"] = s3_server.url(bucket)
    cli.env["ENVSTORE_S3_TIMEOUT"] = "2"
    return Seen(cli)


def test_no_key_to_a_store_is_told_to_anybody(seen: Seen, tmp_path: Path) -> None:
    cli, tree, place = seen.cli, tmp_path / "tree", tmp_path / "place"
    tree.mkdir()
    place.mkdir()
    (tree / "file").write_bytes(os.urandom(100_000))
    cli.ok("init")
    seen.run("push", "t", tree)
    for command in (["ls"], ["show", "t"], ["log", "t"], ["du"], ["doctor"], ["verify"]):
        seen.run(*command)
    seen.run("gc", "--dry-run")
    seen.run("run", "t", "--", "true")
    cli.ok("-vv", "mount", "--node", "off", "t", place)
    try:
        assert (place / "file").read_bytes() == (tree / "file").read_bytes()
        (mounted,) = cli.json("mounts")["mounts"]
        seen.run("stats", place)
        seen.run("mounts")
        for name in ("holder_pid", "server_pid"):
            proc = Path(f"/proc/{mounted[name]}")
            seen.texts[name] = (proc / "cmdline").read_bytes() + (proc / "comm").read_bytes()
        seen.texts["mount table"] = Path("/proc/self/mountinfo").read_bytes()
        seen.files(cli.home)
        assert any(path.endswith(f"{RecordFiles(str(place)).id}.json") for path in seen.texts)
    finally:
        cli.ok("umount", place)
    seen.files(cli.home)
    seen.check(20)


@pytest.mark.parametrize(
    "env",
    [
        {"AWS_SECRET_ACCESS_KEY": WRONG},
        {"AWS_SESSION_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": WRONG},
        {"ENVSTORE_URL": f"s3://{USER}:{PASSWORD}@bucket/prefix"},
        {"ENVSTORE_URL": f"s3://bucket?endpoint=http://{USER}:{PASSWORD}@127.0.0.1:1"},
        {"ENVSTORE_URL": f"file://{USER}:{PASSWORD}@host/path"},
        {"ENVSTORE_URL": f"https://{USER}:{PASSWORD}@host/path"},
        {"ENVSTORE_URL": f"s3://bucket?secret={PASSWORD}"},
        {
            "ENVSTORE_URL": "s3://bucket",
            "AWS_ENDPOINT_URL": f"http://{USER}:{PASSWORD}@127.0.0.1:1",
        },
        {"HTTP_PROXY": f"http://{USER}:{PASSWORD}@127.0.0.1:1", "NO_PROXY": ""},
    ],
    ids=range(9),
)
def test_no_failure_repeats_a_secret(seen: Seen, tmp_path: Path, env: dict[str, str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    seen.run("show", "t", fails=True, plainly=True, **env)
    if "AWS_SECRET_ACCESS_KEY" in env:
        seen.run("mount", "--node", "off", "t", place, fails=True, **env)
    seen.files(seen.cli.home)
    seen.check(2)


def test_no_login_to_an_index_is_told_to_anybody(seen: Seen, tmp_path: Path) -> None:
    host = "127.0.0.1:1"
    requirements, conda = tmp_path / "requirements.txt", tmp_path / "environment.yml"
    requirements.write_text("surely-not-there\n")
    conda.write_text("name: x\nchannels: [private]\ndependencies: [surely-not-there]\n")
    (seen.cli.home / ".netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    (seen.cli.home / ".netrc").chmod(0o600)
    ways = (
        {"PIP_INDEX_URL": f"http://{USER}:{PASSWORD}@{host}/simple"},
        {"UV_INDEX": f"x=http://{host}/simple", "UV_INDEX_X_USERNAME": USER,
         "UV_INDEX_X_PASSWORD": PASSWORD},
    )  # fmt: skip
    for env in ways:
        seen.run("lock", requirements, "-o", tmp_path / "lock", fails=True, **env)
    alias = {"CONDA_CHANNEL_ALIAS": f"http://{USER}:{PASSWORD}@{host}/t/{CHANNEL}/"}
    seen.run("lock", conda, "-o", tmp_path / "lock", fails=True, **alias)
    (seen.cli.home / ".netrc").unlink()
    seen.files(seen.cli.home)
    seen.check(3)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("see http://u:p@host/x", f"see http://{HIDDEN}@host/x"),
        ("at https://host/t/tk-1/main/linux-64", f"at https://host/t/{HIDDEN}/main/linux-64"),
        ("GET /b?X-Amz-Signature=abc&x=1", f"GET /b?X-Amz-Signature={HIDDEN}&x=1"),
        ("{'x-amz-security-token': 'abc'}", f"{{'x-amz-security-token': '{HIDDEN}'}}"),
        ("Authorization: AWS4-HMAC Credential=k", f"Authorization: {HIDDEN}"),
        ("file:///tmp/t/x/y@z and s3://b/t/u", "file:///tmp/t/x/y@z and s3://b/t/u"),
        ("name@0123456789ab is not there: see envstore ls", None),
        ("the key is in-the-environment now", f"the key is {HIDDEN} now"),
        ("'back\\\\slash'", f"'{HIDDEN}'"),
    ],
)
def test_what_is_hidden(monkeypatch: pytest.MonkeyPatch, text: str, left: str | None) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "in-the-environment")
    monkeypatch.setenv("UV_INDEX_X_PASSWORD", "back\\slash")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "now")  # too short to be told from words
    assert redacted(text) == (left or text)


def test_a_long_text_takes_no_long_time() -> None:
    for piece in ("://", "a:", "https://h/t/", "?token=", "authorization", "https://a/a/"):
        redacted(piece * (400_000 // len(piece)))


def test_logs_and_tracebacks_in_them_are_redacted() -> None:
    script = (
        "import logging\n"
        "from envstore.redaction import protect_logs\n"
        "logging.basicConfig(level=logging.DEBUG, format='%(name)s %(message)s')\n"
        "protect_logs(); protect_logs()\n"
        "logging.getLogger('botocore.auth').debug('never said')\n"
        "try:\n"
        "    raise ValueError('http://me:hidden@host')\n"
        "except ValueError:\n"
        "    logging.exception('it failed at %s', 'http://me:hidden@host')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    shown = [line for line in done.stderr.splitlines() if "host" in line]
    assert len(shown) == 2
    assert not any("hidden" in line for line in shown)
    assert "never said" not in done.stderr
