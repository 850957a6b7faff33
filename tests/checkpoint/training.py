"""A training job in processes that a test can kill: numpy states, no torch.

A template process imports what is needed once and forks for each rank, so that a start takes
milliseconds. What a rank says comes as lines of JSON.

    with Trainers() as trainers:
        trainer = trainers.start(store=url, run="team/llm", steps=10)
        trainer.wait_for("saved", step=3)
        trainer.kill()
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 60.0
ITEMS = 3
VALUES = 20_000


def fresh_state(rank: int = 0, values: int = VALUES) -> dict[str, Any]:
    """Return the state with which rank ``rank`` begins."""
    import numpy as np

    model = {f"w{i}": np.full(values, i + 10.0 * rank, "f4") for i in range(ITEMS)}
    return {"model": model, "seen": [0, 0.5], "loader": Loader()}


def train(state: dict[str, Any], step: int) -> None:
    """Do one step: each changes every value and depends on all before."""
    for number, values in enumerate(state["model"].values()):
        values *= 1.001
        values += step + number
    state["seen"] = [step, step / 3]
    state["loader"].position += 7


def fingerprint(state: Mapping[str, Any]) -> str:
    """Return a text that differs if one bit of the state does."""
    found = hashlib.sha256()
    for values in state["model"].values():
        found.update(values.tobytes())
    found.update(repr((state["seen"], state["loader"].position)).encode())
    return found.hexdigest()


class Loader:
    """An object with a state."""

    per_rank = True

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        """Return the state."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the state."""
        self.position = state["position"]


def expected(step: int, rank: int = 0, values: int = VALUES) -> str:
    """Return the fingerprint of rank ``rank`` after ``step`` steps without any interruption."""
    state = fresh_state(rank, values)
    for number in range(1, step + 1):
        train(state, number)
    return fingerprint(state)


class Trainer:
    """One rank under way."""

    def __init__(self) -> None:
        self.pid = 0
        self.said: list[dict[str, Any]] = []
        self.changed = threading.Condition()

    def wait_for(self, what: str, seconds: float = SECONDS, **fields: Any) -> dict[str, Any]:
        """Return the first line that says ``what`` with these fields; waits for it."""

        def look() -> dict[str, Any] | None:
            for line in self.said:
                if line["say"] == what and all(line.get(k) == v for k, v in fields.items()):
                    return line
            return None

        with self.changed:
            self.changed.wait_for(lambda: look() or self._ended(), seconds)
            found = look()
            if found is None:
                raise AssertionError(f"no {what} {fields}; it said {self.said[-5:]}")
            return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, seconds: float = SECONDS) -> None:
        """Wait until it is gone."""
        deadline = time.monotonic() + seconds
        while os.path.exists(f"/proc/{self.pid}"):
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.002)

    def _ended(self) -> bool:
        return bool(self.said) and self.said[-1]["say"] in ("end", "error")


class Trainers:
    """Starts ranks from a template."""

    def __init__(self) -> None:
        self._trainers: dict[str, Trainer] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.training"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._next = 0

    def start(self, *, environ: Mapping[str, str] | None = None, **options: Any) -> Trainer:
        """Start a rank; see ``_work`` for the options. Its environment is the test's."""
        self._next += 1
        key = str(self._next)
        trainer = self._trainers[key] = Trainer()
        merged = {**os.environ, **(environ or {})}
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"key": key, "environ": merged, "options": options}) + "\n"
        )
        self._process.stdin.flush()
        trainer.pid = trainer.wait_for("begin")["pid"]
        return trainer

    def end_all(self) -> None:
        """Kill all that are under way, and wait until they are gone."""
        for trainer in self._trainers.values():
            if trainer.pid:
                trainer.kill()
                trainer.end()
                trainer.pid = 0

    def __enter__(self) -> Trainers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_all()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            trainer = self._trainers[said.pop("key")]
            with trainer.changed:
                trainer.said.append(said)
                trainer.changed.notify_all()


def _main() -> None:
    import numpy as np

    from envstore.checkpoint import run
    from envstore.store.objects import s3

    del np, run, s3
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(order["environ"])
            status = 1
            try:
                status = _child(order["key"], order["options"])
            finally:
                os._exit(status)


def _child(key: str, options: dict[str, Any]) -> int:
    import atexit

    words: deque[str] = deque()

    def say(what: str, **fields: Any) -> None:
        # One write of a short line is never mixed with another's.
        words.append(what)
        os.write(1, (json.dumps({"key": key, "say": what, **fields}) + "\n").encode())

    say("begin", pid=os.getpid())
    try:
        _work(say, **options)
    except Exception as error:  # noqa: BLE001 - the test is told
        say("error", kind=type(error).__name__, text=str(error)[:1000])
        return 1
    say("end")
    atexit._run_exitfuncs()
    return 0


def _work(
    say: Any,
    *,
    store: str,
    run: str,
    steps: int,
    save_every: int = 1,
    rank: int = 0,
    world_size: int = 1,
    values: int = VALUES,
    pause: float = 0.0,
    wait: bool = True,
    keep: int | None = None,
    on_busy: str = "wait",
    together: str = "",
    max_bytes: int | None = None,
    **options: Any,
) -> None:
    """Train ``steps`` steps in all; says ``restored``, ``saved`` and ``step``."""
    from envstore import checkpoint

    state = fresh_state(rank, values)
    opened = checkpoint.Run(
        run,
        store,
        save=checkpoint.every(steps=save_every),
        keep=None if keep is None else checkpoint.last(keep),
        on_busy=on_busy,
        staging=checkpoint.Staging(max_bytes=max_bytes),
        rank=rank,
        world_size=world_size,
        **options,
    )
    done = opened.restore(state)
    say("restored", step=done, digest=fingerprint(state))
    for step in range((done or 0) + 1, steps + 1):
        train(state, step)
        if together:
            _meet(Path(together), rank, world_size, step)
        save = opened.step(step, state, {"loss": 1 / step})
        if save is not None:
            say("saved", step=step, digest=fingerprint(state))
        say("step", step=step, save=save is not None, status=opened.status())
        if opened.preempted:
            say("preempted", step=step)
            break
        time.sleep(pause)
    if wait:
        opened.wait()
        say("durable")
    opened.close()


def _meet(directory: Path, rank: int, world_size: int, step: int) -> None:
    """Wait until all ranks have done ``step``, as those do that reduce their gradients."""
    (directory / f"{rank}.{step}").touch()
    while not all((directory / f"{other}.{step}").exists() for other in range(world_size)):
        time.sleep(0.001)


if __name__ == "__main__":
    _main()
