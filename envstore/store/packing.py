"""The write side of the store: new chunks become frames, packs and index segments.

Compression runs on every core while the caller goes on; finished packs are uploaded in parallel.
Memory is bounded: at most ``4 x cores + 4`` frames wait for compression and ``UPLOADS`` packs for
the store. Of frames that are stored raw only the small ones are copied. The order of writes
(packs, then the segment that lists them) means that whatever a reader can find is there.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store import frames
from envstore.store.anchors import encode_difference, may_be_anchor
from envstore.store.fetch import FrameFetcher
from envstore.store.frames import Codec, Frame, encode_frame
from envstore.store.index import MAX_CHUNKS, DedupIndex, encode_segment, segment_key
from envstore.store.locations import FrameRef
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.body import Buffer
from envstore.store.packs import Pack, PackBuilder, pack_key
from envstore.store.private import make_private

UPLOADS = 4
SEGMENT_PACKS = 8
"""Packs after which an index segment is written, so that an interrupted push keeps its work."""


class PackWriter:
    """Stores new chunks. Call from one thread; always ``close``.

    Every error of a background task is raised by the next call. ``index`` learns each chunk's
    place at once; the frame numbers it hands out are settled when the pack is finished.
    """

    def __init__(
        self,
        objects: ObjectStore,
        index: DedupIndex,
        *,
        pending: Path | None = None,
        level: int = frames.LEVEL,
        codec: Codec = Codec.ZSTD,
        fetcher: FrameFetcher | None = None,
    ) -> None:
        """Write to ``objects``. ``pending`` keeps lists of packs no segment names yet.

        ``level`` is for ``Codec.ZSTD``. With ``Codec.RAW`` nothing is compressed. With it, and
        with ``Codec.SPLIT`` where that saves nothing, a chunk of 1 MiB or more is written from
        where it lies: its data must stay as it is until ``flush`` has returned, or ``close`` if
        that comes first. ``Codec.XOR`` is ``Codec.SPLIT``, and the difference to what ``add`` was
        told is alike where that is clearly less; ``fetcher`` brings it, and may do so from a cache.
        """
        self._objects = objects
        self._fetcher = fetcher or FrameFetcher(objects, None)
        self._index = index
        self._pending_dir = pending
        self._level = level
        self._codec = codec
        cores = len(os.sched_getaffinity(0))
        self._compressors = ThreadPoolExecutor(cores, thread_name_prefix="compress")
        self._uploaders = ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload")
        self._slots = 4 * cores + 4
        self._chunks: list[tuple[bytes, Buffer]] = []
        self._raw = 0
        self._number = -1
        self._anchor: FrameRef | None = None
        self._encoding: deque[tuple[int, FrameRef | None, Future[tuple[Frame, Buffer]]]] = deque()
        # By pack how much of it is certainly there.
        self._there: dict[bytes, int] = {}
        self._uploading: dict[Future[None], Pack] = {}
        self._listed: list[Pack] = []
        self._builder = PackBuilder()
        self._building: list[tuple[int, FrameRef | None]] = []
        self._failed = threading.Event()
        self.new_bytes = 0
        self.stored_bytes = 0

    def adopt(self, packs: list[Pack]) -> None:
        """Take over packs of an interrupted push, to be listed in the next segment."""
        self._listed += packs

    def add(self, name: bytes, data: Buffer, *, like: bytes | None = None) -> tuple[int, int]:
        """Store one chunk, whose digest is ``name``; returns its frame number and offset.

        With ``Codec.XOR`` ``like`` may name a chunk of the index that is as long and much alike,
        such as the same piece of a tensor in an earlier checkpoint.
        """
        if len(data) >= frames.TARGET_SIZE:
            self.end_frame()
            if like is not None and self._codec == Codec.XOR:
                self._anchor = self._find_anchor(like, len(data))
        if not self._chunks:
            self._number = self._index.reserve()
        place = self._number, self._raw
        self._chunks.append((name, data))
        self._raw += len(data)
        self.new_bytes += len(data)
        self._index.learn(name, *place)
        if self._raw >= frames.TARGET_SIZE:
            self.end_frame()
        return place

    def end_frame(self) -> None:
        """Close the current frame: what comes next is fetched separately."""
        if not self._chunks:
            return
        task = self._compressors.submit(self._encode, self._chunks, self._anchor)
        self._encoding.append((self._number, self._anchor, task))
        self._chunks, self._raw, self._anchor = [], 0, None
        while self._encoding and (len(self._encoding) > self._slots or self._encoding[0][2].done()):
            self._collect()

    def flush(self) -> None:
        """Return when every chunk is stored and listed in a segment. Raises any error."""
        self.end_frame()
        while self._encoding:
            self._collect()
        self._end_pack()
        while self._uploading:
            self._reap(block=True)
        self._write_segment()

    def close(self) -> None:
        """Stop the background tasks; what was not flushed is abandoned."""
        self._failed.set()
        self._compressors.shutdown(wait=True, cancel_futures=True)
        self._uploaders.shutdown(wait=True, cancel_futures=True)

    def _find_anchor(self, like: bytes, raw: int) -> FrameRef | None:
        """Return the frame that holds ``like`` alone, or that one's own anchor."""
        place = self._index.find(like)
        if place is None or place[1]:
            return None
        frame = self._index.frames[place[0]]
        anchor = frame.anchor or frame
        return anchor if anchor.pack and may_be_anchor(anchor, raw) else None

    def _encode(
        self, chunks: list[tuple[bytes, Buffer]], anchor: FrameRef | None
    ) -> tuple[Frame, Buffer]:
        if self._codec == Codec.XOR:
            base = None if anchor is None else self._base(anchor)
            if anchor is not None and base is not None:
                ((name, data),) = chunks
                found = encode_difference(name, data, anchor, base)
                if found is not None:
                    return found
            return encode_frame(chunks, codec=Codec.SPLIT)
        return encode_frame(chunks, self._level, self._codec)

    def _base(self, anchor: FrameRef) -> bytes | None:
        """Return the bytes of an anchor, or ``None`` if it is lost and nothing may rely on it."""
        end = anchor.offset + anchor.stored
        if anchor.pack not in self._there:
            # Not from what a cache holds: there it outlives what is in the store.
            self._there[anchor.pack] = self._objects.size(pack_key(anchor.pack)) or 0
        if self._there[anchor.pack] < end:
            return None
        try:
            return self._fetcher.load(anchor)
        except (CorruptError, NotFoundError):
            return None

    def _collect(self) -> None:
        number, anchor, task = self._encoding.popleft()
        frame, data = task.result()
        self._builder.add(frame, data)
        self._building.append((number, anchor if frame.codec == Codec.XOR else None))
        if self._builder.full:
            self._end_pack()

    def _end_pack(self) -> None:
        finished = self._builder.finish()
        if finished is None:
            return
        pack, data = finished
        rows = zip(self._building, pack.frames, pack.offsets(), strict=True)
        for (number, anchor), frame, offset in rows:
            facts = frame.stored, frame.raw, frame.codec, frame.digest
            self._index.settle(number, FrameRef(pack.digest, offset, *facts, anchor))
        self._builder, self._building = PackBuilder(), []
        while len(self._uploading) >= UPLOADS:
            self._reap(block=True)
        self._uploading[self._uploaders.submit(self._upload, pack, data)] = pack
        self.stored_bytes += pack.size
        self._reap(block=False)

    def _upload(self, pack: Pack, data: Sequence[Buffer]) -> None:
        if not self._failed.is_set():
            self._objects.put(pack_key(pack.digest), data)
            if self._pending_dir is not None:
                self._remember(self._pending_dir, pack)

    def _reap(self, *, block: bool) -> None:
        if block:
            wait(self._uploading, return_when=FIRST_COMPLETED)
        for task in [task for task in self._uploading if task.done()]:
            pack = self._uploading.pop(task)
            task.result()
            self._listed.append(pack)
        chunks = sum(len(frame.sizes) for pack in self._listed for frame in pack.frames)
        if len(self._listed) >= SEGMENT_PACKS or chunks >= MAX_CHUNKS:
            self._write_segment()

    def _write_segment(self) -> None:
        if not self._listed:
            return
        name, data = encode_segment(self._listed)
        self._objects.put(segment_key(name), data)
        if self._pending_dir is not None:
            for pack in self._listed:
                (self._pending_dir / pack.digest.hex()).unlink(missing_ok=True)
        self._listed = []

    def _remember(self, directory: Path, pack: Pack) -> None:
        """Keep the list of a pack that is stored but not yet named by a segment."""
        path = directory / pack.digest.hex()
        # Another push may be storing the very same pack.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        try:
            make_private(directory)
            partial.write_bytes(encode_segment([pack])[1])
            partial.replace(path)
        except OSError as error:
            raise EnvstoreError(
                f"cannot write {path}: {error.strerror}", hint="set ENVSTORE_CACHE_DIR"
            ) from error
