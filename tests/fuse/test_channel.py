"""Messages with open files, and what is kept of a mount, between processes."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from envstore.errors import UnsupportedFormatError
from envstore.fuse.channel import MAX_MESSAGE, Channel
from envstore.fuse.keeping import (
    STATE_FORMAT,
    Keepsake,
    Kept,
    MountRequest,
    read_state,
    write_state,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def opened(stack: ExitStack, content: bytes) -> int:
    fd = os.memfd_create("test")
    stack.callback(os.close, fd)
    os.write(fd, content)
    return fd


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_arrive_whole_in_order_with_their_files(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    with ExitStack() as stack:
        files = tuple(opened(stack, b"%d" % number) for number in range(16))
        one.send("first", files, text="käse \udcff", number=[1, {"deep": None}])
        one.send("second")
        one.post("third")
        first = other.receive()
        assert first is not None
        assert (first.kind, first.body) == (
            "first",
            {"text": "käse \udcff", "number": [1, {"deep": None}]},
        )
        assert [os.pread(fd, 9, 0) for fd in first.files] == [b"%d" % n for n in range(16)]
        assert not any(os.get_inheritable(fd) for fd in first.files)
        for fd in first.files:
            os.close(fd)
    for kind in ("second", "third"):
        message = other.receive()
        assert message is not None
        assert (message.kind, message.body, message.files) == (kind, {}, ())


def test_the_largest_message(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    room = MAX_MESSAGE - len(json.dumps({"kind": "big", "text": ""}))
    one.send("big", text="x" * room)
    message = other.receive()
    assert message is not None
    assert len(message.body["text"]) == room
    with pytest.raises(OSError, match="too long"):
        one.send("big", text="x" * (room + 1))
    with ExitStack() as stack, pytest.raises(OSError, match="too long"):
        one.send("files", (opened(stack, b""),) * 17)
    one.send("still there")
    assert other.receive() is not None


def test_what_does_not_arrive_whole_is_the_end_and_leaks_nothing(
    ends: tuple[Channel, Channel],
) -> None:
    one, other = ends
    before = open_files()
    with ExitStack() as stack:
        files = [opened(stack, b"") for _ in range(20)]
        socket.send_fds(one.socket, [b'{"kind": "too many"}'], files)
        assert other.receive() is None
        socket.send_fds(one.socket, [b"x" * (MAX_MESSAGE + 1)], files[:3])
        assert other.receive() is None
    assert open_files() == before


def test_nobody_at_the_other_end(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send("last words")
    one.close()
    message = other.receive()
    assert message is not None
    assert message.kind == "last words"
    assert other.receive() is None
    with pytest.raises(OSError, match="Broken pipe"):
        other.send("anybody?")
    with pytest.raises(OSError, match="Broken pipe"):
        other.post("anybody?")


def test_an_end_that_does_not_read_delays_signs_of_life_not_at_all(
    ends: tuple[Channel, Channel],
) -> None:
    one, other = ends

    def beat_for_ever() -> None:
        while True:
            one.post("beat")

    with pytest.raises(BlockingIOError):
        beat_for_ever()
    # What must arrive waits for a while, and is given up then.
    with pytest.raises(BlockingIOError):
        one.send("keep", key="x" * 1000)
    reader = threading.Thread(target=other.receive)
    reader.start()
    reader.join()
    one.send("keep", key="x")


def kept_of(stack: ExitStack, keepsakes: int) -> Kept:
    kept = Kept(
        MountRequest("file:///a\udcffb", "ref", "/place\n", hung_after=3.5),
        {"lock": opened(stack, b"lock"), "counters": opened(stack, b"counters")},
        fuse=opened(stack, b"device"),
        target="/target",
        init=bytes(range(104)),
        flags=1 << 39 | 5,
        restarts=7,
        started=1.5,
    )
    for number in range(keepsakes):
        files = (opened(stack, b"image %d" % number), opened(stack, b"told %d" % number))
        kept.keepsakes[f"slot/{number}"] = Keepsake({"name": "n" * 500, "number": number}, files)
    return kept


def same(one: Kept, other: Kept) -> bool:
    facts = ("request", "target", "init", "flags", "restarts", "started")
    return all(getattr(one, name) == getattr(other, name) for name in facts)


def test_what_is_kept_is_told_to_servers(ends: tuple[Channel, Channel]) -> None:
    with ExitStack() as stack:
        kept = kept_of(stack, 0)
        kept.send(ends[0])
        message = ends[1].receive()
        assert message is not None
        found = Kept.received(message.body, message.files)
        assert same(found, kept)
        assert os.pread(found.files["counters"], 9, 0) == b"counters"
        assert os.pread(found.fuse, 9, 0) == b"device"
        for fd in found.descriptors():
            os.close(fd)
        before_the_mount = kept_of(stack, 0)
        before_the_mount.fuse = -1
        before_the_mount.send(ends[0])
        message = ends[1].receive()
        assert message is not None
        found = Kept.received(message.body, message.files)
        assert found.fuse == -1
        for fd in found.descriptors():
            os.close(fd)


def test_three_hundred_snapshots_pass_from_holder_to_holder() -> None:
    with ExitStack() as stack:
        kept = kept_of(stack, 300)
        state = read_state(write_state({"kept": kept.save(), "more": "x" * 300_000}))
        assert len(kept.descriptors()) == 603
        for fd in kept.descriptors():
            os.set_inheritable(fd, True)
        found = Kept.load(state["kept"])
        assert same(found, kept)
        assert found.keepsakes == kept.keepsakes
        assert not any(os.get_inheritable(fd) for fd in found.descriptors())
        assert os.pread(found.keepsakes["slot/299"].files[1], 20, 0) == b"told 299"


def test_three_hundred_snapshots_are_told_to_a_server(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    heard: list[str] = []

    def hear() -> None:
        while (message := other.receive()) is not None and message.kind == "keep":
            heard.append(message.body["key"])
            for fd in message.files:
                os.close(fd)

    with ExitStack() as stack:
        kept = kept_of(stack, 300)
        server = threading.Thread(target=hear)
        server.start()
        for key, keepsake in kept.keepsakes.items():
            one.send("keep", keepsake.files, key=key, body=keepsake.body)
        one.send("prepare")
        server.join()
    assert heard == list(kept.keepsakes)


def test_state_of_other_versions() -> None:
    with ExitStack() as stack:
        state = kept_of(stack, 1).save()
        state["request"]["from the future"] = 5
        del state["request"]["record"]
        assert Kept.load(state).request.record is False
        state["format"] = STATE_FORMAT + 1
        with pytest.raises(UnsupportedFormatError, match="another version"):
            Kept.load(state)


def test_requests_survive_json(tmp_path: Path) -> None:
    request = MountRequest("s", "r", os.fsdecode(b"/\xff\n"), patience=1.5, node=str(tmp_path))
    assert MountRequest(**json.loads(json.dumps(asdict(request)))) == request
