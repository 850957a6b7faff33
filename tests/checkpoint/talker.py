"""A trainer's end of the socket, a persister in a thread, and ways to look at what they did."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from envstore.checkpoint.layout import RunName
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.service import Persister
from envstore.checkpoint.talking import Lines, connect, encode
from envstore.checkpoint.trees import SnapshotTree
from envstore.store.repository import Repository
from envstore.store.verify import verify
from tests.checkpoint.slotfill import Files

PATIENCE = 60.0


def wait_for(true: Callable[[], Any], what: str) -> Any:
    """Return what ``true`` returns once that is something."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)
    return found


class Talker:
    """A trainer that talks to the persister of a directory."""

    def __init__(self, directory: Path, *, trainer: bool = True) -> None:
        self.socket = wait_for(lambda: connect(directory, PATIENCE), "somebody listens")
        self._lines = Lines()
        self._heard: list[dict[str, Any]] = []
        self.ask("hello", **({"pid": os.getpid()} if trainer else {}))
        self.pid = self.hear("hello")["pid"]

    def ask(self, question: str, **more: Any) -> None:
        """Say something."""
        self.socket.sendall(encode({"ask": question, **more}))

    def hear(self, say: str, **fields: Any) -> dict[str, Any]:
        """Return the next message of a kind and with these fields; others before it are kept."""
        while True:
            for number, message in enumerate(self._heard):
                if message["say"] == say and fields.items() <= message.items():
                    return self._heard.pop(number)
            data = self.socket.recv(1 << 16)
            assert data, f"cut off, and not told {say} {fields}, but {self._heard}"
            self._heard += self._lines.feed(data)

    def ended_failures(self) -> list[dict[str, Any]]:
        """Return what is said to have failed for good, of what was said until now."""
        self.ask("status")
        self.hear("status")
        return [one for one in self._heard if one["say"] == "failed" and one["final"]]

    def ended(self) -> bool:
        """Wait until the other end is closed."""
        with suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 16):
                self._heard += self._lines.feed(data)
        return True

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def serving(directory: Path, **options: Any) -> Iterator[Persister]:
    """Run a persister in a thread, and end it."""
    persister = Persister(directory, **options)
    thread = threading.Thread(target=persister.run, name="persister")
    thread.start()
    try:
        yield persister
    finally:
        with suppress(OSError):
            persister.terminate()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def run_of(repository: Repository) -> RunStore:
    """Return the run of the tests, seen anew."""
    return RunStore(repository, RunName("team", "llm"))


def assert_holds(repository: Repository, step: int, files: Files) -> None:
    """Check that ``step`` is committed, sound to the last byte, and holds exactly ``files``."""
    commit = run_of(repository).find(step)
    report = verify(repository, [("it", commit.snapshot)], read_data=True)
    assert report.problems == []
    tree = SnapshotTree(repository, commit.snapshot)
    try:
        assert {path: tree.read(path) for path in tree.sizes} == {
            path: b"".join(segments) for path, segments in files.items()
        }
    finally:
        tree.close()
