"""Scenario ``push``: how long it takes to store a tree, and the same tree once more.

Every repetition starts with an empty store and empty caches of the tool; the page cache holds the
tree for everybody, so that the disk's speed is no part of the result.
"""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measure import BenchmarkError, interleave, tree_size, warm
from benchmarks.peers import Storer, missing, storers
from benchmarks.results import Metric, Result
from examples.client import Envstore
from examples.seaweed import running_s3

FIRST = Metric("first push", "s")
FIRST_CPU = Metric("first push, CPU", "s")
PEAK = Metric("first push, peak memory", "B")
AGAIN = Metric("unchanged push", "s")

SMALL_FILES = "small files pushed to S3"
SMALL_REQUESTS = "requests for them"
AGAIN_UPLOADED = "data bytes uploaded by the unchanged push"

_SEED = 20_240_607
_FILES_IN_A_FOLDER = 100


def measure(context: Context) -> Result:
    """Measure first and unchanged pushes of every tool, and the requests for many small files."""
    result = Result("push", "Storing a tree for the first time, and again unchanged")
    files, size = tree_size(context.tree)
    result.facts |= {"files": files, "logical bytes": size}
    tools = {}
    for tool in filter(lambda tool: context.wants(tool.name), storers()):
        why = missing(tool)
        if why:
            result.absent[tool.name] = why
        else:
            tools[tool.name] = tool
    with context.scratch() as scratch:
        warm(context.tree)
        steps = {
            name: partial(_store_twice, tool, context.tree, scratch / "home", result)
            for name, tool in tools.items()
        }
        result.absent |= interleave(context.repetitions, steps, context.say)
    _unchanged_traffic(context, result)
    _small_files(context, result)
    result.notes.append(
        "tar | zstd and squashfs know no unchanged tree: their second time is a whole new archive."
    )
    return result


def _store_twice(tool: Storer, tree: Path, home: Path, result: Result) -> None:
    home.mkdir()
    try:
        tool.prepare(home)
        first = tool.store(home, tree)
        again = tool.store(home, tree)
    finally:
        shutil.rmtree(home)
    result.add(FIRST, tool.name, first.seconds)
    result.add(FIRST_CPU, tool.name, first.cpu_seconds)
    result.add(PEAK, tool.name, first.peak_bytes)
    result.add(AGAIN, tool.name, again.seconds)


def _unchanged_traffic(context: Context, result: Result) -> None:
    """Ask a push of an unchanged tree what it sent. Its own count: nothing crosses a network."""
    with context.scratch() as scratch:
        store = Envstore(str(scratch / "store"), scratch)
        store.call("init")
        store.call("push", "bench", context.tree)
        again = store.call("push", "bench", context.tree)
    if not again["unchanged"]:
        raise BenchmarkError("the second push of the same tree gave another snapshot")
    result.facts[AGAIN_UPLOADED] = again["uploaded_bytes"]


def _small_files(context: Context, result: Result) -> None:
    """Push many small files to S3 and count requests where nobody can be mistaken: there."""
    context.say(f"{context.small_files:,} small files to S3")
    with context.scratch() as scratch, running_s3(scratch / "s3") as server:
        tree = scratch / "tree"
        _write_small_files(tree, context.small_files)
        bucket = server.new_bucket()
        store = Envstore(server.url(bucket), scratch, server.environment)
        store.call("init")
        before = server.served(bucket)
        pushed = store.call("push", "--kind", "dir", "small", tree)
        served = server.served(bucket) - before
    result.facts |= {
        SMALL_FILES: pushed["files"],
        SMALL_REQUESTS: served.requests,
        "requests for them, as envstore counted": pushed["requests"],
        "seconds for them": pushed["seconds"],
    }


def _write_small_files(tree: Path, count: int) -> None:
    """Write files of 100 to 4,000 bytes of text, alike but never the same, the same every time."""
    rng = random.Random(_SEED)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(2000)]
    for number in range(count):
        folder = tree / f"{number // _FILES_IN_A_FOLDER:05d}"
        if number % _FILES_IN_A_FOLDER == 0:
            folder.mkdir(parents=True)
        text = " ".join(rng.choices(words, k=rng.randint(12, 500)))
        (folder / f"{number:06d}.txt").write_text(text)
