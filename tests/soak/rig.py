"""Puts the rig up, lets it run, and takes it down so that nothing is left."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from envstore.store.creation import create_store
from tests.s3server import RestartableS3
from tests.soak.ending import Reckoning, quiet, reckon, unmount_all
from tests.soak.faults import Disk, Killer, Network
from tests.soak.processes import bury, end_all
from tests.soak.work import Worker
from tests.soak.world import LIMIT, World
from tests.tcpproxy import tcp_proxy

_SMALL_CACHE = "6m"
_SMALL_STORE = "120m"


def soak(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    base = options.dir or Path("/var/tmp")
    base.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="envstore-soak-", dir=base))
    good = False
    try:
        good = _run(options, root)
    except KeyboardInterrupt:
        _say("soak: interrupted", sys.stderr)
        good = True
        return 130
    finally:
        unmount_all(root)
        if good and not options.keep:
            shutil.rmtree(root, ignore_errors=True)
        else:
            _say(f"soak: logs and the store are in {root}, see rig.log", sys.stderr)
    return 0 if good else 1


def _run(options: argparse.Namespace, root: Path) -> bool:
    token = uuid.uuid4().hex
    (root / "said").mkdir()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(end_all, token)
        _memory(stack, root / "shm", "1g")
        server = proxy = None
        if options.store == "s3":
            server = RestartableS3(root / "server")
            stack.callback(server.close)
            os.environ.update(server.server.env)
            bucket = server.server.new_bucket()
            direct = server.server.url(bucket)
            proxy = stack.enter_context(tcp_proxy(server.server.endpoint))
            store = direct.replace(_quoted(server.server.endpoint), _quoted(proxy.endpoint))
        else:
            small = _memory(stack, root / "store", _SMALL_STORE)
            direct = store = f"file://{root}/store/objects"
        create_store(direct)
        world = World(root, store, token)
        stack.callback(world.close)
        workers = [
            Worker(world, number, options.seed, options.without)
            for number in range(options.workers)
        ]
        does = [worker.work for worker in workers]
        if options.kill_every:
            does.append(Killer(world, options.kill_every, options.seed).work)
        if server is not None and proxy is not None and "network" not in options.without:
            does.append(Network(world, proxy, server, options.seed).work)
        readers = [worker for worker in workers if worker.role == "read"]
        for reader in readers[:1] if "disk" not in options.without else ():
            if not _memory(stack, root / reader.name / "cache", _SMALL_CACHE):
                continue
            does.append(Disk(world, root / reader.name / "cache", reader.name, options.seed).work)
        if options.store == "file" and small and "disk" not in options.without:
            does.append(Disk(world, root / "store", "", options.seed).work)
        _let_run(world, does, options.seconds)
        if proxy is not None:
            proxy.restore()
        reckoning = _end(world, direct, workers, options)
        _print(options, world, reckoning, time.monotonic() - started)
        return not world.failures


def _say(text: str, where: TextIO = sys.stdout) -> None:
    where.write(f"{text}\n")


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _memory(stack: contextlib.ExitStack, place: Path, size: str) -> bool:
    """Make ``place`` a file system in memory, if we may; returns whether it is one."""
    place.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        return False
    stack.callback(subprocess.run, ["umount", "-l", str(place)], check=False, capture_output=True)
    return True


def _let_run(world: World, does: list[Any], seconds: float) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in does]
    with _told_to_stop(world):
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not world.failures:
            time.sleep(0.2)
        world.stop.set()
        world.log("told to stop")
        deadline = time.monotonic() + 3 * LIMIT
        for thread in threads:
            thread.join(max(1.0, deadline - time.monotonic()))
            if thread.is_alive():
                world.fail(
                    f"a worker does not end: {sorted(op.kind for op in world.ops().values())}"
                )
    bury()


@contextmanager
def _told_to_stop(world: World) -> Iterator[None]:
    try:
        yield
    except BaseException:
        world.stop.set()
        raise


def _end(world: World, url: str, workers: list[Worker], options: argparse.Namespace) -> Reckoning:
    for worker in workers:
        if worker.role == "train":
            worker.settle(url)
    quiet(world, 30)
    return reckon(world, url, workers, gc="gc" not in options.without)


def _print(options: argparse.Namespace, world: World, found: Reckoning, seconds: float) -> None:
    facts = {
        "seed": options.seed,
        "workers": options.workers,
        "store": options.store,
        "seconds": round(seconds, 1),
        "kills": sum(n for what, n in world.counts.items() if what.startswith("killed: ")),
        "stops": sum(n for what, n in world.counts.items() if what.startswith("stopped: ")),
        "operations": sum(n for what, n in world.counts.items() if what.endswith(": done")),
        "acknowledged": world.ledger.acknowledged,
        **found.encode(),
        "counts": dict(sorted(world.counts.items())),
        "peak_memory": dict(sorted(world.peaks.items())),
        "failures": world.failures,
    }
    if options.json:
        _say(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            _say(f"{name}:")
            for what, number in value.items():
                _say(f"    {what:34} {number:>15,}")
        elif isinstance(value, list):
            for failure in value:
                _say(f"FAILURE {failure}")
        else:
            shown = f"{value:,}" if isinstance(value, int | float) else value
            _say(f"{name:38} {shown:>15}")
    _say("soak: all is well" if not world.failures else f"soak: {len(world.failures)} failures")
