"""Unix sockets by path, however long the path, and questions in one line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError

MAX_LINE = 1 << 20
_MAX_ANSWER = 64 << 20
_TIMES = 5


def claim(path: str | os.PathLike[str]) -> socket.socket:
    """Return ``listen(path)`` if nobody listens there and nothing else is there.

    Raises ``UsageError``, ``AccessDeniedError``.
    """
    try:
        if somebody_listens(path):
            raise UsageError(f"somebody listens at {path} already")
        return listen(path)
    except OSError as error:
        raise AccessDeniedError(f"cannot listen at {path}: {error.strerror}") from error


def somebody_listens(path: str | os.PathLike[str]) -> bool:
    """Whether the socket at ``path`` has a listener, however busy.

    Raises ``UsageError`` if there is something else than a socket, and ``OSError``.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is in the way: it is not a socket")
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            short_address(path) as address,
        ):
            client.setblocking(False)
            client.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except BlockingIOError:
        pass  # others wait for it to accept them
    return True


@contextlib.contextmanager
def short_address(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield an address for ``path`` that is short enough for a socket."""
    path = Path(path)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: str | os.PathLike[str]) -> socket.socket:
    """Return a non-blocking listening socket at ``path``, for this user alone.

    What was there before is replaced. Raises ``OSError``.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with short_address(path) as address:
            listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


class SilentError(NotFoundError):
    """Nobody answers at a socket."""


class CutOffError(SilentError):
    """Whoever was asked has ended before the answer; another may be there by now."""


def ask(path: str | os.PathLike[str], timeout: float | None = None, **question: object) -> Any:
    """Send one question to the socket at ``path`` and return the answer.

    ``timeout`` is in seconds. Raises ``SilentError`` when nobody answers there, ``CutOffError``,
    and whatever error the answer is, see ``errors.EnvstoreError``.
    """
    data = bytearray()
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            short_address(path) as address,
        ):
            client.settimeout(timeout)
            _connect(client, address, timeout)
            client.sendall(json.dumps(question).encode() + b"\n")
            while piece := client.recv(1 << 16):
                data += piece
                if len(data) > _MAX_ANSWER:
                    raise ValueError("an answer without end")
        answer = json.loads(data)
    except PermissionError as error:
        raise AccessDeniedError(f"no permission to use {path}: {error.strerror}") from error
    except (ConnectionResetError, BrokenPipeError, ValueError, RecursionError) as error:
        raise CutOffError(f"nobody answers at {path}: it was cut off") from error
    except OSError as error:
        reason = error.strerror or "it takes too long"
        raise SilentError(f"nobody answers at {path}: {reason}") from error
    said = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(said, dict):
        raise raised(said)
    return answer


def ask_lasting(path: str | os.PathLike[str], timeout: float, **question: object) -> Any:
    """``ask`` those who replace each other at ``path``; the question may be heard several times."""
    for _ in range(_TIMES - 1):
        with contextlib.suppress(CutOffError):
            return ask(path, timeout, **question)
    return ask(path, timeout, **question)


def _connect(client: socket.socket, address: str, timeout: float | None) -> None:
    """Connect, and wait for room where many others wait, too."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            client.connect(address)
        except BlockingIOError:
            if end is not None and time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def give_back(node: str, lease: str, *, lazy: bool = False) -> None:
    """Tell the node server that a mount is gone; with ``lazy`` it may still be in use."""
    with contextlib.suppress(NotFoundError):  # no server, no lease
        ask_lasting(node, 30.0, ask="unmounted", id=lease, lazy=lazy)


def told(error: EnvstoreError) -> dict[str, Any]:
    """Return an error as JSON, for ``raised`` at the other end."""
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def raised(said: dict[str, Any]) -> EnvstoreError:
    """Return the error that another process has met."""
    from envstore import errors

    kind = getattr(errors, str(said.get("kind")), EnvstoreError)
    if not (isinstance(kind, type) and issubclass(kind, EnvstoreError)):
        kind = EnvstoreError
    hint = said.get("hint")
    found: EnvstoreError = kind(str(said.get("message")), hint=hint and str(hint))
    return found
