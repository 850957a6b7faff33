"""Places of a test's own for stores, slots and caches; persisters end with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.checkpoint.spawning import ask_hello
from envstore.checkpoint.talking import SOCKET
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from tests.checkpoint.training import Trainers

_SECONDS = 30.0


@pytest.fixture
def slots_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the directory of all slots of the test, in memory."""
    root = Path(tempfile.mkdtemp(prefix="envstore-test-", dir="/dev/shm"))
    monkeypatch.setenv("ENVSTORE_SLOTS", str(root))
    yield root
    end_persisters(root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlotDirectory:
    """Return a slot directory on disk, for tests that do not need it to be in memory."""
    monkeypatch.setenv("ENVSTORE_SLOTS", str(tmp_path / "slots"))
    found = SlotDirectory(tmp_path / "slots" / "run" / "00000")
    found.create()
    return found


@pytest.fixture
def owner(slots: SlotDirectory) -> Iterator[SlotOwner]:
    """Return the trainer's hold on the slots."""
    held = SlotOwner(slots)
    yield held
    held.close()


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the node cache of the test."""
    path = tmp_path / "cache"
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(path))
    return path


@pytest.fixture
def store_url(tmp_path: Path, slots_root: Path, cache_dir: Path) -> str:
    """Return the URL of a store in a directory, with slots and a cache of the test's own."""
    url = f"file://{tmp_path}/store"
    make_store(url)
    return url


@pytest.fixture(scope="session")
def _template() -> Iterator[Trainers]:
    with Trainers() as opened:
        yield opened


@pytest.fixture
def trainers(_template: Trainers, slots_root: Path) -> Iterator[Trainers]:
    """Return what starts trainers; they are gone before the slots are removed."""
    yield _template
    _template.end_all()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Return a function that waits until a condition holds."""
    return wait_until


def make_store(url: str) -> None:
    """Make the place a store."""
    objects = open_objects(url, create=True)
    try:
        init_store(objects)
    finally:
        objects.close()


def persisters(root: Path) -> list[int]:
    """Return the process ids of the persisters of all slot directories below ``root``."""
    found = []
    for directory, _, names in os.walk(root):  # which does not mind what goes meanwhile
        if SOCKET in names and (pid := ask_hello(Path(directory))) is not None:
            found.append(pid)
    return found


def end_persisters(root: Path) -> None:
    """Kill them, and wait until they are gone."""
    for pid in persisters(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: is_gone(pid))


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, although init may not have buried it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; fails after half a minute."""
    end = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)
