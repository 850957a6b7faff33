"""No process outlives what it works for, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError
from envstore.resolver.workers import worker_processes

ROOT = Path(__file__).parents[2]
FOR_EVER = 3600.0
TRIES, PAUSE = 600, 0.05

_KILLED = """
import os, signal
from tests.resolver.test_workers import busy

if __name__ == "__main__":
    from envstore.resolver.workers import worker_processes
    with worker_processes(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        busy(pool)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def busy(pool: Executor) -> None:
    """Give a pool of two more to do than it will ever get done."""
    for _ in range(4):
        pool.submit(time.sleep, FOR_EVER)


def gone(pid: int) -> bool:
    """Whether a process ends before long; one that nobody has buried yet has ended."""
    for _ in range(TRIES):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(PAUSE)
    return False


def give_up(reason: BaseException, pids: list[int]) -> None:
    """Fail while a pool is busy."""
    with worker_processes(2) as pool:
        pids.append(pool.submit(os.getpid).result())
        busy(pool)
        raise reason


def lose_one() -> None:
    """Wait for a process that is killed."""
    with worker_processes(2) as pool:
        pid = pool.submit(os.getpid).result()
        waiting = pool.submit(time.sleep, FOR_EVER)
        os.kill(pid, signal.SIGKILL)
        waiting.result()


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), SystemExit(143), EnvstoreError("full")])
def test_what_is_given_up_ends_at_once(reason: BaseException) -> None:
    pids: list[int] = []
    with pytest.raises(type(reason)):
        give_up(reason, pids)
    assert gone(pids[0])


def test_nothing_is_left_when_the_first_process_is_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_one_that_is_killed_is_one_clear_error() -> None:
    with pytest.raises(EnvstoreError, match=r"was killed .*enough memory"):
        lose_one()


def test_a_ctrl_c_is_for_the_first_process_to_heed() -> None:
    with worker_processes(1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGINT)
        assert pool.submit(os.getpid).result() == pid
