"""One snapshot that a server answers for, and what is kept of it for the next server."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content
from envstore.fuse.forest import told_size
from envstore.fuse.keeping import Keepsake
from envstore.fuse.metrics import Metrics
from envstore.fuse.moved import Moved
from envstore.fuse.reader import Reader
from envstore.fuse.relocating import RelocatingReader
from envstore.fuse.supplies import Supply
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache
from envstore.store.locations import Located


@dataclass(slots=True, eq=False)
class Volume:
    """One snapshot being served, and what it needs again after a restart."""

    slot: int
    content: Content
    keepsake: Keepsake
    supply: Supply
    metrics: Metrics
    moved: Moved = field(init=False)
    reader: Reader | RelocatingReader = field(init=False)
    closed: bool = False

    def image(self) -> int | None:
        """Return a descriptor of its image, the caller's, unless it is served no longer."""
        return None if self.closed else os.dup(self.keepsake.files[0])

    def move(self, fd: int, locations: Located) -> None:
        """Be served from another image, which has other locations."""
        former = self.keepsake.files
        self.content = replace(self.content, fd=fd, locations=locations)
        self.keepsake = Keepsake(self.keepsake.body, (fd, *former[1:]))

    def close(self) -> None:
        """Let go of what was kept of it."""
        self.closed = True
        for fd in self.keepsake.files:
            os.close(fd)
        # They refer to this in turn, and would keep the image mapped until a collection.
        del self.reader, self.moved


def make_volume(
    slot: int,
    content: Content,
    keepsake: Keepsake,
    supply: Supply,
    metrics: Metrics,
    cache: BlobCache,
    complaints: Complaints,
    patience: float,
    watch: Callable[[int, int, int], None] | None,
    has_moved: Callable[[Volume], None],
) -> Volume:
    """Return a snapshot that is ready to be read.

    ``has_moved`` is told when its keepsake is another, because its packs have moved.
    """
    volume = Volume(slot, content, keepsake, supply, metrics)

    def found(fd: int, locations: Located) -> None:
        if volume.closed:
            os.close(fd)
            return
        former = volume.keepsake.files[0]
        volume.move(fd, locations)
        has_moved(volume)
        os.close(former)

    tree, locations = content.tree, content.locations
    volume.moved = Moved(
        locations, supply.objects, content.manifest, complaints, patience, volume.image, found
    )
    reader = Reader(tree, locations, supply.loader, cache, metrics, complaints, watch, volume.moved)
    volume.reader = RelocatingReader(reader, tree) if tree.relocates else reader
    return volume


def told_memory(tree: Tree) -> int:
    """Return memory in which it is noted what the kernel was told of; see ``forest``."""
    told = os.memfd_create("envstore-told", os.MFD_CLOEXEC)
    os.ftruncate(told, told_size(tree))
    return told


def subtree(slot: int, content: Content) -> bytes:
    """Return the name of a snapshot's directory among others."""
    return b"%d-%s" % (slot, content.manifest.hex()[:16].encode())
