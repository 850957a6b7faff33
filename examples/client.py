"""Calls the envstore command as a user would, and reads what it says with ``--json``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """A command failed; the message names it and repeats what it said."""


def envstore_command() -> list[str]:
    """Return the command that belongs to the running interpreter."""
    beside = Path(sys.executable).with_name("envstore")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "envstore"]


def is_mounted(path: Path) -> bool:
    """Return whether something is mounted on ``path``, even if it no longer answers."""
    escaped = str(path).replace("\\", "\\134").replace(" ", "\\040")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == escaped for line in mounts)


def _reason(said: str) -> str:
    """Return the message and the hint of a failure that was reported as JSON."""
    lines = said.strip().splitlines() or ["it said nothing"]
    try:
        error = json.loads(lines[-1])["error"]
    except (ValueError, KeyError, TypeError):
        return " | ".join(lines[-3:])
    return f"{error['message']} ({error['hint']})" if error["hint"] else str(error["message"])


@dataclass(frozen=True, slots=True)
class Mount:
    """A live mount: where it is, how long it took, and the process that holds it and its server."""

    path: Path
    seconds: float
    pid: int
    stats_socket: str

    def stats(self) -> dict[str, Any]:
        """Return the server's own counts: requests and bytes from the store, kernel requests."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(self.stats_socket)
            answer = bytearray()
            while piece := connection.recv(65536):
                answer += piece
        return dict(json.loads(answer))


@dataclass(frozen=True, slots=True)
class Envstore:
    """One store, seen from one node: ``home`` holds all that envstore keeps outside the store."""

    store: str
    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Return the variables of its commands; nothing of the user's own settings is in them."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ENVSTORE_", "AWS_"))
        }
        return {
            **kept,
            "ENVSTORE_URL": self.store,
            "ENVSTORE_CACHE_DIR": str(self.home / "cache"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "AWS_CONFIG_FILE": str(self.home / "no-aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.home / "no-aws-credentials"),
            **self.variables,
        }

    def call(self, *arguments: str | Path) -> dict[str, Any]:
        """Run a command with ``--json`` and return the object. Raises ``CommandError``."""
        command = [*envstore_command(), *map(str, arguments), "--json"]
        process = subprocess.Popen(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # a Ctrl-C comes to us alone, and is passed on once
        )
        try:
            printed, said = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
        name = f"envstore {arguments[0]}"
        if process.returncode:
            raise CommandError(f"{name} failed: {_reason(said)}")
        try:
            return dict(json.loads(printed))
        except ValueError as error:
            raise CommandError(f"{name} printed no JSON object: {printed[:200]!r}") from error

    @contextmanager
    def mounted(self, ref: str, path: Path, *options: str) -> Iterator[Mount]:
        """Mount ``ref`` on ``path``, which is made, and take the mount away again."""
        path.mkdir(parents=True, exist_ok=True)
        try:
            started = time.monotonic()
            said = self.call("mount", *options, ref, path)
            seconds = time.monotonic() - started
            yield Mount(path, seconds, int(said["holder_pid"]), str(said["stats"]))
        finally:
            self.unmount(path)

    def unmount(self, path: Path) -> None:
        """Take the mount on ``path`` away, even from under a program that still uses it."""
        if is_mounted(path):
            try:
                self.call("umount", path)
            except CommandError:
                self.call("umount", "--lazy", path)
