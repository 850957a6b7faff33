"""Scenario ``read``: ``import numpy, pandas`` from the tree, cold and warm.

Cold: a fresh mount with empty caches, and an empty page cache where it may be emptied. Warm: the
same again on the same mount, in turns with the tree on local disk. The time is that of the whole
process, the interpreter's start included; making the tree available is not in it, but its bytes
and requests are.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import zstandard

from benchmarks.context import Context
from benchmarks.measure import BenchmarkError, drop_caches, interleave
from benchmarks.mounted import LocalDisk, Mounter
from benchmarks.node import Node, prepared
from benchmarks.results import OURS, Metric, Result

READY = Metric("until it is there", "s")
COLD = Metric("cold import", "s")
WARM = Metric("warm import", "s")
WARM_DISK = Metric("local disk in turns with it", "s")
FETCHED = Metric("fetched, with the mount", "B")
REQUESTS = Metric("requests, with the mount", "requests")
REQUESTS_ALONE = Metric("requests of the import alone", "requests")
PERFECT = Metric("stored size of the chunks read", "B")

OPENED = "files opened by the import"
OPENED_BYTES = "their bytes"
OPENED_COMPRESSED = "their compressed size"

MODULES = "numpy, pandas"
_IMPORT = f"import {MODULES}"
_WARM_RUNS = 5
_PIECE = 1 << 20
# The interpreter reports what Python code opens; the loader's doings show in the process's maps.
_WHAT_IS_OPENED = f"""
import json, sys
opened = set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.add(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
sys.addaudithook(hook)
early = [m.__spec__.cached or m.__spec__.origin for m in list(sys.modules.values())
         if getattr(m, "__spec__", None)]
{_IMPORT}
found = sorted(opened) + [path for path in early if path]
with open("/proc/self/maps") as maps:
    found += [line.split(None, 5)[5].strip() for line in maps if "/" in line]
print(json.dumps(found))
"""


def measure(context: Context, node: Node | None = None) -> Result:
    """Measure the import by every way; ``node`` may be shared with ``mount``."""
    if node is None:
        with prepared(context) as node:
            return measure(context, node)
    result = Result("read", f"python -c 'import {MODULES}' from a stored tree")
    result.absent |= node.absent
    opened = opened_files(context.tree)
    result.facts |= {
        OPENED: len(opened),
        OPENED_BYTES: sum(path.stat().st_size for path in opened),
        OPENED_COMPRESSED: compressed_size(opened),
    }
    if not drop_caches():
        result.notes.append("Not root: the page cache was not emptied, so nothing waits for disks.")
    local = LocalDisk(context.tree)
    ways = (*node.ready.values(), local)
    steps = {way.name: partial(_once, way, local, node, result) for way in ways}
    result.absent |= interleave(context.repetitions, steps, context.say)
    result.notes += [
        f"'{OPENED_COMPRESSED}' is computed: the opened files one after the other in path order, "
        "every 1 MiB of them compressed by itself with zstd at level 3.",
        "What a download left in the page cache stays there, as it would on a real machine.",
        "Bytes and requests are the S3 server's own count, from before the mount until the cold "
        "import ended.",
    ]
    return result


def opened_files(tree: Path) -> list[Path]:
    """Return the regular files below ``tree`` that the import opens, in path order.

    What is opened before Python code runs (``pyvenv.cfg``, ``.pth`` files) is not among them.
    """
    done = subprocess.run(
        [_interpreter(tree), "-I", "-B", "-c", _WHAT_IS_OPENED],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise BenchmarkError(f"{tree} has no Python that can import {MODULES}: {' '.join(said)}")
    root = tree.resolve()
    paths = {Path(os.path.realpath(name)) for name in json.loads(done.stdout)}
    return sorted(path for path in paths if path.is_relative_to(root) and path.is_file())


def compressed_size(files: list[Path]) -> int:
    """Return what ``files``, joined and cut into pieces of 1 MiB, take compressed."""
    joined = b"".join(path.read_bytes() for path in files)
    pieces = [joined[start : start + _PIECE] for start in range(0, len(joined), _PIECE)]

    def compressed(piece: bytes) -> int:
        return len(zstandard.ZstdCompressor(level=3).compress(piece))

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(compressed, pieces))


def _interpreter(root: Path) -> Path:
    for name in ("python", "python3"):
        if (root / "bin" / name).exists():
            return root / "bin" / name
    raise BenchmarkError(f"{root} has no bin/python: choose an environment with --tree")


def _once(way: Mounter, local: LocalDisk, node: Node, result: Result) -> None:
    drop_caches()
    with node.empty_directory() as scratch:
        before = node.server.served(way.bucket) if way.bucket else None
        started = time.perf_counter()
        with way.mounted(scratch) as available:
            python = _interpreter(available.root)
            result.add(READY, way.name, time.perf_counter() - started)
            mounted = node.server.served(way.bucket) if way.bucket else None
            result.add(COLD, way.name, _import(python))
            if way.bucket and before is not None and mounted is not None:
                after = node.server.served(way.bucket)
                result.add(FETCHED, way.name, (after - before).sent)
                result.add(REQUESTS, way.name, (after - before).requests)
                result.add(REQUESTS_ALONE, way.name, (after - mounted).requests)
            _warm(way, python, local, result)
            if way.name == OURS and available.mount is not None:
                used = available.mount.stats()["used"]
                result.add(PERFECT, way.name, used["stored_bytes"])


def _warm(way: Mounter, python: Path, local: LocalDisk, result: Result) -> None:
    """Import again and again, by this way and from local disk in turns."""
    disk = _interpreter(local.tree)
    _import(disk)
    for _ in range(_WARM_RUNS):
        result.add(WARM, way.name, _import(python))
        if way is not local:
            result.add(WARM_DISK, way.name, _import(disk))


def _import(python: Path) -> float:
    """Return the seconds of one process that imports and ends."""
    started = time.perf_counter()
    # -B: the tree is somebody's, and must be afterwards what it was before.
    command = [python, "-I", "-B", "-c", _IMPORT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BenchmarkError(f"the import failed: {' '.join(said)}")
    return seconds
