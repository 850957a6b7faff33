"""All that a mount must know of a snapshot before the first file of it is opened."""

from __future__ import annotations

from dataclasses import dataclass

from envstore.fuse.image import make_image, open_image
from envstore.fuse.keys import placed_key
from envstore.fuse.tree import Tree
from envstore.store.locations import Located
from envstore.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Content:
    """A snapshot ready to be served: the name it was asked by, its tree, where chunks lie.

    ``fd`` is the descriptor of its tree image. It belongs to whoever asked for the content and
    may be closed at any time: the tree does not need it. ``prefix`` is the path that its files
    are made for, empty if they are the same anywhere, or shown as they are stored.
    """

    name: str
    snapshot: bytes
    manifest: bytes
    tree: Tree
    locations: Located
    fd: int
    prefix: bytes = b""

    @property
    def key(self) -> bytes:
        """A name for the tree as it is shown; that of the manifest if it is so anywhere."""
        return placed_key(self.manifest, self.prefix)


def load_content(
    repository: Repository, snapshot: bytes, name: str = "", prefix: bytes = b""
) -> Content:
    """Return the content of ``snapshot``: two or three round trips with an empty cache.

    It is that at ``prefix``, or as it is stored if that is empty. Raises ``NotFoundError``,
    ``CorruptError``, ``UnavailableError``, ``UsageError`` (the prefix is too long).
    """
    manifest = repository.snapshot(snapshot).manifest
    root, locations = repository.located(manifest)
    fd = make_image(manifest, root, repository.parts(root, locations), locations, prefix)
    return content_from_image(fd, name, snapshot)


def content_from_image(fd: int, name: str, snapshot: bytes) -> Content:
    """Return the content of ``snapshot`` from the image that ``load_content`` made of it.

    Neither the store nor the cache is asked for anything. Raises ``CorruptError``,
    ``UnsupportedFormatError`` as ``open_image`` does.
    """
    image = open_image(fd)
    title = name or f"@{snapshot.hex()[:12]}"
    return Content(title, snapshot, image.manifest, image.tree, image.locations, fd, image.prefix)
