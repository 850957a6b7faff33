"""The persister: whatever dies, fails or lies, what was staged is committed, whole, and once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from envstore.checkpoint import persisting, service
from envstore.checkpoint.policies import encode_keep, last
from envstore.checkpoint.service import BusyError, Persister
from envstore.checkpoint.slotformat import BROKEN, DURABLE, STAGED
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.checkpoint.spawning import PersisterOptions, ensure_persister
from envstore.checkpoint.talking import MAX_LINE, connect
from envstore.errors import AccessDeniedError, NoSpaceError, UnavailableError
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.repository import Repository
from tests.checkpoint.slotfill import begin, content, fill, orders, stage, state, table
from tests.checkpoint.talker import Talker, assert_holds, run_of, serving, wait_for
from tests.faulty import FaultyStore
from tests.s3server import S3Server
from tests.stores import Store

_PROGRAM = Path(__file__).with_name("slotfill.py")
_ROOT = str(Path(__file__).parents[2])
FILES = {"model.safetensors": (300_000, 1), "ranks/x/optim.safetensors": (5000, 2)}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persisting, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(persisting, "LONGEST_PAUSE", 0.1)


def _faulty(store: Store) -> dict[str, Any]:
    """Options of a persister whose store is the test's own, with its faults."""
    return {"open_objects": lambda url: _Unclosed(store.faults)}


class _Unclosed:
    """The test's store, which a persister may close and open again."""

    def __init__(self, inner: FaultyStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def close(self) -> None:
        pass


def _trainer(
    slots: SlotDirectory, url: str, step: int, env: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen[bytes]:
    """Start a trainer that stages, and return it once it has."""
    said = {"store": url, "step": step, "files": FILES, "options": {"linger": 0.2}, **more}
    process = subprocess.Popen(
        [sys.executable, _PROGRAM, slots.path, json.dumps(said)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _ROOT, **(env or {})},
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"staged\n"
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


# Whoever is killed.


def test_a_trainer_is_killed_as_soon_as_its_state_is_staged(
    slots: SlotDirectory, store: Store
) -> None:
    _kill(_trainer(slots, store.url, 5))

    wait_for(lambda: not slots.path.exists(), "all is stored and removed")
    assert_holds(store.repository, 5, state(FILES))
    assert store.repository.resolve("team/llm:step-5") == run_of(store.repository).find(5).snapshot


def test_a_trainer_is_killed_and_the_store_is_s3(slots: SlotDirectory, s3_server: S3Server) -> None:
    url = s3_server.url(s3_server.new_bucket(), "prefix")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        objects = open_objects(url)
        config, _ = init_store(objects)
        with Repository(objects, config, None) as repository:
            _kill(_trainer(slots, url, 7))

            wait_for(lambda: not slots.path.exists(), "all is stored and removed")
            assert_holds(repository, 7, state(FILES))


def test_persisters_are_killed_again_and_again(slots: SlotDirectory, store: Store) -> None:
    files = {"m": (2_000_000, 3)}
    chosen = random.Random(5)
    _kill(_trainer(slots, store.url, 3, persister=False, files=files))

    for _ in range(6):
        pid = ensure_persister(slots.path, PersisterOptions(linger=60))
        time.sleep(chosen.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not _alive(pid), "it is dead")
    ensure_persister(slots.path, PersisterOptions(linger=60))
    with Talker(slots.path, trainer=False) as talker:
        talker.ask("flush")
        talker.hear("flushed")
        assert_holds(store.repository, 3, state(files))
        talker.ask("close")
        talker.ended()

    wait_for(lambda: not slots.path.exists(), "the slots are removed")


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # init may take its time to collect it


def test_what_a_trainer_left_unfinished_is_not_committed(
    slots: SlotDirectory, store: Store
) -> None:
    files = state(FILES)
    with SlotOwnerOf(slots) as owner, serving(slots.path, linger=0.0, **_faulty(store)):
        stage(owner, orders(store.url, 1), files)
        with Talker(slots.path) as talker:
            talker.hear("durable")
            writer, header, _ = begin(owner, orders(store.url, 2), files)
            fill(writer, header, files)
            talker.ask("writing", slot=writer.number, id="2")
            owner.close()  # as its end would
        wait_for(lambda: not slots.path.exists(), "the slots are removed")

    assert [commit.step for commit in run_of(store.repository).commits()] == [1]


class SlotOwnerOf(SlotOwner):
    """A ``SlotOwner`` for a ``with``."""

    def __enter__(self) -> SlotOwner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A life.


def test_a_trainer_is_told_what_becomes_of_its_saves(
    slots: SlotDirectory, owner: SlotOwner, store: Store
) -> None:
    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        for step in (1, 2, 3):
            files = state({"m": (100_000, step)})
            wanted = orders(store.url, step, keep=encode_keep(last(2)), metrics={"loss": 0.1})
            id = str(wanted.checkpoint)
            writer, header, _ = begin(owner, wanted, files)
            talker.ask("writing", slot=writer.number, id=id)
            fill(writer, header, files)
            writer.finish()
            talker.ask("staged", slot=writer.number, id=id)
            said = talker.hear("durable", id=id)
            assert said["snapshot"] == run_of(store.repository).find(step).snapshot.hex()
            assert len(files["m"][0]) < said["sent"] < len(files["m"][0]) + 20_000
            assert_holds(store.repository, step, files)
        talker.ask("staged", slot=writer.number, id=id)
        assert talker.hear("durable", id=id)["id"] == id
        talker.ask("flush")
        talker.hear("flushed")
        talker.ask("status")
        status = talker.hear("status")
        assert (status["durable"], status["failed"], status["last"]) == (3, 0, id)

    assert [commit.step for commit in run_of(store.repository).commits()] == [2, 3]
    assert [_state(slots, number) for number in slots.numbers()] == [DURABLE, DURABLE]


def test_hashing_and_uploads_begin_before_all_is_staged(
    slots: SlotDirectory, owner: SlotOwner, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.store.packs.TARGET_SIZE", 1 << 20)
    # More frames than may wait for a writer.
    count = 4 * (os.cpu_count() or 1) + 12
    segments = [content(seed, 1 << 20) for seed in range(count)]
    files = {"m": segments, "state.json": [table()]}
    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        writer, header, _ = begin(owner, orders(store.url, 1), files)
        talker.ask("writing", slot=writer.number, id="1")
        for (start, length), segment in zip(header.files[0].segments, segments, strict=True):
            writer.view[start : start + length] = segment
            writer.fill(start + length)
        wait_for(lambda: store.faults.count("put", "packs/"), "an upload begins")
        assert store.faults.count("put", "runs/") + store.faults.count("put_if", "runs/") == 0
        (start, length), *_ = header.files[1].segments
        writer.view[start : start + length] = files["state.json"][0]
        writer.finish()
        talker.hear("durable")

    assert_holds(store.repository, 1, files)


def test_waves_are_taken_one_by_one(slots: SlotDirectory, owner: SlotOwner, store: Store) -> None:
    from envstore.checkpoint.layout import StagedFile
    from envstore.checkpoint.slotformat import Header, encode_header

    segments = [content(seed, 200_000) for seed in range(3)]
    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        writer = owner.acquire(300_000)
        assert writer is not None
        for wave, segment in enumerate(segments):
            places = [(4096 if i == wave else 0, len(segment)) for i in range(len(segments))]
            header = encode_header(Header(orders(store.url, 4), (StagedFile("m", tuple(places)),)))
            at = 4096 + 200_000 + 64
            writer.begin(header, at, last=wave == 2)
            talker.ask("writing", slot=writer.number, id="4")
            writer.view[4096 : 4096 + len(segment)] = segment
            writer.finish()
            talker.ask("wave", slot=writer.number, id="4", wave=wave)
            if wave < 2:
                wait_for(writer.taken, "the wave is taken")
        talker.hear("durable")

    # A table is not in it: what is committed is what was staged, of whatever kind.
    assert_holds(store.repository, 4, {"m": segments})


def test_ranks_commit_together(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_SLOTS", str(tmp_path / "slots"))
    both = [SlotDirectory(tmp_path / "slots" / "run" / f"{rank:05d}") for rank in (0, 1)]
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(SlotOwnerOf(slots)) for slots in both]
        for slots in both:
            stack.enter_context(serving(slots.path, **_faulty(store)))
        talkers = [stack.enter_context(Talker(slots.path)) for slots in both]
        for rank, (owner, talker) in enumerate(zip(owners, talkers, strict=True)):
            files = {f"ranks/{rank:05d}/state.json": [table(rank, 2)]}
            stage(owner, orders(store.url, 9, rank=rank, world_size=2), files)
            talker.ask("writing", slot=0, id="")
            if not rank:
                # The part is in the store, so the slot is free; but it is no checkpoint yet.
                wait_for(lambda: _state(both[0], 0) == DURABLE, "the part is stored")
                assert run_of(store.repository).commits() == []
        said = [talker.hear("durable")["snapshot"] for talker in talkers]

    assert said == [run_of(store.repository).find(9).snapshot.hex()] * 2


def test_a_rank_far_behind_is_waited_for_and_one_that_left_a_step_out_is_named(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_SLOTS", str(tmp_path / "slots"))
    monkeypatch.setattr("envstore.checkpoint.persisting.LONGEST_COMMIT_PAUSE", 0.2)
    both = [SlotDirectory(tmp_path / "slots" / "run" / f"{rank:05d}") for rank in (0, 1)]
    steps = range(1, 9)
    left_out = 3
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(SlotOwnerOf(slots)) for slots in both]
        for slots in both:
            stack.enter_context(serving(slots.path, **_faulty(store)))
        talkers = [stack.enter_context(Talker(slots.path)) for slots in both]
        runs = run_of(store.repository)
        for rank in (0, 1):
            files = {f"ranks/{rank:05d}/state.json": [table(rank, 2)]}
            for step in steps:
                if rank and step == left_out:
                    continue
                said = orders(store.url, step, rank=rank, world_size=2)
                writer = stage(owners[rank], said, files)
                id = str(said.checkpoint)
                talkers[rank].ask("staged", slot=writer.number, id=id)
                talkers[rank].hear("local", id=id)
            if not rank:
                wait_for(lambda: len(runs._shelf.all_parts()) == len(steps), "all are stored")
                assert talkers[0].ended_failures() == []
        for step in steps:
            id = str(orders(store.url, step).checkpoint)
            if step == left_out:
                failed = talkers[0].hear("failed", id=id, final=True)
                assert "rank 1 saved later steps" in failed["error"]
            else:
                talkers[0].hear("durable", id=id)
    found = [commit.step for commit in run_of(store.repository).commits()]
    assert found == [step for step in steps if step != left_out]


def _state(slots: SlotDirectory, number: int) -> str:
    slot = slots.read_slot(number)
    if slot is None:
        return ""
    with slot:
        return slot.state


# What the store does.


_DOWN = UnavailableError("it is down")


@pytest.mark.parametrize(
    ("operation", "key", "error"),
    [
        ("put", "packs/", AccessDeniedError("not allowed")),
        ("put", "packs/", NoSpaceError("full")),
        ("put", "packs/", MemoryError()),
        ("put", "index/", _DOWN),
        ("put", "snapshots/", _DOWN),
        ("*", "runs/", _DOWN),
        ("list", "", _DOWN),
        ("get", "envstore.json", _DOWN),
    ],
    ids=lambda value: str(value) or "bug",
)
def test_a_store_that_fails_is_tried_until_it_does_not(
    slots: SlotDirectory,
    owner: SlotOwner,
    store: Store,
    operation: str,
    key: str,
    error: BaseException,
) -> None:
    files = state(FILES)
    store.faults.fail(operation, error, key=key, times=3)
    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        writer = stage(owner, orders(store.url, 1), files)
        talker.ask("staged", slot=writer.number, id=str(orders(store.url, 1).checkpoint))
        said = talker.hear("failed")
        assert said["final"] is False
        assert said["error"] == str(error) or "MemoryError" in said["error"]
        talker.hear("durable")

    assert_holds(store.repository, 1, files)


@pytest.mark.parametrize(
    ("operation", "key", "when"),
    [
        ("put", "packs/", "before"),
        ("put", "index/", "after"),
        ("put", "manifests/", "before"),
        ("put", "snapshots/", "after"),
        ("put_if", "runs/team/llm/parts/", "before"),
        ("put_if", "runs/team/llm/parts/", "after"),
        ("put_if", "runs/team/llm/commits/", "before"),
        ("put_if", "runs/team/llm/commits/", "after"),
    ],
)
def test_a_persister_dies_at_any_point_and_another_goes_on(
    slots: SlotDirectory, owner: SlotOwner, store: Store, operation: str, key: str, when: str
) -> None:
    files = state(FILES)
    stage(owner, orders(store.url, 1), files)
    dying = subprocess.run(
        [sys.executable, _PROGRAM.with_name("dying.py"), slots.path, operation, key, when],
        env={**os.environ, "PYTHONPATH": _ROOT},
        timeout=60,
        check=False,
    )
    assert dying.returncode == -signal.SIGKILL
    assert _state(slots, 0) == STAGED

    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        talker.ask("flush")
        talker.hear("flushed")

    assert_holds(store.repository, 1, files)


def test_an_s3_server_that_is_down_for_a_while(
    slots: SlotDirectory,
    owner: SlotOwner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_server: S3Server,
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "0.5")
    bucket = s3_server.new_bucket()
    objects = open_objects(s3_server.url(bucket))
    config, _ = init_store(objects)
    port = int(s3_server.endpoint.rpartition(":")[2])
    files = state(FILES)
    with (
        Repository(objects, config, None) as repository,
        socket.create_server(("127.0.0.1", 0)) as gap,
    ):
        # A server that takes connections and never answers, then a way through to the real one.
        url = s3_server.url(bucket).replace(str(port), str(gap.getsockname()[1]))
        with serving(slots.path), Talker(slots.path) as talker:
            stage(owner, orders(url, 1), files)
            talker.ask("writing", slot=0, id="1")
            assert talker.hear("failed")["kind"] == "UnavailableError"
            passing = _Passing(gap, port)
            talker.hear("durable")
            passing.close()
        assert_holds(repository, 1, files)


class _Passing:
    """Passes connections on to a port."""

    def __init__(self, listener: socket.socket, port: int) -> None:
        self._listener = listener
        self._port = port
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
                other = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._open += [one, other]
            for a, b in ((one, other), (other, one)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in self._open:
            each.close()


def test_wrong_credentials_are_tried_again(
    slots: SlotDirectory, owner: SlotOwner, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket())
    objects = open_objects(url)
    config, _ = init_store(objects)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    files = state(FILES)
    with Repository(objects, config, None) as repository:
        with serving(slots.path), Talker(slots.path) as talker:
            stage(owner, orders(url, 1), files)
            talker.ask("writing", slot=0, id="1")
            said = talker.hear("failed")
            assert (said["kind"], said["final"]) == ("AccessDeniedError", False)
            assert "c0ffee" not in json.dumps(said)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
            talker.hear("durable")
        assert_holds(repository, 1, files)


def test_what_can_never_be_stored_is_said_once_and_gives_its_slot_back(
    slots: SlotDirectory, owner: SlotOwner, store: Store
) -> None:
    cases = {
        "UsageError": orders(store.url, 1, codec="gzip"),
        "CheckpointError": orders("file:///elsewhere", 2),
    }
    with (
        serving(slots.path, allowed=[store.url], **_faulty(store)),
        Talker(slots.path) as talker,
    ):
        for kind, wanted in cases.items():
            writer = stage(owner, wanted, state(FILES))
            talker.ask("staged", slot=writer.number, id=str(wanted.checkpoint))
            said = talker.hear("failed", final=True)
            assert (said["kind"], said["id"]) == (kind, str(wanted.checkpoint))
            wait_for(lambda writer=writer: _broken(slots, writer.number), "the slot is free")
        talker.ask("flush")
        talker.hear("flushed")
        talker.ask("status")
        assert talker.hear("status")["failed"] == 2

    assert store.object_keys("packs/") == []


def _broken(slots: SlotDirectory, number: int) -> bool:
    page = slots.slot_path(number).read_bytes()[8:16]
    return page.rstrip(b"\0") == BROKEN.encode()


@pytest.mark.parametrize("damage", ["header", "path", "bounds", "rank"])
def test_a_slot_that_lies_is_refused(
    slots: SlotDirectory, owner: SlotOwner, store: Store, damage: str
) -> None:
    from envstore.checkpoint.slotformat import Header, encode_header

    writer, header, at = begin(owner, orders(store.url, 1), state(FILES))
    fill(writer, header, state(FILES))
    data = encode_header(Header(header.orders, header.files))
    path, good = b'"model.safetensors"', b"[4096,"
    lie = {
        "header": data[:-2],
        "path": data.replace(path, b'"../../etc/passwd"'),
        "bounds": data.replace(good, b"[9999999999,"),
        "rank": data.replace(b'"rank":0', b'"rank":7'),
    }[damage]
    assert lie != data
    writer.begin(lie, at)
    writer.finish()

    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        wait_for(lambda: _broken(slots, writer.number), "it is refused")
        stage(owner, orders(store.url, 2), state(FILES))
        talker.ask("writing", slot=0, id="")
        talker.hear("durable")

    assert [commit.step for commit in run_of(store.repository).commits()] == [2]


def test_an_older_incarnation_is_told_that_it_is_fenced(
    slots: SlotDirectory, owner: SlotOwner, store: Store
) -> None:
    run = run_of(store.repository)
    run.open_epoch("first", 1, lambda commits: None)
    second = run.open_epoch("second", 1, lambda commits: None)
    if second.number == 1:
        pytest.skip("one epoch serves both as long as nothing is committed")
    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        stage(owner, orders(store.url, 4, epoch=1), state(FILES))
        talker.ask("writing", slot=0, id="")
        said = talker.hear("failed", final=True)
        assert said["kind"] == "FencedError"


def test_the_news_that_a_dead_persister_did_not_tell_is_told_by_the_next(
    slots: SlotDirectory, owner: SlotOwner, store: Store
) -> None:
    """Also of a part whose slot another save has taken since."""
    ids = [str(orders("", step).checkpoint) for step in (1, 2, 3)]
    with serving(slots.path, linger=3600, **_faulty(store)), Talker(slots.path) as talker:
        for step in (1, 2, 3):
            stage(owner, orders(store.url, step), state({"m": (1000, step)}))
            talker.ask("writing", slot=0, id="")
            talker.hear("durable")

    with serving(slots.path, linger=3600, **_faulty(store)), Talker(slots.path) as talker:
        for number, id in ((0, ids[0]), (1, ids[1]), (0, ids[2])):
            talker.ask("staged", slot=number, id=id)
            talker.hear("local", id=id)
            said = talker.hear("durable", id=id)
            assert said["snapshot"] == run_of(store.repository).find(int(id[:12])).snapshot.hex()
        talker.ask("staged", slot=0, id="not an id")
        talker.hear("local")
        talker.ask("flush")
        talker.hear("flushed")


# The end.


def test_told_to_end_it_finishes_what_is_staged(slots: SlotDirectory, store: Store) -> None:
    fault = store.faults.fail("put", UnavailableError("down"), key="packs/")
    with SlotOwnerOf(slots) as owner:
        for step in (1, 2):
            stage(owner, orders(store.url, step), state({"m": (1000, step)}))
    persister = Persister(slots.path, **_faulty(store))
    thread = threading.Thread(target=persister.run)
    thread.start()
    with Talker(slots.path, trainer=False) as talker:
        talker.hear("failed")
        persister.terminate()
        fault.remove()
        ids = {talker.hear("durable")["id"] for _ in range(2)}
        talker.hear("closed")
    thread.join(60)

    assert not thread.is_alive()
    assert not slots.path.exists()
    assert ids == {str(orders("", step).checkpoint) for step in (1, 2)}


@pytest.mark.parametrize("alive", [True, False])
def test_the_oldest_is_first_unless_the_trainer_is_gone(
    slots: SlotDirectory, store: Store, alive: bool
) -> None:
    # There might be time for only one.
    with SlotOwnerOf(slots) as owner:
        for step in (1, 2):
            stage(owner, orders(store.url, step), state({"m": (1000, step)}))
        if not alive:
            owner.close()
        with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
            talker.ask("flush")
            talker.hear("flushed")

    commits = [
        call.key.rpartition("/")[2]
        for call in store.faults.calls
        if call.operation == "put_if" and "/commits/" in call.key
    ]
    wanted = (1, 2) if alive else (2, 1)
    assert commits == [str(orders("", step).checkpoint) for step in wanted]


def test_a_signal_ends_it_and_a_second_one_at_once(slots: SlotDirectory, tmp_path: Path) -> None:
    # There is no such store, so what is staged can not be stored.
    with SlotOwnerOf(slots) as owner:
        stage(owner, orders(f"file://{tmp_path}/nowhere", 1), state(FILES))
    for signals in (1, 2):
        pid = ensure_persister(slots.path)
        with Talker(slots.path, trainer=False) as talker:
            os.kill(pid, signal.SIGTERM)
            talker.hear("failed")
            if signals == 1:
                assert _alive(pid)
            os.kill(pid, signal.SIGTERM)
            talker.ended()
        wait_for(lambda pid=pid: not _alive(pid), "it is gone")

    assert _state(slots, 0) == STAGED


def test_slots_stay_for_a_trainer_that_comes_back(slots: SlotDirectory, store: Store) -> None:
    with serving(slots.path, linger=3600.0, **_faulty(store)):
        with SlotOwnerOf(slots) as owner, Talker(slots.path) as talker:
            stage(owner, orders(store.url, 1), state(FILES))
            talker.ask("writing", slot=0, id="")
            talker.hear("durable")
        with SlotOwnerOf(slots), Talker(slots.path) as talker:
            assert _state(slots, 0) == DURABLE
            talker.ask("flush")
            talker.hear("flushed")


def test_what_is_staged_in_the_last_moment_is_seen(slots: SlotDirectory, store: Store) -> None:
    """The trainer dies before the persister has looked again, and nobody told it anything."""
    with SlotOwnerOf(slots) as owner, serving(slots.path, linger=0.0, **_faulty(store)):
        with Talker(slots.path, trainer=False) as talker:
            talker.ask("flush")
            talker.hear("flushed")
        stage(owner, orders(store.url, 1), state(FILES))
        owner.close()
        wait_for(lambda: not slots.path.exists(), "all is stored and removed")

    assert_holds(store.repository, 1, state(FILES))


def test_close_finishes_and_removes_everything(slots: SlotDirectory, store: Store) -> None:
    with serving(slots.path, linger=3600.0, **_faulty(store)):
        owner = SlotOwner(slots)
        with Talker(slots.path) as talker:
            stage(owner, orders(store.url, 1), state(FILES))
            talker.ask("close")
            talker.hear("durable")
            talker.hear("closed")
            owner.close()
            talker.ended()
        wait_for(lambda: not slots.path.exists(), "the slots are removed")

    assert_holds(store.repository, 1, state(FILES))


def test_a_directory_has_one_persister(
    slots: SlotDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LOCK_SECONDS", 0.05)
    with serving(slots.path), Talker(slots.path, trainer=False) as talker:
        with pytest.raises(BusyError, match="another persister serves"):
            Persister(slots.path).run()
        talker.ask("status")
        talker.hear("status")


# The socket.


@pytest.mark.parametrize(
    "garbage",
    [
        b"not json\n",
        b"[1]\n",
        b'{"ask": "explode"}\n',
        b'{"ask": "staged"}\n',
        b'{"ask": "staged", "id": "x", "slot": "../../etc"}\n',
        b'{"ask": "hello", "pid": 1, "bandwidth": -5}\n',
        b"x" * (MAX_LINE + 1),
        b"[" * 60_000 + b"\n",
        b"\0\xff\n",
    ],
    ids=range(9),
)
def test_whoever_talks_nonsense_is_cut_off_and_nobody_else(
    slots: SlotDirectory, garbage: bytes
) -> None:
    with serving(slots.path), Talker(slots.path, trainer=False) as good:
        bad = connect(slots.path, 60)
        assert bad is not None
        with bad:
            bad.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                assert bad.recv(100) == b""
        good.ask("status")
        good.hear("status")


def test_a_claim_that_something_is_staged_is_checked(
    slots: SlotDirectory, owner: SlotOwner
) -> None:
    with serving(slots.path), Talker(slots.path) as talker:
        talker.ask("staged", slot=0, id="none")
        said = talker.hear("failed")
        assert (said["id"], said["final"]) == ("none", True)


def test_who_asks_may_limit_uploads_but_not_beyond_the_persister(slots: SlotDirectory) -> None:
    with serving(slots.path, bandwidth=1000.0), Talker(slots.path) as talker:
        for asked, rate in ((500, 500.0), (2000, 1000.0), (None, 1000.0)):
            talker.ask("hello", pid=os.getpid(), bandwidth=asked)
            talker.hear("hello")
            talker.ask("status")
            assert talker.hear("status")["bandwidth"] == rate


def test_lists_of_packs_that_others_may_have_written_are_not_believed(
    slots: SlotDirectory, owner: SlotOwner, store: Store
) -> None:
    lie = slots.path / "pending" / ("ab" * 32)
    lie.parent.mkdir()
    lie.write_bytes(b"a list of packs that is none")
    with serving(slots.path, trusted=False, **_faulty(store)), Talker(slots.path) as talker:
        stage(owner, orders(store.url, 1), state(FILES))
        talker.ask("writing", slot=0, id="")
        talker.hear("durable")
        assert lie.exists()

    with serving(slots.path, **_faulty(store)), Talker(slots.path) as talker:
        stage(owner, orders(store.url, 2), state({"m": (10, 1)}))
        talker.ask("writing", slot=0, id="")
        talker.hear("durable")
        assert not lie.exists()


def test_a_trainer_that_comes_back_keeps_a_persister_that_was_told_to_close(
    slots: SlotDirectory, store: Store
) -> None:
    fault = store.faults.fail("put", _DOWN, key="packs/")
    with serving(slots.path, linger=3600, **_faulty(store)):
        with SlotOwnerOf(slots) as owner, Talker(slots.path) as talker:
            stage(owner, orders(store.url, 1), state(FILES))
            talker.ask("close")
            talker.hear("failed")
        with SlotOwnerOf(slots), Talker(slots.path) as talker:
            fault.remove()
            talker.hear("durable")
            talker.ask("flush")
            talker.hear("flushed")
            assert _state(slots, 0) == DURABLE
