"""On a terminal there are tables, colours, progress and questions; elsewhere there are none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.commands import Cli
from tests.trees import noise


def _on_terminal(
    cli: Cli, *arguments: str | Path, typed: bytes = b"", columns: int = 100
) -> tuple[int, str]:
    """Run a command on a terminal of its own; returns its status and what the screen got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    screen = bytearray()
    with cli.start(
        *arguments,
        env={"TERM": "xterm-256color", "COLUMNS": str(columns)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        os.write(ours, typed)
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while piece := os.read(ours, 1 << 16):
                screen += piece
    os.close(ours)
    return process.returncode, screen.decode()


def test_tables(stored: Cli) -> None:
    status, screen = _on_terminal(stored, "ls")
    assert status == 0
    assert "tree:latest" in screen
    assert "\x1b[1m" in screen
    assert "\x1b" not in stored.ok("ls")
    for command in (["du"], ["log", "tree"], ["show", "tree"], ["doctor", "--no-probe"]):
        status, screen = _on_terminal(stored, *command)
        assert status in (0, 1)
        assert "Traceback" not in screen
        assert "\x1b" not in stored(*command).out


def test_a_narrow_terminal_loses_nothing(stored: Cli) -> None:
    name = "a-name-that-is-longer-than-the-whole-terminal-is-wide:v1"
    stored.ok("tag", "tree", name)
    _, screen = _on_terminal(stored, "ls", columns=60)
    assert name.replace("-", "") in "".join(
        line.split()[0] for line in screen.splitlines() if line.split()
    ).replace("-", "")


def test_names_are_harmless_on_a_terminal(stored: Cli) -> None:
    _, screen = _on_terminal(stored, "ls", "tree")
    assert "two\\nlines\\x1b[31m" in screen
    assert "\x1b[31m" not in screen


def test_progress(stored: Cli, tree: Path) -> None:
    (tree / "noise").write_bytes(noise(8, 8 << 20))
    status, screen = _on_terminal(stored, "push", "p", tree, "--kind", "dir")
    assert status == 0
    assert "\x1b[?25l" in screen, "the cursor is hidden while a bar is drawn"
    assert screen.rstrip().count("\x1b[?25h") >= 1, "and shown again"
    assert "pushed p:latest" in screen
    for command in (["pull", "p", "out"], ["verify", "--read-data"]):
        status, screen = _on_terminal(stored, *command)
        assert status == 0
        assert "\x1b[?25h" in screen
    status, screen = _on_terminal(stored, "-q", "verify", "--read-data")
    assert (status, screen) == (0, "")


@pytest.mark.parametrize(
    ("typed", "status", "left"),
    [(b"y\n", 0, False), (b"n\n", 1, True), (b"\n", 1, True), (b"\x04", 130, True)],
)
def test_rm_asks(stored: Cli, typed: bytes, status: int, left: bool) -> None:
    found, screen = _on_terminal(stored, "rm", "tree", typed=typed)
    assert found == status
    assert "remove tree:latest?" in screen
    assert bool(stored.refs()) is left
    assert "Traceback" not in screen


def test_json_stays_alone_on_stdout(stored: Cli, tree: Path) -> None:
    ours, theirs = pty.openpty()
    with stored.start(
        "--json", "push", "p", tree, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        out = process.stdout.read()
        with contextlib.suppress(OSError):
            while os.read(ours, 1 << 16):
                pass
    os.close(ours)
    assert process.returncode == 0
    assert out.startswith(b"{")
    assert out.count(b"\n") == 1
