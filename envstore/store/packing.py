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

from envstore.errors import EnvstoreError
from envstore.store import frames
from envstore.store.frames import Codec, Frame, encode_frame
from envstore.store.index import MAX_CHUNKS, DedupIndex, encode_segment, segment_key
from envstore.store.locations import FrameRef
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.body import Buffer
from envstore.store.packs import Pack, PackBuilder, pack_key

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
    ) -> None:
        """Write to ``objects``. ``pending`` keeps lists of packs no segment names yet.

        ``level`` is for ``Codec.ZSTD``. With ``Codec.RAW`` nothing is compressed. With it, and
        with ``Codec.SPLIT`` where that saves nothing, a chunk of 1 MiB or more is written from
        where it lies: its data must stay as it is until ``flush`` has returned, or ``close`` if
        that comes first.
        """
        self._objects = objects
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
        self._encoding: deque[tuple[int, Future[tuple[Frame, Buffer]]]] = deque()
        self._uploading: dict[Future[None], Pack] = {}
        self._listed: list[Pack] = []
        self._builder = PackBuilder()
        self._building: list[int] = []
        self._failed = threading.Event()
        self.new_bytes = 0
        self.stored_bytes = 0

    def adopt(self, packs: list[Pack]) -> None:
        """Take over packs of an interrupted push, to be listed in the next segment."""
        self._listed += packs

    def add(self, name: bytes, data: Buffer) -> tuple[int, int]:
        """Store one chunk, whose digest is ``name``; returns its frame number and offset."""
        if len(data) >= frames.TARGET_SIZE:
            self.end_frame()
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
        task = self._compressors.submit(encode_frame, self._chunks, self._level, self._codec)
        self._encoding.append((self._number, task))
        self._chunks, self._raw = [], 0
        while self._encoding and (len(self._encoding) > self._slots or self._encoding[0][1].done()):
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

    def _collect(self) -> None:
        number, task = self._encoding.popleft()
        frame, data = task.result()
        self._builder.add(frame, data)
        self._building.append(number)
        if self._builder.full:
            self._end_pack()

    def _end_pack(self) -> None:
        finished = self._builder.finish()
        if finished is None:
            return
        pack, data = finished
        for number, frame, offset in zip(self._building, pack.frames, pack.offsets(), strict=True):
            self._index.settle(
                number,
                FrameRef(pack.digest, offset, frame.stored, frame.raw, frame.codec, frame.digest),
            )
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
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_bytes(encode_segment([pack])[1])
            partial.replace(path)
        except OSError as error:
            raise EnvstoreError(
                f"cannot write {path}: {error.strerror}", hint="set ENVSTORE_CACHE_DIR"
            ) from error
