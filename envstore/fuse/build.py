"""Builds a ``Tree`` from the parts of a manifest, for those who need no more than names."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable

from envstore.fuse.image import make_image, open_image
from envstore.fuse.tree import Tree
from envstore.store.locations import NOWHERE, Locations
from envstore.store.manifest import Part, Root


def build_tree(root: Root, parts: Iterable[Part]) -> Tree:
    """Return the tree of the manifest whose ``root`` and ``parts`` (in order) are given.

    Raises ``CorruptError`` when they contradict each other or themselves.
    """
    refs = sum(part.refs for part in root.parts)
    nowhere = Locations(
        ref_frames=array("I", [NOWHERE]) * refs, ref_offsets=array("I", bytes(4 * refs))
    )
    fd = make_image(root.digest, root, parts, nowhere)
    try:
        return open_image(fd).tree
    finally:
        os.close(fd)
