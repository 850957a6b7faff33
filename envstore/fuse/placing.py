"""Puts a hydrated snapshot that holds its own prefix where it is to be mounted without a server.

Its files are kept as they are stored. For each prefix that it is mounted at, those that hold it
are made once more from them, in a directory beside, and stay as long as the snapshot does.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from envstore.errors import CorruptError, NoSpaceError
from envstore.fuse.erofs import ensure_image, find_image
from envstore.fuse.hydrated import Hydrated
from envstore.fuse.keys import placed_key
from envstore.fuse.local import LocalFiles, NewFile
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache
from envstore.store.private import make_private

_ATTEMPTS = 3
_BATCH = 64


def placed_image(found: Hydrated, cache: BlobCache, prefix: bytes) -> Path:
    """Return the image of a hydrated snapshot at ``prefix``, all of whose files are in ``cache``.

    Takes as long as building the tree and writing those files for the first mount at a prefix,
    milliseconds for others. Raises ``CorruptError``, ``UsageError`` (the prefix is too long),
    ``NoSpaceError``.
    """
    if not found.record.relocates:
        return found.image()
    key = placed_key(found.manifest, prefix)
    directory = found.directory / "prefixes" / key.hex()
    with cache.errors(), _alone(directory):
        # Written last: where it is, the files are.
        image = find_image(key, directory / "image")
        if image is not None:
            return image
        content = found.content(prefix)
        os.close(content.fd)
        tree = content.tree
        nodes = {tree.content_key(node): node for node in tree.relocated_nodes()}
        _make(cache, tree, list(nodes.values()), found.directory / "pins", directory / "pins")
        return ensure_image(tree, key, directory / "image")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Make ``directory`` and hold off others who would fill it."""
    make_private(directory)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make(cache: BlobCache, tree: Tree, nodes: list[int], stored: Path, pins: Path) -> None:
    """Make and pin the files ``nodes`` of what lies in ``stored``."""
    local = LocalFiles(cache)
    # A file may be evicted in the moment between getting its name and its pin.
    for _ in range(_ATTEMPTS):
        wanted = {tree.content_key(node): (node, tree.size(node)) for node in nodes}
        absent = local.pin([(key, size) for key, (_, size) in wanted.items()], pins)
        nodes = [wanted[key][0] for key in absent]
        if not nodes:
            return
        for start in range(0, len(nodes), _BATCH):
            files: list[NewFile] = []
            try:
                for node in nodes[start : start + _BATCH]:
                    files.append(local.begin(tree, node))
                    _fill(files[-1], tree, stored)
            except BaseException:
                local.abandon(files)
                raise
            local.keep(files)
    raise NoSpaceError(
        f"the cache {cache.root} is too full to keep all files", hint="raise ENVSTORE_CACHE_SIZE"
    )


def _fill(file: NewFile, tree: Tree, stored: Path) -> None:
    name = tree.stored_key(file.node).hex()
    try:
        with (stored / name[:2] / name).open("rb") as source:
            for ref in tree.file_refs(file.node):
                size = tree.chunk_size(ref)
                if tree.is_hole(ref):
                    source.seek(size, os.SEEK_CUR)
                else:
                    file.write(ref, source.read(size))
    except FileNotFoundError:
        raise CorruptError(
            f"the hydrated snapshot in {stored.parent} is not whole", hint="hydrate it again"
        ) from None
