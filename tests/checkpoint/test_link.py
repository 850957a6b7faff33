"""The trainer's end of the socket: who is told what, and told again when a persister dies."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.layout import Captured, CapturedFile, CheckpointId, RunName
from envstore.checkpoint.link import Link
from envstore.checkpoint.slots import SlotDirectory, slot_directory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.checkpoint.spawning import PersisterOptions
from envstore.checkpoint.staging import Stager
from envstore.checkpoint.talking import Lines, encode, listen
from envstore.store.config import load_config
from envstore.store.objects import open_objects
from envstore.store.repository import Repository
from tests.checkpoint import slotfill
from tests.checkpoint.conftest import is_gone, wait_until
from tests.checkpoint.talker import assert_holds
from tests.checkpoint.test_slots import run_alone

PATIENCE = 60
FIRST, SECOND = CheckpointId(1, 1), CheckpointId(2, 1)


class Peer:
    """A persister by hand: it says what the test says, and remembers what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.listener = listen(directory)
        self.listener.settimeout(PATIENCE)
        self.connection: socket.socket | None = None
        self.lines = Lines()
        self.asked: list[dict[str, Any]] = []

    def accept(self) -> None:
        self.hang_up()
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(PATIENCE)

    def next(self) -> dict[str, Any]:
        """Return the next message."""
        assert self.connection is not None
        while not self.asked:
            data = self.connection.recv(1 << 16)
            assert data, "cut off"
            self.asked += self.lines.feed(data)
        return self.asked.pop(0)

    def ended(self) -> bool:
        """Wait for the end, and whether it comes without another word."""
        assert self.connection is not None
        return not self.asked and self.connection.recv(1) == b""

    def say(self, say: str, **more: Any) -> None:
        assert self.connection is not None
        self.connection.sendall(encode({"say": say, **more}))

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Starter:
    """What a link starts persisters with: counts, and fails as it is told to."""

    def __init__(self) -> None:
        self.started = 0
        self.failures: list[CheckpointError] = []

    def __call__(self, directory: Path, options: PersisterOptions) -> int:
        self.started += 1
        if self.failures:
            raise self.failures.pop()
        return os.getpid()


class Heard:
    """Collects what the link hears."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def __call__(self, message: Any) -> None:
        self.said.put(message)
        if message.get("say") == "trap":
            raise RuntimeError("a bug of whoever listens")

    def next(self) -> dict[str, Any]:
        return self.said.get(timeout=PATIENCE)


@pytest.fixture
def slots(slots_root: Path) -> SlotDirectory:
    slots = SlotDirectory(slot_directory("file:///store", RunName("team", "llm"), 0))
    slots.create()
    return slots


@pytest.fixture
def peer(slots: SlotDirectory) -> Iterator[Peer]:
    peer = Peer(slots.path)
    yield peer
    peer.hang_up()
    peer.listener.close()


@pytest.fixture
def starter() -> Starter:
    return Starter()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def link(slots: SlotDirectory, peer: Peer, starter: Starter, heard: Heard) -> Iterator[Link]:
    link = Link(slots, PersisterOptions(bandwidth=1e9), heard, ensure=starter)
    peer.accept()
    assert peer.next() == {"ask": "hello", "pid": os.getpid(), "bandwidth": 1e9}
    yield link
    link.close()
    link.close()


def staged(checkpoint: CheckpointId, slot: int) -> dict[str, Any]:
    return {"ask": "staged", "slot": slot, "id": str(checkpoint)}


def test_a_persister_is_told_each_thing_and_heard(link: Link, peer: Peer, heard: Heard) -> None:
    link.writing(1, FIRST)
    link.wave(1, FIRST, 0)
    link.staged(1, FIRST)
    assert peer.next() == {"ask": "writing", "slot": 1, "id": str(FIRST)}
    assert peer.next() == {"ask": "wave", "slot": 1, "id": str(FIRST), "wave": 0}
    assert peer.next() == staged(FIRST, 1)
    assert link.pending == [str(FIRST)]
    peer.say("local", id=str(FIRST))
    peer.say("trap")
    peer.say("durable", id=str(FIRST), snapshot="00", sent=7)
    assert heard.next() == {"say": "local", "id": str(FIRST)}
    assert heard.next() == {"say": "trap"}
    assert heard.next()["sent"] == 7
    assert link.pending == []
    link.close()
    assert peer.next() == {"ask": "close"}
    assert peer.ended()


def test_another_persister_is_told_of_what_is_not_durable(
    link: Link, peer: Peer, starter: Starter, heard: Heard
) -> None:
    for number, checkpoint in enumerate((FIRST, SECOND)):
        link.staged(number, checkpoint)
        assert peer.next() == staged(checkpoint, number)
    peer.say("durable", id=str(FIRST), snapshot="00", sent=7)
    assert heard.next()["id"] == str(FIRST)
    starter.failures.append(CheckpointError("no process can be started", hint="wait"))
    peer.accept()
    failed = heard.next()
    assert (failed["say"], failed["id"], failed["final"]) == ("failed", str(SECOND), False)
    assert failed["error"] == "no process can be started"
    assert peer.next()["ask"] == "hello"
    assert peer.next() == staged(SECOND, 1)
    assert starter.started == 3
    link.check(SECOND)


def test_no_persister_is_started_until_there_is_something_to_do(
    link: Link, peer: Peer, starter: Starter
) -> None:
    peer.hang_up()
    assert link.status(timeout=0.05) is None
    assert starter.started == 1
    link.writing(0, FIRST)
    peer.accept()
    assert peer.next()["ask"] == "hello"
    assert starter.started == 2


def test_what_keeps_a_save_from_being_stored_is_raised(
    link: Link, peer: Peer, heard: Heard, starter: Starter
) -> None:
    link.writing(0, FIRST)
    link.check(FIRST)
    peer.say("failed", id=str(FIRST), error="later", kind="UnavailableError", final=False)
    peer.say("failed", id=str(FIRST), error="too late", kind="FencedError", final=True)
    assert (heard.next()["final"], heard.next()["final"]) == (False, True)
    with pytest.raises(CheckpointError, match="too late"):
        link.check(FIRST)
    link.check(SECOND)
    starter.failures += [CheckpointError("no process can be started")] * 1000
    peer.hang_up()

    def refused() -> bool:
        try:
            link.check(SECOND)
        except CheckpointError as error:
            return "no process" in str(error)
        return False

    wait_until(refused)


@pytest.mark.parametrize("garbage", [b"\xff\n", b"[]\n", b"x" * 200_000, b"{\n"])
def test_who_talks_nonsense_is_replaced(link: Link, peer: Peer, garbage: bytes) -> None:
    link.staged(0, FIRST)
    assert peer.next() == staged(FIRST, 0)
    assert peer.connection is not None
    with peer.connection:
        peer.connection.sendall(garbage)
        peer.accept()
    assert peer.next()["ask"] == "hello"


def test_questions_are_answered_or_time_out(link: Link, peer: Peer) -> None:
    def answer() -> None:
        assert peer.next() == {"ask": "status"}
        peer.say("status", sent=3)
        assert peer.next() == {"ask": "flush"}
        peer.say("flushed")

    answering = threading.Thread(target=answer)
    answering.start()
    status = link.status(PATIENCE)
    assert status is not None
    assert status["sent"] == 3
    assert link.flush(PATIENCE)
    answering.join()
    assert not link.flush()


def test_what_is_pending_at_the_end_gets_a_persister(link: Link, peer: Peer) -> None:
    link.staged(0, FIRST)
    assert peer.next() == staged(FIRST, 0)
    peer.listener.settimeout(PATIENCE)
    peer.hang_up()
    closing = threading.Thread(target=link.close)
    closing.start()
    peer.accept()
    assert [peer.next()["ask"] for _ in range(3)] == ["hello", "staged", "close"]
    closing.join()
    assert peer.ended()


_FORKS = """
import os, signal, sys
from pathlib import Path
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.link import Link
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.spawning import PersisterOptions
from tests.checkpoint.test_link import Heard, Peer, Starter
slots = SlotDirectory(sys.argv[1])
slots.create()
peer = Peer(slots.path)
link = Link(slots, PersisterOptions(), Heard(), ensure=Starter())
peer.accept()
reading, writing = os.pipe()
child = os.fork()
if not child:
    link.staged(0, CheckpointId(1, 1))
    assert not link.flush(1) and link.status() is None
    link.close()
    os.write(writing, b"done")
    while True:
        signal.pause()
os.close(writing)
assert os.read(reading, 4) == b"done"
link.close()
assert [peer.next()["ask"] for _ in range(2)] == ["hello", "close"]
assert peer.ended(), "although a child of fork goes on"
os.kill(child, 9)
os.waitpid(child, 0)
"""


def test_a_child_of_fork_has_no_part_in_it(slots_root: Path) -> None:
    run_alone(_FORKS, str(slots_root / "run/00000"))


def test_a_real_persister_that_is_killed_is_replaced(store_url: str, heard: Heard) -> None:
    slots = SlotDirectory(slot_directory(store_url, RunName("team", "llm"), 0))
    slots.create()
    link = Link(slots, PersisterOptions(store=store_url), heard)
    owner = SlotOwner(slots)
    first = link.status(PATIENCE)
    assert first is not None
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: is_gone(first["pid"]))
    for step in (1, 2):
        parts = slotfill.state({"model.safetensors": (10_000, step)})
        writer = slotfill.stage(owner, slotfill.orders(store_url, step), parts)
        link.staged(writer.number, CheckpointId(step, 1))
    durable = []
    while len(durable) < 2:
        message = heard.next()
        if message["say"] == "durable":
            durable.append(message["id"])
    assert durable == [str(FIRST), str(SECOND)]
    second = link.status(PATIENCE)
    assert second is not None
    assert second["pid"] != first["pid"]
    owner.close()
    link.close()
    wait_until(lambda: not slots.path.exists())


@dataclass
class Piece:
    """A piece of bytes; during its copy the persister at the end of ``link`` is killed."""

    data: bytes
    link: Link | None = None
    stable: bool = True

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def copy_into(self, view: memoryview) -> None:
        view[:] = self.data
        if self.link is None:
            return
        status = self.link.status(PATIENCE)
        assert status is not None
        os.kill(status["pid"], signal.SIGKILL)
        wait_until(lambda: is_gone(status["pid"]))


def test_waves_go_on_with_another_persister(store_url: str, heard: Heard) -> None:
    slots = SlotDirectory(slot_directory(store_url, RunName("team", "llm"), 0))
    slots.create()
    link = Link(slots, PersisterOptions(store=store_url), heard)
    stager = Stager(slots, link, max_bytes=400_000)
    data = [slotfill.content(seed, 90_000) for seed in range(5)]
    pieces = [Piece(one, link if one is data[3] else None) for one in data]
    table = CapturedFile("state.json", (Piece(slotfill.table()),))
    captured = Captured((table, CapturedFile("a", tuple(pieces))))
    assert stager.stage(captured, slotfill.orders(store_url, 1)) is not None
    while heard.next()["say"] != "durable":
        pass
    stager.close()
    link.close()
    objects = open_objects(store_url)
    with Repository(objects, load_config(objects), None) as repository:
        assert_holds(repository, 1, {"state.json": [slotfill.table()], "a": data})
