from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from envstore.store import hosts


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys; from envstore.store import hosts; print(hosts.here(), flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_process_is_not_gone_while_it_lives_and_is_once_killed(
    child: subprocess.Popen[str],
) -> None:
    assert child.stdout is not None
    host = child.stdout.readline().strip()
    assert not hosts.is_gone(host)
    child.send_signal(signal.SIGKILL)
    # Nobody has waited for it yet.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert hosts.is_gone(host)
    child.wait()
    assert hosts.is_gone(host)


def test_a_process_id_that_another_has_now_is_of_one_that_is_gone() -> None:
    host = hosts.here()
    place, _, began = host.rpartition("/")
    assert not hosts.is_gone(host)
    assert hosts.is_gone(f"{place}/{int(began) + 1}")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_is_known_of_other_machines_and_name_spaces(number: int) -> None:
    parts = hosts.here().split("/")
    parts[3] = "4194399"  # no process
    assert hosts.is_gone("/".join(parts))
    parts[number] = "1" + parts[number][1:] if parts[number][0] != "1" else "2" + parts[number][1:]
    assert not hosts.is_gone("/".join(parts))


@pytest.mark.parametrize("text", ["", "x", "a/1/2/3", "a/1/2/3/4/5", "a/1/2/-3/4", "a/1/2/3/4\n"])
def test_what_cannot_be_read_tells_nothing(text: str) -> None:
    assert not hosts.is_gone(text)
