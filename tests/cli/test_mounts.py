"""``mount``, ``umount`` and ``mounts``."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import NOBODY, Cli
from tests.trees import describe

_RECORD = {
    "ref", "digest", "mountpoint", "name", "snapshot", "manifest", "holder_pid", "store", "started",
    "log", "stats", "control", "fast_path", "node", "lease", "prefix",
}  # fmt: skip


@pytest.fixture
def place(stored: Cli) -> Path:
    """An empty directory to mount on."""
    found = stored.root / "a place"
    found.mkdir()
    return found


def test_mount_and_umount(stored: Cli, place: Path, tree: Path) -> None:
    stored.ok("push", "mine", tree, "--kind", "dir")
    made = stored.json("mount", "mine", place)
    assert set(made) == _RECORD | {"seconds"}
    assert (made["ref"], made["mountpoint"]) == ("mine", str(place))
    assert made["digest"] == stored.json("show", "mine")["digest"]
    assert describe(place) == describe(tree)
    (listed,) = stored.json("mounts")["mounts"]
    assert listed["state"] == "serving"
    assert listed["holder_pid"] == made["holder_pid"]
    assert listed["server_pid"] != made["holder_pid"]
    assert (listed["ref"], listed["digest"]) == ("mine", made["digest"])
    assert (listed["restarts"], listed["requests"] > 0) == (0, True)
    text = stored.ok("mounts").splitlines()
    assert text[0].split()[:2] == ["MOUNT", "POINT"]
    assert str(place) in text[1]
    assert stored.json("umount", place) == {"mountpoint": str(place), "lazy": False}
    assert os.listdir(place) == []
    assert stored.json("mounts") == {"mounts": []}


def test_a_mount_stays_what_it_was(stored: Cli, place: Path, tree: Path) -> None:
    stored.ok("mount", "tree", place)
    try:
        (tree / "lib" / "text").write_text("another\n")
        stored.ok("push", "tree", tree, "--kind", "dir")
        stored.ok("rm", "--yes", "tree")
        assert (place / "lib" / "text").read_text() == "some text\n"
    finally:
        stored.ok("umount", place)


def test_lazy_umount(stored: Cli, place: Path) -> None:
    server = os.pidfd_open(stored.json("mount", "tree", place)["holder_pid"])
    with open(place / "lib" / "text") as still:
        stored.fails(1, "umount", place, says=[str(place), "--lazy"])
        stored.ok("umount", "--lazy", place)
        assert os.listdir(place) == []
        assert still.read() == "some text\n"
    ended, _, _ = select.select([server], [], [], 120)
    assert ended == [server], "the server ends with its last user"
    os.close(server)


def test_foreground(stored: Cli, place: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with stored.start(
            *("mount", "--foreground", "tree", place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONUNBUFFERED": "1"},
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline().startswith(b"mounted tree @")
            assert (place / "lib" / "text").read_text() == "some text\n"
            server.send_signal(number)
            _, err = server.communicate(timeout=120)
        assert server.returncode == 0
        assert b"Traceback" not in err
        assert b"unmount" in err
        assert os.listdir(place) == []


def test_the_cache_of_a_mount(stored: Cli, place: Path) -> None:
    stored.ok("cache", "clear")
    cache = stored.root / "own"
    stored.ok("mount", "tree", place.name, "--cache-dir", cache.name)
    try:
        assert len((place / "lib" / "deep" / "data").read_bytes()) == 768_000
    finally:
        stored.ok("umount", place.name)
    assert stored.json("--cache-dir", cache, "cache", "show")["bytes"] > 0
    assert stored.json("cache", "show")["bytes"] == 0
    stored.fails(2, "mount", "tree", place, "--cache-size", "much", says=["not a size"])


def test_an_ordinary_user(ordinary: Cli) -> None:
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    done = ordinary("run", "t", "--", "sh", "-c", "id -u; cat $ENVSTORE_PREFIX/hostname")
    assert done.status == 0, done
    assert done.out == f"{NOBODY}\n{Path('/etc/hostname').read_text()}"
    assert done.err == ""
    assert list(ordinary.root.glob("envstore-run-*")) == []


def test_allow_other_is_explained(ordinary: Cli) -> None:
    fuse = Path("/etc/fuse.conf")
    if fuse.exists() and any(
        line.strip() == "user_allow_other" for line in fuse.read_text().splitlines()
    ):
        pytest.skip("this machine allows it")
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    place = ordinary.root / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    ordinary.fails(1, "mount", "--allow-other", "t", place, says=["user_allow_other", "fuse.conf"])


_KILLS = """
import os, signal, subprocess, sys, time
from envstore.fuse.background import MountRequest, start_background
from envstore.fuse.mount import unmount
from envstore.fuse.overview import overview
from envstore.fuse.sockets import ask
from envstore.fuse.upgrade import upgrade_mount

url, place = sys.argv[1:]
record = start_background(MountRequest(url, "t", place, profile="none"))


def settled():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = ask(record.control, 60, ask="status")
        if found["state"] == "serving" and found["standby_pid"]:
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def read():
    subprocess.run(["cmp", place + "/hostname", "/etc/hostname"], check=True, timeout=60)
    subprocess.run(["ls", "-R", place], check=True, timeout=60, stdout=subprocess.DEVNULL)


for name in ("server_pid", "holder_pid", "standby_pid", "server_pid"):
    before = settled()
    os.kill(before[name], signal.SIGKILL)
    while settled()[name] == before[name]:
        time.sleep(0.01)
    read()
upgrade_mount(place)
read()
(found,) = overview()
assert found.restarts == 3, found
unmount(place)
assert os.listdir(place) == []
print(os.getuid(), overview())
"""


def test_an_ordinary_users_mount_outlives_its_processes(ordinary: Cli) -> None:
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    place = ordinary.root / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    script = ordinary.root / "kills.py"
    script.write_text(_KILLS)
    argv = ordinary.argv()
    argv[argv.index("-m") :] = [str(script), f"file://{ordinary.store}", str(place)]
    done = subprocess.run(
        argv, env=ordinary.env, cwd=ordinary.root, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == f"{NOBODY} []\n".encode()


def test_a_mount_is_upgraded_and_says_what_failed(stored: Cli, place: Path, tree: Path) -> None:
    stored.fails(1, "remount", "--upgrade", place, says=["no mount of yours"])
    stored.fails(2, "remount", place, says=["--upgrade"])
    stored.ok("mount", "--node", "off", "tree", place)
    try:
        (before,) = stored.json("mounts")["mounts"]
        assert before["last_failure"] == ""
        done = stored.json("remount", "--upgrade", place)
        assert done["mountpoint"] == str(place)
        assert done["server_pid"] != before["server_pid"]
        (after,) = stored.json("mounts")["mounts"]
        assert after["server_pid"] == done["server_pid"]
        assert after["holder_pid"] == before["holder_pid"]
        assert after["version"] == done["version"] == before["version"]
        os.kill(after["server_pid"], signal.SIGKILL)
        assert describe(place, times=False) == describe(tree, times=False)
        (last,) = stored.json("mounts")["mounts"]
        assert last["last_failure"] == f"server {after['server_pid']} was killed by SIGKILL"
        assert last["restarts"] == 2
        assert f"process {last['server_pid']}" not in stored.ok("remount", "--upgrade", place)
    finally:
        stored.ok("umount", place)
