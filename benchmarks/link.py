"""The links over which a node reaches the store: loopback as it is, or one like a data centre's.

The shaped link is a pair of virtual interfaces whose far end lies in a network namespace of its
own. Both ends let through no more than a gigabit in a second (``tc tbf``); at the far end a proxy
answers every request 10 ms later than the server does. Clients stay where they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import BenchmarkError, run

UNSHAPED, SHAPED = "unshaped", "shaped"
LINKS = (UNSHAPED, SHAPED)

BITS_PER_SECOND = 1_000_000_000
DELAY_MS = 10.0

_NAMESPACE = "envstore-bench"
_NEAR, _FAR = "esbench-near", "esbench-far"
# Addresses that are set aside for measuring and lead nowhere else.
_NEAR_ADDRESS, _FAR_ADDRESS = "198.18.77.1", "198.18.77.2"
_PORT = 8333
# A bucket larger than the largest segment that the kernel hands over at once (64 KiB).
_BUCKET, _QUEUE = "256kb", "1mb"


@dataclass(frozen=True, slots=True)
class Link:
    """A way to the S3 server: its name, the URL to use, bytes in a second (None: no limit)."""

    name: str
    endpoint: str
    bytes_per_second: float | None = None


@contextmanager
def opened(name: str, endpoint: str) -> Iterator[Link]:
    """Yield the link of that name to the server at ``endpoint``; gone afterwards.

    Raises ``BenchmarkError`` where this user or kernel cannot have it.
    """
    if name == UNSHAPED:
        yield Link(name, endpoint)
        return
    if os.geteuid() != 0:
        raise BenchmarkError("the shaped link needs root: choose --link unshaped")
    with ExitStack() as stack:
        stack.enter_context(_interfaces())
        scheme, _, target = endpoint.partition("://")
        listening = (f"{_FAR_ADDRESS}:{_PORT}", f"/run/netns/{_NAMESPACE}")
        stack.enter_context(proxy(target, DELAY_MS, *listening))
        yield Link(name, f"{scheme}://{_FAR_ADDRESS}:{_PORT}", BITS_PER_SECOND / 8)


@contextmanager
def _interfaces() -> Iterator[None]:
    if Path("/run/netns", _NAMESPACE).exists():
        raise BenchmarkError(
            f"the network namespace {_NAMESPACE} is in use; if no other benchmark runs: "
            f"ip netns del {_NAMESPACE}"
        )
    run(["ip", "netns", "add", _NAMESPACE])
    try:
        far = ("ip", "-n", _NAMESPACE)
        pair = ("type", "veth", "peer", "name", _FAR, "netns", _NAMESPACE)
        run(["ip", "link", "add", _NEAR, *pair])
        run(["ip", "addr", "add", f"{_NEAR_ADDRESS}/30", "dev", _NEAR])
        run(["ip", "link", "set", _NEAR, "up"])
        run([*far, "addr", "add", f"{_FAR_ADDRESS}/30", "dev", _FAR])
        run([*far, "link", "set", _FAR, "up"])
        shape = ("root", "tbf", "rate", str(BITS_PER_SECOND), "burst", _BUCKET, "limit", _QUEUE)
        run(["tc", "qdisc", "add", "dev", _NEAR, *shape])
        run(["tc", "-n", _NAMESPACE, "qdisc", "add", "dev", _FAR, *shape])
        yield
    finally:
        # The interfaces go with it.
        run(["ip", "netns", "del", _NAMESPACE])


@contextmanager
def proxy(
    target: str, delay_ms: float, listen: str = "127.0.0.1:0", namespace: str | None = None
) -> Iterator[int]:
    """Run the delay proxy in front of ``target`` (host:port); yields the port it listens on."""
    options = ["--listen", listen, "--to", target, "--delay-ms", str(delay_ms)]
    if namespace is not None:
        options += ["--namespace", namespace]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.delay_proxy", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        process_group=0,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            _, why = process.communicate()
            raise BenchmarkError(f"the delay proxy failed: {why.strip().splitlines()[-1:]}")
        yield int(said)
    finally:
        process.kill()
        process.communicate()
