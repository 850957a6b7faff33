"""Reads ahead: some requests are always on their way, and no more bytes than fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from envstore.store.repository import PARALLEL

_BYTES = 64 << 20

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(
    items: Iterable[_Item],
    read: Callable[[_Item], _Result],
    *,
    weigh: Callable[[_Item], int] = lambda item: 0,
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each of ``items`` with what ``read`` returns of it, in order.

    ``read`` runs in threads, ``PARALLEL`` at a time and for no more than 64 MiB at once as
    ``weigh`` tells, or for one item. What it raises is raised here; no thread outlives the loop.
    """
    waiting: deque[tuple[_Item, int, Future[_Result]]] = deque()
    held = 0
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="collect") as pool:
        try:
            for item in items:
                weight = weigh(item)
                while waiting and (len(waiting) >= 2 * PARALLEL or held + weight > _BYTES):
                    first, size, task = waiting.popleft()
                    held -= size
                    yield first, task.result()
                waiting.append((item, weight, pool.submit(read, item)))
                held += weight
            while waiting:
                first, _, task = waiting.popleft()
                yield first, task.result()
        finally:
            for _, _, task in waiting:
                task.cancel()
