"""Who is at the other end of a Unix socket, whatever the permissions of its path have become."""

from __future__ import annotations

import os
import socket
import struct
from typing import Protocol

_CREDENTIALS = struct.Struct("iII")


class _End(Protocol):
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def is_ours(end: _End) -> bool:
    """Whether the process at the other end of a connected socket is this user's, or root's."""
    said = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(said)
    return user in (0, os.geteuid())
