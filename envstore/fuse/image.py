"""Tree images: all that a server must know of a snapshot, in memory that outlives the server.

An image is a sealed memory file: nobody can change or cut it, and whoever holds its descriptor
serves the snapshot from it at once, without store and without building anything. Its numbers are
in the byte order of this machine, as it never leaves it. Layout: magic, manifest digest, the
size in bytes of every section of ``sections.TYPES``, then the sections one after another, each
padded to a multiple of eight.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from envstore.errors import CorruptError, NoSpaceError, UnsupportedFormatError
from envstore.fuse.columns import build_sections
from envstore.fuse.frametable import FrameColumns, FrameTable, ImageLocations
from envstore.fuse.sections import TYPES, Buffer, TreeSections
from envstore.fuse.tree import Columns, Tree
from envstore.store.digest import DIGEST_SIZE
from envstore.store.locations import Located
from envstore.store.manifest import Part, Root

MAGIC = b"ESTREE02"

_HEADER = struct.Struct(f"=8s32s{len(TYPES)}Q")
_TEXT_AT = _HEADER.size
_NOEXEC_SEAL = 8
"""Asks memfd_create(2) for a file that cannot be executed: some systems allow no other. Since
Linux 6.3."""
_Section: TypeAlias = "Buffer | memoryview[int]"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Image:
    """A snapshot's tree and where its chunks lie, and the digest of the manifest it is of.

    ``prefix`` is empty if the tree is the same wherever it is mounted.
    """

    tree: Tree
    locations: ImageLocations
    manifest: bytes
    prefix: bytes


def make_image(
    manifest: bytes, root: Root, parts: Iterable[Part], locations: Located, prefix: bytes = b""
) -> int:
    """Build the image of the tree called ``manifest``; returns the descriptor, to be closed.

    Files that hold their own prefix are shown for ``prefix``, or as they are stored if that is
    empty. Takes about 110 bytes for each file, as many more for one that is relocated, and as much
    again while it works. Raises ``CorruptError`` when ``root`` and ``parts`` contradict each
    other, ``UsageError`` when ``prefix`` is too long, ``NoSpaceError`` when memory is short.
    """
    tree = build_sections(root, parts, _TEXT_AT, prefix)
    sections: dict[str, _Section] = {name: getattr(tree, name) for name in TreeSections.__slots__}
    del tree
    sections |= _locate(locations)
    return _written(manifest, sections)


def _written(manifest: bytes, sections: dict[str, _Section]) -> int:
    try:
        fd = _create(f"envstore-{manifest.hex()[:12]}")
        try:
            _fill(fd, manifest, sections)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise NoSpaceError(f"no memory for the tree image: {error.strerror}") from error
    return fd


def moved_image(fd: int, locations: Located) -> int | None:
    """Return an image as ``fd`` is one, but with other locations of the same manifest.

    ``None`` if it has those already. Takes twice the memory of the image for a moment. Raises as
    ``open_image`` does, ``NoSpaceError``.
    """
    memory, manifest, sizes = _opened(fd)
    views = _views(memory, sizes)[1]
    found = {name: memoryview(data) for name, data in _locate(locations).items()}
    if all(views[name] == view for name, view in found.items()):
        return None
    if len(found["ref_frames"]) != len(views["ref_frames"]):
        raise CorruptError(f"locations of manifest {manifest.hex()} do not belong to its image")
    return _written(manifest, {**views, **found})


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def _fill(fd: int, manifest: bytes, sections: dict[str, _Section]) -> None:
    sizes = []
    at = _TEXT_AT
    for name in TYPES:
        # What has been written must not be in memory twice.
        with memoryview(sections.pop(name)) as data:
            sizes.append(data.nbytes)
            _write(fd, data.cast("B"), at)
            at += _padded(data.nbytes)
    _write(fd, memoryview(_HEADER.pack(MAGIC, manifest, *sizes)), 0)
    os.ftruncate(fd, at)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


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
    memory, manifest, sizes = _opened(fd)
    starts, views = _views(memory, sizes)
    _check_lengths({name: len(view) for name, view in views.items()})
    _check_ends(starts, views)
    tree = _tree(memory, starts, views)
    return Image(tree, _locations(memory, starts, views), manifest, bytes(views["prefix"]))


def _opened(fd: int) -> tuple[mmap.mmap, bytes, list[int]]:
    """Return an image's memory, its manifest, and the sizes of its sections."""
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
    magic, manifest, *sizes = _HEADER.unpack_from(memory)
    if magic != MAGIC:
        if magic[:6] == MAGIC[:6]:
            raise UnsupportedFormatError(
                f"a tree image has format {magic[6:]!r}, this version reads {MAGIC[6:]!r}",
                hint="mount again",
            )
        raise CorruptError("a tree image does not start with its magic number")
    return memory, manifest, sizes


def _views(
    memory: mmap.mmap, sizes: Sequence[int]
) -> tuple[dict[str, int], dict[str, memoryview[int]]]:
    """Return where every section starts, and its items."""
    starts, views = {}, {}
    whole = memoryview(memory)
    at = _TEXT_AT
    for (name, code), size in zip(TYPES.items(), sizes, strict=True):
        if size > len(whole) - at or size % struct.calcsize(f"={code}"):
            raise CorruptError(f"a tree image: {name} of {size} bytes is out of bounds")
        starts[name], views[name] = at, whole[at : at + size].cast(code)
        at += _padded(size)
    if at != len(whole):
        raise CorruptError(f"a tree image has {len(whole)} bytes, not {at}")
    return starts, views


def _check_lengths(found: dict[str, int]) -> None:
    """See that columns of the same things are equally long."""
    nodes, refs = found["kinds"], found["ref_frames"]
    frames, table = found["frame_codecs"], found["table"]
    kept = nodes if found["modes"] else 0
    expected = {
        "name_starts": nodes + 1, "parents": nodes, "slots": nodes, "inodes": nodes,
        "modes": kept, "mtimes": kept, "children": nodes - 1,
        "child_starts": found["directories"] + 1,
        "file_starts": found["file_starts"] or 1, "target_starts": found["target_starts"] or 1,
        "digests": DIGEST_SIZE * refs, "ends": refs + 1, "ref_offsets": refs,
        "link_counts": found["linked"], "hole_bytes": found["holed"],
        "long_keys": DIGEST_SIZE * found["long"],
        "relocated_sizes": found["relocated"],
        "plan_starts": found["relocated"] + 1 if found["prefix"] else 0,
        "table": 1 << max(0, table.bit_length() - 1), "multiplier": 1,
        "frame_packs": frames, "frame_offsets": frames, "frame_stored": frames,
        "frame_raw": frames, "frame_digests": DIGEST_SIZE * frames,
        "packs": found["packs"] // DIGEST_SIZE * DIGEST_SIZE,
    }  # fmt: skip
    for name, length in expected.items():
        if found[name] != length:
            raise CorruptError(f"a tree image: {name} has {found[name]} items, not {length}")


def _check_ends(starts: dict[str, int], views: dict[str, memoryview[int]]) -> None:
    """See that running sums end where the columns end that they lead into."""
    text_end = starts["text"] + len(views["text"])
    if len(views["plan_starts"]) and views["plan_starts"][-1] != len(views["plans"]):
        raise CorruptError("a tree image: relocations do not end where they should")
    for name, last in (
        ("target_starts", text_end),
        ("child_starts", len(views["children"])),
        ("file_starts", len(views["ref_frames"])),
    ):
        if views[name][-1] != last:
            raise CorruptError(f"a tree image: {name} ends at {views[name][-1]}, not {last}")


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
            prefix=bytes(views["prefix"]),
            plans_at=starts["plans"],
            plan_starts=views["plan_starts"],
            relocated=views["relocated"],
            relocated_sizes=views["relocated_sizes"],
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
