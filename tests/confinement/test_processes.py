"""What every process of a mount, a node, a driver and a persister holds, as the kernel tells it.

docs/security.md has the same table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.spawning import ask_hello
from envstore.confinement import landlock, seccomp
from envstore.confinement.capabilities import NAMES
from envstore.confinement.process import InForce, in_force
from tests.commands import NOBODY, REPOSITORY, Cli, can_be_ordinary
from tests.csi.nodes import Node
from tests.fuse.lives import ROOT, Live, alive, children_of, kill, lived, until
from tests.fuse.test_fdstore import Kept

FILTERED = seccomp.unavailable() is None
HOLDER = {"sys_admin", "dac_override", "dac_read_search", "setpcap"}
NODE_HOLDER = HOLDER | {"sys_ptrace"}
FILES = {"dac_read_search"}
OF_FILES = {"chown", "dac_override", "fowner"}
NOTHING: set[str] = set()

root_only = pytest.mark.skipif(not ROOT, reason="others have no capabilities")


def has(pid: int, names: set[str], *, gains: bool = False, filtered: bool = FILTERED) -> None:
    """Fail unless a process has these capabilities of root's, and no way to others."""
    found = in_force(pid)
    assert isinstance(found, InForce), pid
    own = _own()
    wanted = names & {NAMES.get(one, str(one)) for one in range(64) if own.capabilities >> one & 1}
    assert set(found.describe()["capabilities"]) == wanted, (pid, found)  # type: ignore[call-overload]
    if ROOT:
        bounding = {NAMES.get(one, str(one)) for one in range(64) if found.bounding >> one & 1}
        assert bounding == wanted, (pid, found)
    assert found.no_new_privs is not gains, (pid, found)
    assert found.filtered is filtered, (pid, found)
    assert limit(pid, "Max core file size") == ["0", "0"]
    assert os.stat(f"/proc/{pid}/environ").st_uid == 0  # not dumpable, or root's anyway


def _own() -> InForce:
    found = in_force(os.getpid())
    assert found is not None
    return found


def limit(pid: int, name: str) -> list[str]:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith(name):
            return line.removeprefix(name).split()[:2]
    raise AssertionError(name)


def children(pid: int) -> set[int]:
    return {*children_of(pid)}


def understudy(status: dict[str, int]) -> int:
    """Return the one child of a holder that is no server."""
    servers = {status["server_pid"], status["standby_pid"]}

    def one() -> bool:
        return len(children(status["holder_pid"]) - servers) == 1

    until(one, "an understudy alone")
    (found,) = children(status["holder_pid"]) - servers
    return found


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with lived(tmp_path, monkeypatch) as made:
        yield made


def mounted(live: Live) -> dict[str, int]:
    status = live.settled()
    pids = {name: status[f"{name}_pid"] for name in ("holder", "server", "standby")}
    return {**pids, "understudy": understudy(status)}


def check_mount(live: Live) -> None:
    pids = mounted(live)
    has(pids["server"], FILES)
    has(pids["standby"], FILES)
    # Whoever is not root must be able to run fusermount3, which is set-uid.
    has(pids["holder"], HOLDER, gains=not ROOT, filtered=False)
    has(pids["understudy"], HOLDER, gains=not ROOT, filtered=False)


def test_a_mounts_processes_from_the_first_to_those_that_follow(live: Live) -> None:
    live.push(files=3)
    live.mount()
    check_mount(live)
    confined = live.status()["confined"]
    assert confined["server"]["no_new_privs"] is True
    assert confined["server"]["seccomp"] is FILTERED
    if ROOT:
        assert set(confined["holder"]["capabilities"]) == HOLDER
    for name in ("server", "holder", "understudy"):
        before = mounted(live)
        kill(before[name])
        until(lambda pid=before[name]: not alive(pid))  # type: ignore[misc]
        until(lambda name=name, pid=before[name]: mounted(live)[name] != pid)  # type: ignore[misc]
        check_mount(live)
        live.check()
    # Without its understudy in between, and that one's successor knows the way back, too.
    before = mounted(live)
    kill(before["holder"])
    until(lambda: live.status()["holder_pid"] != before["holder"])
    check_mount(live)
    live.upgrade_to("")
    check_mount(live)
    until(lambda: not alive(before["understudy"]), "the end of a former understudy")


_TRIES = """
import os, subprocess
from envstore.fuse import serving
attach = serving._attach
def tries(*arguments):
    done = []
    for work in (
        lambda: open({outside!r} + "/new", "w").close(),
        lambda: subprocess.run(["true"]),
        lambda: os.kill(os.getppid(), 9),
        lambda: open("/proc/%d/environ" % os.getppid()).read(),
    ):
        try:
            work()
        except OSError:
            continue
        done.append(work)
    print("done by a server:", len(done), file=__import__("sys").stderr, flush=True)
    attach(*arguments)
serving._attach = tries
"""


@pytest.mark.skipif(not FILTERED or landlock.version() < 3, reason="this kernel lacks some of it")
def test_a_server_in_somebody_elses_hands(live: Live) -> None:
    outside = live.base / "outside"
    outside.mkdir()
    live.push(files=3)
    live.mount()
    live.settled()
    live.upgrade_to(_TRIES.format(outside=str(outside)))
    until(lambda: "done by a server" in live.log())
    assert "done by a server: 0" in live.log()
    live.check()
    assert [*outside.iterdir()] == []


@root_only
def test_a_server_overrides_no_permissions_but_of_what_it_serves(live: Live) -> None:
    live.push(files=3)
    store = live.base / "store" / "objects"
    os.chown(store if store.is_dir() else live.base / "store", NOBODY, NOBODY)
    live.mount()
    has(live.settled()["server_pid"], {"dac_read_search", "dac_override"})
    live.check()


@root_only
def test_a_port_below_1024_is_the_only_reason_to_keep_the_right_to_one(live: Live) -> None:
    live.push(files=1)
    live.mount(metrics="127.0.0.1:923")
    pids = mounted(live)
    has(pids["server"], FILES | {"net_bind_service"})
    has(pids["holder"], HOLDER | {"net_bind_service"}, filtered=False)


@root_only
def test_a_node_server_and_its_fdstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lived(tmp_path, monkeypatch, Kept) as kept:
        fdstore = kept.start_fdstore()
        kept.serve()
        for _ in range(2):
            pids = mounted(kept)
            has(pids["server"], FILES)
            has(pids["standby"], FILES)
            has(pids["holder"], NODE_HOLDER, filtered=False)
            has(pids["understudy"], NODE_HOLDER, filtered=False)
            has(fdstore.pid, NOTHING)
            kept.deposited()
            kept.kill_all()
            kept.serve()


@root_only
def test_the_driver_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Node) as node:
        node.mount()
        try:
            has(node.start().pid, NOTHING)
        finally:
            node.stop()


@pytest.mark.parametrize("watching", [False, True])
def test_a_persister(tmp_path: Path, watching: bool) -> None:
    slots = SlotDirectory(tmp_path / "slots" / "run" / "00000")
    slots.create()
    what = ["--watch", tmp_path / "slots"] if watching else [slots.path]
    command = [sys.executable, "-m", "envstore.checkpoint.persister", *what]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: ask_hello(slots.path), "a persister")
            served = children(process.pid) if watching else {process.pid}
            for pid in served:
                has(pid, OF_FILES)
            if watching:
                has(process.pid, OF_FILES, filtered=False)  # it starts others
        finally:
            process.terminate()


_ORDINARY = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.confinement.test_processes import check_mount, children, kill, mounted, until
from tests.fuse.lives import Live
from envstore.fuse.mount import unmount
live = Live(Path(sys.argv[1]))
try:
    live.push(files=3)
    live.mount()
    check_mount(live)
    for name in ("server", "holder"):
        before = mounted(live)
        kill(before[name])
        until(lambda: mounted(live)[name] != before[name])
        check_mount(live)
        live.check()
    unmount(live.place)
finally:
    live.store.close()
"""


def test_an_ordinary_users_mount() -> None:
    if not can_be_ordinary():
        pytest.skip("needs root, and a Python that other users may run")
    with tempfile.TemporaryDirectory(prefix="envstore-confined-") as directory:
        os.chmod(directory, 0o755)
        cli = Cli(Path(directory) / "cli", ordinary=True)
        base = cli.root / "base"
        base.mkdir()
        os.chown(base, NOBODY, NOBODY)
        argv = cli.argv()
        script = _ORDINARY.format(root=str(REPOSITORY))
        argv[argv.index("-m") :] = ["-c", script, str(base)]
        env = {**cli.env, "XDG_STATE_HOME": str(base / "state")}
        env["ENVSTORE_CACHE_DIR"] = str(base / "cache")
        done = subprocess.run(
            argv, env=env, cwd=cli.root, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
