"""Fetches frames: neighbours in one request, verified, into the cache.

Cost: a request costs about as much as half a MiB of transfer (tens of milliseconds at object
stores), so gaps up to ``MAX_GAP`` are read and thrown away rather than asked around.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from envstore.errors import EnvstoreError
from envstore.store.anchors import decode
from envstore.store.cache import BlobCache
from envstore.store.cachespace import CacheFullError
from envstore.store.locations import FrameRef
from envstore.store.objects.base import ObjectStore, Traffic
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
        self.refused: EnvstoreError | None = None
        """Why the cache last refused a frame of ``stream``, other than for its cap."""

    @property
    def traffic(self) -> Traffic:
        """What crossed the wire between here and the store, for whatever purpose."""
        return self._objects.traffic

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
        start = group[0].offset
        length = group[-1].offset + group[-1].stored - start
        try:
            data = memoryview(self._objects.get_range(pack_key(group[0].pack), start, length))
        except EnvstoreError as error:
            return [error] * len(group)
        with self._lock:
            self.fetched.requests += 1
            self.fetched.frames += len(group)
            self.fetched.bytes += length
        results: list[bytes | EnvstoreError] = []
        for frame in group:
            at = frame.offset - start
            try:
                results.append(self._accept(frame, data[at : at + frame.stored]))
            except EnvstoreError as error:
                results.append(_placed(error, frame))
        return results

    def stream(
        self,
        group: Sequence[FrameRef],
        deliver: Callable[[int, bytes | EnvstoreError], None],
        *,
        urgent: Callable[[int], bool],
        arrived: Callable[[int], None],
    ) -> None:
        """Fetch one planned group, and hand each frame on as soon as its last byte is there.

        One request in one attempt: when it fails, every frame that had not come whole gets the
        error. While a frame is missing that is ``urgent``, which is asked again with every piece,
        others that came before it are not yet unpacked. ``arrived`` is told the size of each
        piece, and may hold the transfer up. What the cache does not take is delivered all the
        same; see ``refused``.
        """
        first, last = group[0], group[-1]
        length = last.offset + last.stored - first.offset
        assembly = _Assembly(group)
        todo = dict.fromkeys(range(len(group)))
        ready: dict[int, bytes] = {}
        for piece in self._answer(pack_key(first.pack), first.offset, length):
            if isinstance(piece, EnvstoreError):
                for at in todo:
                    stored = ready.pop(at, None)
                    deliver(at, piece if stored is None else self._unpacked(group[at], stored))
                return
            arrived(len(piece))
            ready |= assembly.add(piece)
            hurry = [at for at in todo if urgent(at)]
            now = hurry if any(at not in ready for at in hurry) else [*hurry, *todo]
            for at in dict.fromkeys(now):
                if at in ready:
                    del todo[at]
                    deliver(at, self._unpacked(group[at], ready.pop(at)))

    def _answer(self, key: str, start: int, length: int) -> Iterator[bytes | EnvstoreError]:
        """Yield a range as it arrives, counted, and the error with which it broke off, if any."""
        begun = False
        try:
            for piece in self._objects.iter_range(key, start, length):
                with self._lock:
                    self.fetched.requests += not begun
                    self.fetched.bytes += len(piece)
                begun = True
                yield piece
        except EnvstoreError as error:
            yield error

    def _unpacked(self, frame: FrameRef, stored: bytes) -> bytes | EnvstoreError:
        """Return a frame's raw bytes, kept in the cache if that takes them, or what is wrong."""
        try:
            raw = decode(frame, stored, self.load)
        except EnvstoreError as error:
            return _placed(error, frame)
        with self._lock:
            self.fetched.frames += 1
        if self._cache is not None:
            try:
                self._cache.put(frame.digest, raw)
            except CacheFullError:
                pass
            except EnvstoreError as error:
                self.refused = error
        return raw

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
        raw = decode(frame, stored, self.load)
        if self._cache is not None:
            # A cap that is too small for what is on its way makes reading slow, not impossible.
            with contextlib.suppress(CacheFullError):
                self._cache.put(frame.digest, raw)
        return raw


class _Assembly:
    """Cuts the frames of a group out of an answer that comes in pieces."""

    def __init__(self, group: Sequence[FrameRef]) -> None:
        self._group = group
        self._next = 0
        self._buffer = bytearray()
        self._base = group[0].offset

    def add(self, piece: bytes) -> dict[int, bytes]:
        """Return the stored bytes of the frames that this piece completes, by position."""
        buffer = self._buffer
        buffer += piece
        whole: dict[int, bytes] = {}
        used = 0
        while self._next < len(self._group):
            frame = self._group[self._next]
            at = frame.offset - self._base
            if at + frame.stored > len(buffer):
                used = min(at, len(buffer))
                break
            whole[self._next] = bytes(buffer[at : at + frame.stored])
            self._next += 1
            used = at + frame.stored
        del buffer[:used]
        self._base += used
        return whole


def _placed(error: EnvstoreError, frame: FrameRef) -> EnvstoreError:
    """Say of an error in which pack it was met, and where."""
    error.message = f"{error.message} (pack {frame.pack.hex()}, byte {frame.offset})"
    return error
