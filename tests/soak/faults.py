"""What goes wrong on purpose: killed and stopped processes, networks, servers, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.s3server import RestartableS3
from tests.soak.processes import Marked, bury, marked, peak
from tests.soak.world import World
from tests.tcpproxy import TcpProxy

_STOPPED_SHARE = 0.2


class Killer:
    """Kills, or stops for a while, a random process of the run every so many seconds."""

    def __init__(self, world: World, seconds: float, seed: int) -> None:
        self._world = world
        self._seconds = seconds
        self._choose = random.Random(f"{seed}.kills")

    def work(self) -> None:
        """Go on until the world stops."""
        due = time.monotonic() + self._seconds
        stopped: list[tuple[float, int]] = []
        while not self._world.stop.wait(max(0.0, min(0.2, due - time.monotonic()))):
            now = time.monotonic()
            stopped = self._wake(stopped, now)
            bury()
            if now < due:
                continue
            due += self._seconds
            victim = self._victim()
            if victim is None:
                continue
            op = self._world.children().get(victim.pid) or self._world.ops().get(victim.op)
            about = f"{victim.what} {victim.pid} of {op.worker + ' ' + op.kind if op else 'nobody'}"
            if self._choose.random() < _STOPPED_SHARE:
                seconds = self._choose.uniform(1, 5)
                self._world.log(f"stop {about} for {seconds:.1f} s")
                self._world.counts[f"stopped: {victim.what}"] += 1
                self._world.hurt(victim.pid, signal.SIGSTOP, "stopped", op)
                stopped.append((now + seconds, victim.pid))
                continue
            self._world.log(f"kill {about}")
            what = op.kind if op is not None and victim.what == "program" else victim.what
            self._world.counts[f"killed: {what}"] += 1
            self._world.hurt(victim.pid, signal.SIGKILL, "killed", op)
        self._wake(stopped, float("inf"))

    def _wake(self, stopped: list[tuple[float, int]], now: float) -> list[tuple[float, int]]:
        for at, pid in stopped:
            if at <= now:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return [(at, pid) for at, pid in stopped if at > now]

    def _victim(self) -> Marked | None:
        """Choose among the kinds of processes first: some are many."""
        children = self._world.children()
        found: dict[str, list[Marked]] = {}
        for one in marked(self._world.token):
            if one.pid == self._world.template.pid or (
                one.what == "program" and one.pid not in children
            ):
                continue
            self._note(one)
            what = children[one.pid].kind if one.what == "program" else one.what
            found.setdefault(what, []).append(one)
        if not found:
            return None
        return self._choose.choice(found[self._choose.choice(sorted(found))])

    def _note(self, one: Marked) -> None:
        if one.what != "program":
            peaks = self._world.peaks
            peaks[one.what] = max(peaks[one.what], peak(one.pid))


class Network:
    """Breaks the way to the server for a while, again and again, and kills the server."""

    def __init__(self, world: World, proxy: TcpProxy, server: RestartableS3, seed: int) -> None:
        self._world = world
        self._proxy = proxy
        self._server = server
        self._choose = random.Random(f"{seed}.network")

    def work(self) -> None:
        """Go on until the world stops."""
        while not self._world.stop.wait(self._choose.uniform(2, 8)):
            what = self._choose.choice(
                [*(name for name in self._breaks()), "server killed", "server killed"]
            )
            with self._world.trouble(what):
                if what == "server killed":
                    self._server.kill()
                    self._world.stop.wait(self._choose.uniform(0, 2))
                    self._server.start()
                    continue
                self._breaks()[what]()
                self._world.stop.wait(self._choose.uniform(0.5, 5))
                self._proxy.restore()

    def _breaks(self) -> dict[str, Callable[[], None]]:
        proxy, choose = self._proxy, self._choose
        return {
            "connections cut": proxy.cut,
            "answers lost": lambda: proxy.swallow_answers(times=choose.randint(1, 8)),
            "requests cut": lambda: proxy.cut_requests_before_body(times=choose.randint(1, 8)),
            "answers cut": lambda: proxy.cut_answers_after(
                choose.choice((10, 200, 5_000, 100_000)), times=choose.randint(1, 8)
            ),
            "no answers": lambda: proxy.hang(times=choose.randint(1, 4)),
            "errors 503": lambda: proxy.answer(503, times=choose.randint(1, 20)),
            "errors 500": lambda: proxy.answer(500, times=choose.randint(1, 20)),
            "delays": lambda: proxy.delay(choose.uniform(0.02, 0.4)),
        }


class Disk:
    """Fills a small file system for a while, again and again. ``where`` says whose it is."""

    def __init__(self, world: World, place: Path, where: str, seed: int) -> None:
        self._world = world
        self._place = place
        self._where = where
        self._choose = random.Random(f"{seed}.{where}.disk")

    def work(self) -> None:
        """Go on until the world stops."""
        ballast = self._place / "ballast"
        while not self._world.stop.wait(self._choose.uniform(5, 15)):
            with self._world.trouble("disk full", self._where):
                try:
                    with contextlib.suppress(OSError), ballast.open("wb") as file:
                        while not self._world.stop.wait(0.05):
                            file.write(bytes(1 << 20))
                            file.flush()
                    self._world.stop.wait(self._choose.uniform(1, 4))
                finally:
                    ballast.unlink(missing_ok=True)
