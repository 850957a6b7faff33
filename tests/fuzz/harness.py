"""What a fuzzing target is, and one run of it under watch.

A target is a function of some bytes that must return, or raise an ``EnvstoreError``, whatever the
bytes are. Anything else that escapes is a finding, and so is taking too much processor time or
memory.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from envstore.errors import EnvstoreError

CORPUS = Path(__file__).with_name("corpus")
MAX_INPUT = 64 << 10
"""Bytes of the longest input that is tried."""
SECONDS = 20.0
"""Processor time that one input may take: far more than any should, for machines that are busy."""
MEMORY = 96 << 20
"""Bytes by which one input may raise the process's peak, besides ``PER_BYTE`` for each of its own.

The longest input that a reader takes in one piece is a manifest part of 8 MiB, and decoding it
costs about forty times that; so there is nothing in an input of 64 KiB that should come near."""
PER_BYTE = 1024

Run = Callable[[bytes], None]
Mutate = Callable[[bytes, Random], bytes]


class BrokenError(AssertionError):
    """A property that a target promises does not hold."""


class Slow(BaseException):
    """One input took more processor time than ``SECONDS``."""


@dataclass(frozen=True)
class Target:
    """One decoder under test; ``seeds`` makes inputs that are well formed."""

    name: str
    run: Run
    seeds: Callable[[], list[bytes]]
    mutate: Mutate | None = None
    words: tuple[bytes, ...] = ()
    module: str = ""

    @property
    def corpus(self) -> Path:
        """Where its inputs lie."""
        return CORPUS / self.name

    def inputs(self) -> list[bytes]:
        """Return the stored inputs, in the order of their names."""
        return [path.read_bytes() for path in sorted(self.corpus.glob("*"))]


REGISTRY: dict[str, Target] = {}


def target(
    name: str,
    seeds: Callable[[], list[bytes]],
    mutate: Mutate | None = None,
    words: tuple[bytes, ...] = (),
) -> Callable[[Run], Run]:
    """Make the decorated function the target called ``name``."""

    def register(run: Run) -> Run:
        if name in REGISTRY:
            raise ValueError(f"two targets are called {name}")
        REGISTRY[name] = Target(name, run, seeds, mutate, words, run.__module__)
        return run

    return register


def load_targets() -> dict[str, Target]:
    """Import every module of targets and return all targets by name."""
    package = importlib.import_module("tests.fuzz.targets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"tests.fuzz.targets.{module.name}")
    return dict(sorted(REGISTRY.items()))


def expect(condition: object, message: str) -> None:
    """Raise ``BrokenError`` unless ``condition`` holds."""
    if not condition:
        raise BrokenError(message)


@dataclass(slots=True)
class Finding:
    """What went wrong with one input; ``signature`` is equal for findings of one cause."""

    data: bytes
    signature: str
    text: str

    @property
    def name(self) -> str:
        """The name of the file that keeps the input."""
        return f"crash-{hashlib.sha256(self.data).hexdigest()[:16]}"


@dataclass
class Watch:
    """Runs inputs and tells what they did wrong. Not for several threads."""

    target: Target
    executions: int = 0
    refused: int = 0
    peak: int = 0

    def run(self, data: bytes) -> Finding | None:
        """Try one input."""
        self.executions += 1
        before = max(self.peak, _peak())
        try:
            with _limited():
                self.target.run(data)
        except EnvstoreError as error:
            self.refused += 1
            if not error.message:
                return _finding(data, error)
        except (Exception, Slow) as error:  # noqa: BLE001 - finding out what escapes is the point
            return _finding(data, error)
        self.peak = _peak()
        if self.peak - before > MEMORY + PER_BYTE * len(data):
            grown = (self.peak - before) >> 20
            return Finding(data, f"memory {self.target.name}", f"{grown} MiB for {len(data)} bytes")
        return None


def _finding(data: bytes, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "envstore/" in frame.filename] or list(frames)
    at = ours[-1]
    place = f"{at.filename.rpartition('envstore/')[2]}:{at.name}"
    text = "".join(traceback.format_exception(error))
    return Finding(data, f"{type(error).__name__} {place}", text[-4000:])


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _too_slow(signum: int, frame: object) -> None:
    raise Slow(f"more than {SECONDS} s of processor time")


def prepare(room: int = 3 << 30) -> None:
    """Set the limits of this process: ``room`` bytes of address space more than it has."""
    signal.signal(signal.SIGVTALRM, _too_slow)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, hard))
