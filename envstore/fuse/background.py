"""Starts a mount's server as a process of its own, and is that process.

The server is a fresh interpreter: it shares no thread, lock or descriptor with whoever asked
for the mount, and loads what it needs once. It gets its request on standard input, and says on
standard output how it went: one line of JSON, with the mount's record or an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import IO, Any

if __name__ == "__main__":  # at the end, so that it can hide nothing
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from envstore import errors
from envstore.errors import EnvstoreError
from envstore.fuse.mount import check_mountpoint, serve
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.session import check_device

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount where: store URL, REF or ``@digest``, and the mount point."""

    store: str
    ref: str
    mountpoint: str
    allow_other: bool = False


def start_background(request: MountRequest) -> MountRecord:
    """Mount in a new process and return when the mount answers.

    The cache is the one that the environment variables describe. Raises whatever kept the
    mount from being made, as ``serve`` does.
    """
    mountpoint = check_mountpoint(request.mountpoint)
    check_device()
    files = RecordFiles(mountpoint)
    files.prepare()
    with open(files.log, "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    with server:
        said, _ = server.communicate(json.dumps(asdict(request)).encode())
    if not said:
        last = files.log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise EnvstoreError(f"the mount server ended: {last}", hint=f"see {files.log}")
    answer = json.loads(said)
    if "error" in answer:
        raise _error(answer["error"])
    os.stat(mountpoint)  # goes through the new server
    return MountRecord(**answer["mounted"])


def _error(said: dict[str, Any]) -> EnvstoreError:
    kind = getattr(errors, said["kind"], EnvstoreError)
    found: EnvstoreError = kind(said["message"], hint=said["hint"])
    return found


def main() -> int:
    """Run as the server: read a request, mount, say so, serve. Returns the exit status."""
    request = MountRequest(**json.loads(sys.stdin.buffer.read()))
    if os.fork():
        os._exit(0)  # who started this need not collect the server when it ends
    answers = os.fdopen(os.dup(1), "wb")
    for name, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        null = os.open(os.devnull, flags)
        os.dup2(null, name)
        os.close(null)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        _serve(request, answers)
    except EnvstoreError as error:
        _log.error("%s", error)
        said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        _answer(answers, {"error": said})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the log is the only place for a traceback
        _log.exception("the server failed")
        said = {"kind": "EnvstoreError", "message": f"the mount server failed: {error!r}"}
        _answer(answers, {"error": {**said, "hint": "see the log"}})
        return 1
    return 0


def _import_serving() -> None:
    with contextlib.suppress(ImportError):  # `serve` will meet it again
        importlib.import_module("envstore.fuse.serving")


def _serve(request: MountRequest, answers: IO[bytes]) -> None:
    # The event loop's modules take a tenth of a second, and so does waiting for the store.
    threading.Thread(target=_import_serving, daemon=True).start()
    from envstore.store.cache import default_cache
    from envstore.store.repository import Repository

    def ready(record: MountRecord) -> None:
        # Raises if nobody waits for the mount any more, which then goes away again.
        answers.write(json.dumps({"mounted": asdict(record)}).encode())
        answers.close()
        os.chdir("/")

    with Repository.open(request.store, default_cache()) as repository:
        serve(
            repository,
            repository.resolve(request.ref),
            request.mountpoint,
            name=request.ref,
            allow_other=request.allow_other,
            ready=ready,
        )


def _answer(answers: IO[bytes], message: dict[str, Any]) -> None:
    if not answers.closed:
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message).encode())
            answers.close()


if __name__ == "__main__":
    sys.exit(main())
