"""Locations: where in which packs the chunks of one manifest lie.

The manifest names chunks by digest and never changes; this companion object says where they are
and may be rewritten when packs are. Its numbers line up with the manifest: first one pair for
each part, then one pair for each chunk reference in order, so that no digest is repeated. It is
trusted for speed only: every frame and every chunk it leads to is checked against its digest.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from envstore.errors import ConflictError, CorruptError, UnavailableError
from envstore.store.binary import U32, Cursor, pack_array, seal, unseal
from envstore.store.digest import DIGEST_SIZE
from envstore.store.frames import MAX_SIZE, Codec
from envstore.store.objects.base import ObjectStore

MAGIC = b"ESLOCA01"
MAX_BODY = 1 << 30
NOWHERE = 0xFFFFFFFF
"""Frame number of a hole."""
_ATTEMPTS = 20

_T = TypeVar("_T")


def locations_key(manifest: bytes) -> str:
    """Return the object key of the locations of a manifest."""
    return f"locations/{manifest.hex()}"


@dataclass(frozen=True, slots=True)
class FrameRef:
    """Enough to fetch and check one frame: ``offset`` and ``stored`` are bytes in ``pack``.

    ``anchor`` is what a frame of ``Codec.XOR`` is a difference to, where that is known without
    looking into it; it does not make two frames of one place different.
    """

    pack: bytes
    offset: int
    stored: int
    raw: int
    codec: int
    digest: bytes
    anchor: FrameRef | None = field(default=None, compare=False)


class Located(Protocol):
    """What a reader needs of locations, wherever they are kept."""

    @property
    def frames(self) -> Sequence[FrameRef]:
        """The frames, by number."""
        ...

    @property
    def ref_frames(self) -> Sequence[int]:
        """By reference the number of its chunk's frame, ``NOWHERE`` for a hole."""
        ...

    @property
    def ref_offsets(self) -> Sequence[int]:
        """By reference where in the raw frame its chunk starts."""
        ...


@dataclass(slots=True)
class Locations:
    """Frames in first-use order, and for parts and references the frame number and offset.

    The frame behind one of ``Codec.XOR`` is its anchor, whether anything else refers to it or not.
    """

    frames: list[FrameRef] = field(default_factory=list)
    part_frames: array[int] = field(default_factory=lambda: array("I"))
    part_offsets: array[int] = field(default_factory=lambda: array("I"))
    ref_frames: array[int] = field(default_factory=lambda: array("I"))
    ref_offsets: array[int] = field(default_factory=lambda: array("I"))

    def seal(self) -> bytes:
        """Return the object to store."""
        packs = list(dict.fromkeys(frame.pack for frame in self.frames))
        number = {name: i for i, name in enumerate(packs)}
        frames = self.frames
        columns = (
            array("I", (number[frame.pack] for frame in frames)),
            array("I", (frame.offset for frame in frames)),
            array("I", (frame.stored for frame in frames)),
            array("I", (frame.raw for frame in frames)),
        )
        body = b"".join(
            (
                U32.pack(len(packs)),
                U32.pack(len(frames)),
                U32.pack(len(self.part_frames)),
                U32.pack(len(self.ref_frames)),
                b"".join(packs),
                *(pack_array(column) for column in columns),
                bytes(frame.codec for frame in frames),
                b"".join(frame.digest for frame in frames),
                pack_array(self.part_frames),
                pack_array(self.part_offsets),
                pack_array(self.ref_frames),
                pack_array(self.ref_offsets),
            )
        )
        return seal(MAGIC, body)


def anchored(frames: Sequence[FrameRef], what: str) -> list[FrameRef]:
    """Return ``frames``, each difference with its anchor, which comes directly behind it.

    Raises ``CorruptError`` naming ``what`` if there is none.
    """
    found = list(frames)
    for number, frame in enumerate(frames):
        if frame.codec == Codec.XOR:
            anchor = frames[number + 1] if number + 1 < len(frames) else frame
            if anchor.codec >= Codec.XOR or anchor.raw != frame.raw:
                raise CorruptError(f"{what}: a difference without its anchor")
            found[number] = replace(frame, anchor=anchor)
    return found


def packs_named(data: bytes, what: str) -> set[bytes]:
    """Return the packs that stored locations lead to. Raises ``CorruptError``."""
    cursor = Cursor(unseal(MAGIC, data, limit=MAX_BODY, what=what)[0])
    count = cursor.u32()
    cursor.take(3 * U32.size)
    return {cursor.digest() for _ in range(count)}


def open_locations(data: bytes, manifest: bytes, *, parts: int, refs: int) -> Locations:
    """Decode the locations of ``manifest``, which has so many parts and references.

    Raises ``CorruptError`` when anything points outside its pack table or frame table.
    """
    what = f"locations of manifest {manifest.hex()}"
    body, _ = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    cursor = Cursor(body)
    pack_count, frame_count, part_count, ref_count = (cursor.u32() for _ in range(4))
    if part_count != parts or ref_count != refs:
        raise CorruptError(f"{what} do not belong to it")
    packs = [cursor.digest() for _ in range(pack_count)]
    numbers, offsets, stored, raw = (cursor.array(frame_count, 4) for _ in range(4))
    codecs = bytes(cursor.take(frame_count))
    names = bytes(cursor.take(frame_count * DIGEST_SIZE))
    if frame_count and (
        max(numbers) >= pack_count or max(raw) > MAX_SIZE or max(stored) > MAX_SIZE
    ):
        raise CorruptError(f"{what}: a frame out of bounds")
    frames = [
        FrameRef(
            packs[numbers[i]], offsets[i], stored[i], raw[i], codecs[i],
            names[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE],
        )
        for i in range(frame_count)
    ]  # fmt: skip
    found = Locations(
        anchored(frames, what) if Codec.XOR in codecs else frames,
        cursor.array(part_count, 4),
        cursor.array(part_count, 4),
        cursor.array(ref_count, 4),
        cursor.array(ref_count, 4),
    )
    cursor.finish()
    if max(found.part_frames, default=-1) >= frame_count:
        raise CorruptError(f"{what}: a part in no frame")
    # Most manifests have no holes.
    if max(found.ref_frames, default=-1) >= frame_count:
        located = filter(NOWHERE.__ne__, found.ref_frames)
        if max(located, default=-1) >= frame_count:
            raise CorruptError(f"{what}: a chunk in no frame")
    return found


def replace_locations(
    objects: ObjectStore, manifest: bytes, change: Callable[[bytes], tuple[bytes | None, _T]]
) -> _T:
    """Write what ``change`` makes of a manifest's locations; returns what it says besides.

    ``change`` is given the sealed locations as they are, and returns those to put in their place,
    or ``None`` to leave them. It is called once more where somebody else was faster, so that what
    others make of them at the same time stays. Raises ``NotFoundError``, what ``change`` raises,
    ``ConflictError`` if they are changed all the time, and the errors of the store.
    """
    key = locations_key(manifest)
    for _ in range(_ATTEMPTS):
        data, version = objects.get_versioned(key)
        sealed, result = change(data)
        if sealed is None:
            return result
        try:
            objects.put_if(key, sealed, version)
        except ConflictError:
            continue
        except UnavailableError:
            if objects.get(key) != sealed:
                raise
        return result
    raise ConflictError(
        f"the locations of manifest {manifest.hex()} are changed all the time", hint="try again"
    )
