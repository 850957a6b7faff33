"""Live mounts to be hard on: a store, a tree in it, readers that check every byte, and the end.

    with lived(tmp_path, monkeypatch) as live:
        live.push(files=50)
        live.mount()
        with live.readers(6) as readers:
            live.kill_server()
        assert readers.done

Whatever a test leaves behind is killed and unmounted; a reader that hangs fails its test only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from envstore.fuse import background
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mountinfo import list_mounts
from envstore.fuse.overview import MountOverview, overview
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.sockets import ask
from envstore.fuse.stats import read_stats
from tests.stores import Store
from tests.trees import noise, prose

ROOT = os.geteuid() == 0
PATIENCE = 60.0
"""Seconds after which something that should have happened will not: generous, machines stall."""


def until(true: Callable[[], object], what: str = "it") -> None:
    """Return when ``true`` is; fail if it does not come to be."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process is there and more than a zombie, any of its threads included.

    One whose first thread has ended has its files open as long as another has not.
    """
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            state = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX":
                return True
    except (FileNotFoundError, ProcessLookupError):
        return os.path.exists(f"/proc/{pid}") and alive(pid)  # a thread ended just now
    return False


def disconnected(place: Path) -> bool:
    """Whether the kernel tells everybody that a mount's last process has gone.

    Who asked while that was going is told that it was aborted.
    """
    try:
        os.listdir(place)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return error.errno == errno.ENOTCONN
    return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started and that are there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def gone(*pids: int | None) -> bool:
    return not any(alive(pid) for pid in pids if pid)


def within(seconds: float, *command: str | Path) -> str:
    """Run a command that may hang; returns what it says."""
    done = subprocess.run(
        [*map(str, command)], timeout=seconds, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


_READ = """
import hashlib, mmap, os, random, sys, time
place, source, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = random.Random(seed)
names = sorted(os.listdir(source))
want = {}
for name in names:
    with open(os.path.join(source, name), "rb") as file:
        want[name] = hashlib.sha256(file.read()).digest()
print("reading", flush=True)
count = 0
while True:
    if os.path.exists(sys.argv[4]):
        break
    name = rng.choice(names)
    path = os.path.join(place, name)
    what = rng.randrange(4)
    if what == 0:
        assert sorted(os.listdir(place)) == names, "listing"
    elif what == 1:
        st, real = os.stat(path), os.stat(os.path.join(source, name))
        assert (st.st_size, st.st_mode, st.st_mtime_ns) == (
            real.st_size, real.st_mode, real.st_mtime_ns), name
    elif what == 2:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert hashlib.sha256(file.read()).digest() == want[name], name
    else:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                assert hashlib.sha256(mapped).digest() == want[name], name
    count += 1
print(count)
"""


class Readers:
    """Processes that read a mount at random and compare with the source until told to stop."""

    def __init__(self, place: Path, source: Path, count: int, stop: Path) -> None:
        self._stop = stop
        self.done = 0
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _READ, place, source, str(seed), stop],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in range(count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"

    def stop(self) -> None:
        """Have all stop, and see that none met an error."""
        self._stop.touch()
        for process in self._processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, (process.returncode, err)
            self.done += int(out)

    def end(self) -> None:
        self._stop.touch()
        for process in self._processes:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)


class Live:
    """A store and a mount of one snapshot in it, below ``base``."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.store = Store(base / "store")
        self.tree = base / "tree"
        self.place = base / "place"
        self.place.mkdir()
        self.record: MountRecord | None = None
        self.request = MountRequest(self.store.url, "tree", str(self.place), profile="none")

    def push(self, files: int = 20, size: int = 200_000) -> None:
        """Push a flat tree of text and noise."""
        self.tree.mkdir()
        for number in range(files):
            make = noise if number % 2 else prose
            (self.tree / f"file {number}").write_bytes(make(f"live {number}", size + number))
        self.store.push(self.tree)

    def mount(self, **request: Any) -> MountRecord:
        """Mount with these fields of the request changed."""
        self.request = replace(self.request, **request)
        self.record = background.start_background(self.request)
        return self.record

    def status(self) -> dict[str, Any]:
        """Return what the holder says."""
        assert self.record is not None
        found = ask(self.record.control, PATIENCE, ask="status")
        assert isinstance(found, dict)
        return found

    def stats(self) -> dict[str, Any]:
        assert self.record is not None
        return read_stats(Path(self.record.stats))

    def overview(self) -> MountOverview:
        (found,) = [one for one in overview() if one.mountpoint == str(self.place)]
        return found

    def settled(self) -> dict[str, Any]:
        """Return the status once a server serves and another stands by."""
        found: dict[str, Any] = {}

        def stands() -> bool:
            nonlocal found
            found = self.status()
            pids = [found[name] for name in ("holder_pid", "server_pid", "standby_pid")]
            return found["state"] == "serving" and all(pid and alive(pid) for pid in pids)

        until(stands, "a server and a standby")
        return found

    def kill_server(self) -> None:
        """Kill the one that serves, when another stands by, and see it end."""
        self.kill_server_of(self.settled())

    def kill_server_of(self, status: dict[str, Any]) -> None:
        """Kill the one that serves, and see it end."""
        kill(status["server_pid"])
        until(lambda: not alive(status["server_pid"]))

    def processes(self) -> list[int]:
        """Return every process that has this mount's lock open: its holder and servers.

        Into those nobody but root sees; of them only the holder and its children are known.
        """
        if not ROOT:
            record = RecordFiles(str(self.place)).load()
            holder = record.holder_pid if record is not None else 0
            return [pid for pid in (holder, *children_of(holder)) if pid and alive(pid)]
        lock = RecordFiles(str(self.place)).log.with_suffix(".lock")
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{process}/fd"):
                    with contextlib.suppress(FileNotFoundError):
                        if os.readlink(f"/proc/{process}/fd/{fd}") == str(lock):
                            found.append(int(process))
                            break
        return found

    def log(self) -> str:
        return RecordFiles(str(self.place)).log.read_text()

    @contextmanager
    def readers(self, count: int) -> Iterator[Readers]:
        readers = Readers(self.place, self.tree, count, self.base / f"stop {time.monotonic()}")
        try:
            yield readers
            readers.stop()
        finally:
            readers.end()

    def check(self) -> None:
        """See that every file is as it should be, in a process that may hang."""
        script = (
            "import sys,os\n"
            "place, source = sys.argv[1:]\n"
            "assert sorted(os.listdir(place)) == sorted(os.listdir(source))\n"
            "for name in os.listdir(source):\n"
            "    one, two = open(f'{place}/{name}', 'rb'), open(f'{source}/{name}', 'rb')\n"
            "    with one, two:\n"
            "        assert one.read() == two.read(), name\n"
        )
        within(PATIENCE, sys.executable, "-c", script, self.place, self.tree)

    def left(self) -> list[str]:
        """Return what is left of mounts here: processes, mounts, records and sockets."""
        state = RecordFiles(str(self.place)).directory
        kept = {".log", ".lock"}
        files = [path.name for path in state.iterdir() if path.suffix not in kept]
        mounts = [one.mountpoint for one in list_mounts() if str(self.base) in one.mountpoint]
        return [*files, *mounts, *map(str, self.processes())]

    def upgrade_to(self, script: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Have the mount served by ``script``, which may change envstore before it begins."""
        assert self.record is not None
        program = self.base / f"program {time.monotonic()}.py"
        program.write_text(_PROGRAM.format(root=str(_ROOT), script=script))
        argv = [sys.executable, "-P", str(program)]
        found = ask(self.record.control, timeout, ask="upgrade", program=argv)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        self.kill_processes()
        for mounted in reversed(list_mounts()):
            if str(self.base) in mounted.mountpoint:
                command = ["umount", "-l"] if ROOT else ["fusermount3", "-u", "-z"]
                subprocess.run([*command, mounted.mountpoint], timeout=30, check=False)
        until(self.kill_processes, "the end of all processes")
        self.store.close()

    def kill_processes(self) -> bool:
        """Kill all there are; returns whether there were none. Others may be just being started."""
        found = self.processes()
        for pid in found:
            kill(pid, signal.SIGCONT)
            kill(pid)
        return not found


_ROOT = Path(__file__).parent.parent.parent
_PROGRAM = """
import sys
sys.path.append({root!r})
{script}
from envstore.fuse import background
background.__file__ = {root!r} + "/envstore/fuse/background.py"
sys.exit(background.main(sys.argv[1:]))
"""


_Made = TypeVar("_Made", bound=Live)


@contextmanager
def lived(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[_Made] = Live,  # type: ignore[assignment]
) -> Iterator[_Made]:
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(base / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(base / "state"))
    live = kind(base)
    try:
        yield live
    finally:
        live.close()
