"""``node``: one server for all mounts of a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Cli
from tests.trees import describe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a node server takes root")


@pytest.fixture
def node(stored: Cli) -> Iterator[Cli]:
    """The command line with a node server that runs in the background."""
    stored.env["ENVSTORE_NODE_SOCKET"] = str(stored.root / "run" / "node.sock")
    made = stored.json("node", "--background", "--directory", stored.root / "node")
    assert made == {
        "socket": stored.env["ENVSTORE_NODE_SOCKET"],
        "mountpoint": str(stored.root / "node"),
    }
    try:
        yield stored
    finally:
        for mounted in stored.json("mounts")["mounts"]:
            stored("umount", "--lazy", mounted["mountpoint"])


def place_of(cli: Cli, name: str) -> Path:
    place = cli.root / name
    place.mkdir()
    return place


def test_mounts_through_it(node: Cli, tree: Path) -> None:
    first, second, apart = (place_of(node, name) for name in ("first", "second", "apart"))
    made = node.json("mount", "tree", first)
    assert made["node"] == node.env["ENVSTORE_NODE_SOCKET"]
    node.ok("mount", "--node", "on", "--fast-path", "off", "tree", second)
    assert node.json("mount", "--node", "off", "tree", apart)["node"] == ""
    for place in (first, second, apart):
        assert describe(place, times=False) == describe(tree, times=False)
    listed = {one["mountpoint"]: one for one in node.json("mounts")["mounts"]}
    assert set(listed) == {str(place) for place in (node.root / "node", first, second, apart)}
    assert {one["state"] for one in listed.values()} == {"serving"}
    assert listed[str(first)]["server_pid"] == listed[str(node.root / "node")]["server_pid"]
    assert listed[str(first)]["holder_pid"] == listed[str(node.root / "node")]["holder_pid"]
    assert listed[str(first)]["server_pid"] != listed[str(apart)]["server_pid"]
    status = node.json("node", "--status")
    assert {one["mountpoint"] for one in status["mounts"]} == {str(first), str(second)}
    assert status["snapshots"] == 1
    assert str(first) in node.ok("node", "--status")
    node.fails(1, "umount", node.root / "node", says=["serves 2 other mounts", "--lazy"])
    for place in (first, second, apart):
        node.ok("umount", place)
        assert os.listdir(place) == []
    assert node.json("node", "--status")["mounts"] == []
    node.ok("umount", node.root / "node")
    assert node.json("mounts") == {"mounts": []}
    node.fails(1, "node", "--status", says=["nobody answers"])
    node.fails(1, "mount", "--node", "on", "tree", first, says=["nobody answers"])
    assert node.json("mount", "tree", first)["node"] == ""
    node.ok("umount", first)


def test_errors_come_through(node: Cli) -> None:
    place = place_of(node, "place")
    node.fails(1, "mount", "--node", "on", "no-such", place, says=["no ref no-such"])
    node.fails(2, "mount", "--node", "on", "tree", node.root, says=["not empty"])
    node.ok("mount", "tree", place)
    node.fails(2, "mount", "tree", place, says=["already a mount"])
    with open(place / "lib" / "text"):
        node.fails(1, "umount", place, says=["--lazy"])
        node.ok("umount", "--lazy", place)


def test_where_it_cannot_be(node: Cli) -> None:
    socket = node.env["ENVSTORE_NODE_SOCKET"]
    other = ("--directory", node.root / "other")
    node.fails(2, "node", "--background", *other, says=["somebody listens", socket])
    node.fails(2, "node", *other, says=["somebody listens", socket])
    mine = node.root / "mine"
    mine.write_text("precious")
    node.fails(2, "node", "--background", "--socket", mine, *other, says=["not a socket"])
    assert mine.read_text() == "precious"
    node.fails(
        2,
        *("node", "--socket", node.root / "new.sock", "--directory", mine),
        says=["cannot make the directory"],
    )
    node.fails(
        2,
        *("node", "--background", "--socket", node.root / "new.sock"),
        *("--directory", node.root / "node"),
        says=["already a mount"],
    )
    # A socket that nobody listens at any more is in nobody's way.
    processes = [node.json("mounts")["mounts"][0][name] for name in ("holder_pid", "server_pid")]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in processes:
            os.kill(pid, number)
    end = time.monotonic() + 60
    while node("node", "--status").status == 0 and time.monotonic() < end:
        time.sleep(0.1)
    assert os.path.exists(socket)
    node.ok("node", "--background", *other)
    assert node.json("node", "--status")["mounts"] == []


def test_in_the_foreground(stored: Cli) -> None:
    place = place_of(stored, "place")
    socket = stored.root / "n.sock"
    argv = ("node", "--socket", socket, "--directory", stored.root / "node")
    with stored.start(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(b"serving this node at ")
        env = {"ENVSTORE_NODE_SOCKET": str(socket)}
        assert stored.json("mount", "tree", place, env=env)["node"] == str(socket)
        assert (place / "lib" / "text").read_text() == "some text\n"
        stored.ok("umount", place, env=env)
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=120)
    assert server.returncode == 0
    assert b"Traceback" not in err
    assert not socket.exists()
    assert stored.json("mounts") == {"mounts": []}


def test_an_ordinary_user_mounts_without_it(ordinary: Cli) -> None:
    ordinary.fails(1, "node", "--directory", ordinary.root / "n", says=["only root", "--node off"])
    ordinary.ok("init")
    ordinary.ok("push", "t", "/etc/hostname")
    place = place_of(ordinary, "place")
    ordinary.fails(1, "mount", "--node", "on", "t", place, says=["only root"])
