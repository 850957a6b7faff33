"""Starts a mount's holder as a process of its own, and is that process.

The holder is a fresh interpreter: it shares no thread, lock or descriptor with whoever asked
for the mount. It gets its request on standard input, and says on standard output how it went: one
line of JSON, with the mount's record or an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import IO, Any

if __name__ == "__main__":  # at the end, so that it can hide nothing
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.channel import Channel
from envstore.fuse.holder import Holder
from envstore.fuse.keeping import STATE_FORMAT, Kept, MountRequest, read_state
from envstore.fuse.mount import check_mountpoint
from envstore.fuse.privileges import keep_what_a_holder_needs
from envstore.fuse.processes import load_server_code
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.session import check_device
from envstore.fuse.sockets import claim, listen, raised, told
from envstore.redaction import protect_logs
from envstore.store.private import private

__all__ = ["MountRequest", "hold", "start_background", "start_mount"]

_MODULES = ("pyfuse3", "trio")

_log = logging.getLogger(__name__)


def start_background(request: MountRequest) -> MountRecord:
    """Mount in a new process and return when the mount answers.

    The cache is the one that the environment variables describe. Raises whatever kept the
    mount from being made: ``UsageError``, ``NotFoundError``, ``AccessDeniedError``,
    ``CorruptError``, ``UnavailableError``.
    """
    request = request.placed()
    mountpoint = check_mountpoint(request.mountpoint)
    _check_modules()
    check_device()
    files = RecordFiles(mountpoint)
    files.prepare()
    # To append, so that it can be cut when it grows too long.
    with open(files.log, "ab", opener=private) as log:
        log.truncate(0)
        holder = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    with holder:
        said, _ = holder.communicate(json.dumps(asdict(request)).encode())
    if not said:
        last = files.log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise EnvstoreError(f"the mount's holder ended: {last}", hint=f"see {files.log}")
    answer = json.loads(said)
    if "error" in answer:
        raise raised(answer["error"])
    os.stat(mountpoint)  # goes through the new server
    return MountRecord(**answer["mounted"])


def start_mount(request: MountRequest, node: str = "auto") -> MountRecord:
    """Mount by whatever is fastest here.

    A hydrated snapshot needs no server where the fast path is to be had; others are mounted
    through the node server, or with a holder and server of the mount's own. ``node`` is ``on``,
    ``off``, or ``auto``: if there is a node server that this user may use. Raises as
    ``start_background`` does; ``NotFoundError`` if it must be the node and none is there.
    """
    from envstore.fuse.complete import mount_complete
    from envstore.fuse.leases import mount_through, node_for

    request = request.placed()
    if request.metrics:
        # Only a server of the mount's own can serve its counts at an address of its own.
        if node == "on":
            raise UsageError(
                "a mount through the node server has no metrics of its own",
                hint="see: envstore node --metrics",
            )
        return start_background(request)
    record = mount_complete(request) if node != "on" else None
    if record is not None:
        return record
    path = node_for(node)
    return start_background(request) if path is None else mount_through(path, request)


def hold(request: MountRequest, say: Callable[[dict[str, Any]], None]) -> int:
    """Mount and keep the mount until it is unmounted; returns an exit status.

    ``say`` is called once: with ``mounted`` and a record, or with ``error``. SIGTERM, SIGINT and
    SIGHUP unmount; a mount in use is then detached and served until the last user is gone, or a
    second signal comes. Call from the main thread of a process without others.

    Raises ``UsageError``, ``NotFoundError``, ``AccessDeniedError`` before anything is mounted.
    """
    request = request.placed()
    life: dict[str, int] = {}
    fdstore = None
    if request.fdstore:
        from envstore.fuse.deposit import claim as claim_deposit
        from envstore.fuse.deposit import open_life
        from envstore.fuse.inheriting import prepare_places

        life = open_life()
        fdstore, kept = claim_deposit(request.fdstore, life["watch"])
        if kept is not None and fdstore is not None:
            return _inherit(kept, request, life, fdstore, say)
        prepare_places(request)
    mountpoint = check_mountpoint(request.mountpoint)
    _check_modules()
    check_device()
    files = RecordFiles(mountpoint)
    files.prepare()
    lock = files.acquire()
    if lock is None:
        raise UsageError(
            f"{mountpoint} is being served already", hint=f"envstore umount {mountpoint}"
        )
    try:
        files.clear()
        request = replace(request, mountpoint=mountpoint, metrics=_lasting(request.metrics))
        request = _settled(request)
        node = {"node": claim(request.node).detach()} if request.node else {}
        descriptors = {
            "lock": lock,
            "counters": os.memfd_create("envstore-counters", os.MFD_CLOEXEC),
            "stats": listen(files.stats).detach(),
            "control": listen(files.control).detach(),
            **node,
            **life,
        }
    except BaseException:
        # Who is told why, and tries again at once, must not meet what is left of this process.
        os.close(lock)
        raise
    holder = Holder(Kept(request, descriptors), files, say, fdstore)
    holder.begin()
    return holder.run()


def _check_modules() -> None:
    """See that there is what servers are made of, which nobody but they imports.

    Raises ``ModuleNotFoundError``.
    """
    for name in _MODULES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _inherit(
    kept: Kept,
    request: MountRequest,
    life: dict[str, int],
    fdstore: Channel,
    say: Callable[[dict[str, Any]], None],
) -> int:
    """Go on with what an fdstore has kept of a node server."""
    from envstore.fuse.inheriting import check_same, inherit

    check_same(kept, request)
    files = inherit(kept, replace(request, metrics=_lasting(request.metrics)))
    kept.request = _settled(kept.request)
    kept.files |= life
    load_server_code()
    holder = Holder(kept, files, say, fdstore)
    holder.inherit()
    return holder.run()


def _settled(request: MountRequest) -> MountRequest:
    """Return the request with what only this process can find out; gives up all but its needs."""
    keep_what_a_holder_needs(request)
    if os.geteuid() == 0:
        from envstore.fuse.fast import tried
        from envstore.store.cache import default_cache

        request = tried(request, default_cache())
    return request


def _lasting(address: str) -> str:
    """Return an address of metrics that means the same in any directory."""
    if address:
        from envstore.fuse.prometheus import check_address

        if check_address(address) is None:
            return os.path.abspath(address)
    return address


def main(arguments: list[str]) -> int:
    """Run as the holder: of a new mount, or with ``--resume FD`` of one that is there."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    protect_logs()
    if arguments[:1] == ["--check"]:
        load_server_code()
        return 0 if arguments[1:] == [str(STATE_FORMAT)] else 1
    if arguments[:1] == ["--resume"]:
        return _resume(int(arguments[1]))
    request = MountRequest(**json.loads(sys.stdin.buffer.read()))
    if os.fork():
        os._exit(0)  # who started this need not collect the holder when it ends
    answers = os.fdopen(os.dup(1), "wb")
    for name, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        null = os.open(os.devnull, flags)
        os.dup2(null, name)
        os.close(null)

    def say(answer: dict[str, Any]) -> None:
        # Raises if nobody waits for the mount any more, which then goes away again.
        answers.write(json.dumps(answer).encode())
        answers.close()
        os.chdir("/")

    try:
        return hold(request, say)
    except EnvstoreError as error:
        _log.error("%s", error)
        _answer(answers, {"error": told(error)})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the log is the only place for a traceback
        _log.exception("the holder failed")
        failure = EnvstoreError(f"the mount's holder failed: {error!r}", hint="see the log")
        _answer(answers, {"error": told(failure)})
        return 1


def _resume(memory: int) -> int:
    state = read_state(memory)
    kept = Kept.load(state["kept"])
    os.chdir("/")
    keep_what_a_holder_needs(kept.request)
    holder = Holder(kept, RecordFiles(kept.request.mountpoint), lambda answer: None)
    holder.adopt(state)
    return holder.run()


def _answer(answers: IO[bytes], message: dict[str, Any]) -> None:
    if not answers.closed:
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message).encode())
            answers.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
