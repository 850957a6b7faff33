"""The command line in processes of their own that need not import it first.

A template process imports what most commands use, once, and forks for each command. The copy gets
its own arguments, environment, directory and streams, and ends as an interpreter ends.

found = run_forked(["ls"], env, cwd)
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_REPOSITORY = Path(__file__).parent.parent
# What an interpreter heeds when it starts; whoever changes them needs a real start.
_AT_START = ("PYTHON", "LC_", "LANG")
_PRELOADED = (
    "envstore.cli.activate",
    "envstore.cli.check",
    "envstore.cli.failures",
    "envstore.cli.group",
    "envstore.cli.lock",
    "envstore.cli.push",
    "envstore.cli.run",
    "envstore.fuse.background",
    "envstore.fuse.hydrate",
    "envstore.fuse.run",
    "envstore.resolver.locking",
    "envstore.resolver.prefix",
    "envstore.resolver.pushing",
    "envstore.resolver.resolving",
    "envstore.store.catalog",
    "envstore.store.diff",
    "envstore.store.pull",
    "envstore.store.push",
    "envstore.store.verify",
)


class ForkServer:
    """A template process, for one command at a time.

    ``base`` are the environment variables that it starts with.
    """

    def __init__(self, base: Mapping[str, str]) -> None:
        self._started = {name: base[name] for name in base if name.startswith(_AT_START)}
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Pipes, as those of the commands will be: a stream finds out when it is opened.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(base),
            )

    def fits(self, env: Mapping[str, str]) -> bool:
        """Whether commands with these variables may do without a start of their own."""
        return self._process.poll() is None and self._started == {
            name: env[name] for name in env if name.startswith(_AT_START)
        }

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: str, timeout: float
    ) -> tuple[int, bytes, bytes]:
        """Run ``envstore`` to its end; returns its status, as ``Popen`` does, and its output."""
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        with tempfile.TemporaryFile() as request:
            request.write(json.dumps([list(arguments), dict(env), cwd]).encode())
            request.flush()
            request.seek(0)
            try:
                socket.send_fds(self._ours, [b"."], [request.fileno(), out_end, err_end])
            finally:
                os.close(out_end)
                os.close(err_end)
        child = self._number()
        try:
            found = _read([out, err], time.monotonic() + timeout)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            self._number()
            raise
        finally:
            os.close(out)
            os.close(err)
        return self._number(), *found

    def close(self) -> None:
        """End the template process."""
        self._ours.close()
        self._process.communicate()

    def _number(self) -> int:
        said = b""
        while not said.endswith(b"\n"):
            piece = self._ours.recv(1)
            assert piece, f"the template process ended: {self._process.communicate()[0]!r}"
            said += piece
        return int(said)


def _read(ends: Sequence[int], deadline: float) -> list[bytes]:
    found = {end: bytearray() for end in ends}
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            assert ready, f"a command did not end; it said {found}"
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                found[key.fd] += piece
                if not piece:
                    selector.unregister(key.fd)
    return [bytes(data) for data in found.values()]


_server: ForkServer | None = None


def fork_server(base: Mapping[str, str]) -> ForkServer:
    """Return the template process of this test run, started with ``base`` if it is the first."""
    global _server  # noqa: PLW0603 - a process for all tests, however they come by it
    if _server is None:
        _server = ForkServer(base)
        atexit.register(_server.close)
    return _server


def _serve(asked: socket.socket) -> None:
    """Fork for each request; returns in each child, and with an exit when nobody asks any more."""
    while True:
        said, fds, _, _ = socket.recv_fds(asked, 1, 3)
        if not said:
            os._exit(0)
        child = os.fork()
        if not child:
            break
        for fd in fds:
            os.close(fd)
        asked.send(b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        asked.send(b"%d\n" % os.waitstatus_to_exitcode(status))
    asked.close()
    with open(fds[0], "rb") as request:
        arguments, variables, cwd = json.load(request)
    for fd, standard in zip(fds[1:], (1, 2), strict=True):
        os.dup2(fd, standard)
        os.close(fd)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    tempfile.tempdir = None
    sys.path[0] = cwd
    sys.argv[1:] = arguments


def _main() -> None:
    import gc
    import importlib
    import runpy

    asked = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(asked.fileno(), False)
    sys.path.insert(0, str(_REPOSITORY))
    for name in _PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "no thread survives a fork"
    gc.collect()
    gc.freeze()  # what is never looked at for garbage is never copied for it either
    _serve(asked)
    runpy.run_module("envstore", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
