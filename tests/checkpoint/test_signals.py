"""A signal is noticed, and still reaches whoever had it before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from envstore.checkpoint.signals import SignalWatch, parse_signals
from envstore.errors import UsageError


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_handler_before_is_called_and_put_back() -> None:
    calls: list[str] = []

    def before(number: int, frame: object) -> None:
        calls.append("before")

    signal.signal(signal.SIGTERM, before)
    watch = SignalWatch([signal.SIGTERM], lambda _: calls.append("noticed"), absorb=False)
    raise_signal(signal.SIGTERM)
    assert calls == ["noticed", "before"]
    watch.close()
    watch.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_watches_chain_and_close_in_any_order() -> None:
    calls: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append("before"))
    first = SignalWatch([signal.SIGTERM], lambda _: calls.append("first"), absorb=True)
    second = SignalWatch([signal.SIGTERM], lambda _: calls.append("second"), absorb=True)
    first.close()
    raise_signal(signal.SIGTERM)
    assert calls == ["second", "before"]
    second.close()
    raise_signal(signal.SIGTERM)
    assert calls == ["second", "before", "before"]


def test_a_handler_set_since_stays() -> None:
    calls: list[str] = []
    watch = SignalWatch([signal.SIGTERM], lambda _: calls.append("noticed"), absorb=True)

    def later(number: int, frame: object) -> None:
        calls.append("later")

    signal.signal(signal.SIGTERM, later)
    watch.close()
    assert signal.getsignal(signal.SIGTERM) is later


def test_an_ignored_signal_is_noticed_and_stays_ignored() -> None:
    calls: list[int] = []
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    watch = SignalWatch([signal.SIGUSR1], calls.append, absorb=False)
    raise_signal(signal.SIGUSR1)
    watch.close()
    assert calls == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


PROGRAM = """
import os, signal, sys
from envstore.checkpoint.signals import SignalWatch
SignalWatch([signal.SIGTERM], lambda _: print("noticed", flush=True), absorb={absorb})
os.kill(os.getpid(), signal.SIGTERM)
print("alive", flush=True)
"""


@pytest.mark.parametrize(
    ("absorb", "said", "status"),
    [(False, "noticed\n", -signal.SIGTERM), (True, "noticed\nalive\n", 0)],
)
def test_the_default_follows_unless_it_is_absorbed(absorb: bool, said: str, status: int) -> None:
    program = PROGRAM.format(absorb=absorb)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (said, status)


def test_other_threads_watch_nothing() -> None:
    made: list[SignalWatch] = []
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(
        target=lambda: made.append(SignalWatch([signal.SIGTERM], lambda _: None, absorb=True))
    )
    thread.start()
    thread.join()
    assert not made[0].active
    made[0].close()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_signals_are_named() -> None:
    assert parse_signals(["SIGTERM", signal.SIGUSR1]) == (signal.SIGTERM, signal.SIGUSR1)
    for wrong in ("TERM", 4000):
        with pytest.raises(UsageError, match="not a signal"):
            parse_signals([wrong])
