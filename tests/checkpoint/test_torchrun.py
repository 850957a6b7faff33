"""The example, alone and under torchrun: killed, it goes on with the very same losses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from envstore.checkpoint import Run
from tests.checkpoint.conftest import is_gone, wait_until

_EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "train.py"
_LINE = re.compile(r"step (\d+) loss (\S+)")
NAME = "team/example"


class Job:
    """A job under way, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def losses(self) -> list[tuple[int, str]]:
        """Return step and loss, as printed."""
        found = [_LINE.fullmatch(line.strip()) for line in self.lines]
        return [(int(match[1]), match[2]) for match in found if match]

    def wait_for(self, text: str) -> None:
        """Wait until a line begins with ``text``."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    any(line.startswith(text) for line in self.lines) or not self._reader.is_alive()
                ),
                120,
            )
        assert any(line.startswith(text) for line in self.lines), "".join(self.lines[-30:])

    def end(self) -> int:
        """Wait for the end; returns the exit status."""
        status = self.process.wait(120)
        self._reader.join()
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()


@contextmanager
def started(*command: str) -> Iterator[Job]:
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    job = Job(process)
    try:
        yield job
    finally:
        for pid in [*children(process.pid), process.pid]:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        job.end()
        assert process.stdout is not None
        process.stdout.close()


def children(pid: int) -> list[int]:
    """Return the processes of the example that ``pid`` has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [
        int(child)
        for child in text.split()
        if _EXAMPLE.name.encode() in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_the_example_goes_on_where_it_was_killed(store_url: str) -> None:
    command = (str(_EXAMPLE), "--store", store_url, "--name", NAME, "--save-every", "5")
    with started(*command, "--steps", "1000") as job:
        job.wait_for("step 9 ")
        job.process.kill()
        job.end()
        before = dict(job.losses)
    # Another schedule would be another training: so many steps in all, but it is ended early.
    with started(*command, "--steps", "1000") as job:
        job.wait_for("step 14 ")
        after = dict(job.losses)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 0, "".join(job.lines)
        left = job.losses[-1][0]
    first = min(after)
    assert first % 5 == 1
    assert first > 5
    again = before.keys() & after.keys()
    assert again
    assert all(before[step] == after[step] for step in again)
    with Run(NAME, store_url) as run:
        assert run.latest() == left


def test_workers_of_torchrun_are_killed_and_resume_with_the_same_losses(store_url: str) -> None:
    with started(
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"),
        *("--monitor-interval", "0.05", str(_EXAMPLE), "--store", store_url, "--name", NAME),
        *("--save-every", "5", "--steps", "1000"),
    ) as job:
        for at, victim in ((8, 1), (18, 0)):
            job.wait_for(f"step {at} ")
            workers = children(job.process.pid)
            assert len(workers) == 2
            os.kill(workers[victim], signal.SIGKILL)
            wait_until(lambda workers=workers: not {*workers} & {*children(job.process.pid)})
        # Preempted, all ranks save the same step, which no number has decided.
        job.wait_for("step 23 ")
        job.process.send_signal(signal.SIGTERM)
        job.end()
        losses = job.losses
        starts = [int(line.split()[-1]) for line in job.lines if line.startswith("starts with")]
    assert starts[0] == 1
    assert len(starts) == 3
    assert starts[1] >= 6
    assert starts[2] >= 16
    assert len(losses) > len(dict(losses)) == losses[-1][0]
    assert all(dict(losses)[step] == loss for step, loss in losses)
    with Run(NAME, store_url, rank=0, world_size=1) as run:
        assert run.latest() == losses[-1][0]
        assert run.info(losses[-1][0]).world_size == 2
