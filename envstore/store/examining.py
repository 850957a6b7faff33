"""Looks into packs: at their tables, at every byte of them, or at single chunks that are in doubt.

Nothing here holds a pack as a whole. Frames are read in pieces of a few MiB; what is wrong with
one is a sentence in the answer and keeps none of the others from being looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from envstore.errors import CorruptError, EnvstoreError, NotFoundError
from envstore.store.anchors import anchor_of, decode
from envstore.store.digest import digest
from envstore.store.expected import Expected, anchor_mark, chunk_mark, frame_mark
from envstore.store.fetch import FrameFetcher
from envstore.store.frames import Codec, Frame, encode_table
from envstore.store.locations import FrameRef
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import FOOTER, FOOTER_SIZE, HEADER, OLD_HEADER, Pack, pack_key, read_table
from envstore.store.problems import DAMAGE

TAIL = 64 << 10
"""Bytes at the end of a pack that are asked for first: most tables are shorter."""
PIECE = 4 << 20
"""Bytes of frames that are asked for at once, unless one frame has more."""

_NOTHING = Expected()


@dataclass(slots=True)
class Looked:
    """What a look at one pack showed.

    ``reasons`` say how the pack itself is damaged. ``lacking`` is how many frames and chunks it
    should hold as others tell and does not, ``anchors`` how many differences are to others than is
    said, ``claims`` the segments that list it otherwise than it is; with these the others are wrong
    if ``reasons`` is empty. ``read`` counts bytes.
    """

    reasons: list[str] = field(default_factory=list)
    lacking: int = 0
    anchors: int = 0
    claims: list[str] = field(default_factory=list)
    frames: int = 0
    chunks: int = 0
    read: int = 0


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the last bytes of a pack say, and those bytes themselves."""

    pack: Pack
    body: int
    """Where in the pack its frames end."""
    tail: bytes
    old: bool


def read_trailer(objects: ObjectStore, name: bytes, size: int) -> Trailer:
    """Return the table of a pack of ``size`` bytes. One request or two. Raises ``CorruptError``."""
    length = min(size, TAIL)
    for _ in range(2):
        if length < FOOTER_SIZE:
            break
        tail = objects.get_range(pack_key(name), size - length, length)
        found = read_table(tail, size, name)
        if not isinstance(found, int):
            body = len(HEADER) + sum(frame.stored for frame in found)
            old = tail[-len(FOOTER) :] != FOOTER
            return Trailer(Pack(name, size, found), body, tail, old)
        length = found
    raise CorruptError(f"pack {name.hex()} is truncated to {size} bytes")


def look(
    objects: ObjectStore,
    fetcher: FrameFetcher,
    name: bytes,
    size: int | None,
    expected: Expected = _NOTHING,
    *,
    read_data: bool,
) -> Looked:
    """Look at the pack ``name``; ``size`` is what the store lists, ``None`` if it does not.

    With ``read_data`` every frame is decoded and every chunk hashed. Memory: a few times
    ``PIECE``. Raises what the store raises when it cannot be read.
    """
    found = Looked()
    if size is None:
        found.reasons.append("it is missing")
        return found
    try:
        trailer = read_trailer(objects, name, size)
        found.read += len(trailer.tail)
        _compare(trailer, expected, found)
        if len(trailer.tail) == size:
            _check_header(trailer, trailer.tail[: len(HEADER)])
        if read_data:
            _read_whole(objects, fetcher, trailer, expected, found)
    except DAMAGE as error:
        found.reasons.append(error.message)
    return found


def _compare(trailer: Trailer, expected: Expected, found: Looked) -> None:
    """Compare what others expect of a pack with what it says of itself."""
    pack = trailer.pack
    found.frames = len(pack.frames)
    found.chunks = sum(len(frame.sizes) for frame in pack.frames)
    table = digest(encode_table(pack.frames)) if expected.claims else b""
    found.claims = sorted({key for key, claimed in expected.claims if claimed != table})
    frames: set[int] = set()
    chunks: set[int] = set()
    for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
        frames.add(frame_mark(offset, frame))
        chunks.update(chunk_mark(offset, start, size, name) for name, start, size in frame.chunks())
    found.lacking = expected.frames.beyond(frames) + expected.chunks.beyond(chunks)


def _check_header(trailer: Trailer, header: bytes) -> None:
    if header != (OLD_HEADER if trailer.old else HEADER):
        raise CorruptError(f"pack {trailer.pack.digest.hex()} does not start as a pack does")


def _read_whole(
    objects: ObjectStore,
    fetcher: FrameFetcher,
    trailer: Trailer,
    expected: Expected,
    found: Looked,
) -> None:
    """Read a pack from its first byte to its table."""
    pack = trailer.pack
    whole = blake3() if trailer.old else None
    anchors: set[int] = set()
    tail_at = pack.size - len(trailer.tail)

    def read(start: int, end: int) -> bytes:
        cut = max(start, min(end, tail_at))
        data = trailer.tail[max(0, cut - tail_at) : max(0, end - tail_at)] if end > cut else b""
        if cut > start:
            found.read += cut - start
            data = objects.get_range(pack_key(pack.digest), start, cut - start) + data
        return data

    header = read(0, len(HEADER))
    if whole is not None:
        whole.update(header)
    try:
        _check_header(trailer, header)
    except CorruptError as error:
        found.reasons.append(error.message)
    for group in _pieces(pack):
        start = group[0][1]
        data = memoryview(read(start, group[-1][1] + group[-1][0].stored))
        if whole is not None:
            whole.update(data)
        for frame, offset in group:
            stored = data[offset - start : offset - start + frame.stored]
            found.reasons += _check_frame(pack.digest, frame, offset, stored, fetcher, anchors)
    found.anchors = expected.anchors.beyond(anchors)
    if whole is not None:
        whole.update(read(trailer.body, pack.size))
        if whole.digest() != pack.digest and not found.reasons:
            found.reasons.append(f"pack {pack.digest.hex()} does not match its name")


def _pieces(pack: Pack) -> Iterator[list[tuple[Frame, int]]]:
    """Group a pack's frames, with their offsets, into what is asked for at once."""
    group: list[tuple[Frame, int]] = []
    size = 0
    for frame, offset in zip(pack.frames, pack.offsets(), strict=True):
        if group and size + frame.stored > PIECE:
            yield group
            group, size = [], 0
        group.append((frame, offset))
        size += frame.stored
    if group:
        yield group


def _check_frame(
    pack: bytes,
    frame: Frame,
    offset: int,
    stored: memoryview,
    fetcher: FrameFetcher,
    anchors: set[int],
) -> list[str]:
    """Return what is wrong with one frame; ``anchors`` takes up the one it has, if any."""
    ref = FrameRef(pack, offset, frame.stored, frame.raw, frame.codec, frame.digest)
    try:
        if frame.codec == Codec.XOR:
            anchors.add(anchor_mark(offset, anchor_of(ref, stored)))
        raw = memoryview(decode(ref, stored, fetcher.load))
    except DAMAGE as error:
        return [f"{error.message} (byte {offset})"]
    if len(frame.sizes) == 1 and frame.digests == frame.digest:
        return []
    return [
        f"chunk {chunk.hex()} does not match its digest (byte {offset})"
        for chunk, start, size in frame.chunks()
        if digest(raw[start : start + size]) != chunk
    ]


Place = tuple[FrameRef, int, int, bytes]
"""A chunk where locations say that it lies: frame, offset in the raw frame, size, digest."""


class Examiner:
    """Tells whether single chunks can be had from where they are said to lie.

    Answers are remembered: 100 bytes or so for each chunk asked for. Not safe for concurrent use.
    """

    def __init__(self, fetcher: FrameFetcher) -> None:
        """Read through ``fetcher``, which should have no cache: that says nothing of the store."""
        self._fetcher = fetcher
        self._known: dict[Place, str | None] = {}

    def reason(self, place: Place) -> str | None:
        """Return why a chunk that was passed to ``examine`` cannot be read, if it cannot."""
        return self._known[place]

    def examine(
        self,
        places: Collection[Place],
        good: Callable[[bytes, memoryview], None] = lambda name, data: None,
    ) -> None:
        """Read the frames of ``places``, a few MiB at a time, and hash the chunks.

        ``good`` is given each chunk that is whole, also when that was known before: its digest
        and its bytes. Raises what the store raises when it cannot be read.
        """
        wanted: dict[FrameRef, list[Place]] = {}
        for place in places:
            wanted.setdefault(place[0], []).append(place)
        for group in self._fetcher.plan(wanted, max_request=PIECE):
            for frame, raw in zip(group, self._load(group), strict=True):
                for place in wanted.pop(frame):
                    self._known[place] = self._judge(place, raw, good)
        # Of several that are said to be one frame, and differ otherwise, one was fetched above.
        for frame, others in wanted.items():
            (raw,) = self._load((frame,))
            for place in others:
                self._known[place] = self._judge(place, raw, good)

    def _judge(
        self,
        place: Place,
        raw: bytes | EnvstoreError,
        good: Callable[[bytes, memoryview], None],
    ) -> str | None:
        _, offset, size, name = place
        if isinstance(raw, EnvstoreError):
            return raw.message
        data = memoryview(raw)[offset : offset + size]
        if len(data) != size or digest(data) != name:
            return f"chunk {name.hex()} is not where its locations say"
        good(name, data)
        return None

    def _load(self, group: Sequence[FrameRef]) -> list[bytes | EnvstoreError]:
        found = self._fetcher.fetch(group)
        # One that lies beyond the end of a pack fails the request for all before it.
        if len(group) > 1 and any(isinstance(one, CorruptError) for one in found):
            found = [self._fetcher.fetch((frame,))[0] for frame in group]
        for one in found:
            if isinstance(one, EnvstoreError) and not isinstance(one, (*DAMAGE, NotFoundError)):
                raise one
        return found
