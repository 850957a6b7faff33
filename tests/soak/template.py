"""Python programs in processes of their own that need not import anything first: many at once.

A template process imports what most of them use, once, and forks for each. The copy gets its own
arguments, environment, directory and output files, and ends as an interpreter ends.

    with Template(env) as template:
        child = template.start("envstore", ["ls"], env, cwd, out, err)
        child.wait(60)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
_PRELOADED = (
    "numpy",
    "envstore.checkpoint.run",
    "envstore.cli.failures",
    "envstore.cli.group",
    "envstore.cli.push",
    "envstore.fuse.background",
    "envstore.resolver.kinds",
    "envstore.store.catalog",
    "envstore.store.gc",
    "envstore.store.objects.s3",
    "envstore.store.pull",
    "envstore.store.push",
    "envstore.store.verify",
)


class Child:
    """One program under way. ``status`` as ``Popen`` gives it, ``peak`` in bytes of memory."""

    def __init__(self) -> None:
        self.pid = 0
        self.status: int | None = None
        self.peak = 0
        self.born = threading.Event()
        self.ended = threading.Event()

    def wait(self, seconds: float) -> int | None:
        """Return how it ended, ``None`` if it did not within ``seconds``."""
        self.ended.wait(seconds)
        return self.status

    def signal(self, number: int) -> None:
        """Send a signal, if it still is there."""
        if self.status is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Template:
    """The template process. For any thread."""

    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.template", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=dict(env),
                start_new_session=True,  # a Ctrl-C is for the rig
            )
        self.pid = self._process.pid
        self._socket = ours
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._number = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        out: Path,
        err: Path,
    ) -> Child:
        """Run ``module`` as ``python -m`` would; returns once its process is there."""
        child = Child()
        with self._lock:
            self._number += 1
            number = self._number
            self._children[number] = child
        request = [number, module, list(arguments), dict(env), str(cwd), str(out), str(err)]
        self._socket.send(json.dumps(request).encode())
        if not child.born.wait(60):
            raise RuntimeError("the template process does not answer")
        return child

    def _read(self) -> None:
        while said := self._said():
            number, what, *facts = json.loads(said)
            child = self._children[number]
            if what == "pid":
                child.pid = facts[0]
                child.born.set()
            else:
                child.status, child.peak = facts
                del self._children[number]
                child.ended.set()

    def _said(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        """End the template, and all that it started."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._reader.join()
        self._socket.close()

    def __enter__(self) -> Template:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _serve(asked: socket.socket) -> list[Any] | None:
    """Fork for each request; returns its request in each child, ``None`` when nobody asks more."""
    wake, woken = os.pipe()
    for fd in (wake, woken):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    numbers: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([asked, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            while numbers:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                code = os.waitstatus_to_exitcode(status)
                told = [numbers.pop(pid), "end", code, usage.ru_maxrss * 1024]
                asked.send(json.dumps(told).encode())
        if asked not in ready:
            continue
        said = asked.recv(1 << 20)
        if not said:
            for pid in numbers:
                os.kill(pid, signal.SIGKILL)
            return None
        request: list[Any] = json.loads(said)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(wake)
            os.close(woken)
            return request
        numbers[pid] = request[0]
        asked.send(json.dumps([request[0], "pid", pid]).encode())


def _prepare_s3() -> None:
    """Parse the description of S3 once for all clients: that takes longer than most requests."""
    import functools

    import botocore.session

    botocore.session.create_loader = functools.cache(botocore.session.create_loader)
    session = botocore.session.Session()
    session.create_client("s3", region_name="us-east-1", endpoint_url="http://127.0.0.1:1").close()


def _main() -> None:
    import gc
    import importlib
    import importlib.util
    import runpy

    asked = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(asked.fileno(), False)
    for name in _PRELOADED:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    _prepare_s3()
    assert len(os.listdir("/proc/self/task")) == 1, "no thread survives a fork"
    gc.collect()
    gc.freeze()  # what is never looked at for garbage is never copied for it either
    request = _serve(asked)
    if request is None:
        os._exit(0)
    asked.close()
    _, module, arguments, variables, cwd, out, err = request
    for path, standard in ((out, 1), (err, 2)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, standard)
        os.close(fd)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    import tempfile

    tempfile.tempdir = None
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
