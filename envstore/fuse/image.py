"""Tree images: all that a server must know of a snapshot, in memory that outlives the server.

An image is a sealed memory file: nobody can change or cut it, and whoever holds its descriptor
serves the snapshot from it at once, without store and without building anything. Its numbers are
in the byte order of this machine, as it never leaves it. Layout: magic, manifest digest, size of
the whole, a table of ``(offset, size)`` in bytes for every section of ``sections.TYPES``, then
the sections, each at a multiple of eight.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.fuse.columns import build_sections
from envstore.fuse.frametable import FrameColumns, FrameTable, ImageLocations
from envstore.fuse.sections import TYPES, Buffer, TreeSections
from envstore.fuse.tree import Columns, Tree
from envstore.store.digest import DIGEST_SIZE
from envstore.store.locations import Located
from envstore.store.manifest import Part, Root

MAGIC = b"ESTREE01"

_HEADER = struct.Struct("=8s32sQ")
_ROW = struct.Struct("=QQ")
_TEXT_AT = _HEADER.size + len(TYPES) * _ROW.size
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Image:
    """A snapshot's tree and where its chunks lie, and the digest of the manifest it is of."""

    tree: Tree
    locations: ImageLocations
    manifest: bytes


def make_image(manifest: bytes, root: Root, parts: Iterable[Part], locations: Located) -> int:
    """Build the image of the tree called ``manifest``; returns the descriptor, to be closed.

    Takes about 110 bytes for each file, and as much again while it works. Raises ``CorruptError``
    when ``root`` and ``parts`` contradict each other.
    """
    tree = build_sections(root, parts, _TEXT_AT)
    sections: dict[str, Buffer] = {name: getattr(tree, name) for name in TreeSections.__slots__}
    del tree
    sections |= _locate(locations)
    fd = os.memfd_create(f"envstore-{manifest.hex()[:12]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rows = []
        at = _TEXT_AT
        for name in TYPES:
            # What has been written must not be in memory twice.
            with memoryview(sections.pop(name)) as data:
                rows.append(_ROW.pack(at, data.nbytes))
                _write(fd, data.cast("B"), at)
                at += -(-data.nbytes // 8) * 8
        _write(fd, memoryview(_HEADER.pack(MAGIC, manifest, at) + b"".join(rows)), 0)
        os.ftruncate(fd, at)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locate(locations: Located) -> dict[str, Buffer]:
    frames = locations.frames
    packs = {name: at for at, name in enumerate(dict.fromkeys(frame.pack for frame in frames))}
    return {
        "packs": b"".join(packs),
        "frame_packs": array("I", (packs[frame.pack] for frame in frames)),
        "frame_offsets": array("I", (frame.offset for frame in frames)),
        "frame_stored": array("I", (frame.stored for frame in frames)),
        "frame_raw": array("I", (frame.raw for frame in frames)),
        "frame_codecs": bytes(frame.codec for frame in frames),
        "frame_digests": b"".join(frame.digest for frame in frames),
        "ref_frames": array("I", locations.ref_frames),
        "ref_offsets": array("I", locations.ref_offsets),
    }


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def open_image(fd: int) -> Image:
    """Return what an image holds; ``fd`` may be closed afterwards.

    Raises ``UnsupportedFormatError`` when another version made it, ``CorruptError`` when it is no
    image, or could still be changed: a page that is cut off kills whoever reads it.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed:
        raise CorruptError("a tree image that is not sealed")
    size = os.fstat(fd).st_size
    if size < _TEXT_AT:
        raise CorruptError(f"a tree image of {size} bytes is too short")
    # Older kernels refuse a shared mapping of a file that is sealed against writing.
    memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    magic, manifest, expected = _HEADER.unpack_from(memory)
    if magic != MAGIC:
        if magic[:6] == MAGIC[:6]:
            raise UnsupportedFormatError(
                f"a tree image has format {magic[6:]!r}, this version reads {MAGIC[6:]!r}",
                hint="mount again",
            )
        raise CorruptError("a tree image does not start with its magic number")
    if size != expected:
        raise CorruptError(f"a tree image has {size} bytes, not {expected}")
    starts, views = _views(memory, size)
    _check_lengths({name: len(view) for name, view in views.items()})
    return Image(_tree(memory, starts, views), _locations(memory, starts, views), manifest)


def _views(memory: mmap.mmap, size: int) -> tuple[dict[str, int], dict[str, memoryview[int]]]:
    """Return where every section starts, and its items."""
    starts, views = {}, {}
    whole = memoryview(memory)
    free = _TEXT_AT
    for number, (name, code) in enumerate(TYPES.items()):
        start, length = _ROW.unpack_from(memory, _HEADER.size + number * _ROW.size)
        if start % 8 or start < free or length > size - start or length % array(code).itemsize:
            raise CorruptError(f"a tree image: section {name!r} is out of bounds")
        free = start + length
        starts[name], views[name] = start, whole[start:free].cast(code)
    return starts, views


def _check_lengths(found: dict[str, int]) -> None:
    """See that columns of the same things are equally long."""
    nodes, refs = found["kinds"], found["ref_frames"]
    frames, digest = found["frame_codecs"], DIGEST_SIZE
    kept = nodes if found["modes"] else 0
    expected = {
        "name_starts": nodes + 1, "parents": nodes, "slots": nodes, "inodes": nodes,
        "children": nodes - 1, "modes": kept, "mtimes": kept,
        "child_starts": found["directories"] + 1,
        "digests": digest * refs, "ends": refs + 1, "ref_offsets": refs,
        "link_counts": found["linked"], "hole_bytes": found["holed"],
        "long_keys": digest * found["long"],
        "table": 1 << found["table"].bit_length() - 1 if found["table"] else 1, "multiplier": 1,
        "frame_packs": frames, "frame_offsets": frames, "frame_stored": frames,
        "frame_raw": frames, "frame_digests": digest * frames,
        "packs": found["packs"] // digest * digest,
        "file_starts": max(found["file_starts"], 1),
        "target_starts": max(found["target_starts"], 1),
    }  # fmt: skip
    for name, length in expected.items():
        if found[name] != length:
            raise CorruptError(f"a tree image: {name} has {found[name]} items, not {length}")


def _tree(memory: mmap.mmap, starts: dict[str, int], views: dict[str, memoryview[int]]) -> Tree:
    return Tree(
        Columns(
            text=memory,
            kinds=views["kinds"],
            name_starts=views["name_starts"],
            parents=views["parents"],
            slots=views["slots"],
            inodes=views["inodes"],
            modes=views["modes"],
            mtimes=views["mtimes"],
            directories=views["directories"],
            child_starts=views["child_starts"],
            children=views["children"],
            file_starts=views["file_starts"],
            digests_at=starts["digests"],
            ends=views["ends"],
            target_starts=views["target_starts"],
            linked=views["linked"],
            link_counts=views["link_counts"],
            holed=views["holed"],
            hole_bytes=views["hole_bytes"],
            long=views["long"],
            long_keys_at=starts["long_keys"],
            table=views["table"],
            multiplier=views["multiplier"][0],
        )
    )


def _locations(
    memory: mmap.mmap, starts: dict[str, int], views: dict[str, memoryview[int]]
) -> ImageLocations:
    frames = FrameColumns(
        memory=memory,
        packs_at=starts["packs"],
        digests_at=starts["frame_digests"],
        packs=views["frame_packs"],
        offsets=views["frame_offsets"],
        stored=views["frame_stored"],
        raw=views["frame_raw"],
        codecs=views["frame_codecs"],
    )
    return ImageLocations(FrameTable(frames), views["ref_frames"], views["ref_offsets"])
