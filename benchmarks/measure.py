"""How everything here is measured: one process at a time, in turns, medians of repetitions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SETTLE_SECONDS, _SETTLE_SAMPLE, _IDLE_SHARE = 60.0, 0.5, 0.85
_PAGE = os.sysconf("SC_PAGE_SIZE")


class BenchmarkError(Exception):
    """A measurement could not be taken; the message says why."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of a command: wall and CPU seconds, peak resident bytes of its largest process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(
    *commands: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: Path | None = None,
    sync: bool = True,
) -> Timing:
    """Run one command, or several as a pipeline, and return what it took.

    ``output`` receives the last one's standard output. What the disk still has to write for
    somebody else is written first, unless ``sync`` is false. Raises ``BenchmarkError`` with the
    last lines of a failure.
    """
    if sync:
        os.sync()
    log = os.memfd_create("stderr")
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if output else subprocess.DEVNULL
    started = time.perf_counter()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            last = number == len(commands) - 1
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=processes[-1].stdout if processes else subprocess.DEVNULL,
                    stdout=sink if last else subprocess.PIPE,
                    stderr=log,
                    env=env,
                    cwd=cwd,
                )
            )
            if number and (pipe := processes[number - 1].stdout):
                pipe.close()
        ends = [_reap(process) for process in processes]
        seconds = time.perf_counter() - started
        if any(status for status, _ in ends):
            said = os.pread(log, 1 << 20, 0).decode(errors="replace").strip().splitlines()
            program = Path(commands[0][0]).name
            raise BenchmarkError(f"{program} failed: {' | '.join(said[-3:]) or 'silently'}")
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                process.wait()
        os.close(log)
        if isinstance(sink, int) and sink >= 0:
            os.close(sink)
    usages = [usage for _, usage in ends]
    return Timing(
        seconds,
        sum(usage.ru_utime + usage.ru_stime for usage in usages),
        max(usage.ru_maxrss for usage in usages) * 1024,
    )


def _reap(process: subprocess.Popen[bytes]) -> tuple[int, object]:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def interleave(
    repetitions: int, steps: Mapping[str, Callable[[], None]], say: Callable[[str], None]
) -> dict[str, str]:
    """Call every step once, then every step again: what else the machine does hits all alike.

    Each step first waits a while for the machine to be idle. A step that raises
    ``BenchmarkError`` is left out from then on; returns why, by its name.
    """
    failed: dict[str, str] = {}
    for repetition in range(repetitions):
        for name, step in steps.items():
            if name in failed:
                continue
            say(f"{name} ({repetition + 1}/{repetitions})")
            settle()
            try:
                step()
            except BenchmarkError as error:
                failed[name] = str(error)
    return failed


def settle() -> bool:
    """Wait until the machine does nothing else, a minute at most; returns whether it came to it."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        idle, total = _processor_ticks()
        time.sleep(_SETTLE_SAMPLE)
        idle_after, total_after = _processor_ticks()
        if idle_after - idle >= _IDLE_SHARE * (total_after - total):
            return True
    return False


def _processor_ticks() -> tuple[int, int]:
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def files_below(tree: Path) -> Iterator[Path]:
    """Yield every regular file below ``tree``, links not followed."""
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def tree_size(tree: Path) -> tuple[int, int]:
    """Return the number of regular files below ``tree`` and the sum of their sizes."""
    files = total = 0
    for path in files_below(tree):
        files += 1
        total += path.stat().st_size
    return files, total


def bytes_on_disk(path: Path) -> int:
    """Return the sum of the sizes of all files below ``path``, or of the file ``path``."""
    return path.stat().st_size if path.is_file() else tree_size(path)[1]


def warm(tree: Path) -> None:
    """Read everything below ``tree``, so that the page cache holds it for whoever comes next."""
    buffer = bytearray(4 << 20)
    for path in files_below(tree):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_caches() -> bool:
    """Empty the machine's page cache where that is allowed; returns whether it was."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and of all that descend from it."""
    total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            total += resident_bytes(int(child))
    return total


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds ``path``, for example ``ext4``."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, fstype, *_ = line.split()
        if path.resolve().is_relative_to(mounted) and len(mounted) >= len(best):
            best, kind = mounted, fstype
    return kind


def machine() -> dict[str, object]:
    """Return the facts about this machine that the figures depend on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": cpu,
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "root": os.geteuid() == 0,
        "load": [round(load, 2) for load in os.getloadavg()],
    }
