"""Whatever is wrong: one line that says what, where and how to mend it, and refs as before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest

from envstore.store import canonical
from tests.commands import NOBODY, Cli, one_line
from tests.s3server import SECRET_KEY, S3Server
from tests.trees import describe, noise

_READERS = [
    ("pull", "{}", "out"),
    ("mount", "{}", "mnt"),
    ("mount", "--foreground", "{}", "mnt"),
    ("run", "{}", "--", "true"),
    ("ls", "{}"),
    ("ls", "{}:/lib"),
    ("show", "{}"),
    ("log", "{}"),
    ("diff", "{}", "tree"),
    ("diff", "tree", "{}"),
    ("tag", "{}", "other"),
    ("verify", "{}"),
]
_NAMED = [*_READERS, ("rm", "--yes", "{}"), ("rm", "--yes", "tree", "{}"), ("du", "{}")]


def _filled(command: tuple[str, ...], ref: str) -> list[str]:
    return [word.format(ref) for word in command]


@pytest.mark.parametrize("command", _NAMED, ids=" ".join)
def test_an_unknown_ref(stored: Cli, command: tuple[str, ...]) -> None:
    (stored.root / "mnt").mkdir()
    before = stored.refs()
    stored.fails(1, *_filled(command, "team/nope:1"), says=["no ref team/nope:1", "envstore ls"])
    assert stored.refs() == before
    assert not (stored.root / "out").exists()


def test_an_unknown_parent(stored: Cli, tree: Path) -> None:
    before = stored.refs()
    stored.fails(1, "push", "tree", tree, "--parent", "nope", says=["no ref nope:latest"])
    assert stored.refs() == before


def test_an_unknown_digest(stored: Cli) -> None:
    stored.fails(1, "show", "@00000000", says=["no snapshot starts with 00000000", "envstore ls"])
    stored.fails(1, "tag", f"@{'0' * 64}", "zero", says=["0" * 64, "is not in"])
    assert list(stored.refs()) == ["default/tree/latest"]


@pytest.mark.parametrize("command", [*_NAMED, ("push", "{}", ".")], ids=" ".join)
@pytest.mark.parametrize("ref", ["a b", "a/b/c"])
def test_a_malformed_ref(stored: Cli, command: tuple[str, ...], ref: str) -> None:
    (stored.root / "mnt").mkdir()
    before = stored.refs()
    line = stored.fails(2, *_filled(command, ref))
    assert "not a valid ref" in line or "not a namespace" in line
    assert stored.refs() == before


@pytest.mark.parametrize("ref", ["", ":", "a:", "/a", "../x", "a:b:c", "é", "a\nb", "a" * 129, "."])
def test_more_malformed_refs(stored: Cli, ref: str) -> None:
    stored.fails(2, "show", ref, says=["not a valid ref"])
    stored.fails(2, "ls", ref, says=["not a valid ref"])


@pytest.mark.parametrize("ref", ["@", "@xyz", "@12", "tree@", "@1234567g"])
def test_a_malformed_digest(stored: Cli, ref: str) -> None:
    stored.fails(2, "show", ref, says=["is not a digest", "4 to 64 hex digits"])


@pytest.mark.parametrize("command", [*_READERS, ("push", "{}", "."), ("du",)], ids=" ".join)
def test_a_place_that_is_no_store(cli: Cli, command: tuple[str, ...]) -> None:
    (cli.root / "mnt").mkdir()
    cli.store.mkdir()
    (cli.store / "notes.txt").write_text("mine")
    cli.fails(1, *_filled(command, "tree"), says=["is not an envstore store", "envstore init"])
    assert os.listdir(cli.store) == ["notes.txt"]


def test_a_store_that_does_not_exist(cli: Cli) -> None:
    cli.fails(1, "ls", says=[str(cli.store), "does not exist", "envstore init"])
    cli.fails(1, "push", "x", cli.home, says=[str(cli.store), "does not exist", "envstore init"])
    assert not cli.store.exists()


def test_a_store_that_is_a_file(cli: Cli) -> None:
    cli.store.write_text("I am a file")
    cli.fails(1, "ls", says=[str(cli.store), "is not a directory"])
    cli.fails(1, "init", says=[str(cli.store)])
    assert cli.store.read_text() == "I am a file"


@pytest.mark.parametrize(
    "url", ["http://host/x", "s3://", "s3:bucket", "file://host/x", "s3://b/p?colour=red"]
)
def test_a_malformed_store_url(cli: Cli, url: str) -> None:
    cli.fails(2, "--store", url, "ls", says=["file:///abs/path"])


def test_a_store_url_with_a_secret_is_not_repeated(cli: Cli) -> None:
    line = cli.fails(2, "--store", f"s3://key:{SECRET_KEY}@bucket", "ls", says=["AWS_SECRET"])
    assert SECRET_KEY not in line


def test_init_where_something_else_is(cli: Cli) -> None:
    cli.store.mkdir()
    (cli.store / "notes.txt").write_text("mine")
    cli.fails(2, "init", says=["not empty", "notes.txt"])
    assert os.listdir(cli.store) == ["notes.txt"]


@pytest.mark.parametrize("command", [*_READERS, ("push", "{}", "."), ("init",)], ids=" ".join)
def test_a_store_of_a_newer_format(stored: Cli, command: tuple[str, ...]) -> None:
    (stored.root / "mnt").mkdir()
    config = stored.store / "envstore.json"
    newer = {**canonical.decode(config.read_bytes(), "description"), "format": 99}
    config.write_bytes(canonical.encode_checked(newer))
    before = stored.refs()
    stored.fails(1, *_filled(command, "tree"), says=["format 99", "upgrade envstore"])
    assert stored.refs() == before


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"format": "1"}', "\x00\xff"])
def test_a_store_whose_description_is_damaged(stored: Cli, damage: str) -> None:
    (stored.store / "envstore.json").write_bytes(damage.encode("latin-1"))
    stored.fails(1, "ls", says=["envstore.json"])


def test_a_path_that_is_not_there(stored: Cli) -> None:
    before = stored.refs()
    stored.fails(1, "push", "tree", stored.root / "nope", says=["no such path", "nope"])
    stored.fails(1, "ls", "tree:/no/such", says=["there is no /no/such"])
    stored.fails(2, "pull", "tree", stored.root / "no" / "out", says=["not a directory", "create"])
    assert stored.refs() == before


def test_a_typing_error_makes_no_store(cli: Cli) -> None:
    del cli.env["ENVSTORE_URL"]
    cli.fails(1, "push", "tree", cli.root / "nope", says=["no such path"])
    cli.fails(2, "push", "a b", cli.home, says=["not a valid ref"])
    cli.fails(1, "ls", says=["nothing was pushed yet", "envstore push"])
    cli.fails(1, "run", "tree", "--", "true", says=["nothing was pushed yet"])
    assert not (cli.home / ".local" / "share").exists()


def test_a_socket_in_the_tree(stored: Cli, tree: Path) -> None:
    before = stored.refs()
    with socket.socket(socket.AF_UNIX) as listener:
        with chdir(tree):  # its address must be short
            listener.bind("sock")
        stored.fails(2, "push", "tree", tree, "--kind", "dir", says=["sock is a socket", "remove"])
    assert stored.refs() == before


def test_pull_into_a_directory_in_use(stored: Cli) -> None:
    out = stored.root / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    stored.fails(2, "pull", "tree", out, says=[str(out), "not empty"])
    assert os.listdir(out) == ["mine"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["frob"],
        ["push", "tree"],
        ["push", "--frob", "tree", "."],
        ["push", "tree", ".", "--level", "99"],
        ["push", "tree", ".", "--kind", "cake"],
        ["completion"],
        ["completion", "tcsh"],
        ["ls", "-R"],
        ["log", "-n", "0", "tree"],
        ["--cache-size", "much", "cache", "show"],
        ["run", "tree"],
        ["run", "tree", "sh", "-c", "true"],
        ["cache", "frob"],
        ["rm"],
        ["rm", "tree"],
        ["tag", "tree"],
        ["init", "a", "--store", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage(stored: Cli, arguments: list[str]) -> None:
    before = stored.refs()
    stored.fails(2, *arguments, says=["("])
    assert stored.refs() == before


def test_without_permission_to_read_the_store(ordinary: Cli) -> None:
    ordinary.store.mkdir(mode=0o700)
    ordinary.fails(1, "ls", says=["ermission denied", str(ordinary.store)])
    ordinary.fails(1, "push", "x", "/usr/include/linux/fuse.h", says=["ermission denied"])
    assert os.listdir(ordinary.store) == []


def test_without_permission_to_write_the_store(ordinary: Cli, tree: Path) -> None:
    root = Cli(ordinary.root / "root")
    root.store = ordinary.store
    root.env["ENVSTORE_URL"] = str(root.store)
    root.ok("init")
    root.ok("push", "tree", tree, "--kind", "dir")
    before = ordinary.refs()
    ordinary.fails(1, "push", "mine", "/etc/hostname", says=["ermission denied", "check the owner"])
    ordinary.fails(1, "tag", "tree", "mine", says=["ermission denied"])
    ordinary.fails(1, "rm", "--yes", "tree", says=["ermission denied"])
    assert ordinary.refs() == before
    assert "lib/text" in ordinary.ok("ls", "-R", "tree"), "reading needs no more than reading"


def test_without_permission_to_read_the_tree(ordinary: Cli) -> None:
    ordinary.ok("init")
    secret = ordinary.root / "tree" / "secret"
    secret.parent.mkdir()
    secret.write_text("s")
    secret.chmod(0o600)
    ordinary.fails(
        1, "push", "t", secret.parent, "--kind", "dir", says=["secret", "ermission denied"]
    )
    assert ordinary.refs() == {}


def test_without_permission_to_write_the_cache(ordinary: Cli) -> None:
    ordinary.ok("init")
    cache = ordinary.root / "cache"
    cache.mkdir()
    for command in (["ls"], ["push", "t", "/etc/hostname"]):
        line = ordinary.fails(1, "--cache-dir", str(cache), *command, says=[str(cache)])
        assert "ENVSTORE_CACHE_DIR" in line
    assert ordinary.refs() == {}


def test_without_permission_to_write_the_destination(ordinary: Cli) -> None:
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    place = ordinary.root / "place"
    place.mkdir()
    ordinary.fails(1, "pull", "t", place / "out", says=[str(place), "ermission denied"])
    assert os.listdir(place) == []


def test_no_space_in_the_store(cli: Cli, tree: Path, small_disk: Path) -> None:
    cli.store = small_disk / "store"
    cli.env["ENVSTORE_URL"] = str(cli.store)
    cli.ok("init")
    cli.ok("push", "tree", tree, "--kind", "dir")
    before = cli.refs()
    (tree / "large").write_bytes(noise(1, 3 << 20))
    cli.fails(1, "push", "tree", tree, "--kind", "dir", says=["no space", "free space"])
    assert cli.refs() == before
    cli.ok("verify", "--read-data")
    (tree / "large").unlink()
    (tree / "small").write_text("fits")
    cli.ok("push", "tree", tree, "--kind", "dir")
    assert cli.refs() != before


def test_no_space_for_a_pull(stored: Cli, tree: Path, small_disk: Path) -> None:
    (tree / "large").write_bytes(noise(2, 3 << 20))
    stored.ok("push", "tree", tree, "--kind", "dir")
    stored.fails(1, "pull", "tree", small_disk / "out", says=["No space", "free space"])
    assert os.listdir(small_disk) == []


def test_no_space_in_the_cache(stored: Cli, tree: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes((2 << 20) - 8192))
    before = stored.refs()
    cache = ("--cache-dir", small_disk / "cache")
    stored.fails(1, *cache, "pull", "tree", stored.root / "out", says=["No space", "CACHE_DIR"])
    (tree / "more").write_text("more")
    stored.fails(1, *cache, "push", "tree", tree, "--kind", "dir", says=["CACHE_DIR"])
    assert stored.refs() == before


@pytest.fixture
def s3(cli: Cli, s3_server: S3Server) -> Cli:
    """The command line with a store in a bucket."""
    cli.env |= s3_server.env
    cli.env["ENVSTORE_URL"] = s3_server.url(s3_server.new_bucket(), "some/where")
    cli.ok("init")
    return cli


def test_wrong_credentials(s3: Cli, tree: Path) -> None:
    s3.ok("push", "tree", tree, "--kind", "dir")
    before = s3.json("ls")
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        for command in (
            ["ls"],
            ["push", "tree", tree],
            ["pull", "tree", s3.root / "out"],
            ["rm", "--yes", "tree"],
            ["run", "tree", "--", "true"],
        ):
            done = s3(*command, env=wrong)
            assert done.status == 1
            line = one_line(done, ["credentials", "AWS_SECRET_ACCESS_KEY"])
            assert SECRET_KEY not in line
    assert s3.json("ls") == before


def test_no_credentials(s3: Cli) -> None:
    del s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"]
    s3.fails(1, "ls", says=["no credentials", "AWS_ACCESS_KEY_ID"])


def test_a_bucket_that_does_not_exist(s3: Cli, s3_server: S3Server) -> None:
    url = s3_server.url("no-such-bucket")
    for command in ("init", "ls", "doctor"):
        line = s3("--store", url, command)
        assert line.status == 1
    s3.fails(1, "--store", url, "ls", says=["no-such-bucket does not exist", "create it"])


def test_a_prefix_that_is_no_store(s3: Cli, s3_server: S3Server) -> None:
    url = s3_server.url(s3_server.new_bucket(), "empty")
    s3.fails(1, "--store", url, "ls", says=["not an envstore store", "envstore init"])


def test_an_endpoint_where_nobody_listens(s3: Cli, tree: Path) -> None:
    (s3.root / "mnt").mkdir()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody's else, and refusing as long as it is not listening
        port = bound.getsockname()[1]
        away = {
            "ENVSTORE_URL": f"s3://bucket/x?endpoint=http://127.0.0.1:{port}",
            "ENVSTORE_S3_TIMEOUT": "2",
        }
        for command in (
            ["ls"],
            ["init"],
            ["push", "tree", tree],
            ["mount", "tree", s3.root / "mnt"],
            ["run", "tree", "--", "true"],
        ):
            s3.fails(1, *command, env=away, says=["cannot reach", str(port), "check the endpoint"])


@pytest.mark.parametrize("flag", [[], ["--foreground"]])
def test_a_mount_point_that_will_not_do(stored: Cli, flag: list[str]) -> None:
    place = stored.root / "place"
    stored.fails(1, "mount", *flag, "tree", place, says=[str(place), "does not exist", "mkdir"])
    place.mkdir()
    (place / "mine").write_text("mine")
    stored.fails(2, "mount", *flag, "tree", place, says=[str(place), "not empty"])
    stored.fails(2, "mount", *flag, "tree", place / "mine", says=["mine"])
    assert os.listdir(place) == ["mine"]


def test_a_mount_point_in_use(stored: Cli) -> None:
    place = stored.root / "place"
    place.mkdir()
    stored.ok("mount", "tree", place)
    try:
        stored.fails(2, "mount", "tree", place, says=["already a mount of", "umount"])
        with open(place / "lib" / "text"):
            stored.fails(1, "umount", place, says=[str(place), "--lazy"])
        assert (place / "lib" / "text").read_text() == "some text\n"
    finally:
        stored.ok("umount", place)
    stored.fails(1, "umount", place, says=["nothing is mounted"])


def test_umount_of_somebody_elses_mount(stored: Cli, small_disk: Path) -> None:
    stored.fails(2, "umount", small_disk, says=[str(small_disk), "not of envstore"])
    assert small_disk.is_mount()


@pytest.mark.parametrize(
    "command", [("mount", "t", "mnt"), ("run", "t", "--", "true")], ids="-".join
)
def test_without_fusermount3(ordinary: Cli, command: tuple[str, ...]) -> None:
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    mountpoint = ordinary.root / "mnt"
    mountpoint.mkdir()
    os.chown(mountpoint, NOBODY, NOBODY)
    # All that becoming nobody needs, and no fusermount3.
    programs = ordinary.root / "programs"
    programs.mkdir()
    for name in ("sh", "mount", "mknod", "chmod", "setpriv", "true"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    unshare = shutil.which("unshare")
    assert unshare is not None
    (programs / "unshare").symlink_to(unshare)
    ordinary.env["PATH"] = str(programs)
    ordinary.fails(1, *command, says=["fusermount3 is not installed", "apt-get install fuse3"])
    assert list(ordinary.root.glob("envstore-run-*")) == []


def _damages(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    middle = len(data) // 2
    return {
        "emptied": b"",
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :],
        "foreign": b"<html>not what you are looking for</html>",
    }


def test_damaged_objects(cli: Cli, tree: Path) -> None:
    """Every object of the store in turn, in four ways: a line, or the very bytes, or nothing."""
    cli.ok("init")
    cli.ok("push", "tree", tree, "--kind", "dir")
    original = describe(tree)
    objects = [p for p in cli.store.rglob("*") if p.is_file() and not p.match(".*/*")]
    objects = [p for p in objects if ".locks" not in p.parts and ".tmp" not in p.parts]
    assert {p.relative_to(cli.store).parts[0] for p in objects} >= {
        "packs", "index", "manifests", "locations", "snapshots", "refs", "envstore.json",
    }  # fmt: skip
    for path in objects:
        name = str(path.relative_to(cli.store))
        sound = path.read_bytes()
        for how, damage in _damages(path).items():
            path.write_bytes(damage)
            out = cli.root / "out"
            shutil.rmtree(cli.home / ".cache", ignore_errors=True)
            done = cli("pull", "tree", out)
            if done.status == 0:
                assert describe(out) == original, (name, how)
                shutil.rmtree(out)
            else:
                assert done.status == 1, (name, how, done)
                one_line(done)
                assert not out.exists()
            if not name.startswith("index/"):
                checked = cli("verify", "--read-data")
                assert checked.status == 1, (name, how, checked)
                assert checked.err.count("\n") == 1, (name, how, checked)
                assert "Traceback" not in checked.err
            path.write_bytes(sound)
    assert cli.json("verify", "--read-data")["ok"]


def test_a_push_over_damage_tells_or_mends(stored: Cli, tree: Path) -> None:
    for kind in ("refs", "snapshots", "manifests", "locations", "index", "packs"):
        for path in (p for p in (stored.store / kind).rglob("*") if p.is_file()):
            sound = path.read_bytes()
            before = stored.refs()
            path.write_bytes(sound[: len(sound) // 2])
            (tree / "lib" / "text").write_text(f"changed for {kind}\n")
            shutil.rmtree(stored.home / ".cache", ignore_errors=True)
            done = stored("push", "tree", tree, "--kind", "dir")
            if done.status != 0:
                assert done.status == 1, (kind, done)
                one_line(done)
                path.write_bytes(sound)
                assert stored.refs() == before
            else:
                path.write_bytes(sound)


def test_json_errors_are_one_object_on_stderr(stored: Cli) -> None:
    for arguments, kind, status in (
        (["show", "nope"], "not_found", 1),
        (["show", "a b"], "usage", 2),
        (["show"], "usage", 2),
        (["frob"], "usage", 2),
        (["pull", "tree", "home"], "usage", 2),
    ):
        for argv in (["--json", *arguments], [*arguments, "--json"]):
            done = stored(*argv)
            assert (done.status, done.out) == (status, "")
            assert done.err.count("\n") == 1
            error = json.loads(done.err)["error"]
            assert set(error) == {"kind", "message", "hint", "exit_code"}
            assert (error["kind"], error["exit_code"]) == (kind, status)


def test_a_message_is_one_line_whatever_it_names(stored: Cli) -> None:
    odd = os.fsdecode(b"no\nsuch\x1b[31m\xff")
    line = stored.fails(1, "push", "tree", stored.root / odd)
    assert "no\\nsuch\\x1b[31m\\xff" in line
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    line = stored.fails(1, "push", "tree", "/nope/é", env=ascii_only)
    assert "/nope/" in line


def test_umount_clears_away_a_dead_mount(stored: Cli) -> None:
    place = stored.root / "place"
    place.mkdir()
    stored.json("mount", "tree", place)
    (found,) = stored.json("mounts")["mounts"]
    try:
        # Stopped first, or one would replace the other before it is killed, too.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for name in ("holder_pid", "server_pid"):
                os.kill(found[name], number)
        listed = stored.json("mounts")["mounts"]
        assert [item["mountpoint"] for item in listed] == [str(place)]
    finally:
        done = subprocess.run(stored.argv("umount", place), env=stored.env, check=False)
    assert done.returncode == 0
    assert stored.json("mounts") == {"mounts": []}
    assert os.listdir(place) == []
