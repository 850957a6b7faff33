"""Runs the event loop behind a live mount. Nothing here knows how the mount was made."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from envstore.errors import EnvstoreError, UsageError
from envstore.fuse import stats
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.operations import SnapshotOperations
from envstore.fuse.reader import Reader
from envstore.fuse.session import BusyError, Session, close_mount
from envstore.store.repository import Repository

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_log = logging.getLogger(__name__)


def serve_session(
    session: Session,
    content: Content,
    repository: Repository,
    stats_socket: Path,
    ready: Callable[[], None],
) -> None:
    """Answer a live mount until it is gone; ``ready`` is called when it answers.

    What is known here beyond ``content`` makes things faster, never different: a server that
    takes over in the middle gives the same answers. Call from the main thread.
    """
    if repository.cache is None:
        raise UsageError("a mount needs a cache")
    metrics, complaints = Metrics(), Complaints(_log)
    fetcher, cache = repository.fetcher, repository.cache
    _hold_little_memory()

    async def main() -> None:
        loader = FrameLoader(fetcher, cache, metrics, complaints)
        reader = Reader(content.tree, content.locations, loader, cache, metrics, complaints)

        def report() -> dict[str, object]:
            return metrics.report(fetcher, repository.objects, reader.used())

        async with trio.open_nursery() as nursery:
            await nursery.start(loader.run)
            await nursery.start(stats.answer, stats_socket, report)
            await nursery.start(_unmount_on_signal, session.mountpoint, nursery.cancel_scope)
            _attach(session, SnapshotOperations(content.tree, reader, metrics.requests))
            try:
                ready()
                await pyfuse3.main()
            finally:
                pyfuse3.close(unmount=False)
            nursery.cancel_scope.cancel()
        _log.info("%s is unmounted: %s", session.mountpoint, json.dumps(report()))

    trio.run(main)


def _attach(session: Session, operations: SnapshotOperations) -> None:
    """Have libfuse serve a device whose INIT was answered already.

    libfuse insists on an INIT of its own, so it is given a pipe that holds the kernel's; while it
    handles that, the device takes the pipe's place. Its answer reaches the kernel as one to a
    request that is long done, and is ignored.
    """
    inlet, outlet = os.pipe()
    os.write(outlet, session.init)
    os.close(outlet)
    operations.on_init = partial(os.dup2, session.fd, inlet, inheritable=False)
    pyfuse3.init(operations, f"/dev/fd/{inlet}", set(pyfuse3.default_options))


async def _unmount_on_signal(
    mountpoint: str,
    everything: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """On SIGTERM or SIGINT unmount, which ends the server; on the second one end at once."""
    asked = False
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            _log.info("%s: unmounting %s", signal.Signals(number).name, mountpoint)
            if asked:
                everything.cancel()
                return
            asked = True
            # In a thread: the kernel may ask this very server while it unmounts.
            await trio.to_thread.run_sync(_detach, mountpoint)


def _detach(mountpoint: str) -> None:
    try:
        close_mount(mountpoint)
    except BusyError:
        _log.warning("%s is in use: detached, serving until the last user is gone", mountpoint)
        close_mount(mountpoint, lazy=True)
    except EnvstoreError as error:
        _log.warning("%s", error)


def _hold_little_memory() -> None:
    """Give freed frames back to the system, and leave start-up's objects out of collections.

    glibc would raise its threshold to the largest block it has seen and keep megabytes in every
    thread's arena.
    """
    gc.collect()
    gc.freeze()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 20)
        library.mallopt(_M_ARENA_MAX, 2)
