"""Fuzzing from the command line: ``python -m tests.fuzz --target manifest-part --time 1h``.

Each target runs in a process of its own. Where atheris is installed it chooses inputs by the code
that they reach, else they are changed at random. New inputs that reach more, and what was found,
are kept below ``--work``. Ends with status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.harness import Target, Watch, load_targets, prepare

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
_PATIENCE = 120


@dataclass
class Job:
    """One target being fuzzed by a child."""

    target: Target
    process: subprocess.Popen[bytes]
    log: Path
    result: Path
    scratch: Path
    began: float = field(default_factory=time.monotonic)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", default=[], help="one target; may be repeated")
    parser.add_argument("--time", type=_seconds, default=60.0, help="for each target: 90, 10m, 1h")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), help="where inputs are kept")
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--repeat", type=Path, help="run one target with this file's bytes")
    found = parser.parse_args()
    targets = load_targets()
    unknown = [name for name in found.target if name not in targets]
    if unknown:
        parser.error(f"no target is called {', '.join(unknown)}; see --list")
    chosen = [targets[name] for name in found.target] or list(targets.values())
    if found.list:
        for each in chosen:
            print(each.name)
        return 0
    if found.repeat is not None:
        if len(found.target) != 1:
            parser.error("--repeat needs one --target")
        return _repeat(chosen[0], found.repeat)
    return _fuzz(chosen, found)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90, 10m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _repeat(target: Target, path: Path) -> int:
    prepare()
    finding = Watch(target).run(path.read_bytes())
    if finding is None:
        print(f"{target.name}: nothing is wrong with {path}")
        return 0
    print(f"{finding.text}\n{target.name}: {finding.signature}")
    return 1


def _fuzz(targets: list[Target], options: argparse.Namespace) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    waiting = list(reversed(targets))
    running: list[Job] = []
    findings = executions = 0
    stopped = False
    print(f"{'target':26}{'executions':>12}{'/s':>8}{'coverage':>10}{'peak MiB':>10}{'found':>7}")
    try:
        while waiting or running:
            while waiting and len(running) < max(1, options.jobs):
                running.append(_start(waiting.pop(), options))
            time.sleep(0.2)
            for job in [job for job in running if _ended(job, options.time)]:
                running.remove(job)
                one = _report(job)
                executions += one["executions"]
                findings += one["findings"]
    except KeyboardInterrupt:
        stopped = True
        for job in running:
            job.process.send_signal(signal.SIGINT)
        for job in running:
            _wait(job)
            one = _report(job, stopped=True)
            executions += one["executions"]
            findings += one["findings"]
    print(f"{executions:,} executions, {findings} findings{', stopped' if stopped else ''}")
    return 1 if findings else 130 if stopped else 0


def _start(target: Target, options: argparse.Namespace) -> Job:
    work = options.work / target.name
    (work / "corpus").mkdir(parents=True, exist_ok=True)
    (work / "found").mkdir(exist_ok=True)
    log, result = work / "log", work / "result.json"
    result.unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="envstore-fuzz-"))
    command = [
        sys.executable, "-m", "tests.fuzz.child", target.name, "--module", target.module,
        "--work", str(work), "--time", str(options.time), "--seed", str(options.seed),
        "--engine", options.engine, "--scratch", str(scratch),
    ]  # fmt: skip
    # A group of its own, so that Ctrl-C reaches it through this process, which then can report.
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        )
    return Job(target, process, log, result, scratch)


def _ended(job: Job, seconds: float) -> bool:
    if job.process.poll() is not None:
        return True
    if time.monotonic() - job.began > seconds + _PATIENCE:
        job.process.kill()
        job.process.wait()
        return True
    return False


def _wait(job: Job) -> None:
    try:
        job.process.wait(30)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()


def _report(job: Job, *, stopped: bool = False) -> dict[str, Any]:
    name = job.target.name
    shutil.rmtree(job.scratch, ignore_errors=True)
    try:
        found: dict[str, Any] = json.loads(job.result.read_bytes())
    except (OSError, ValueError):
        # Killed, out of memory or hung inside C code: the engine's log says on which input.
        died = {} if stopped else {f"it died, see {job.log}": ""}
        found = {"executions": 0, "peak": 0, "found": died}
    elapsed = max(0.001, found.get("seconds", time.monotonic() - job.began))
    coverage = _coverage(job.log)
    count = len(found["found"])
    print(
        f"{name:26}{found['executions']:>12,}{found['executions'] / elapsed:>8,.0f}"
        f"{coverage or '-':>10}{found['peak'] >> 20:>10}{count:>7}",
        flush=True,
    )
    for signature, path in found["found"].items():
        print(f"    {signature}")
        if path:
            python = os.path.relpath(sys.executable)
            print(f"    {python} -m tests.fuzz --target {name} --repeat {path}")
    return {"executions": found["executions"], "findings": count}


def _coverage(log: Path) -> str:
    """Return how many edges the engine saw, from the last line where it says so."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        seen = re.findall(rb"cov: (\d+)", file.read())
    return seen[-1].decode() if seen else ""


if __name__ == "__main__":
    sys.exit(main())
