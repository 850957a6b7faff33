"""Fetches frames: neighbours in one request, verified, into the cache.

Cost: a request costs about as much as half a MiB of transfer (tens of milliseconds at object
stores), so gaps up to ``MAX_GAP`` are read and thrown away rather than asked around.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from envstore.errors import EnvstoreError
from envstore.store.cache import BlobCache, CacheFullError
from envstore.store.frames import decode_frame
from envstore.store.locations import FrameRef
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import pack_key

MAX_GAP = 256 << 10
MAX_REQUEST = 16 << 20


@dataclass(slots=True)
class Fetched:
    """Totals since the start: requests sent, frames checked, stored bytes received."""

    requests: int = 0
    frames: int = 0
    bytes: int = 0


class FrameFetcher:
    """Reads frames of packs. Blocking; every method may be called from any thread."""

    def __init__(self, objects: ObjectStore, cache: BlobCache | None) -> None:
        """Fetch from ``objects`` and keep what was checked in ``cache``, if there is one."""
        self._objects = objects
        self._cache = cache
        self._lock = threading.Lock()
        self.fetched = Fetched()

    def plan(
        self,
        frames: Iterable[FrameRef],
        *,
        max_gap: int = MAX_GAP,
        max_request: int = MAX_REQUEST,
    ) -> list[tuple[FrameRef, ...]]:
        """Group ``frames`` so that each group is one ranged request; doubles are merged.

        Groups come in the order in which their first frame was given.
        """
        rank: dict[tuple[bytes, int, bytes], int] = {}
        unique: dict[tuple[bytes, int, bytes], FrameRef] = {}
        for frame in frames:
            key = frame.pack, frame.offset, frame.digest
            rank.setdefault(key, len(rank))
            unique[key] = frame
        groups: list[list[FrameRef]] = []
        for key in sorted(unique):
            frame = unique[key]
            if groups and groups[-1][0].pack == frame.pack:
                first, last = groups[-1][0], groups[-1][-1]
                gap = frame.offset - (last.offset + last.stored)
                span = frame.offset + frame.stored - first.offset
                if 0 <= gap <= max_gap and span <= max_request:
                    groups[-1].append(frame)
                    continue
            groups.append([frame])
        groups.sort(
            key=lambda group: min(rank[frame.pack, frame.offset, frame.digest] for frame in group)
        )
        return [tuple(group) for group in groups]

    def fetch(self, group: Sequence[FrameRef]) -> list[bytes | EnvstoreError]:
        """Fetch the frames of one planned group with one request.

        Returns for each frame its raw bytes, or the error that befell it alone
        (``CorruptError``, ``NoSpaceError`` of the cache); a failed request gives all of them the
        same error. Bytes returned were verified and are in the cache.
        """
        results: list[bytes | EnvstoreError] = [b""] * len(group)
        self.fetch_each(group, range(len(group)), results.__setitem__)
        return results

    def fetch_each(
        self,
        group: Sequence[FrameRef],
        order: Iterable[int],
        deliver: Callable[[int, bytes | EnvstoreError], None],
    ) -> None:
        """Fetch like ``fetch``, but hand each frame on as soon as it is verified and cached.

        ``order`` are the positions in ``group``, the most urgent first. Whatever ``deliver`` does
        not keep is freed before the next frame is unpacked.
        """
        start = group[0].offset
        length = group[-1].offset + group[-1].stored - start
        try:
            data = memoryview(self._objects.get_range(pack_key(group[0].pack), start, length))
        except EnvstoreError as error:
            for position in order:
                deliver(position, error)
            return
        with self._lock:
            self.fetched.requests += 1
            self.fetched.frames += len(group)
            self.fetched.bytes += length
        for position in order:
            frame = group[position]
            at = frame.offset - start
            result: bytes | EnvstoreError
            try:
                result = self._accept(frame, data[at : at + frame.stored])
            except EnvstoreError as error:
                error.message = f"{error.message} (pack {frame.pack.hex()}, byte {frame.offset})"
                result = error
            deliver(position, result)
            del result

    def load(self, frame: FrameRef) -> bytes:
        """Return one frame's raw bytes from the cache or the store. Raises ``EnvstoreError``."""
        if self._cache is not None:
            data = self._cache.read(frame.digest, 0, frame.raw)
            if data is not None:
                return data
        (result,) = self.fetch((frame,))
        if isinstance(result, EnvstoreError):
            raise result
        return result

    def _accept(self, frame: FrameRef, stored: memoryview) -> bytes:
        raw = decode_frame(stored, frame.codec, frame.raw, frame.digest)
        if self._cache is not None:
            # A cap that is too small for what is on its way makes reading slow, not impossible.
            with contextlib.suppress(CacheFullError):
                self._cache.put(frame.digest, raw)
        return raw
