"""A server that reads what strangers wrote may say anything to its holder."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from envstore.fuse.channel import Channel, Message
from envstore.fuse.sense import makes_sense

_LOADED = {"name": "x", "snapshot": "a", "manifest": "b", "store": "s", "fast": False}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("keep", {"key": "lease/1", "body": {}}),
        ("drop", {"key": "lease/1"}),
        ("loaded", _LOADED),
        ("failed", {"error": {"kind": "CorruptError", "message": "m", "hint": None}}),
        ("failed", {"error": {"kind": "CorruptError", "message": "m", "hint": "h"}}),
        ("serving", {}),
        ("of a later version", {"x": 1}),
    ],
)
def test_what_servers_say(kind: str, body: dict[str, Any]) -> None:
    assert makes_sense(Message(kind, body))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("keep", {}), ("keep", {"key": 5, "body": {}}), ("keep", {"key": "x" * 999, "body": {}}),
        ("keep", {"key": "x", "body": []}), ("drop", {"key": None}), ("loaded", {}),
        ("loaded", {**_LOADED, "fast": 1}), ("loaded", {**_LOADED, "store": None}),
        ("loaded", {**_LOADED, "name": "x,suid"}), ("loaded", {**_LOADED, "name": "x\n"}),
        ("failed", {}), ("failed", {"error": "m"}), ("failed", {"error": {"message": "m"}}),
        ("failed", {"error": {"kind": "CorruptError", "message": 5, "hint": None}}),
    ],
)  # fmt: skip
def test_what_cannot_be(kind: str, body: dict[str, Any]) -> None:
    assert not makes_sense(Message(kind, body))


@pytest.mark.parametrize(
    "data",
    [b"nonsense", b"[]", b"5", b"{}", b'{"kind":5}', b"\xff\xfe", b"[" * 60_000, b'{"a":' * 20_000],
)
def test_messages_that_are_none_end_a_channel_and_leave_no_descriptor(data: bytes) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        before = os.listdir("/proc/self/fd")
        socket.send_fds(one, [data], [one.fileno(), other.fileno()])
        assert Channel.of(other).receive() is None
        assert os.listdir("/proc/self/fd") == before
