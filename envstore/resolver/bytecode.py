"""Bytecode for an environment, made by its own interpreter in processes beside the push.

Every source gets one ``.pyc`` that stays right wherever the tree is mounted and whatever its
times are: a PEP 552 header that is never checked against the source, and file names relative to
the environment's root, which Python replaces by the real ones on import. Bytecode that is there
and valid is rewritten, which is about ten times faster than compiling (0.3 against 3 ms a file).

Reading, compiling and rewriting happen in the workers; this side only passes frames. A worker
that is ahead stops at a full pipe, so memory stays bounded without counting anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple, cast

from envstore.errors import EnvstoreError
from envstore.resolver import _compile_worker as protocol
from envstore.store.source import ChangedError, access_error

ALGORITHM = b"1"
"""Changes whenever the bytes made from the same source by the same interpreter change."""

_SCRIPT = Path(__file__).with_name("_compile_worker.py")
_PIPE_SIZE = 1 << 20
_MOST_PENDING, _REFILL = 128, 64
_MOST_WORKERS = 8
_JOBS_WORTH_A_WORKER = 32
_FIRST_WITHOUT_SEED = 11
# Older versions write sets in hash order, so the seed must be fixed; -I would ignore it. What is
# left of -I: no PYTHON variables, no user site, nothing imported from the current directory.
_ISOLATE = "import sys; del sys.path[0]; exec(open(sys.argv[1], encoding='utf-8').read())"
_NO_SIGNATURE = bytes(protocol.SIGNATURE.size)


class InterpreterError(EnvstoreError):
    """An interpreter does not run here, or is not what its directory says."""


class _WorkerError(Exception):
    """A worker ended or hangs; says how."""


class Job(NamedTuple):
    """One ``.pyc`` to make. Paths are relative to the root, signatures those of ``stat``.

    ``cache`` and ``cache_signature`` are empty when no bytecode is there; ``level`` is the
    optimisation level; without ``create`` bytecode is rewritten only if it is there and valid;
    with ``inner`` the first component of ``source`` is not part of the name in the bytecode.
    A named tuple because there is one for each module of an environment.
    """

    source: bytes
    signature: bytes
    follow: bool = False
    cache: bytes = b""
    cache_signature: bytes = b""
    level: int = 0
    create: bool = True
    size: int = 0
    inner: bool = False

    def request(self) -> bytes:
        """Return the frame that asks a worker for it."""
        flags = (
            self.follow * protocol.FOLLOW
            | bool(self.cache) * protocol.HAS_CACHE
            | self.create * protocol.CREATE
            | self.inner * protocol.INNER
        )
        head = protocol.REQUEST.pack(flags, self.level, len(self.source), len(self.cache))
        last = self.cache_signature or _NO_SIGNATURE
        return b"".join((head, self.source, self.cache, self.signature, last))


class _Worker:
    """One process, the frames sent to it, and the jobs it has not answered, oldest first."""

    def __init__(self, command: list[str], root: Path, patience: float) -> None:
        self.pending: deque[Job] = deque()
        self.weight = 0
        self._patience = patience
        self._outgoing = b""
        self._buffer = bytearray()
        # A file, because a pipe that nobody reads would stop a worker with much to complain about.
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                bufsize=0,
                cwd=root,
                env=_clean(os.environ),
                start_new_session=True,
            )
        except OSError as error:
            self._complaints.close()
            raise InterpreterError(f"{command[0]} does not start: {error.strerror}") from error
        self._in = cast("IO[bytes]", self._process.stdin)
        self._out = cast("IO[bytes]", self._process.stdout)
        os.set_blocking(self._in.fileno(), False)
        with contextlib.suppress(PermissionError):
            # Over the user's share of pipe memory a small pipe does, only with more waiting.
            fcntl.fcntl(self._out.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    def send(self, jobs: Iterable[Job]) -> None:
        """Ask for ``jobs``; never blocks."""
        frames = [self._outgoing]
        for job in jobs:
            self.pending.append(job)
            self.weight += job.size
            frames.append(job.request())
        self._outgoing = b"".join(frames)
        self._flush()

    def greeting(self) -> str:
        """Return what the process says of itself; optional, but if at all, before any answer."""
        return self._receive()[1].decode(errors="replace")

    def answer(self) -> tuple[Job, int, bytes]:
        """Return the oldest job with its answer; raises ``_WorkerError`` if none comes."""
        kind, payload = self._receive()
        if kind == protocol.HELLO:
            kind, payload = self._receive()
        job = self.pending.popleft()
        self.weight -= job.size
        return job, kind, payload

    def close(self) -> None:
        """Kill the process, if it still runs, and wait for it."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()
        self._complaints.close()

    def _complaint(self) -> str:
        """Return the last line the process wrote to stderr, or what ended it."""
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read()[-4096:].decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        return said[-1] if said else f"it ended with {ended}"

    def _receive(self) -> tuple[int, bytes]:
        head = self._take(protocol.ANSWER.size)
        kind, size = protocol.ANSWER.unpack(head)
        return kind, self._take(size)

    def _take(self, size: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < size:
            self._wait()
            data = os.read(self._out.fileno(), _PIPE_SIZE)
            if not data:
                raise _WorkerError(self._complaint())
            buffer += data
        found = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        return found

    def _wait(self) -> None:
        """Return when there is something to read, or its end; write what is left meanwhile."""
        until = time.monotonic() + self._patience
        while True:
            poll = select.poll()
            poll.register(self._out, select.POLLIN)
            if self._outgoing:
                poll.register(self._in, select.POLLOUT)
            left = max(until - time.monotonic(), 0)
            ready = dict(poll.poll(left * 1000))
            if self._out.fileno() in ready:
                return
            if ready:
                self._flush()
            elif not left:
                raise _WorkerError(f"no answer within {self._patience:.0f} s")

    def _flush(self) -> None:
        if not self._outgoing:
            return
        try:
            sent = os.write(self._in.fileno(), self._outgoing)
        except BlockingIOError:
            return
        except BrokenPipeError:
            # The end of its output says so too, and there the reason is at hand.
            self._outgoing = b""
            return
        self._outgoing = self._outgoing[sent:]


class BytecodePool:
    """Workers that make bytecode for one tree. Use it from one thread at a time."""

    def __init__(
        self, interpreter: Path, tag: str, root: Path, *, workers: int = 0, patience: float = 120
    ) -> None:
        """Describe the pool; ``start`` starts it.

        ``tag`` is the cache tag that the interpreter must have, such as ``cpython-311``.
        ``workers`` is their number at most, by default one for each processor, ``patience`` how
        many seconds a worker may take for one file.
        """
        self.interpreter = interpreter
        self._tag = tag
        self._root = root
        self._patience = patience
        self._most = workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        self._workers: list[_Worker] = []
        self._ahead: deque[Job] = deque()
        self._waiting: set[Job] = set()
        self._given: dict[Job, _Worker] = {}

    def start(self) -> None:
        """Start one worker; raises ``InterpreterError`` if the interpreter is of no use."""
        if self._workers:
            return
        worker = _Worker(self._command(), self._root, self._patience)
        try:
            tag, _, version = worker.greeting().partition("\n")
        except _WorkerError as error:
            worker.close()
            raise InterpreterError(f"{self.interpreter} does not run: {error}") from None
        if tag != self._tag:
            worker.close()
            raise InterpreterError(f"{self.interpreter} is {tag} {version}, not {self._tag}")
        self._workers.append(worker)

    def announce(self, jobs: Iterable[Job]) -> None:
        """Start work on ``jobs``, which will be asked for in this order, in place of any before."""
        self._ahead = deque(jobs)
        self._waiting = set(self._ahead)
        self.start()
        wanted = min(self._most, -(-len(self._ahead) // _JOBS_WORTH_A_WORKER))
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._command(), self._root, self._patience))
        self._refill()

    def result(self, job: Job) -> bytes | None:
        """Return the ``.pyc``, or ``None`` if the source is none that can be compiled.

        Announced jobs before it that were not asked for are forgotten. Raises ``ChangedError``,
        ``AccessDeniedError`` and, when a worker crashes or hangs, ``EnvstoreError``.
        """
        if job not in self._given:
            self._pass_over(job)
            self.start()
            self._give(min(self._workers, key=lambda worker: worker.weight), [job])
        worker = self._given[job]
        try:
            while True:
                done, kind, payload = worker.answer()
                self._given.pop(done, None)
                if done == job:
                    break
        except _WorkerError as error:
            name = os.fsdecode(worker.pending[0].source)
            self.close()
            raise EnvstoreError(
                f"{self.interpreter} failed while it made bytecode for {name}: {error}",
                hint="remove that file or its bytecode, or push with --kind dir",
            ) from None
        self._refill()
        return self._outcome(job, kind, payload)

    def close(self) -> None:
        """Kill the workers; idempotent."""
        while self._workers:
            self._workers.pop().close()
        self._ahead.clear()
        self._waiting.clear()
        self._given.clear()

    def _outcome(self, job: Job, kind: int, payload: bytes) -> bytes | None:
        if kind == protocol.DONE:
            return payload
        if kind == protocol.OMITTED:
            return None
        if kind == protocol.CHANGED:
            raise ChangedError(job.source)
        number = int.from_bytes(payload, "little", signed=True)
        raise access_error(OSError(number, os.strerror(number)), job.source)

    def _command(self) -> list[str]:
        # Without site and without writing bytecode: nothing of the environment but the
        # interpreter and its standard library is executed.
        options = ["-S", "-B", "-X", "utf8", "-W", "ignore"]
        if int(self._tag.removeprefix("cpython-3")) >= _FIRST_WITHOUT_SEED:
            return [str(self.interpreter), "-I", *options, str(_SCRIPT)]
        return [str(self.interpreter), "-s", *options, "-c", _ISOLATE, str(_SCRIPT)]

    def _pass_over(self, job: Job) -> None:
        while job in self._waiting:
            self._next()

    def _next(self) -> Job:
        job = self._ahead.popleft()
        self._waiting.discard(job)
        return job

    def _refill(self) -> None:
        """Give the workers more to do, in batches: one write for many jobs."""
        pending = len(self._given)
        if not self._ahead or pending > _REFILL * len(self._workers):
            return
        batches: dict[_Worker, list[Job]] = {worker: [] for worker in self._workers}
        weights = {worker: worker.weight for worker in self._workers}
        for _ in range(min(len(self._ahead), _MOST_PENDING * len(self._workers) - pending)):
            job = self._next()
            worker = min(weights, key=weights.__getitem__)
            weights[worker] += job.size
            batches[worker].append(job)
        for worker, batch in batches.items():
            self._give(worker, batch)

    def _give(self, worker: _Worker, jobs: list[Job]) -> None:
        self._given.update(dict.fromkeys(jobs, worker))
        worker.send(jobs)


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONHASHSEED": "0"}
