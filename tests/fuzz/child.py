"""Fuzzes one target until its time is up; ``__main__`` starts it and reads what it leaves."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.harness import MAX_INPUT, REGISTRY, Target, Watch, prepare
from tests.fuzz.mutating import mutate

_CORPUS_KEPT = 2000


class _Log:
    """Keeps one input of each cause, and writes down how far it is."""

    def __init__(self, target: Target, work: Path) -> None:
        self.watch = Watch(target)
        self.found: dict[str, str] = {}
        self._work = work
        self._began = time.monotonic()
        self._saved = 0.0

    def run(self, data: bytes) -> None:
        finding = self.watch.run(data)
        if finding is not None and finding.signature not in self.found:
            path = self._work / "found" / finding.name
            path.write_bytes(data)
            self.found[finding.signature] = str(path)
            print(f"FOUND {finding.signature} in {path}\n{finding.text}", file=sys.stderr)
        now = time.monotonic()
        if now - self._saved > 1:
            self._saved = now
            self.save()

    def save(self) -> None:
        path = self._work / "result.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(
            json.dumps(
                {
                    "executions": self.watch.executions,
                    "refused": self.watch.refused,
                    "seconds": time.monotonic() - self._began,
                    "peak": self.watch.peak,
                    "found": self.found,
                }
            )
        )
        partial.replace(path)


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--module", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--time", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--engine", required=True)
    options = parser.parse_args()
    there = importlib.util.find_spec("atheris") is not None
    if options.engine == "atheris" and not there:
        parser.error("atheris is not installed")
    # Targets that write do it here; whoever started this removes it, as an engine ends at once.
    tempfile.tempdir = str(options.scratch)
    if there and options.engine != "own":
        _with_atheris(options)
    else:
        _by_chance(options)


def _target(options: argparse.Namespace) -> Target:
    importlib.import_module(options.module)
    return REGISTRY[options.name]


def _by_chance(options: argparse.Namespace) -> None:
    target = _target(options)
    prepare()
    log = _Log(target, options.work)
    random = Random(f"{options.seed} {target.name}")
    inputs = target.inputs() or target.seeds()
    until = time.monotonic() + options.time
    with contextlib.suppress(KeyboardInterrupt):
        for data in inputs:
            log.run(data)
        while time.monotonic() < until:
            log.run(changed(target, random.choice(inputs), random, inputs))
    log.save()


def changed(target: Target, data: bytes, random: Random, inputs: list[bytes]) -> bytes:
    """Return ``data`` changed in the target's own way, or in the general one."""
    if target.mutate is not None and random.randrange(2):
        return target.mutate(data, random)[:MAX_INPUT]
    return mutate(data, random, inputs, target.words)[:MAX_INPUT]


def _with_atheris(options: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=["envstore"]):
        target = _target(options)
    prepare(room=1 << 44)  # its shadow memory is mapped later; it has a limit of its own
    log = _Log(target, options.work)
    seeds = options.work / "seeds"
    seeds.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(data)
    arguments = [
        sys.argv[0], str(options.work / "corpus"), str(seeds),
        f"-max_total_time={max(1, int(options.time))}", f"-max_len={MAX_INPUT}", "-timeout=60",
        "-rss_limit_mb=3072", f"-seed={options.seed + 1}",
        f"-artifact_prefix={options.work / 'found'}/", "-print_final_stats=1",
    ]  # fmt: skip
    if target.corpus.is_dir():
        arguments.insert(3, str(target.corpus))

    if target.words:
        words = options.work / "words"
        words.write_text(
            "".join(f'"{_quoted(word)}"\n' for word in target.words if 0 < len(word) <= 60)
        )
        arguments.append(f"-dict={words}")

    def custom(data: bytes, size: int, seed: int) -> bytes:
        assert target.mutate is not None
        if seed % 2:
            return bytes(atheris.Mutate(data, size))
        return target.mutate(bytes(data), Random(seed))[:size]

    more: dict[str, Any] = {"custom_mutator": custom} if target.mutate is not None else {}
    atheris.Setup(arguments, log.run, internal_libfuzzer=True, **more)
    signal.signal(signal.SIGINT, lambda *_: _stop(log))
    atheris.Fuzz()  # leaves through exit(), with the last result at most a second old


def _stop(log: _Log) -> None:
    log.save()
    os._exit(0)


def _quoted(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()
