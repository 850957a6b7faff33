"""What the processes of a mount say to each other, and the files that they leave for each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from envstore.fuse import hydrated, sense
from envstore.fuse.channel import Channel
from envstore.fuse.control import Connection
from envstore.fuse.fdstore import _Deposit
from envstore.fuse.keeping import Keepsake, Kept, MountRequest
from envstore.fuse.keepsakes import Keepsakes
from envstore.fuse.ledger import read_counts, write_counts
from envstore.fuse.mountinfo import _parse
from envstore.fuse.records import MountRecord, RecordFiles, list_records
from envstore.fuse.sockets import ask, listen
from envstore.store.cache import BlobCache
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json

_KINDS = ("keep", "drop", "kept", "hello", "loaded", "failed", "look", "serving", "whole")


def _messages() -> list[bytes]:
    kept = Kept(MountRequest("file:///s", "x", "/m"), {})
    found: list[dict[str, Any]] = [
        {"kind": "keep", "key": "lease/1", "body": {"snapshot": "ab"}},
        {"kind": "drop", "key": "lease/1"},
        {"kind": "failed", "error": {"kind": "CorruptError", "message": "m", "hint": None}},
        {
            "kind": "loaded",
            "name": "x",
            "snapshot": "a",
            "manifest": "b",
            "store": "s",
            "fast": True,
        },
        {"kind": "kept", "names": [], **kept._body()},
    ]
    return [json.dumps(one).encode() for one in found]


@target("channel", _messages, mutate_json, tuple(f'"kind":"{kind}"'.encode() for kind in _KINDS))
def channel(data: bytes) -> None:
    """One message with a descriptor; what it was is done as a holder and an fdstore would."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        file = os.open("/dev/null", os.O_RDONLY)
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(one, [data[:60_000] or b" "], [file])
        message = Channel.of(other).receive()
        os.close(file)
        if message is None:
            expect(len(os.listdir("/proc/self/fd")) == before - 1, "a descriptor is left open")
            return
        if sense.makes_sense(message) and message.kind in ("keep", "drop"):
            _keep(message.kind, message.body, message.files)
        else:
            for fd in message.files:
                os.close(fd)
            _deposit(message.kind, message.body)
        expect(len(os.listdir("/proc/self/fd")) == before - 1, "a descriptor is left open")


def _keep(kind: str, body: dict[str, Any], files: tuple[int, ...]) -> None:
    kept = Kept(MountRequest("file:///s", "x", "/m"), {})
    keepsakes = Keepsakes(kept, lambda key: None, lambda: None)
    server: Any = None
    if kind == "keep":
        keepsakes.keep(server, body["key"], Keepsake(body["body"], files))
        keepsakes.drop(server, body["key"])
    else:
        keepsakes.drop(server, body["key"])
        for fd in files:
            os.close(fd)


def _deposit(kind: str, body: dict[str, Any]) -> None:
    from envstore.fuse.channel import Message

    # These are what the fdstore and the node server expect, and cut a caller off for.
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        _Deposit().take(Message(kind, body))
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        Kept.received(body, ())


def _questions() -> list[bytes]:
    return [b'{"ask":"status"}\n', b'{"ask":"unmounted","id":"1","lazy":true}\n', b"[1]\n"]


@target("control-socket", _questions, mutate_json, (b'"ask":', b"\n", b"[[[["))
def control_socket(data: bytes) -> None:
    """A question to a holder."""
    one, other = socket.socketpair()
    with one:
        other.setblocking(False)

        def answer(connection: Connection, question: dict[str, Any]) -> None:
            expect(isinstance(question, dict), "a question that is no object")
            connection.answer(asked=question["ask"])

        connection = Connection(other, answer)
        one.sendall(data[:65_536].rstrip(b"\n") + b"\n")
        for _ in range(3):
            if connection.open:
                connection.hear()
        connection.close()


def _answers() -> list[bytes]:
    return [
        b'{"mounts":[]}',
        b'{"error":{"kind":"NotFoundError","message":"no","hint":null}}',
        b'{"error":{"kind":"__name__","message":5}}',
    ]


@target("answer", _answers, mutate_json, (b'"error":', b'"kind":"annotations"'))
def answer_of_a_socket(data: bytes) -> None:
    """What somebody answers who listens where a holder or node server should."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        with listen(path) as listener:
            listener.setblocking(True)
            pid = os.fork()
            if not pid:
                try:
                    end, _ = listener.accept()
                    end.recv(1 << 16)
                    end.sendall(data)
                    end.close()
                finally:
                    os._exit(0)
            try:
                ask(path, 5.0, ask="status")
            finally:
                os.waitpid(pid, 0)


def _record_seeds() -> list[bytes]:
    record = MountRecord("/m", "x", "ab", "cd", 5, "file:///s", "now", "/l", "/s", "/c")
    return [json.dumps(asdict(record)).encode()]


@target("mount-record", _record_seeds, mutate_json)
def mount_record(data: bytes) -> None:
    """A record in a user's own state directory."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        try:
            files = RecordFiles("/m")
            files.prepare()
            files.record.write_bytes(data)
            for found, _ in list_records():
                expect(isinstance(found.mountpoint, str), "a mount point that is no text")
                json.dumps(found.encode()).encode()
        finally:
            del os.environ["XDG_STATE_HOME"]


def _hydrated_seeds() -> list[bytes]:
    record = hydrated.Record("ab" * 32, "cd" * 32, "x", 1, 2, "2026-01-02T03:04:05+00:00")
    return [json.dumps({"format": hydrated.FORMAT, **asdict(record)}).encode()]


@target("hydrated-record", _hydrated_seeds, mutate_json)
def hydrated_record(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = BlobCache(Path(folder), 1 << 20)
        directory = hydrated._top(cache) / ("ab" * 32)
        directory.mkdir(parents=True)
        (directory / hydrated._RECORD).write_bytes(data)
        for found in hydrated.list_hydrated(cache):
            expect(len(found.snapshot) == len(found.manifest) == 32, "a digest")
        hydrated.find_hydrated(cache, "@abab")


@target("counts", lambda: [b"", json.dumps({"a": 1}).encode()])
def counts(data: bytes) -> None:
    """Memory that a server which was killed has left: anything at any place."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        write_counts(fd, {"n": 1})
        os.pwrite(fd, data, 0)
        found = read_counts(fd)
        expect(found is None or isinstance(found, dict), "counts that are none")
    finally:
        os.close(fd)


@target("mount-table", lambda: [b"36 35 98:0 /m1 /m\\040x rw,noatime master:1 - ext3 /dev/r rw\n"])
def mount_table(data: bytes) -> None:
    """A line as the kernel writes it, of names that anybody chose."""
    name = data.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\n", b"\\012")
    name = name.replace(b"\t", b"\\011")
    line = b"36 35 98:0 / /" + name + b" rw - ext3 " + name + b" rw\n"
    expect(os.fsencode(_parse(line).mountpoint) == b"/" + data, "another name")
