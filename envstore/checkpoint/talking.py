"""How a trainer and its persister talk: lines of JSON over a socket in the slot directory.

Neither believes the other: lines are bounded, and only processes of the same user, of the
directory's owner or of root are listened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, CorruptError

SOCKET = "socket"
MAX_LINE = 64 << 10
"""Bytes of one line; a longer one ends the conversation."""
MAX_UNREAD = 1 << 20
"""Bytes that wait for somebody who does not read; more end the conversation."""

_CREDENTIALS = struct.Struct("3i")


@contextlib.contextmanager
def short_address(directory: Path) -> Iterator[str]:
    """Yield an address of the socket in ``directory`` that is short enough, however long that is.

    Raises ``OSError``.
    """
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)


def listen(directory: Path) -> socket.socket:
    """Return a non-blocking listening socket in ``directory``, for its owner alone.

    One that was left behind is replaced: call with the directory locked. Raises ``OSError``.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short_address(directory) as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            listener.bind(address)
            owner = os.stat(directory).st_uid
            if owner != os.geteuid():
                os.chown(address, owner, -1, follow_symlinks=False)
        listener.listen(64)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def connect(directory: Path, timeout: float) -> socket.socket | None:
    """Return a socket on which somebody listens in ``directory``, or ``None`` if nobody does.

    ``timeout`` (seconds) is for connecting and stays set. Raises ``AccessDeniedError``.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(timeout)
        with short_address(directory) as address:
            if not stat.S_ISSOCK(os.lstat(address).st_mode):
                raise AccessDeniedError(f"{directory / SOCKET} is in the way: it is not a socket")
            client.connect(address)
    except PermissionError as error:
        client.close()
        raise AccessDeniedError(
            f"no permission to use {directory / SOCKET}",
            hint="the persister must run as the same user, or as root",
        ) from error
    except OSError:
        client.close()
        return None
    except BaseException:
        client.close()
        raise
    return client


def may_ask(client: socket.socket, owner: int) -> bool:
    """Whether the process at the other end is this user's, the directory's owner's or root's."""
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user in (0, os.geteuid(), owner)


def encode(message: Mapping[str, Any]) -> bytes:
    """Return one message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Takes bytes as they come and gives whole messages. Not safe for concurrent use."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that are complete now. Raises ``CorruptError`` for anything else."""
        *whole, self._left = (self._left + data).split(b"\n")
        if len(self._left) > MAX_LINE:
            raise CorruptError(f"a message is longer than {MAX_LINE} bytes")
        return [_message(line) for line in whole]


def _message(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise CorruptError(f"a message is longer than {MAX_LINE} bytes")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise CorruptError("a message is not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptError("a message is not a JSON object")
    return value
