"""Fills the files of a tree that is being pulled, from frames that may move meanwhile."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.locations import FrameRef, Located
from envstore.store.repository import PARALLEL
from envstore.store.whereabouts import ATTEMPTS, Whereabouts

_PATH_MAX = 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Write:
    """One chunk's destination, and the number of its reference in the manifest."""

    ref: int
    file: int
    at: int
    start: int
    size: int
    digest: bytes


@contextmanager
def reach(top: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield a directory and the name below it by which ``path`` can be reached.

    A path longer than ``PATH_MAX`` is legal on disk, but reached only one step at a time.
    """
    if len(path) < _PATH_MAX:
        yield top, path
        return
    *folders, name = path.split(b"/")
    fd = os.dup(top)
    try:
        for folder in folders:
            below = os.open(folder, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, name
    finally:
        os.close(fd)


class Filling:
    """Fetches what is to be written, and writes it, wherever it has moved meanwhile."""

    def __init__(
        self, fetcher: FrameFetcher, whereabouts: Whereabouts, top: int, paths: Sequence[bytes]
    ) -> None:
        self._fetcher = fetcher
        self._whereabouts = whereabouts
        self._top = top
        self._paths = paths

    def in_parallel(self, locations: Located, writes: dict[int, list[Write]]) -> Iterable[int]:
        """Fetch and write all frames; yields the bytes written by each request."""
        of_frame = _by_place(locations, writes)
        groups = self._groups(locations, writes)
        with ThreadPoolExecutor(PARALLEL) as pool:
            running: deque[Future[int]] = deque()
            try:
                for group in groups:
                    running.append(pool.submit(self._work, group, of_frame, locations, ATTEMPTS))
                    if len(running) >= 2 * PARALLEL:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _groups(self, locations: Located, writes: Iterable[int]) -> list[tuple[FrameRef, ...]]:
        frames = (locations.frames[number] for number in writes)
        return self._fetcher.plan(frames, max_request=8 << 20)

    def _work(
        self,
        group: Sequence[FrameRef],
        of_frame: dict[tuple[bytes, int], list[Write]],
        locations: Located,
        attempts: int,
    ) -> int:
        """Fetch and write what one request brings; what is not there is looked for elsewhere."""
        written = 0
        missed: list[Write] = []
        failure: EnvstoreError | None = None
        for frame, result in zip(group, self._fetcher.fetch(group), strict=True):
            writes = of_frame[frame.pack, frame.offset]
            try:
                if isinstance(result, EnvstoreError):
                    raise result
                written += _write_frame(result, writes, self._top, self._paths)
            except (CorruptError, NotFoundError) as error:
                failure = self._named(error, writes)
                missed += writes
        if failure is not None:
            moved = self._whereabouts.again(locations) if attempts else None
            if moved is None:
                raise failure
            again = _moved(moved, missed, self._paths)
            places = _by_place(moved, again)
            for part in self._groups(moved, again):
                written += self._work(part, places, moved, attempts - 1)
        return written

    def _named(self, error: EnvstoreError, writes: Sequence[Write]) -> EnvstoreError:
        """Say of an error which file it concerns."""
        path = os.fsdecode(self._paths[writes[0].file])
        return type(error)(f"{path}: {error.message}", hint=error.hint)


def _by_place(
    locations: Located, writes: dict[int, list[Write]]
) -> dict[tuple[bytes, int], list[Write]]:
    found: dict[tuple[bytes, int], list[Write]] = defaultdict(list)
    for number, wanted in writes.items():
        frame = locations.frames[number]
        found[frame.pack, frame.offset] += wanted
    return found


def _moved(
    locations: Located, writes: Iterable[Write], paths: Sequence[bytes]
) -> dict[int, list[Write]]:
    """Return ``writes`` by the frames in which ``locations`` have their chunks."""
    found: dict[int, list[Write]] = defaultdict(list)
    for write in writes:
        number = locations.ref_frames[write.ref]
        if number >= len(locations.frames):
            raise CorruptError(f"locations: a chunk of {paths[write.file]!r} is nowhere")
        found[number].append(replace(write, start=locations.ref_offsets[write.ref]))
    return found


def _write_frame(raw: bytes, writes: Sequence[Write], top: int, paths: Sequence[bytes]) -> int:
    view = memoryview(raw)
    fd, opened = -1, -1
    written = 0
    try:
        for write in writes:
            data = view[write.start : write.start + write.size]
            if digest(data) != write.digest:
                raise CorruptError(f"chunk {write.digest.hex()} is not where its locations say")
            if write.file != opened:
                if fd >= 0:
                    os.close(fd)
                    fd = -1
                with reach(top, paths[write.file]) as (folder, name):
                    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                opened = write.file
            at = 0
            while at < len(data):
                at += os.pwrite(fd, data[at:], write.at + at)
            written += len(data)
    finally:
        if fd >= 0:
            os.close(fd)
    return written
