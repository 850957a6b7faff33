"""One server for all mounts of a machine: what they share, and that it outlives it all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from envstore.errors import EnvstoreError, NotFoundError
from envstore.fuse import background
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mount import active_mounts, unmount
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.node import Node
from envstore.fuse.overview import overview
from envstore.fuse.sockets import ask, short_address
from envstore.fuse.upgrade import upgrade_mount
from envstore.fuse.volumes import Volumes
from tests.fuse.lives import (
    PATIENCE,
    ROOT,
    Live,
    alive,
    disconnected,
    gone,
    kill,
    lived,
    until,
    within,
)
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")


class Site(Live):
    """A node server, and stores to mount from: its own mount is the one that ``Live`` is of."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.socket = base / "node.sock"
        self.request = MountRequest(
            "", "", str(self.place), allow_other=True, node=str(self.socket), lease_grace=1.0
        )

    def add(self, ref: str, files: dict[str, bytes], store: Store | None = None) -> Path:
        """Push files as ``ref``; returns the source."""
        source = self.base / f"source {ref}"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name, data in files.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            os.utime(path, (1000, 1000))
        (store or self.store).push(source, ref)
        return source

    def show(self, ref: str, name: str = "", fast: str = "off", store: str = "") -> Path:
        """Mount ``ref`` through the node server."""
        place = self.base / (name or f"mount {ref}")
        place.mkdir(exist_ok=True)
        url = store or self.store.url
        request = MountRequest(url, ref, str(place), profile="none", fast_path=fast)
        background.start_mount(request, "on")
        return place

    def told(self) -> dict[str, Any]:
        found = ask(self.socket, PATIENCE, ask="status")
        assert isinstance(found, dict)
        return found

    def names(self) -> list[str]:
        return within(PATIENCE, "ls", self.place).split()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Site) as made:
        made.mount()
        yield made


def same(source: Path, place: Path) -> None:
    within(PATIENCE, "diff", "-r", source, place)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


BIG = noise("big", 3 << 20)


def test_what_snapshots_have_in_common_is_one_file(site: Site) -> None:
    one = site.add("one", {"lib/big": BIG, "same": b"same", "mode": b"m", "only": b"1"})
    two = site.base / "source two"
    shutil.copytree(one, two)
    (two / "only").write_bytes(b"2")
    (two / "mode").chmod(0o755)
    os.utime(two / "same", (2000, 2000))
    site.store.push(two, "two")
    first, second = site.show("one"), site.show("two")
    same(one, first)
    same(two, second)
    ids = {
        name: [os.stat(place / name).st_ino for place in (first, second)]
        for name in ("lib/big", "same", "mode", "only", "lib")
    }
    assert ids["lib/big"][0] == ids["lib/big"][1]
    for name in ("same", "mode", "only", "lib"):
        assert ids[name][0] != ids[name][1], name
    assert os.stat(first).st_dev == os.stat(second).st_dev
    # What was read through one is in memory for the other: no request is made for it.
    before = site.stats()["requests"]["read"]
    assert (second / "lib/big").read_bytes() == BIG
    assert site.stats()["requests"]["read"] == before
    for place in (first, second):
        unmount(place)


def test_stores_share_nothing(site: Site) -> None:
    with Store(site.base / "other store") as other:
        site.add("one", {"file": b"content", "big": BIG})
        first = site.show("one")
        site.add("one", {"file": b"content", "big": BIG}, other)
        second = site.show("one", "second", store=other.url)
        assert os.stat(first / "file").st_ino != os.stat(second / "file").st_ino
        assert (first / "big").read_bytes() == (second / "big").read_bytes() == BIG
        told = site.told()
        assert told["snapshots"] == 2
        assert told["totals"]["fetched"]["bytes"] >= len(BIG), "equal blobs are fetched once"
        assert told["cache"]["capacity"] > told["cache"]["bytes"] >= len(BIG)
        unmount(first)
        unmount(second)


def test_a_snapshot_goes_with_its_last_mount_and_comes_back_as_it_was(site: Site) -> None:
    source = site.add("one", {"d/file": b"content", "big": BIG, "twin": b"twin", "d/twin": b"twin"})
    place = site.show("one")
    same(source, place)
    kept = {path: os.stat(place / path).st_ino for path in ("d", "d/file", "big", "twin", "d/twin")}
    (name,) = [name for name in site.names() if "objects" not in name]
    again = site.show("one", "again")
    unmount(place)
    assert name in site.names()
    unmount(again)
    assert site.names() == []
    assert site.told()["mounts"] == []
    for turn in range(5):
        place = site.show("one")
        assert name in site.names()
        assert {path: os.stat(place / path).st_ino for path in kept} == kept
        if turn % 2:
            site.kill_server()
            drop_caches()
        same(source, place)
        unmount(place)
    assert site.names() == []
    assert "Stale" not in site.log()
    assert active_mounts()[0][0].mountpoint == str(site.place)


def test_a_shared_file_outlives_the_snapshot_it_was_opened_through(site: Site) -> None:
    site.add("one", {"big": BIG, "own": noise("own", 2 << 20)})
    site.add("two", {"big": BIG})
    first, second = site.show("one"), site.show("two")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, first / "big", first / "own"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"open\n"
        subprocess.run(["umount", "-l", first], check=True, timeout=30)
        until(lambda: site.told()["snapshots"] == 1, "the end of the lease")
        drop_caches()
        site.kill_server()
        out, _ = user.communicate(b"\n", timeout=PATIENCE)
    assert user.returncode == 0
    assert out == BIG + noise("own", 2 << 20)
    assert (second / "big").read_bytes() == BIG
    unmount(second)


def test_of_dropped_snapshots_that_share_a_file_one_comes_back(site: Site) -> None:
    names = ("one", "two", "three")
    for name in names:
        site.add(name, {"big": BIG, "own": name.encode()})
    first, *others = [site.show(name) for name in names]
    with open(first / "big", "rb") as file:
        subprocess.run(["umount", "-l", first], check=True, timeout=30)
        for place in others:
            unmount(place)
        until(lambda: site.told()["snapshots"] == 0, "the end of the leases")
        drop_caches()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        assert within(PATIENCE, "sha256sum", path).split()[0] == hashlib.sha256(BIG).hexdigest()
    assert site.log().count("bringing back") == 1


def test_a_file_of_a_dropped_snapshot_whose_store_has_gone(site: Site) -> None:
    site.add("one", {"own": BIG})
    first = site.show("one")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, first / "own"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"open\n"
        subprocess.run(["umount", "-l", first], check=True, timeout=30)
        until(lambda: site.told()["snapshots"] == 0, "the end of the lease")
        site.store.path("").rename(site.base / "away")
        shutil.rmtree(site.base / "cache")
        site.kill_server()
        site.settled()
        drop_caches()
        restarts = site.status()["restarts"]
        _, err = user.communicate(b"\n", timeout=PATIENCE)
    assert b"Errno 116" in err or b"Errno 5" in err, "an error, and only for whoever needs it"
    assert site.settled()["restarts"] == restarts
    (site.base / "away").rename(site.store.path(""))
    assert (site.show("one", "again") / "own").read_bytes() == BIG


_HOLD = """
import sys
files = [open(path, 'rb') for path in sys.argv[1:]]
print('open', flush=True)
sys.stdin.readline()
for file in files:
    sys.stdout.buffer.write(file.read())
"""


def test_lazily_unmounted_in_use(site: Site) -> None:
    source = site.add("one", {"big": BIG, "own": b"own"})
    place = site.show("one")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, place / "big"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"open\n"
        unmount(place, lazy=True)
        assert find_mount(str(place)) is None
        site.store.path("").rename(site.base / "away")
        (site.base / "away").rename(site.store.path(""))
        site.kill_server()
        out, _ = user.communicate(b"\n", timeout=PATIENCE)
    assert out == BIG
    place = site.show("one")
    same(source, place)
    unmount(place)


def test_a_mount_that_somebody_else_unmounts_is_noticed(site: Site) -> None:
    site.add("one", {"file": b"content"})
    kept, lost = site.show("one", "kept"), site.show("one", "lost")
    subprocess.run(["umount", lost], check=True, timeout=30)
    until(lambda: len(site.told()["mounts"]) == 1)
    assert site.told()["mounts"][0]["mountpoint"] == str(kept)
    assert (kept / "file").read_bytes() == b"content"
    subprocess.run(["umount", kept], check=True, timeout=30)
    until(lambda: site.names() == [])
    assert [record.mountpoint for record, _ in active_mounts()] == [str(site.place)]


def test_a_mount_in_another_name_space(site: Site) -> None:
    site.add("one", {"file": b"content"})
    place = site.base / "elsewhere"
    place.mkdir()
    script = (
        "import sys\n"
        "from envstore.fuse.background import start_mount, MountRequest\n"
        "start_mount(MountRequest(sys.argv[1], 'one', sys.argv[2], profile='none'), 'on')\n"
        "print(open(sys.argv[2] + '/file').read(), flush=True)\n"
        "sys.stdin.readline()\n"
        "print(open(sys.argv[2] + '/file').read(), flush=True)\n"
    )
    argv = ["unshare", "--mount", sys.executable, "-c", script, site.store.url, place]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"content\n"
        assert find_mount(str(place)) is None
        time.sleep(2.5)  # longer than a mount may be seen nowhere
        assert len(site.told()["mounts"]) == 1
        site.kill_server()
        out, _ = other.communicate(b"\n", timeout=PATIENCE)
    assert out == b"content\n"
    # Its mounts went with the name space.
    until(lambda: site.told()["mounts"] == [])


def test_nonsense_at_the_socket_ends_nothing(site: Site) -> None:
    site.add("one", {"file": b"content"})
    place = site.show("one")
    before = site.settled()
    assert os.stat(site.socket).st_mode & 0o777 == 0o600
    good = {"ask": "mount", "store": site.store.url, "ref": "one", "target": "/x", "namespace": 1}
    questions: list[object] = [
        5,
        [],
        {},
        {"ask": None},
        {"ask": "mount"},
        {"ask": "unmounted"},
        *({**good, "namespace": wrong} for wrong in ("text", None, 1e400, [])),
        *({**good, "ref": wrong} for wrong in (5, "no such", ["one"], "x" * 100_000, "\udcff\0")),
        *({**good, "store": wrong} for wrong in (None, "file:///no/such", "s3://", "\0", "")),
        {**good, "target": "x" * 200_000},
        {**good, "profile": "y" * 900_000},
    ]
    lines = [json.dumps(question).encode() + b"\n" for question in questions]
    lines += [b"", b"\n", b"nonsense\n", b"[" * 300_000 + b"\n", b"\xff\n", b"x" * (3 << 20)]
    lines += [b"no end", b'{"ask": "status"}']
    for line in lines:
        with short_address(site.socket) as address, socket.socket(socket.AF_UNIX) as end:
            end.connect(address)
            end.settimeout(PATIENCE)
            try:
                end.sendall(line)
                end.shutdown(socket.SHUT_WR)
                answer = end.recv(1 << 16)
            except ConnectionError:
                continue
            assert answer == b"" or b"error" in answer, line
    after = site.settled()
    assert after == before
    assert (place / "file").read_bytes() == b"content"
    # What was never mounted is forgotten.
    ask(site.socket, PATIENCE, **good)
    assert len(site.told()["mounts"]) == 2
    until(lambda: len(site.told()["mounts"]) == 1)
    unmount(place)


def test_whoever_connects_and_says_nothing_is_told_so() -> None:
    volumes = Volumes(MountRequest("", "", ""), _nothing, _nothing)
    node = Node(volumes, "/", _nothing, _nothing, 60.0, int, _nothing)

    async def converse() -> bytes:
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node._converse, theirs)
            return bytes(await ours.receive_some())

    answer = trio.run(converse, clock=trio.testing.MockClock(autojump_threshold=0))
    assert b"error" in answer


def _nothing(*arguments: object) -> None:
    pass


def test_many_silent_askers(site: Site) -> None:
    site.add("one", {"file": b"content"})
    before = site.settled()
    with short_address(site.socket) as address:
        ends = [socket.socket(socket.AF_UNIX) for _ in range(1500)]
        try:
            for end in ends:
                end.setblocking(False)
                try:
                    end.connect(address)
                except BlockingIOError:
                    break
        finally:
            for end in ends:
                end.close()
    place = site.show("one")
    assert (place / "file").read_bytes() == b"content"
    assert site.settled()["server_pid"] == before["server_pid"]


def test_node_processes_killed_under_readers(site: Site) -> None:
    site.push()
    place = site.show("tree")
    other = site.show("tree", "other", fast="auto")
    node, site.place = site.place, place
    with site.readers(3) as readers:
        site.place = other
        with site.readers(3) as more:
            site.place = node
            for name in ("server_pid", "holder_pid", "server_pid", "standby_pid", "holder_pid"):
                pid = site.settled()[name]
                kill(pid)
                until(lambda pid=pid: gone(pid))  # type: ignore[misc]
                site.settled()
    assert readers.done
    assert more.done
    assert len(site.told()["mounts"]) == 2
    assert {one.state for one in overview()} == {"serving"}
    unmount(place)
    unmount(other)
    unmount(node)
    assert site.left() == []
    assert not site.socket.exists()


def test_the_node_is_upgraded_with_its_mounts(site: Site) -> None:
    site.push()
    place = site.show("tree")
    before = site.settled()
    node, site.place = site.place, place
    with site.readers(3) as readers:
        upgrade_mount(node)
    site.place = node
    assert readers.done
    assert site.settled()["server_pid"] != before["server_pid"]
    assert len(site.told()["mounts"]) == 1
    unmount(place)
    assert site.names() == []


def test_all_node_processes_killed(site: Site) -> None:
    site.add("one", {"file": b"content"})
    place = site.show("one")
    status = site.settled()
    for name in ("holder_pid", "server_pid"):
        kill(status[name], signal.SIGSTOP)
    for name in ("holder_pid", "server_pid", "standby_pid"):
        kill(status[name])
    until(lambda: not site.processes())
    dead = {str(site.place): "dead", str(place): "dead"}
    # A process has let go of its locks a moment after it has closed its files.
    until(lambda: {one.mountpoint: one.state for one in overview()} == dead)
    until(lambda: disconnected(place))
    with pytest.raises(NotFoundError):
        site.show("one", "new")
    unmount(place)
    unmount(site.place)
    assert overview() == []
    site.mount()
    assert (site.show("one") / "file").read_bytes() == b"content"


def test_a_node_server_that_ends_while_in_use(site: Site) -> None:
    source = site.add("one", {"file": b"content", "big": BIG})
    place = site.show("one")
    holder = site.settled()["holder_pid"]
    kill(holder, signal.SIGTERM)
    until(lambda: find_mount(str(site.place)) is None)
    same(source, place)
    with pytest.raises(EnvstoreError, match="ending"):
        site.show("one", "another")
    alone = site.base / "alone"
    alone.mkdir()
    record = background.start_mount(
        MountRequest(site.store.url, "one", str(alone), profile="none"), "auto"
    )
    assert record.node == ""
    same(source, alone)
    unmount(alone)
    unmount(place)
    until(lambda: not alive(holder))
    assert site.left() == []


def test_twenty_mounts_at_once(site: Site) -> None:
    sources = [site.add(f"r{n}", {"n": b"%d" % n, "common": BIG}) for n in range(5)]
    with ThreadPoolExecutor(20) as pool:
        places = list(pool.map(lambda n: site.show(f"r{n % 5}", f"place {n}"), range(20)))
    for number, place in enumerate(places):
        assert (place / "n").read_bytes() == b"%d" % (number % 5)
    same(sources[0], places[0])
    assert len({os.stat(place / "common").st_ino for place in places}) == 1
    told = site.told()
    assert (len(told["mounts"]), told["snapshots"]) == (20, 5)
    assert len(site.names()) == 10
    site.kill_server()
    assert len(site.told()["mounts"]) == 20
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(unmount, places))
    assert site.names() == []
    assert site.told()["mounts"] == []


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_hostile_names_of_objects(site: Site, fast: str) -> None:
    source = site.add("one", {"file": b"content"})
    place = site.show("one", fast=fast)
    same(source, place)
    (objects,) = [name for name in site.names() if name.endswith(".objects")]
    top = site.place / objects
    before = site.settled()
    names = ["  ", "AB", "a", "zz", "abc", "+1", "é", "x" * 255, "0x"]
    for shelf in ["", "00/", "ff/"]:
        for name in [
            *names,
            " " * 64,
            "A" * 64,
            "f" * 63,
            "f" * 65,
            "f" * 64,
            "../" * 3 + "nothing",
        ]:
            done = subprocess.run(
                ["stat", top / (shelf + name)], timeout=PATIENCE, capture_output=True, check=False
            )
            assert done.returncode, (shelf, name)
    within(PATIENCE, "ls", "-R", top)
    assert site.settled() == before
    unmount(place)


def test_who_may_not(site: Site) -> None:
    script = (
        "import os, sys\n"
        "os.setuid(65534)\n"
        "from envstore.errors import AccessDeniedError\n"
        "from envstore.fuse.leases import node_for\n"
        "assert node_for('auto') is None\n"
        "try:\n"
        "    node_for('on')\n"
        "except AccessDeniedError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "import envstore.errors, envstore.fuse.leases\n" + script],
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "only root" in done.stdout


def test_mounting_while_servers_are_killed(site: Site) -> None:
    for number in range(3):
        site.add(f"r{number}", {"n": b"%d" % number, "big": BIG})
    with ThreadPoolExecutor(4) as pool:

        def use(turn: int) -> None:
            place = site.show(f"r{turn % 3}", f"place {turn}")
            same(site.base / f"source r{turn % 3}", place)
            unmount(place)

        turns = [pool.submit(use, turn) for turn in range(60)]
        while not all(turn.done() for turn in turns):
            site.kill_server()
            time.sleep(0.15)
        for turn in turns:
            turn.result()
    until(lambda: site.told()["mounts"] == [])
