"""Mounts at targets that others name: what is made there, what is refused, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envstore.errors import (
    ConflictError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.fuse.mount import unmount
from envstore.fuse.mountinfo import list_mounts
from envstore.fuse.overlay import probe
from envstore.fuse.sockets import ask, ask_lasting, short_address
from envstore.fuse.upgrade import upgrade_mount
from tests.fuse.lives import PATIENCE, ROOT, alive, disconnected, gone, kill, lived, until, within
from tests.fuse.test_node import BIG, Site, same

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")


class Pods(Site):
    """A node server that makes mounts below ``pods``, and one snapshot that it serves."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.pods = base / "pods"
        self.pods.mkdir()
        self.request = replace(
            self.request, targets=[str(self.pods)], hung_after=2.0, lease_grace=60.0
        )
        self.source = self.add("one", {"lib/big": BIG, "file": b"content", "bin/run": _SCRIPT})
        (self.source / "bin/run").chmod(0o755)
        self.store.push(self.source, "one")

    def take(self, fast: str = "off") -> dict[str, Any]:
        """Take a lease; returns what is to be said to show it."""
        found = ask_lasting(
            self.socket,
            PATIENCE,
            ask="mount",
            store=self.store.url,
            ref="one",
            target=str(self.pods / "x"),
            fast_path=fast,
            profile="none",
            namespace=os.stat("/proc/self/ns/mnt").st_ino,
        )
        return {
            **{name: found[name] for name in ("id", "root", "subtree", "fast")},
            "source": "envstore:one",
            "required": fast == "on",
        }

    def ask(self, what: str, **question: Any) -> Any:
        assert self.record is not None
        return ask_lasting(self.record.control, PATIENCE, ask=what, **question)

    def put(self, lease: dict[str, Any], target: Path) -> bool:
        return bool(self.ask("show", target=str(target), **lease)["fast"])

    def hide(self, target: Path) -> None:
        assert self.ask("hide", target=str(target)) == {}

    def look(self) -> list[dict[str, Any]]:
        found = self.ask("look")["mounts"]
        assert isinstance(found, list)
        return found


_SCRIPT = b"#!/bin/sh\necho ran\n"


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Pods) as made:
        made.mount()
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("showing")
        patch.setenv("ENVSTORE_NODE_SOCKET", str(base / "node.sock"))
        with lived(base, patch, Pods) as made:
            made.mount()
            yield made


def mounted(base: Path) -> list[str]:
    return [one.mountpoint for one in list_mounts() if one.mountpoint.startswith(f"{base}/")]


def options(target: Path) -> set[str]:
    """Return the options of the one mount on a target."""
    with open("/proc/self/mountinfo") as table:
        (found,) = [line.split()[5] for line in table if line.split()[4] == str(target)]
    return set(found.split(","))


@pytest.mark.parametrize("fast", ["off", "auto"])
def test_shown_and_hidden(shared: Pods, fast: str) -> None:
    if fast == "auto" and probe(shared.base / "cache") is not None:
        pytest.skip("no fast path here")
    lease = shared.take(fast)
    target = shared.pods / "a pod" / "näme\n"
    target.parent.mkdir(exist_ok=True)
    was_fast = shared.put(lease, target)
    assert was_fast == (fast == "auto")
    same(shared.source, target)
    assert within(PATIENCE, target / "bin/run") == "ran\n"
    with open("/proc/self/mountinfo", "rb") as table:
        (line,) = [line for line in table if b"a\\040pod/" in line]
    assert {b"ro", b"nosuid", b"nodev"} <= set(line.split()[5].split(b","))
    assert b"noexec" not in line
    (found,) = shared.look()
    assert (found["target"], found["alive"], found["fast"]) == (str(target), True, was_fast)
    assert found["id"] == lease["id"]
    # Again is the same; another may not.
    assert shared.put(lease, target) == was_fast
    assert len(mounted(shared.pods)) == 1
    with pytest.raises(ConflictError, match="something else"):
        shared.put(shared.take(fast), target)
    for _ in range(3):
        shared.hide(target)
        assert not target.exists()
    assert shared.look() == []
    assert shared.put(lease, target) == was_fast
    shared.hide(target)


def test_many_at_once(shared: Pods) -> None:
    leases = [shared.take() for _ in range(5)]
    before = shared.settled()
    files = len(os.listdir(f"/proc/{before['holder_pid']}/fd"))

    def use(number: int) -> None:
        target = shared.pods / f"many {number % 50}"
        shared.put(leases[number % 5], target)
        assert (target / "file").read_bytes() == b"content"
        shared.hide(target)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(use, range(50)))
    with ThreadPoolExecutor(50) as pool:  # several at the same target, in any order
        calls = [pool.submit(shared.put, leases[0], shared.pods / "one") for _ in range(25)]
        calls += [pool.submit(shared.hide, shared.pods / "one") for _ in range(25)]
        for call in calls:
            call.result()
    shared.hide(shared.pods / "one")
    assert mounted(shared.pods) == []
    assert shared.settled() == {**before, "leases": shared.settled()["leases"]}
    until(lambda: len(os.listdir(f"/proc/{before['holder_pid']}/fd")) <= files, "closing files")


def test_targets_that_are_refused(shared: Pods) -> None:
    lease = shared.take()
    outside = shared.base / "outside"
    outside.mkdir()
    (outside / "below").mkdir()
    (shared.pods / "link").symlink_to(outside)
    (shared.pods / "dangling").symlink_to(outside / "nothing")
    (shared.pods / "file").write_bytes(b"file")
    (shared.pods / "full").mkdir()
    (shared.pods / "full/file").write_bytes(b"file")
    before = sorted(path for path in shared.base.rglob("*") if "state" not in str(path))
    pods = str(shared.pods)
    refused: list[Any] = [
        "", ".", "/", pods, pods + "/", pods + "/.", pods + "/..", pods + "/../outside/x",
        pods + "/x/", pods + "//x", pods + "/./x", "/" + pods + "/x", pods + "x", pods + "x/y",
        str(outside / "x"), "pods/x", pods + "/\0", pods + "/\ud800", pods + "/" + "x" * 300,
        pods + "/x" * 3000, pods + "/no/such/x", pods + "/file/x", pods + "/link/x",
        pods + "/link/below", 5, None, [], {"a": 1}, True,
    ]  # fmt: skip
    for target in refused:
        with pytest.raises(UsageError):
            shared.ask("show", **{**lease, "target": target})
    for name in ("link", "dangling", "file", "full"):
        with pytest.raises(UsageError):
            shared.put(lease, shared.pods / name)
    for target in refused:
        if target != pods + "/no/such/x":
            with pytest.raises(UsageError):
                shared.ask("hide", target=target)
    shared.ask("hide", target=pods + "/no/such/x")
    for name in ("link", "dangling", "file"):
        with pytest.raises(UsageError, match="no directory"):
            shared.hide(shared.pods / name)
    with pytest.raises(ConflictError, match="not empty"):
        shared.hide(shared.pods / "full")
    for name in ("show", "hide"):
        with pytest.raises(UsageError, match="not a question"):
            shared.ask(name)
    after = sorted(path for path in shared.base.rglob("*") if "state" not in str(path))
    assert after == before
    assert mounted(shared.pods) == []


def test_shows_what_its_leases_are_for_and_nothing_else(shared: Pods) -> None:
    if probe(shared.base / "cache") is not None:
        pytest.skip("no fast path here")
    lease = shared.take("on")
    target = str(shared.pods / "x")
    for wrong in (
        {"id": "0" * 16}, {"id": None}, {"root": "/"}, {"root": str(shared.base)},
        {"subtree": ".."}, {"subtree": "../.."}, {"subtree": ""}, {"subtree": "99-" + "0" * 16},
        {"subtree": lease["subtree"] + "/.."}, {"subtree": lease["subtree"] + ".objects"},
        {"source": "/dev/sda1"}, {"source": "envstore:" + "x" * 5000}, {"source": "envstore:\0"},
        {"fast": {**lease["fast"], "local": "/etc"}},
        {"fast": {**lease["fast"], "image": "/etc/passwd"}},
        {"fast": {**lease["fast"], "image": lease["fast"]["image"] + "/../../lock"}},
        {"fast": {}}, {"fast": "yes"},
    ):  # fmt: skip
        with pytest.raises((UsageError, NotFoundError)):
            shared.ask("show", **{**lease, "target": target, **wrong})
    # What is not there is not shown, and nothing is left of the attempt.
    missing = {**lease["fast"], "image": str(Path(lease["fast"]["image"]).with_name("none"))}
    with pytest.raises(EnvstoreError):
        shared.ask("show", **{**lease, "target": target, "fast": missing})
    assert not Path(target).exists()
    assert not shared.ask(
        "show", **{**lease, "target": target, "fast": missing, "required": False}
    )["fast"]
    same(shared.source, Path(target))
    shared.hide(Path(target))
    assert mounted(shared.pods) == []


def test_without_targets_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lived(tmp_path, monkeypatch, Pods) as pods:
        pods.mount(targets=[])
        for question in ({"ask": "look"}, {"ask": "hide", "target": "/x"}, {"ask": "show"}):
            assert pods.record is not None
            with pytest.raises(UsageError, match="--targets"):
                ask(pods.record.control, PATIENCE, **question)


def test_others_mounts_are_left(shared: Pods) -> None:
    lease = shared.take()
    target = shared.pods / "theirs"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "theirs", target], check=True, timeout=30)
    try:
        with pytest.raises(ConflictError, match="something else is mounted"):
            shared.put(lease, target)
        with pytest.raises(ConflictError, match="theirs"):
            shared.hide(target)
        assert mounted(shared.pods) == [str(target)]
        assert shared.look() == []
    finally:
        subprocess.run(["umount", target], check=True, timeout=30)
    shared.hide(target)
    # What others unmount is forgotten, and can be shown again.
    shared.put(lease, target)
    subprocess.run(["umount", target], check=True, timeout=30)
    assert shared.look() == []
    shared.put(shared.take(), target)
    shared.hide(target)


def test_stacked_mounts_are_hidden_together(shared: Pods) -> None:
    lease = shared.take()
    target = shared.pods / "stacked"
    shared.put(lease, target)
    served = Path(lease["root"]) / lease["subtree"]
    subprocess.run(["mount", "--bind", served, target], check=True, timeout=30)
    assert len(shared.look()) == 2
    shared.hide(target)
    assert mounted(shared.pods) == []
    assert not target.exists()


def test_a_used_mount_is_hidden(shared: Pods) -> None:
    lease = shared.take()
    target = shared.pods / "used"
    shared.put(lease, target)
    with (target / "lib/big").open("rb") as file:
        shared.hide(target)
        assert file.read() == BIG


def test_a_target_in_a_directory_that_is_reached_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lived(tmp_path, monkeypatch, Pods) as pods:
        link = tmp_path / "link"
        link.symlink_to(pods.pods)
        pods.mount(targets=[str(link)])
        lease = pods.take()
        pods.put(lease, link / "x")
        assert (pods.pods / "x/file").read_bytes() == b"content"
        assert [one["target"] for one in pods.look()] == [str(link / "x")]
        with pytest.raises(UsageError, match="not below"):
            pods.hide(pods.pods / "x")
        pods.hide(link / "x")


def test_what_is_shown_is_known_to_every_next_holder(pods: Pods) -> None:
    fast = "auto" if probe(pods.base / "cache") is None else "off"
    leases = {pods.pods / "plain": pods.take(), pods.pods / "fast": pods.take(fast)}
    for target, lease in leases.items():
        pods.put(lease, target)

    def known() -> None:
        found = {one["target"]: (one["id"], one["alive"]) for one in pods.look()}
        assert found == {str(target): (lease["id"], True) for target, lease in leases.items()}
        for target, lease in leases.items():
            pods.put(lease, target)
            same(pods.source, target)

    known()
    upgrade_mount(pods.place)
    known()
    for name in ("holder_pid", "server_pid", "holder_pid"):
        before = pods.settled()
        kill(before[name])
        until(lambda pid=before[name]: gone(pid))  # type: ignore[misc]
        pods.settled()
        known()
    for target in leases:
        pods.hide(target)
    assert mounted(pods.pods) == []


def test_nobody_answers(pods: Pods) -> None:
    lease = pods.take()
    shown, other = pods.pods / "shown", pods.pods / "other"
    pods.put(lease, shown)
    held = pods.settled()["server_pid"]
    kill(held, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        # The next server answers, after the one that hangs was killed.
        late = pool.submit(pods.put, lease, other)
        pods.hide(shown)
        assert pods.look() == []
        late.result()
    assert gone(held)
    same(pods.source, other)
    pods.hide(other)


def test_a_helper_that_is_killed_leaves_nothing(pods: Pods) -> None:
    lease = pods.take()
    status = pods.settled()
    for name in ("server_pid", "standby_pid"):
        kill(status[name], signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(pods.put, lease, pods.pods / "x")

        def helpers() -> list[int]:
            holder = status["holder_pid"]
            found = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
            return [pid for pid in map(int, found) if pid not in status.values()]

        until(helpers, "a helper")
        for pid in helpers():
            kill(pid)
        for name in ("server_pid", "standby_pid"):
            kill(status[name], signal.SIGCONT)
        failed = call.exception()
    if failed is not None:  # it was not too late
        assert "the helper ended with status -9" in str(failed)
        assert not (pods.pods / "x").exists()
        pods.put(lease, pods.pods / "x")
    pods.hide(pods.pods / "x")
    assert pods.look() == []


def test_no_server_for_longer_than_anybody_waits(pods: Pods) -> None:
    lease = pods.take()
    pods.upgrade_to(_NEVER_SERVES.format(flag=str(pods.base / "die")))
    status = pods.settled()
    (pods.base / "die").touch()
    kill(status["server_pid"])
    with pytest.raises(UnavailableError, match="no answer"):
        pods.put(lease, pods.pods / "x")
    assert not (pods.pods / "x").exists()
    assert pods.status()["holder_pid"] == status["holder_pid"]
    (pods.base / "die").unlink()
    until(lambda: pods.status()["state"] == "serving")
    pods.put(lease, pods.pods / "x")
    same(pods.source, pods.pods / "x")
    pods.hide(pods.pods / "x")
    until(lambda: "Z" not in states(status["holder_pid"]))


def states(pid: int) -> list[str]:
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in pids]


_NEVER_SERVES = """
import os
import resource
from envstore.fuse import serving
attach = serving._attach
def dying(*arguments):
    if os.path.exists({flag!r}):
        os._exit(7)
    attach(*arguments)
serving._attach = dying
"""


def test_dead_mounts_are_hidden_and_not_taken_for_living_ones(pods: Pods) -> None:
    fast = "auto" if probe(pods.base / "cache") is None else "off"
    targets = [pods.pods / "plain", pods.pods / "fast"]
    pods.put(pods.take(), targets[0])
    pods.put(pods.take(fast), targets[1])
    for pid in pods.processes():
        kill(pid, signal.SIGSTOP)
    for pid in pods.processes():
        kill(pid)
    until(lambda: not pods.processes())
    until(lambda: disconnected(targets[0]))
    unmount(pods.place)
    pods.mount()
    lease = pods.take()
    found = pods.look()
    assert sorted(one["target"] for one in found) == sorted(map(str, targets))
    assert not any(one["alive"] for one in found)
    for target in targets:
        with pytest.raises(ConflictError):
            pods.put(lease, target)
        pods.hide(target)
        pods.put(lease, target)
        same(pods.source, target)
        pods.hide(target)
    assert mounted(pods.pods) == []


def test_a_race_with_links_leads_nowhere_else(shared: Pods) -> None:
    """Somebody exchanges the directory above the target for a link, again and again."""
    lease = shared.take()
    outside, race = shared.base / "not here", shared.pods / "race"
    outside.mkdir()
    script = (
        "import os, sys\n"
        "race, outside = sys.argv[1:]\n"
        "print('racing', flush=True)\n"
        "while True:\n"
        "    try:\n"
        "        os.mkdir(race); os.rename(race, race + '.old')\n"
        "    except OSError: pass\n"
        "    try:\n"
        "        os.symlink(outside, race); os.unlink(race)\n"
        "        os.rename(race + '.old', race)\n"
        "    except OSError: pass\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, race, outside], stdout=subprocess.PIPE
    ) as racer:
        assert racer.stdout is not None
        racer.stdout.readline()
        try:
            for _ in range(40):
                try:
                    shared.put(lease, race / "x")
                except EnvstoreError:
                    continue
                assert str(outside) not in "".join(mounted(shared.base))
                with contextlib.suppress(EnvstoreError):
                    shared.hide(race / "x")
                assert os.listdir(outside) == []
        finally:
            racer.kill()
    for place in mounted(shared.pods):
        subprocess.run(["umount", "-l", place], check=True, timeout=30)
    if race.is_symlink():
        race.unlink()
    for left in shared.pods.glob("race*"):
        shutil.rmtree(left)
    assert os.listdir(outside) == []


def test_nonsense_at_the_control_socket(shared: Pods) -> None:
    before = shared.settled()
    assert shared.record is not None
    lines = [b"{}\n", b'{"ask": "show"}\n', b'{"ask": "hide", "target": 1e999}\n', b"[]\n", b"\n"]
    lines.append(json.dumps({"ask": "hide", "target": "/" + "x" * 900_000}).encode() + b"\n")
    for line in lines:
        with short_address(shared.record.control) as address, socket.socket(socket.AF_UNIX) as end:
            end.connect(address)
            end.settimeout(PATIENCE)
            end.sendall(line)
            assert b"error" in end.recv(1 << 16), line
    assert shared.settled() == before


def test_a_holder_without_a_free_descriptor_gives_nothing_up(pods: Pods) -> None:
    target = pods.pods / "kept"
    lease = pods.take()
    pods.put(lease, target)
    status = pods.settled()
    holder = status["holder_pid"]
    limits = resource.prlimit(holder, resource.RLIMIT_NOFILE)
    assert pods.record is not None
    for spare in range(8):
        taken = max(map(int, os.listdir(f"/proc/{holder}/fd"))) + 1
        resource.prlimit(holder, resource.RLIMIT_NOFILE, (taken + spare, limits[1]))
        for what in ("look", "status"):
            with contextlib.suppress(EnvstoreError):
                ask(pods.record.control, 0.5, ask=what)
        for question in ({"ask": "show", **lease}, {"ask": "hide"}):
            with contextlib.suppress(EnvstoreError):
                ask(pods.record.control, 0.5, target=str(pods.pods / "other"), **question)
    kill(status["standby_pid"])
    until(lambda: not alive(status["standby_pid"]), "the end of the standby")
    resource.prlimit(holder, resource.RLIMIT_NOFILE, limits)
    assert alive(holder)
    pods.hide(pods.pods / "other")
    assert (target / "file").read_bytes() == b"content"
    assert pods.settled()["holder_pid"] == holder
    pods.hide(target)
    assert mounted(pods.pods) == []
