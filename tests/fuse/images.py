"""EROFS images of trees, mounted for real, and what the kernel then says is in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from envstore.fuse import overlay
from envstore.fuse.erofs import write_image
from envstore.fuse.mountinfo import list_mounts
from envstore.fuse.tree import ROOT, Tree
from envstore.store.source import Kind

MANIFEST = bytes(range(32))


def mounts_below(path: Path) -> list[str]:
    """Return where something is mounted at or below ``path``."""
    places = [Path(mount.mountpoint) for mount in list_mounts()]
    return [str(place) for place in places if place.is_relative_to(path)]


def written(tree: Tree, path: Path, manifest: bytes = MANIFEST) -> Path:
    with path.open("x+b") as out:
        write_image(tree, manifest, out)
    return path


@contextmanager
def mounted(image: Path) -> Iterator[int]:
    """Yield the open root of an image that is mounted nowhere."""
    mount = overlay._apart(lambda: overlay._make_erofs(image))
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
    os.close(mount)
    try:
        yield fd
    finally:
        os.close(fd)


def compare(tree: Tree, top: int, *, attributes: bool = True) -> None:
    """See that the file system at ``top`` is the tree, but for the content of files."""
    seen: dict[int, int] = {}
    _compare(tree, ROOT, top, seen, attributes=attributes)
    assert len(seen) == len({tree.inode(node) for node in range(ROOT, len(tree) + 1)})


def _compare(
    tree: Tree, directory: int, fd: int, seen: dict[int, int], *, attributes: bool
) -> None:
    _same(tree, directory, os.stat(fd), seen)
    children = [tree.child(directory, at) for at in range(tree.child_count(directory))]
    with os.scandir(fd) as listing:
        listed = {os.fsencode(item.name): item for item in listing}
    assert set(listed) == {tree.name(child) for child in children}
    for child in children:
        name = tree.name(child)
        kind = tree.kind(child)
        item = listed[name]
        assert item.is_dir(follow_symlinks=False) == (kind is Kind.DIRECTORY)
        assert item.is_symlink() == (kind is Kind.SYMLINK)
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        _same(tree, child, st, seen)
        assert item.inode() == st.st_ino
        if kind is Kind.SYMLINK:
            assert os.readlink(name, dir_fd=fd) == tree.target(child)
        elif kind is Kind.DIRECTORY:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            try:
                _compare(tree, child, below, seen, attributes=attributes)
            finally:
                os.close(below)
        elif attributes:
            file = os.open(name, os.O_RDONLY, dir_fd=fd)
            try:
                _same_file(tree, child, file)
            finally:
                os.close(file)


def _same(tree: Tree, node: int, st: os.stat_result, seen: dict[int, int]) -> None:
    expected = tree.attributes(node)
    assert st.st_mode == expected.mode
    assert st.st_mtime_ns == expected.mtime_ns
    assert (st.st_uid, st.st_gid) == (0, 0)
    assert st.st_nlink == expected.links
    if not stat.S_ISDIR(st.st_mode):
        assert st.st_size == expected.size
    assert seen.setdefault(tree.inode(node), st.st_ino) == st.st_ino


def _same_file(tree: Tree, node: int, fd: int) -> None:
    found = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    if not tree.size(node):
        assert found == {}
        return
    key = tree.content_key(node).hex()
    redirect = f"/{key[:2]}/{key}".encode()
    assert found == {"trusted.overlay.metacopy": b"", "trusted.overlay.redirect": redirect}
    size = tree.size(node)
    assert not os.pread(fd, 100, max(0, size - 100)).strip(b"\0")
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
