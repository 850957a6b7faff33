"""Mounts outlive their servers and their holders, in whatever order these are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, NotFoundError, UsageError
from envstore.fuse import mount
from envstore.fuse.mount import unmount
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.records import RecordFiles
from envstore.fuse.session import BusyError
from envstore.fuse.sockets import ask, short_address
from envstore.fuse.upgrade import upgrade_mount
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.repository import Repository
from tests.commands import name_space_copied
from tests.fuse.lives import PATIENCE, ROOT, Live, disconnected, gone, kill, lived, until, within
from tests.s3server import S3Server
from tests.tcpproxy import tcp_proxy


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with lived(tmp_path, monkeypatch) as made:
        yield made


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def state_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children(pid: int) -> list[str]:
    """Return the states of a process's children."""
    return [*map(state_of, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def test_servers_killed_again_and_again_under_readers(live: Live) -> None:
    live.push()
    live.mount()
    before = live.settled()
    open_files = fds(before["holder_pid"]), fds(before["server_pid"])
    with live.readers(6) as readers:
        for _ in range(25):
            until(lambda: live.status()["state"] == "serving")
            pid = live.status()["server_pid"]
            kill(pid)
            # The holder learns of it when all threads have ended; none is to be counted twice.
            until(lambda pid=pid: live.status()["server_pid"] != pid)  # type: ignore[misc]
            time.sleep(0.15)
    assert readers.done > 6
    after = live.settled()
    assert after["holder_pid"] == before["holder_pid"]
    assert after["restarts"] == 25
    assert "SIGKILL" in after["last_failure"]
    until(lambda: (fds(after["holder_pid"]), fds(live.status()["server_pid"])) <= open_files)
    assert "Z" not in children(after["holder_pid"])
    found = live.overview()
    assert (found.state, found.restarts) == ("serving", after["restarts"])
    unmount(live.place)
    assert live.left() == []


def test_killed_in_the_first_read_of_what_no_cache_holds(live: Live) -> None:
    live.push(files=8, size=3 << 20)
    live.mount()
    live.settled()
    reading = threading.Thread(target=live.check)
    reading.start()
    while reading.is_alive():
        pid = live.status()["server_pid"]
        if pid:
            kill(pid)
        reading.join(0.3)
    live.check()
    assert live.status()["restarts"]


def test_a_standby_takes_over_without_the_store(live: Live) -> None:
    live.push()
    live.mount()
    live.check()
    live.settled()
    live.store.path("").rename(live.base / "away")
    for _ in range(3):
        live.kill_server()
    within(PATIENCE, "sh", "-c", "echo 1 > /proc/sys/vm/drop_caches || true")
    live.check()


def test_a_server_that_hangs_is_replaced(live: Live) -> None:
    live.push()
    live.mount(hung_after=2.0)
    pid = live.settled()["server_pid"]
    with live.readers(4) as readers:
        kill(pid, signal.SIGSTOP)
        until(lambda: live.status()["server_pid"] not in (pid, None))
        until(lambda: live.status()["state"] == "serving")
    assert readers.done
    assert gone(pid)
    assert "no sign of life" in live.log()


def test_a_standby_that_hangs_is_replaced_in_its_turn(live: Live) -> None:
    live.push()
    live.mount(hung_after=2.0)
    status = live.settled()
    kill(status["standby_pid"], signal.SIGSTOP)
    kill(status["server_pid"])
    live.check()
    assert live.settled()["restarts"] == 2


def test_a_standby_that_is_killed_is_replaced(live: Live) -> None:
    live.push()
    live.mount()
    first = live.settled()
    kill(first["standby_pid"])
    until(lambda: live.status()["standby_pid"] not in (first["standby_pid"], None))
    second = live.settled()
    assert second["server_pid"] == first["server_pid"]
    assert second["restarts"] == 0
    kill(second["standby_pid"])
    kill(second["server_pid"])
    live.check()


def test_a_holder_that_is_killed_is_replaced(live: Live) -> None:
    live.push()
    live.mount()
    first = live.settled()
    with live.readers(4) as readers:
        for _ in range(3):
            before = live.settled()
            kill(before["holder_pid"])
            until(lambda pid=before["holder_pid"]: live.status()["holder_pid"] != pid)  # type: ignore[misc]
            found = live.settled()
            assert found["server_pid"] == before["server_pid"]
            assert live.overview().holder_pid == found["holder_pid"]
            pid = found["server_pid"]
            kill(pid)
            until(lambda pid=pid: live.status()["server_pid"] not in (pid, None))  # type: ignore[misc]
    assert readers.done
    assert gone(first["holder_pid"], first["standby_pid"])
    last = live.settled()
    assert last["restarts"] == 3
    unmount(live.place)
    assert live.left() == []


def test_holder_and_server_killed_at_once(live: Live) -> None:
    live.push()
    live.mount()
    status = live.settled()
    # Stopped first, or whoever is left would bring the other back.
    for name in ("holder_pid", "server_pid"):
        kill(status[name], signal.SIGSTOP)
    for name in ("server_pid", "holder_pid"):
        kill(status[name])
    until(lambda: gone(*(status[name] for name in ("holder_pid", "server_pid", "standby_pid"))))
    until(lambda: disconnected(live.place))
    until(lambda: live.overview().state == "dead")
    with pytest.raises(UsageError, match="has died"):
        live.mount()
    unmount(live.place)
    assert live.left() == []
    live.mount()
    live.check()


@pytest.mark.parametrize(
    "order",
    [
        ("holder_pid", "server_pid"),
        ("server_pid", "holder_pid"),
        ("standby_pid", "holder_pid"),
        ("standby_pid", "server_pid"),
        ("holder_pid", "standby_pid", "server_pid"),
        ("server_pid", "standby_pid", "holder_pid"),
    ],
)
def test_killed_in_every_order(live: Live, order: tuple[str, ...]) -> None:
    live.push(files=5)
    live.mount()
    with live.readers(3) as readers:
        for name in order:
            pid = live.settled()[name]
            kill(pid)
            until(lambda pid=pid: gone(pid))  # type: ignore[misc]
    assert readers.done
    live.settled()
    unmount(live.place)
    assert live.left() == []


def test_two_hundred_readers_while_servers_are_killed(live: Live) -> None:
    live.push(files=10, size=50_000)
    live.mount()
    live.settled()
    script = (
        "import os, sys, threading, hashlib\n"
        "place, source = sys.argv[1:]\n"
        "want = {n: open(f'{source}/{n}', 'rb').read() for n in os.listdir(source)}\n"
        "failed = []\n"
        "def read():\n"
        "    try:\n"
        "        for name in want:\n"
        "            with open(f'{place}/{name}', 'rb') as file:\n"
        "                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "                assert file.read() == want[name], name\n"
        "    except BaseException as error:\n"
        "        failed.append(error)\n"
        "threads = [threading.Thread(target=read) for _ in range(200)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "assert not failed, failed\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, live.place, live.tree]) as process:
        try:
            end = time.monotonic() + PATIENCE
            while process.poll() is None and time.monotonic() < end:
                kill(live.settled()["server_pid"])
                time.sleep(0.1)
            assert process.wait(1) == 0
        finally:
            process.kill()
    assert live.status()["restarts"]


_DIES = """
import os
from envstore.fuse import serving
attach = serving._attach
def dying(*arguments):
    if os.path.exists({flag!r}):
        os._exit(7)
    attach(*arguments)
serving._attach = dying
"""


def test_servers_that_die_at_once_are_started_ever_later(live: Live) -> None:
    live.push()
    live.mount()
    live.settled()
    flag = live.base / "die"
    live.upgrade_to(_DIES.format(flag=str(flag)))
    first = live.settled()
    with live.readers(2) as readers:
        flag.touch()
        kill(first["server_pid"])
        until(lambda: live.status()["state"] == "failing" and live.status()["restarts"] >= 5)
        found = live.overview()
        assert found.state == "failing"
        assert "exit status 7" in found.last_failure
        assert "the next one starts in" in live.log()
        flag.unlink()
        until(lambda: live.status()["state"] == "serving")
    assert readers.done
    assert live.settled()["holder_pid"] == first["holder_pid"]
    assert "Z" not in children(first["holder_pid"])
    unmount(live.place)
    assert live.left() == []


_NO_RESEND = """
from envstore.fuse.protocol import Flag
from envstore.fuse.servers import Servers
retire = Servers.retire
def retire_and_forget(self):
    retire(self)
    replace = self._replace
    def last(server, how):
        replace(server, how)
        self._kept.flags &= ~Flag.HAS_RESEND
        del self._replace
    self._replace = last
Servers.retire = retire_and_forget
"""


def test_a_kernel_that_cannot_send_again_has_the_mount_end_cleanly(live: Live) -> None:
    live.push()
    live.mount()
    live.settled()
    live.upgrade_to(_NO_RESEND)
    status = live.settled()
    with pytest.raises(EnvstoreError, match="on this kernel"):
        upgrade_mount(live.place)
    kill(status["server_pid"], signal.SIGSTOP)
    listing = "import os, sys; print(flush=True); os.listdir(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", listing, live.place], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        until(lambda: state_of(waiting.pid) in "SD")  # for an answer
        kill(status["server_pid"])
        _, said = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode
    assert b"connect" in said
    until(lambda: gone(status["holder_pid"]))
    assert "cannot send requests again" in live.log()
    assert find_mount(str(live.place)) is None
    assert live.left() == []


def test_a_first_server_that_cannot_load_leaves_nothing(live: Live) -> None:
    live.push(files=2)
    with pytest.raises(NotFoundError, match="no ref"):
        live.mount(ref="another")
    live.mount(ref="tree")
    unmount(live.place)
    for manifest in live.store.path("manifests").rglob("*"):
        if manifest.is_file():
            manifest.write_bytes(manifest.read_bytes()[:-9] + b"123456789")
    with pytest.raises(EnvstoreError, match="manifest"):
        live.mount(profile="none")
    with pytest.raises(EnvstoreError):
        live.mount(store=f"file://{live.base}/nowhere")
    until(lambda: live.left() == [])
    assert "Traceback" not in live.log()


def test_a_mount_in_use(live: Live) -> None:
    live.push(files=2, size=3 << 20)
    live.mount()
    status = live.settled()
    # Not opened by this process, which would hang if the mount did.
    script = (
        "import sys\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    sys.stdout.buffer.write(file.read())\n"
    )
    for lazy in (True, False):
        status = live.settled()
        holder = status["holder_pid"]
        with subprocess.Popen(
            [sys.executable, "-c", script, live.place / "file 1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as user:
            assert user.stdout is not None
            assert user.stdout.readline() == b"open\n"
            with pytest.raises(BusyError, match="in use"):
                unmount(live.place)
            if lazy:
                unmount(live.place, lazy=True)
            else:
                kill(holder, signal.SIGTERM)
            until(lambda: find_mount(str(live.place)) is None)
            kill(status["server_pid"])
            out, _ = user.communicate(b"\n", timeout=PATIENCE)
            assert out == (live.tree / "file 1").read_bytes()
        until(lambda holder=holder: gone(holder))  # type: ignore[misc]
        assert live.left() == []
        live.mount()


def test_an_upgrade_under_readers(live: Live) -> None:
    live.push()
    live.mount()
    before = live.settled()
    with live.readers(6) as readers:
        for _ in range(3):
            found = upgrade_mount(live.place)
            after = live.settled()
            assert found["server_pid"] == after["server_pid"] != before["server_pid"]
            assert after["holder_pid"] == before["holder_pid"]
            before = after
    assert readers.done
    assert "last_failure" in before
    assert before["last_failure"] == ""
    kill(before["server_pid"])
    live.check()
    until(lambda: children(before["holder_pid"]).count("Z") == 0)
    unmount(live.place)
    assert live.left() == []


@pytest.mark.parametrize(
    "script",
    [
        "import no_such_module",
        "sys.exit(3)",
        "from envstore.fuse import keeping\nkeeping.STATE_FORMAT = 99",
    ],
)
def test_an_upgrade_that_does_not_start_is_refused(live: Live, script: str) -> None:
    live.push(files=3)
    live.mount()
    before = live.settled()
    with pytest.raises(EnvstoreError, match="does not start"):
        live.upgrade_to(script)
    assert live.settled() == before
    live.check()


def test_an_upgrade_to_servers_that_do_not_start_leaves_the_old_one(live: Live) -> None:
    live.push(files=3)
    live.mount()
    before = live.settled()
    with pytest.raises(EnvstoreError, match="the old one goes on"):
        live.upgrade_to(
            "from envstore.fuse.volumes import Volumes\n"
            "def fail(self): raise ValueError('not this one')\n"
            "Volumes.prepare = fail"
        )
    assert live.status()["server_pid"] == before["server_pid"]
    live.check()
    assert upgrade_mount(live.place)["server_pid"] != before["server_pid"]
    live.check()


def test_nonsense_as_an_upgrade(live: Live) -> None:
    live.push(files=3)
    record = live.mount()
    before = live.settled()
    for program in ([], [""], ["/no/such/program"], ["/etc/passwd"], "text", 5, None, ["a\0b"]):
        with pytest.raises(EnvstoreError):
            ask(record.control, PATIENCE, ask="upgrade", program=program)
    assert live.settled() == before


def test_two_upgrades_at_once(live: Live) -> None:
    live.push(files=3)
    live.mount()
    live.settled()
    answers: list[object] = []

    def upgrade() -> None:
        try:
            answers.append(upgrade_mount(live.place))
        except EnvstoreError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(answers) == 3
    assert any(isinstance(answer, dict) for answer in answers), answers
    assert all(isinstance(answer, dict) or "under way" in str(answer) for answer in answers)
    live.settled()
    live.check()


def test_an_upgrade_right_after_the_mount(live: Live) -> None:
    live.push(files=3)
    live.mount()
    pid = live.status()["server_pid"]
    time.sleep(1.0)  # when the first standby is being made
    assert upgrade_mount(live.place)["server_pid"] != pid
    live.check()


@pytest.mark.parametrize(
    "name", ["with blanks", "two\nlines", "päth \\040 ,x", "n" * 250, "d/" * 600 + "deep"]
)
def test_odd_mount_points(live: Live, name: str) -> None:
    live.push(files=3)
    live.place.rmdir()
    live.place = live.base / name
    live.place.mkdir(parents=True)
    live.mount(mountpoint=str(live.place))
    status = live.settled()
    kill(status["holder_pid"])
    until(lambda: live.status()["holder_pid"] != status["holder_pid"])
    kill(live.settled()["server_pid"])
    live.check()
    upgrade_mount(live.place)
    assert live.overview().mountpoint == str(live.place)
    unmount(live.place)
    assert live.left() == []


def test_nonsense_at_the_control_socket_ends_nothing(live: Live) -> None:
    live.push(files=3)
    record = live.mount()
    before = live.settled()
    lines = [
        b"", b"\n", b"nonsense\n", b"[]\n", b"{}\n", b'{"ask": 5}\n', b'{"ask": {}}\n', b"5\n",
        b'{"ask": "upgrade"}\n', b"[" * 200_000 + b"\n", b"\xff\xfe\n", b"x" * (3 << 20),
        b'{"ask": "status", "more": "' + b"y" * 500_000 + b'"}\n', b"1" * 10_000 + b"\n",
    ]  # fmt: skip
    assert os.stat(record.control).st_mode & 0o777 == 0o600
    with short_address(record.control) as address, ExitStack() as silent:
        for _ in range(300):
            end = silent.enter_context(socket.socket(socket.AF_UNIX))
            end.connect(address)
        for line in lines:
            with socket.socket(socket.AF_UNIX) as end:
                end.connect(address)
                end.settimeout(PATIENCE)
                try:
                    end.sendall(line)
                    end.shutdown(socket.SHUT_WR)
                    end.recv(1 << 16)
                except OSError:
                    pass
        assert live.status() == before
        assert fds(before["holder_pid"]) < 150
    until(lambda: (live.status(), fds(before["holder_pid"]))[1] < 60)


def test_what_holder_and_servers_have_open_and_hold_does_not_grow(live: Live) -> None:
    live.push(files=3)
    live.mount()

    def cost() -> tuple[int, int, int]:
        status = live.settled()
        holder = status["holder_pid"]
        held = Path(f"/proc/{holder}/statm").read_text().split()
        return fds(holder), fds(status["server_pid"]), (int(held[1]) - int(held[2])) * 4096

    for _ in range(10):
        live.kill_server()
    before = cost()
    for _ in range(40):
        live.kill_server()
    after = cost()
    # A question that is just being answered has a descriptor or two.
    assert all(now <= then + 4 for now, then in zip(after[:2], before[:2], strict=True))
    assert after[2] < before[2] + (2 << 20)
    assert live.status()["restarts"] == 50
    assert "Z" not in children(live.status()["holder_pid"])


def test_a_holder_that_is_stopped_hurts_nobody(live: Live) -> None:
    live.push()
    live.mount()
    status = live.settled()
    kill(status["holder_pid"], signal.SIGSTOP)
    live.check()
    kill(status["server_pid"])
    kill(status["holder_pid"], signal.SIGCONT)
    live.check()
    assert live.settled()["restarts"] == 1


def test_holders_that_keep_dying_are_replaced(live: Live) -> None:
    live.push(files=3)
    live.mount()
    server = live.settled()["server_pid"]
    for _ in range(6):
        holder = live.status()["holder_pid"]
        kill(holder)
        until(lambda holder=holder: live.status()["holder_pid"] != holder)  # type: ignore[misc]
    assert live.settled()["server_pid"] == server
    assert children(server).count("Z") <= 1
    live.check()
    unmount(live.place)
    assert live.left() == []


def test_killed_while_a_reader_waits_for_the_store(
    live: Live, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    objects = open_objects(s3_server.url(bucket), create=True)
    config, _ = init_store(objects)
    live.store.repository.close()
    with tcp_proxy(s3_server.endpoint) as proxy:
        try:
            live.store.repository = Repository(objects, config, None)
            live.push(files=2, size=3 << 20)
            keys = s3_server.access_key, s3_server.secret_key
            live.mount(store=S3Server(proxy.endpoint, *keys, 0).url(bucket))
            live.settled()
            proxy.hang()
            cat = ["cat", str(live.place / "file 1")]
            with subprocess.Popen(cat, stdout=subprocess.PIPE) as reader:
                try:
                    for _ in range(3):
                        time.sleep(0.2)
                        live.kill_server()
                    assert reader.poll() is None
                    proxy.restore()
                    live.kill_server()
                    out, _ = reader.communicate(timeout=PATIENCE)
                finally:
                    reader.kill()
            assert out == (live.tree / "file 1").read_bytes()
            assert live.settled()["restarts"] == 4
        finally:
            proxy.restore()


def test_no_process_stays_in_anybodys_directory(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.push(files=3)
    home = live.base / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    live.mount(metrics="./metrics.sock")
    status = live.settled()
    for name in ("holder_pid", "server_pid", "standby_pid"):
        assert os.readlink(f"/proc/{status[name]}/cwd") == "/"
    until((home / "metrics.sock").exists)
    (home / "metrics.sock").unlink()
    live.kill_server()
    live.check()
    until((home / "metrics.sock").exists)


@pytest.mark.skipif(os.geteuid() != 0, reason="the fast path takes root")
@pytest.mark.parametrize("name", ["server_pid", "holder_pid"])
def test_the_fast_path_outlives_its_processes(live: Live, name: str) -> None:
    live.push()
    try:
        live.mount(fast_path="on")
    except EnvstoreError as error:
        pytest.skip(str(error))
    with live.readers(4) as readers:
        for _ in range(3):
            pid = live.settled()[name]
            kill(pid)
            until(lambda pid=pid: gone(pid))  # type: ignore[misc]
        upgrade_mount(live.place)
    assert readers.done
    live.settled()
    assert live.overview().fast_path
    unmount(live.place)
    until(lambda: live.left() == [])


@pytest.mark.skipif(os.geteuid() != 0, reason="the fast path takes root")
def test_the_fast_path_with_nobody_left(live: Live) -> None:
    live.push(files=4)
    try:
        live.mount(fast_path="on")
    except EnvstoreError as error:
        pytest.skip(str(error))
    status = live.settled()
    for name in ("holder_pid", "server_pid"):
        kill(status[name], signal.SIGSTOP)
    for name in ("server_pid", "holder_pid", "standby_pid"):
        kill(status[name])
    until(lambda: not live.processes())
    until(lambda: live.overview().state == "dead")
    done = subprocess.run(["cat", live.place / "file 1"], timeout=PATIENCE, check=False,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode
    unmount(live.place)
    assert live.left() == []


_NO_FORK = """
import os
from envstore.fuse import servers
start = servers.start_server
def failing():
    if os.path.exists({flag!r}):
        raise OSError(12, "Cannot allocate memory")
    return start()
servers.start_server = failing
"""


def test_when_no_process_can_be_started(live: Live) -> None:
    live.push(files=5)
    live.mount()
    live.settled()
    flag = live.base / "full"
    live.upgrade_to(_NO_FORK.format(flag=str(flag)))
    status = live.settled()
    flag.touch()
    with live.readers(2) as readers:
        live.kill_server()
        until(lambda: live.status()["server_pid"] not in (status["server_pid"], None))
        live.kill_server_of(live.status())
        until(lambda: "Cannot allocate memory" in live.status()["last_failure"])
        assert live.status()["state"] == "failing"
        assert live.status()["holder_pid"] == status["holder_pid"]
        flag.unlink()
        until(lambda: live.status()["state"] == "serving")
    assert readers.done
    live.settled()


def test_the_log_of_servers_that_die_for_ever_has_an_end(live: Live) -> None:
    live.push(files=3)
    live.mount()
    live.settled()
    live.upgrade_to("from envstore.fuse import processes\nprocesses._MAX_LOG = 2000")
    for _ in range(40):
        live.kill_server()
    assert len(live.log()) < 4000
    live.kill_server()
    assert "SIGKILL" in live.log()


_NO_HOLDER = """
import os
from envstore.fuse import understudy
script = understudy.background_script
def missing():
    return "/no/such/program" if os.path.exists({flag!r}) else script()
understudy.background_script = missing
"""


@pytest.mark.parametrize("comes", [True, False])
def test_when_no_holder_can_be_started(live: Live, comes: bool) -> None:
    live.push(files=5)
    live.mount()
    live.settled()
    flag = live.base / "broken"
    live.upgrade_to(_NO_HOLDER.format(flag=str(flag)))
    status = live.settled()
    flag.touch()
    with live.readers(2) as readers:
        kill(status["holder_pid"])
        until(lambda: live.log().count("starting another") > 3)
        assert children(status["server_pid"]).count("Z") <= 1
        live.check()
        if comes:
            flag.unlink()
            assert live.settled()["holder_pid"] != status["holder_pid"]
    assert readers.done
    if comes:
        live.kill_server()
        live.check()
    unmount(live.place)
    until(lambda: live.left() == [])


def test_unmounted_by_somebody_else(live: Live) -> None:
    live.push(files=3)
    live.mount()
    holder = live.settled()["holder_pid"]
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*command, live.place], timeout=PATIENCE, check=True)
    until(lambda: gone(holder))
    assert live.left() == []
    live.mount()
    server = live.settled()["server_pid"]
    kill(server)
    subprocess.run([*command, live.place], timeout=PATIENCE, check=True)
    until(lambda: live.left() == [])


@pytest.mark.skipif(not ROOT, reason="needs root, to copy the mount name space")
def test_unmounted_while_another_name_space_keeps_it(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount, "_END_WITHIN", 0.1)
    live.push(files=3)
    live.mount()
    holder = live.settled()["holder_pid"]
    with name_space_copied():
        unmount(live.place)
        assert find_mount(str(live.place)) is None
        assert not gone(holder)
    until(lambda: live.left() == [])


def test_unmounted_while_servers_are_killed(live: Live) -> None:
    live.push(files=3)
    for name in ("server_pid", "holder_pid", "standby_pid"):
        live.mount()
        status = live.settled()
        kill(status[name])
        unmount(live.place)
        until(lambda: live.left() == [])


def test_a_new_holder_that_cannot_write_its_record(live: Live) -> None:
    live.push(files=3)
    live.mount()
    status = live.settled()
    obstacle = RecordFiles(str(live.place)).record.with_suffix(".tmp")
    obstacle.mkdir()
    kill(status["holder_pid"])
    until(lambda: live.status()["holder_pid"] != status["holder_pid"])
    found = live.settled()
    assert live.overview().holder_pid == found["holder_pid"]
    live.kill_server()
    live.check()
    assert live.settled()["holder_pid"] == found["holder_pid"]
    obstacle.rmdir()
