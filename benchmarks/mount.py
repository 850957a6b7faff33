"""Scenario ``mount``: from nothing to the first ``ls``, and what it costs to serve the tree.

Every repetition starts with empty caches of the tool. The programs themselves are in the page
cache, except for the separate figure after it was emptied. The store is in S3 on loopback, whose
speed flatters whoever fetches everything: look at the bytes too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measure import drop_caches, interleave, resident_bytes, tree_size
from benchmarks.mounted import Available, Mounter
from benchmarks.node import Node, prepared
from benchmarks.results import Metric, Result

FIRST_LS = Metric("until the first ls", "s")
FIRST_LS_COLD = Metric("the same, programs on cold disk too", "s")
FETCHED = Metric("fetched until then", "B")
REQUESTS = Metric("requests until then", "requests")
WALK = Metric("listing all with attributes", "s")
RESIDENT = Metric("server's resident memory", "B")


def measure(context: Context, node: Node | None = None) -> Result:
    """Measure every way to make the tree available; ``node`` may be shared with ``read``."""
    if node is None:
        with prepared(context) as node:
            return measure(context, node)
    result = Result("mount", "Making a stored tree available on an empty machine")
    files, size = tree_size(context.tree)
    result.facts |= {"files": files, "logical bytes": size}
    result.absent |= node.absent
    if os.geteuid() != 0:
        result.notes.append("Not root: the page cache cannot be emptied, so nothing waits for it.")
    steps = {name: partial(_once, way, node, result) for name, way in node.ready.items()}
    result.absent |= interleave(context.repetitions, steps, context.say)
    result.notes.append(
        "Memory is measured after every name of the mounted tree was listed with its attributes."
    )
    return result


def _once(way: Mounter, node: Node, result: Result) -> None:
    if drop_caches():
        with node.empty_directory() as scratch, _timed(way, scratch) as (_, seconds):
            result.add(FIRST_LS_COLD, way.name, seconds)
    with node.empty_directory() as scratch:
        before = node.server.served(way.bucket) if way.bucket else None
        with _timed(way, scratch) as (available, seconds):
            result.add(FIRST_LS, way.name, seconds)
            if way.bucket and before is not None:
                served = node.server.served(way.bucket) - before
                result.add(FETCHED, way.name, served.sent)
                result.add(REQUESTS, way.name, served.requests)
            if available.pid is None:
                return
            started = time.perf_counter()
            _list_all(available.root)
            result.add(WALK, way.name, time.perf_counter() - started)
            result.add(RESIDENT, way.name, resident_bytes(available.pid))


@contextmanager
def _timed(way: Mounter, scratch: Path) -> Iterator[tuple[Available, float]]:
    """Yield the available tree and the seconds from nothing to the end of the first ``ls``."""
    started = time.perf_counter()
    with way.mounted(scratch) as available:
        subprocess.run(["ls", available.root], stdout=subprocess.DEVNULL, check=True)
        yield available, time.perf_counter() - started


def _list_all(root: os.PathLike[str]) -> None:
    """Ask for every name and its attributes, as ``find -ls`` does."""
    pending = [os.fspath(root)]
    while pending:
        with os.scandir(pending.pop()) as listing:
            for entry in listing:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
