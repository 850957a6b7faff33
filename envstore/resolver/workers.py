"""Processes that work side by side, none of which outlives what it works for.

``concurrent.futures`` alone lets its processes finish what they are at when a caller gives up, and
leaves them waiting for ever when it is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

from envstore.errors import EnvstoreError


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Give ``count`` processes for as long as the ``with`` block lasts.

    If it ends with an exception they are stopped at once, in the middle of whatever they do; if
    this process is killed they end as well. Raises ``EnvstoreError`` if one of them is killed.
    """
    context = get_context("spawn")
    # Nothing is ever sent: each of them waits for its end.
    lifeline, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(lifeline,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise EnvstoreError(
            "a process of this push was killed", hint="is there enough memory?"
        ) from error
    except BaseException:
        end.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        end.close()
        lifeline.close()


def _begin(lifeline: Connection) -> None:
    # A Ctrl-C goes to every process of a terminal; what it means is up to the first one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
