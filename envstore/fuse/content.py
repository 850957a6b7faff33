"""All that a mount must know of a snapshot before the first file of it is opened."""

from __future__ import annotations

from dataclasses import dataclass

from envstore.fuse.build import build_tree
from envstore.fuse.tree import Tree
from envstore.store.locations import Locations
from envstore.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Content:
    """A snapshot ready to be served: the name it was asked by, its tree, where chunks lie."""

    name: str
    snapshot: bytes
    manifest: bytes
    tree: Tree
    locations: Locations


def load_content(repository: Repository, snapshot: bytes, name: str = "") -> Content:
    """Return the content of ``snapshot``: two or three round trips with an empty cache.

    Raises ``NotFoundError``, ``CorruptError``, ``UnavailableError``.
    """
    manifest = repository.snapshot(snapshot).manifest
    root, locations = repository.located(manifest)
    tree = build_tree(root, repository.parts(root, locations))
    return Content(name or f"@{snapshot.hex()[:12]}", snapshot, manifest, tree, locations)
