"""What all parts of the rig share: places, the ledger, what goes wrong on purpose, what went wrong.

``World.run`` starts each program and ``World.judge`` says whether its end is one that users were
promised: success, or one clear line about something that was injected.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.ledger import Ledger
from tests.soak.template import REPOSITORY, Child, Template

MARK = "ENVSTORE_SOAK"
LIMIT = 150.0
"""Seconds after which a program hangs: all that is injected passes within ten."""

_NEVER = {"bug", "corrupt", "access_denied", "usage", "unsupported_format"}
"""What no kill, no network and no full disk explains."""
_AFTER = 3.0  # seconds that a trouble still explains failures when it is over


@dataclass(eq=False, slots=True)
class Trouble:
    """Something that goes wrong on purpose for a while. ``where`` is empty for everybody."""

    what: str
    where: str
    began: float
    ended: float | None = None


@dataclass(eq=False, slots=True)
class Op:
    """One thing that a worker does, of one or several programs."""

    id: str
    kind: str
    worker: str
    about: str = ""
    began: float = field(default_factory=time.monotonic)
    hurt: set[str] = field(default_factory=set)
    """``killed``, ``stopped``: what was done to its programs, and to those that they started."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended; ``status`` is ``None`` if it hung and had to be killed."""

    status: int | None
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on stdout."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class World:
    """For any thread."""

    def __init__(self, root: Path, store: str, token: str) -> None:
        self.root = root
        self.store = store
        self.token = token
        self.ledger = Ledger()
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.peaks: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._troubles: list[Trouble] = []
        self._ops: dict[str, Op] = {}
        self._children: dict[int, tuple[Child, Op]] = {}
        self._numbers = itertools.count(1)
        self._started = time.monotonic()
        self._log = (root / "rig.log").open("w", buffering=1)
        self.template = Template(self.environment(root / "template", ""))

    # Places and variables.

    def environment(self, home: Path, op: str, **more: str) -> dict[str, str]:
        """Return the variables of a program; ``op`` is how it and what it starts are found."""
        home.mkdir(parents=True, exist_ok=True)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "always::ResourceWarning",
            "LC_ALL": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",  # the template must not have threads
            "TMPDIR": str(home),
            "ENVSTORE_URL": self.store,
            "ENVSTORE_S3_TIMEOUT": "10",
            "ENVSTORE_NODE_SOCKET": str(home / "node.sock"),
            "ENVSTORE_CACHE_DIR": str(home / "cache"),
            "ENVSTORE_SLOTS_LINGER": "3",
            MARK: f"{self.token}:{op}",
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            **more,
        }

    # Saying what happens.

    def log(self, text: str) -> None:
        """Write one line, with the time since the start."""
        with self._lock:
            if not self._log.closed:
                self._log.write(f"{time.monotonic() - self._started:9.3f} {text}\n")

    def fail(self, text: str) -> None:
        """Something is not as promised: the run has failed."""
        with self._lock:
            self.failures.append(text)
        self.log(f"FAILURE {text}")

    def look_at_logs(self, place: Path) -> None:
        """See that no log below ``place`` holds a traceback."""
        for path in [*place.rglob("log"), *place.rglob("*.log")]:
            with contextlib.suppress(FileNotFoundError):
                text = path.read_text(errors="replace")
                if "Traceback" in text and path.parent != self.root:
                    self.fail(f"a traceback in {path}: {text[-3000:]}")
                    path.unlink()  # once is enough

    def close(self) -> None:
        """End the template; close the log."""
        self.template.close()
        with self._lock:
            self._log.close()

    # Troubles.

    @contextmanager
    def trouble(self, what: str, where: str = "") -> Iterator[Trouble]:
        """Let ``what`` go wrong meanwhile, for the worker ``where`` or for all."""
        found = Trouble(what, where, time.monotonic())
        with self._lock:
            self._troubles.append(found)
        self.log(f"trouble {what} {where}")
        try:
            yield found
        finally:
            found.ended = time.monotonic()
            self.counts[f"fault: {what}"] += 1
            self.log(f"trouble {what} {where} is over")

    def troubles(self, op: Op) -> set[str]:
        """Return what went wrong while ``op`` was under way, and what was done to it."""
        with self._lock:
            self._troubles = [
                t for t in self._troubles if t.ended is None or t.ended > time.monotonic() - 600
            ]
            return op.hurt | {
                trouble.what
                for trouble in self._troubles
                if trouble.where in ("", op.worker)
                and (trouble.ended is None or trouble.ended + _AFTER > op.began)
            }

    # Programs.

    @contextmanager
    def op(self, kind: str, worker: str, about: str = "") -> Iterator[Op]:
        """Begin and end one thing that a worker does."""
        found = Op(f"{next(self._numbers)}", kind, worker, about)
        with self._lock:
            self._ops[found.id] = found
        try:
            yield found
        finally:
            with self._lock:
                del self._ops[found.id]

    def ops(self) -> dict[str, Op]:
        """Return what is under way, by id."""
        with self._lock:
            return dict(self._ops)

    def children(self) -> dict[int, Op]:
        """Return the programs under way, by process id."""
        with self._lock:
            return {pid: op for pid, (_, op) in self._children.items()}

    def hurt(self, pid: int, number: int, how: str, op: Op | None) -> None:
        """Send a signal on purpose, to a program or to what one has started."""
        with self._lock:
            if op is not None:
                op.hurt.add(how)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def run(
        self,
        op: Op,
        module: str,
        arguments: Sequence[str | Path],
        env: Mapping[str, str],
        *,
        limit: float = LIMIT,
    ) -> Done:
        """Run a program to its end."""
        places = [
            self.root / "said" / f"{op.id}.{next(self._numbers)}.{end}" for end in ("out", "err")
        ]
        words = [str(word) for word in arguments]
        child = self.template.start(module, words, env, self.root, places[0], places[1])
        with self._lock:
            self._children[child.pid] = child, op
        try:
            status = child.wait(limit)
            if status is None:
                child.signal(signal.SIGCONT)
                child.signal(signal.SIGABRT)
                child.wait(5)
                child.signal(signal.SIGKILL)
                child.wait(60)
        finally:
            with self._lock:
                del self._children[child.pid]
        self.peaks[op.kind] = max(self.peaks[op.kind], child.peak)
        said = [place.read_text(errors="replace") if place.exists() else "" for place in places]
        self.log(
            f"{op.worker} {op.kind} {op.about} #{op.id} pid {child.pid}: {module} "
            f"{' '.join(words)} -> {status} {said[1].strip()[-300:]}"
        )
        for place in places:
            place.unlink(missing_ok=True)
        return Done(status, *said)

    def judge(self, op: Op, done: Done, allowed: Sequence[str] = ()) -> str:
        """Return ``done``, ``refused``, ``killed`` or ``unclear``; what may not be, has failed.

        ``allowed`` are the kinds of errors that are right without anything having gone wrong.
        """
        what = f"{op.worker} {op.kind} {op.about} #{op.id}"
        whole = done.out + done.err
        if "Traceback" in whole or "this is a bug" in whole:
            self.fail(f"{what}: a traceback: {whole[-3000:]}")
            return "unclear"
        if done.status == 0:
            self.counts[f"{op.kind}: done"] += 1
            return "done"
        if done.status is None:
            self.fail(f"{what}: hung, troubles {self.troubles(op)}: {done.err[-2000:]}")
            return "unclear"
        if done.status < 0:
            if "killed" not in op.hurt:
                self.fail(
                    f"{what}: died of signal {-done.status} that nobody sent: {done.err[-2000:]}"
                )
            self.counts[f"{op.kind}: killed"] += 1
            return "killed"
        try:
            error = json.loads(done.err.strip().rpartition("\n")[2])["error"]
            kind = error["kind"]
        except (ValueError, KeyError, TypeError):
            self.fail(f"{what}: status {done.status} without a clear line: {done.err[-2000:]!r}")
            return "unclear"
        if kind in allowed:
            self.counts[f"{op.kind}: {kind}"] += 1
            return "refused"
        troubles = self.troubles(op)
        if kind in _NEVER or not troubles:
            self.fail(f"{what}: {kind} ({troubles or 'nothing was injected'}): {error['message']}")
            return "unclear"
        self.counts[f"{op.kind}: failed as injected"] += 1
        return "unclear"
