"""Mounts of a node server outlive all of its processes where an fdstore keeps its descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from envstore.errors import EnvstoreError
from envstore.fuse.channel import Channel
from envstore.fuse.deposit import open_life
from envstore.fuse.fdstore import FORMAT
from envstore.fuse.mount import unmount
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.overlay import probe
from envstore.fuse.records import RecordFiles
from envstore.fuse.sockets import ask, short_address
from envstore.fuse.upgrade import upgrade_mount
from tests.fuse.lives import PATIENCE, ROOT, disconnected, gone, kill, lived, until, within
from tests.fuse.test_node import drop_caches
from tests.fuse.test_showing import Pods, same

_ROOT = Path(__file__).parent.parent.parent

_NODE = """
import json, sys
sys.path.insert(0, {root!r})
{script}
import logging
logging.basicConfig(level=logging.INFO)
from envstore.errors import EnvstoreError
from envstore.fuse.background import hold
from envstore.fuse.keeping import MountRequest
def say(answer):
    print(json.dumps(answer), flush=True)
try:
    sys.exit(hold(MountRequest(**json.loads(sys.argv[1])), say))
except EnvstoreError as error:
    say({{"error": str(error)}})
    sys.exit(7)
"""


class Kept(Pods):
    """A node server in the foreground, as a supervisor runs it, and its fdstore."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.fdstore = base / "fdstore.sock"
        self.request = replace(self.request, fdstore=str(self.fdstore), hung_after=15.0)
        self.nodes: list[subprocess.Popen[str]] = []
        self.stores: list[subprocess.Popen[bytes]] = []

    def start_fdstore(self) -> subprocess.Popen[bytes]:
        """Start another fdstore; returns when it listens."""
        script = _ROOT / "envstore/fuse/fdstore.py"
        with self.store_log().open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-E", "-P", "-S", script, self.fdstore], stderr=log
            )
        self.stores.append(process)
        self.store_says("listening")
        return process

    def store_log(self) -> Path:
        return self.base / "fdstore.log"

    def store_says(self, what: str) -> None:
        """Return when the fdstore that was started last has said this."""
        until(lambda: what in self.store_log().read_text(), what)

    def store_files(self) -> int:
        return len(os.listdir(f"/proc/{self.stores[-1].pid}/fd"))

    def begin(
        self, script: str = "", inside: Sequence[str] = (), **request: Any
    ) -> subprocess.Popen[str]:
        """Start a node server by way of the program ``inside``; it may not serve yet."""
        program = _NODE.format(root=str(_ROOT), script=script)
        wanted = replace(self.request, **request)
        with (self.base / "log").open("a") as log:
            process = subprocess.Popen(
                [*inside, sys.executable, "-c", program, json.dumps(asdict(wanted))],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.nodes.append(process)
        return process

    def serve(
        self, script: str = "", inside: Sequence[str] = (), **request: Any
    ) -> subprocess.Popen[str]:
        """Start a node server; returns when it serves."""
        process = self.begin(script, inside, **request)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        said = process.stdout.readline() if ready else "nothing"
        assert '"mounted"' in said, (said, (self.base / "log").read_text())
        self.record = RecordFiles(str(self.place)).load()
        assert self.record is not None
        return process

    def log(self) -> str:
        return (self.base / "log").read_text()

    def pids(self) -> list[int]:
        """Return the processes of the node server: all that serve this mount."""
        stores = [process.pid for process in self.stores]
        return [pid for pid in self.processes() if pid not in stores]

    def kill_all(self) -> None:
        """Kill the node server as the end of its container does: every process at once."""
        self.kill_all_but()

    def kill_all_but(self, *others: int) -> None:
        pids: list[int] = []
        # Stopped first, so that none can start another meanwhile.
        while more := [pid for pid in self.pids() if pid not in (*pids, *others)]:
            for pid in more:
                kill(pid, signal.SIGSTOP)
            pids += more
        assert pids
        for pid in pids:
            kill(pid)
        self.collect()
        until(lambda: gone(*pids), "the end of all")

    def collect(self) -> None:
        for process in self.nodes:
            process.poll()

    def deposited(self) -> None:
        """Return when the fdstore has everything."""
        until(lambda: self.status()["deposited"], "a deposit")

    def close(self) -> None:
        for process in self.stores:
            kill(process.pid)
            process.wait(PATIENCE)
        for pid in self.processes():
            kill(pid, signal.SIGCONT)
            kill(pid)
        for process in self.nodes:
            process.kill()
            process.wait(PATIENCE)
            if process.stdout is not None:
                process.stdout.close()
        super().close()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    if not ROOT:
        pytest.skip("a node server takes root")
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Kept) as made:
        made.start_fdstore()
        yield made


@contextlib.contextmanager
def reading(kept: Kept, *places: Path) -> Iterator[None]:
    """Read all of these, shows of ``live``, and compare, until the end of the block."""
    node = kept.place
    with ExitStack() as stack:
        all_readers = []
        for place in places:
            kept.place = place
            all_readers.append(stack.enter_context(kept.readers(2)))
        kept.place = node
        yield
        # What is read meanwhile is read again after it.
        time.sleep(0.3)
    assert all(readers.done for readers in all_readers)


def live_lease(kept: Kept, fast: str = "off") -> dict[str, Any]:
    """Take a lease of the flat tree that readers compare with."""
    found = ask(
        kept.socket,
        PATIENCE,
        ask="mount",
        store=kept.store.url,
        ref="tree",
        target=str(kept.pods / "x"),
        fast_path=fast,
        profile="none",
        namespace=os.stat("/proc/self/ns/mnt").st_ino,
    )
    lease = {name: found[name] for name in ("id", "root", "subtree", "fast")}
    return {**lease, "source": "envstore:tree", "required": False}


def inodes(place: Path) -> list[str]:
    return sorted(within(PATIENCE, "find", place, "-printf", "%P %i\\n").splitlines())


def test_all_processes_are_killed_under_readers(kept: Kept) -> None:
    kept.push(files=8)
    kept.serve()
    kept.settled()
    fast = "auto" if probe(kept.base / "cache") is None else "off"
    one, two = kept.pods / "one", kept.pods / "two"
    leases = {one: live_lease(kept), two: live_lease(kept, fast)}
    for target, lease in leases.items():
        kept.put(lease, target)
    before = {place: inodes(place) for place in leases}
    kept.deposited()
    files = kept.store_files()
    with reading(kept, one, two):
        for _ in range(2):
            kept.kill_all()
            # Who asks now is answered by the next, at the same socket.
            asking = subprocess.Popen(
                [sys.executable, "-c", _ASK, kept.socket], stdout=subprocess.PIPE, text=True
            )
            kept.serve()
            said, _ = asking.communicate(timeout=PATIENCE)
            assert said == "serving\n"
            kept.deposited()
    until(lambda: kept.store_files() == files, "closing what was replaced")
    drop_caches()
    assert {place: inodes(place) for place in leases} == before
    found = {one["target"]: (one["id"], one["alive"]) for one in kept.look()}
    assert found == {str(target): (lease["id"], True) for target, lease in leases.items()}
    for target, lease in leases.items():
        kept.put(lease, target)
        same(kept.tree, target)
        kept.hide(target)
    third = kept.pods / "three"
    kept.put(live_lease(kept), third)
    assert inodes(third) == before[one]
    kept.hide(third)
    unmount(kept.place, lazy=True)
    until(lambda: not kept.processes(), "the end of the node server")


_ASK = """
import sys
from envstore.fuse.sockets import ask, short_address
print(ask(sys.argv[1], 60.0, ask="state")["state"])
"""


def test_a_new_version_goes_on_where_another_left_off(kept: Kept) -> None:
    kept.push(files=5)
    first = kept.serve()
    kept.settled()
    target = kept.pods / "one"
    lease = live_lease(kept)
    kept.put(lease, target)
    before = inodes(target)
    with reading(kept, target):
        for version in ("8.1", "8.2"):
            kept.deposited()
            first.terminate()
            assert first.wait(PATIENCE) == 0
            until(lambda: not kept.pids(), "the end of its servers")
            assert find_mount(str(target)) is not None
            first = kept.serve(f"import envstore; envstore.__version__ = {version!r}", patience=9.0)
            assert kept.status()["version"] == version
    assert inodes(target) == before
    kept.put(lease, target)
    kept.hide(target)
    kept.settled()
    kept.deposited()
    # Its own upgrade is nothing to the fdstore.
    upgrade_mount(kept.place)
    kept.settled()
    kept.deposited()
    unmount(kept.place, lazy=True)
    assert first.wait(PATIENCE) == 0
    kept.store_says("forgetting it")


def test_the_fdstore_is_killed_and_comes_back(kept: Kept) -> None:
    kept.push(files=5)
    kept.serve()
    kept.settled()
    target = kept.pods / "one"
    kept.put(live_lease(kept), target)
    kept.deposited()
    with reading(kept, target):
        for _ in range(2):
            kept.stores[-1].kill()
            kept.stores[-1].wait(PATIENCE)
            until(lambda: not kept.status()["deposited"])
            kept.put(live_lease(kept), kept.pods / "two")
            kept.hide(kept.pods / "two")
            kept.start_fdstore()
            kept.deposited()
        kept.kill_all()
        kept.serve()
    kept.hide(target)


def test_an_fdstore_that_hangs_delays_nobody(kept: Kept) -> None:
    kept.serve()
    kept.settled()
    kept.deposited()
    store = kept.stores[0].pid
    kill(store, signal.SIGSTOP)
    leases = [kept.take() for _ in range(40)]
    kept.put(leases[0], kept.pods / "one")
    same(kept.source, kept.pods / "one")
    kept.kill_server()
    kept.hide(kept.pods / "one")
    kill(store, signal.SIGCONT)
    kept.deposited()


def test_nothing_is_left_to_an_fdstore_that_hangs(kept: Kept) -> None:
    node = kept.serve()
    kept.settled()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.deposited()
    kill(kept.stores[0].pid, signal.SIGSTOP)
    node.terminate()
    until(lambda: "waiting for an fdstore" in kept.log())
    same(kept.source, target)
    assert node.poll() is None
    kill(kept.stores[0].pid, signal.SIGCONT)
    assert node.wait(PATIENCE) == 0
    kept.serve()
    same(kept.source, target)
    kept.hide(target)


def test_a_deposit_has_one_owner(kept: Kept) -> None:
    kept.serve()
    kept.settled()
    kept.deposited()
    holder = kept.status()["holder_pid"]
    waiting = kept.begin()
    until(lambda: "waiting for its end" in kept.log(), "waiting")
    # One of its servers lives, and starts another holder: it is no other node server.
    kill(holder)
    kept.collect()
    until(lambda: kept.status()["holder_pid"] != holder)
    kept.settled()
    kept.deposited()
    assert waiting.poll() is None
    more = kept.begin()
    assert kept.pids()
    kept.kill_all_but(waiting.pid, more.pid)
    until(lambda: kept.status()["holder_pid"] in (waiting.pid, more.pid))
    kept.settled()
    taker = kept.status()["holder_pid"]
    (other,) = [one for one in (waiting, more) if one.pid != taker]
    kept.deposited()
    assert other.poll() is None
    other.terminate()
    assert other.wait(PATIENCE) == 0
    assert kept.settled()["holder_pid"] == taker


@pytest.mark.parametrize(
    ("script", "change", "message"),
    [
        ("from envstore.fuse import keeping; keeping.STATE_FORMAT = 99", {}, "another version"),
        ("from envstore.fuse import deposit; deposit.FORMAT = 99", {}, "another version"),
        ("", {"mountpoint": "/nowhere/else"}, "same paths"),
        ("", {"node": "/nowhere/else"}, "same paths"),
    ],
)
def test_who_cannot_go_on_says_so_and_breaks_nothing(
    kept: Kept, script: str, change: dict[str, str], message: str
) -> None:
    kept.serve()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.deposited()
    kept.kill_all()
    wrong = kept.begin(script, **change)
    assert wrong.stdout is not None
    assert message in wrong.stdout.read()
    assert wrong.wait(PATIENCE) == 7
    kept.serve()
    same(kept.source, target)
    kept.hide(target)


def test_ending_without_an_fdstore_waits_for_one(kept: Kept) -> None:
    node = kept.serve()
    kept.settled()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.stores[0].kill()
    kept.stores[0].wait(PATIENCE)
    until(lambda: not kept.status()["deposited"])
    node.terminate()
    until(lambda: "a second signal unmounts" in kept.log())
    same(kept.source, target)
    kept.start_fdstore()
    assert node.wait(PATIENCE) == 0
    node = kept.serve()
    same(kept.source, target)
    kept.stores[1].kill()
    kept.stores[1].wait(PATIENCE)
    until(lambda: not kept.status()["deposited"])
    kept.hide(target)
    node.terminate()
    until(lambda: kept.log().count("a second signal unmounts") == 2)
    node.terminate()
    node.wait(PATIENCE)
    assert find_mount(str(kept.place)) is None
    assert kept.pids() == []


@pytest.mark.parametrize("first", ["node", "fdstore"])
def test_a_node_server_without_mounts_leaves_nothing_to_anybody(kept: Kept, first: str) -> None:
    node = kept.serve()
    kept.settled()
    ending = [node, kept.stores[0]]
    for process in ending if first == "node" else reversed(ending):
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert find_mount(str(kept.place)) is None
    assert kept.pids() == []


def test_an_fdstore_that_alone_keeps_mounts_waits_for_a_taker(kept: Kept) -> None:
    kept.serve()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.deposited()
    kept.kill_all()
    store = kept.stores[0]
    store.terminate()
    kept.store_says("waiting")
    assert store.poll() is None
    kept.serve()
    assert store.wait(PATIENCE) == 0
    assert not kept.fdstore.exists()
    same(kept.source, target)
    # With somebody else who has all, it ends at once.
    kept.start_fdstore()
    kept.deposited()
    kept.stores[1].terminate()
    assert kept.stores[1].wait(PATIENCE) == 0
    same(kept.source, target)
    kept.hide(target)


def test_both_die(kept: Kept) -> None:
    kept.serve()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.deposited()
    kept.kill_all()
    for said in ("waiting", "waiting"):
        kept.stores[0].terminate()
        kept.store_says(said)
    assert kept.stores[0].wait(PATIENCE) == 1
    until(lambda: disconnected(target))
    kept.start_fdstore()
    kept.serve()
    (found,) = kept.look()
    assert (found["target"], found["alive"]) == (str(target), False)
    kept.hide(target)
    kept.put(kept.take(), target)
    same(kept.source, target)
    kept.hide(target)


def test_another_container_goes_on(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the former one's files and mounts only those below the targets are there."""
    kept.serve()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    kept.deposited()
    before = inodes(target)
    kept.kill_all()
    subprocess.run(["umount", "-l", kept.place], check=True, timeout=30)
    kept.socket.unlink()
    monkeypatch.setenv("XDG_STATE_HOME", str(kept.base / "other state"))
    kept.serve()
    same(kept.source, target)
    assert inodes(target) == before
    other = kept.pods / "two"
    kept.put(kept.take(), other)
    assert inodes(other) == before
    kept.hide(other)
    kept.hide(target)
    kept.settled()
    kept.kill_server()
    unmount(kept.place, lazy=True)
    until(lambda: not kept.pids())


_CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
_CONTAINER += ["--mount", "--propagation", "unchanged"]


def test_containers_whose_first_process_is_killed(kept: Kept) -> None:
    """Each has processes and mounts of its own, and shows others what it mounts at targets."""
    kept.push(files=5)
    for place, how in ((kept.base, "--make-private"), (kept.pods, "--make-shared")):
        subprocess.run(["mount", "--bind", place, place], check=True, timeout=30)
        subprocess.run(["mount", how, place], check=True, timeout=30)
    kept.serve(inside=_CONTAINER)
    assert find_mount(str(kept.place)) is None
    fast = "auto" if probe(kept.base / "cache") is None else "off"
    one, two = kept.pods / "one", kept.pods / "two"
    leases = {one: live_lease(kept), two: live_lease(kept, fast)}
    for target, lease in leases.items():
        kept.put(lease, target)
    before = {place: inodes(place) for place in leases}
    with reading(kept, one, two):
        for _ in range(2):
            kept.deposited()
            (container,) = [one for one in kept.nodes if one.poll() is None]
            first = f"/proc/{container.pid}/task/{container.pid}/children"
            pids = kept.pids()
            kill(int(Path(first).read_text()))
            container.wait(PATIENCE)
            until(lambda pids=pids: gone(*pids), "the end of all")  # type: ignore[misc]
            kept.serve(inside=_CONTAINER)
            assert {one["target"] for one in kept.look() if one["alive"]} == set(map(str, leases))
    for target, lease in leases.items():
        kept.put(lease, target)
    assert {place: inodes(place) for place in leases} == before
    third = kept.pods / "three"
    kept.put(live_lease(kept), third)
    assert inodes(third) == before[one]
    for target in (one, two, third):
        kept.hide(target)
        assert not target.exists()


def test_what_is_unmounted_while_nobody_serves_is_forgotten(kept: Kept) -> None:
    kept.serve()
    kept.deposited()
    kept.kill_all()
    subprocess.run(["umount", "-l", kept.place], check=True, timeout=30)
    kept.store_says("forgetting")
    kept.serve()
    target = kept.pods / "one"
    kept.put(kept.take(), target)
    same(kept.source, target)
    kept.hide(target)


def test_killed_at_random(kept: Kept) -> None:
    kept.push(files=5, size=50_000)
    kept.serve()
    target = kept.pods / "one"
    lease = live_lease(kept)
    kept.put(lease, target)
    kept.deposited()
    before = inodes(target)
    rng = random.Random(7)

    def fdstore() -> None:
        kept.stores[-1].kill()
        kept.stores[-1].wait(PATIENCE)
        kept.start_fdstore()

    def everything() -> None:
        kept.kill_all()
        kept.serve()

    def left() -> None:
        node = kept.nodes[-1]
        if node.poll() is None and node.pid == kept.status()["holder_pid"]:
            node.terminate()
            node.wait(PATIENCE)
        else:
            kill(kept.status()["holder_pid"], signal.SIGTERM)
            until(lambda: not kept.pids())
        kept.serve()

    def one() -> None:
        kill(rng.choice(kept.pids()))
        kept.collect()

    ways: list[Callable[[], None]] = [fdstore, everything, left, one]
    with reading(kept, target):
        for turn in range(20):
            kept.deposited()
            ways[turn % 4 if turn < 4 else rng.randrange(4)]()
            until(lambda: kept.pids() and answers(kept), "an answer")
            kept.put(lease, target)
    assert inodes(target) == before
    kept.hide(target)


def answers(kept: Kept) -> bool:
    try:
        return bool(ask(kept.socket, 10.0, ask="state")["state"] == "serving")
    except EnvstoreError:
        return False


def test_commands(kept: Kept) -> None:
    socket_ = kept.base / "other.sock"
    argv = [sys.executable, "-P", "-m", "envstore"]
    started, listening = kept.base / "started", kept.base / "listening"
    with listening.open("wb") as out:
        store = subprocess.Popen([*argv, "fdstore", "--socket", socket_], stderr=out)
    node = None
    try:
        until(lambda: "listening" in listening.read_text())
        words = ["--socket", kept.socket, "--directory", kept.place, "--targets", kept.pods]
        command = [*argv, "node", *words, "--fdstore", socket_]
        done = subprocess.run(
            [*command, "--background"], stderr=subprocess.PIPE, timeout=PATIENCE, check=False
        )
        assert done.returncode == 2
        assert b"foreground" in done.stderr
        target = kept.pods / "one"
        lease: dict[str, Any] = {}
        for turn in range(2):
            with started.open("wb") as out:
                node = subprocess.Popen([*command, "--json"], stdout=out)
            until(lambda: '"mountpoint"' in started.read_text(), "serving")
            kept.record = RecordFiles(str(kept.place)).load()
            kept.deposited()
            if not turn:
                lease = kept.take()
            kept.put(lease, target)
            same(kept.source, target)
            node.terminate()
            assert node.wait(PATIENCE) == 0
            assert find_mount(str(kept.place)) is not None
        store.terminate()
        until(lambda: gone(*kept.pids()) or kept.pids() == [store.pid])
        assert store.poll() is None
        store.terminate()
        store.wait(PATIENCE)
        assert find_mount(str(target)) is not None
    finally:
        for process in (store, node):
            if process is not None:
                process.kill()
                process.wait(PATIENCE)


def test_nonsense_at_an_fdstore(tmp_path: Path) -> None:
    base = tmp_path
    script = _ROOT / "envstore/fuse/fdstore.py"
    path = base / "fdstore.sock"
    argv = [sys.executable, "-E", "-P", "-S", script, path]
    with (base / "log").open("wb") as log:
        store = subprocess.Popen(argv, stderr=log)
    try:
        until(lambda: "listening" in (base / "log").read_text())
        assert path.stat().st_mode & 0o777 == 0o600
        taken = subprocess.run(argv, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
        assert taken.returncode == 1
        assert b"listens there already" in taken.stderr
        files = len(os.listdir(f"/proc/{store.pid}/fd"))

        def caller() -> Channel:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with short_address(path) as address:
                end.connect(address)
            end.settimeout(PATIENCE)
            return Channel(end)

        for data in (b"", b"x", b"[]", b"{}", b"5", b'{"kind": 5}', b"\xff" * 200_000):
            channel = caller()
            channel.socket.send(data[:100_000])
            channel.close()
        for kind, count in (("hello", 0), ("hello", 2), ("kept", 1), ("keep", 1), ("sync", 1)):
            channel = caller()
            with ExitStack() as stack:
                opened = [stack.enter_context(open(os.devnull, "rb")) for _ in range(count)]
                channel.send(kind, tuple(one.fileno() for one in opened), key="x", format=1)
            assert channel.receive() is None
            channel.close()
        silent = [caller() for _ in range(40)]
        with ExitStack() as stack:
            life = {name: stack.enter_context(os.fdopen(fd, "r" if name == "watch" else "w"))
                    for name, fd in open_life().items()}  # fmt: skip
            owner = caller()
            owner.send("hello", (life["watch"].fileno(),), format=FORMAT, own=False)
            answer = owner.receive()
            assert answer is not None
            assert answer.kind == "begin"
            other = caller()
            with open(os.devnull, "rb") as null:
                other.send("hello", (null.fileno(),), format=FORMAT, own=False)
                answer = other.receive()
                assert answer is not None
                assert answer.kind == "busy"
            owner.send("keep", (life["watch"].fileno(),), nothing="here")
            assert owner.receive() is None
        for channel in (*silent, owner, other):
            channel.close()
        until(lambda: len(os.listdir(f"/proc/{store.pid}/fd")) == files, "closing files")
        resident = Path(f"/proc/{store.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
        assert int(resident) < 20 << 10
        store.terminate()
        assert store.wait(PATIENCE) == 0
        assert not path.exists()
    finally:
        store.kill()
        store.wait(PATIENCE)
