"""Messages with open files between the processes of one mount: JSON over a packet socket."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 128 << 10
_MAX_FILES = 16
_SEND_WITHIN = 5
"""Seconds that a message may wait for room: the other end may have been stopped."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: what it is about, further fields, and descriptors that now are the reader's."""

    kind: str
    body: dict[str, Any]
    files: tuple[int, ...] = ()


class Channel:
    """One end of a pair. Messages arrive whole and in order; not for use by several threads."""

    def __init__(self, end: socket.socket) -> None:
        """Take over one end of a connected ``SOCK_SEQPACKET`` pair."""
        self.socket = end

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        """Return two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Channel.of(one), Channel.of(other)

    @staticmethod
    def of(end: socket.socket) -> Channel:
        """Return a channel over a connected socket, as both ends of it should be."""
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)
        within = struct.pack("@ll", _SEND_WITHIN, 0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, within)
        return Channel(end)

    @staticmethod
    def duplicate(fd: int) -> Channel:
        """Return a channel over a descriptor that somebody else keeps."""
        return Channel.of(socket.socket(fileno=os.dup(fd)))

    def fileno(self) -> int:
        """Return the descriptor, for poll(2)."""
        return self.socket.fileno()

    def send(self, kind: str, files: tuple[int, ...] = (), **body: object) -> None:
        """Send one message; the ``files`` stay open here, too.

        Raises ``OSError`` when nobody is at the other end, it has stopped reading, or the message
        is longer than ``MAX_MESSAGE``, which the other end would not take.
        """
        self._send(kind, files, body, 0)

    def post(self, kind: str, files: tuple[int, ...] = (), **body: object) -> None:
        """``send`` if that takes no waiting, else raise ``BlockingIOError``."""
        self._send(kind, files, body, socket.MSG_DONTWAIT)

    def _send(self, kind: str, files: tuple[int, ...], body: dict[str, object], flags: int) -> None:
        data = json.dumps({"kind": kind, **body}).encode()
        if len(data) > MAX_MESSAGE or len(files) > _MAX_FILES:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        if files:
            socket.send_fds(self.socket, [data], list(files), flags)
        else:
            self.socket.send(data, flags)

    def receive(self) -> Message | None:
        """Return the next message, waiting for it as the socket does; ``None`` at the end.

        Whoever sends what is none has lost its senses: that is the end, too.
        """
        try:
            data, files, flags, _ = socket.recv_fds(self.socket, MAX_MESSAGE, _MAX_FILES)
        except ConnectionResetError:
            return None
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in files:
                os.close(fd)
            return None
        try:
            for fd in files:
                os.set_inheritable(fd, False)
            message = _message(data, tuple(files))
        except BaseException:
            for fd in files:
                os.close(fd)
            raise
        if message is None:
            for fd in files:
                os.close(fd)
        return message

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self.socket.close()


def _message(data: bytes, files: tuple[int, ...]) -> Message | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or not isinstance(body.get("kind"), str):
        return None
    return Message(body.pop("kind"), body, files)
