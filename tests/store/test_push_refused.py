"""Trees that cannot be pushed, and trees that change while they are."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NotFoundError,
    UsageError,
)
from envstore.store.source import (
    ChangedError,
    DirectorySource,
    access_error,
)
from tests.sources import ListedSource, WatchedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.mark.parametrize("what", ["socket", "fifo", "device"])
def test_what_is_no_file_is_refused_by_name(store: Store, tree: Path, what: str) -> None:
    before = store.push(tree).snapshot
    path = tree / "folder 1" / what
    if what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif what == "fifo":
        os.mkfifo(path)
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    else:
        pytest.skip("only root can make a device")
    with pytest.raises(UsageError) as caught:
        store.push(tree)
    assert str(path) in str(caught.value)
    assert ("socket" if what == "socket" else "device or FIFO") in str(caught.value)
    assert store.repository.resolve("tree") == before


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such path"):
        DirectorySource(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither"):
        DirectorySource(tmp_path / "fifo")


def test_errors_of_the_tree_name_the_path() -> None:
    import errno

    for code, kind in (
        (errno.EACCES, AccessDeniedError),
        (errno.EPERM, AccessDeniedError),
        (errno.ENOENT, ChangedError),
        (errno.ENOTDIR, ChangedError),
        (errno.ELOOP, ChangedError),
        (errno.EIO, EnvstoreError),
    ):
        error = access_error(OSError(code, os.strerror(code)), b"some/caf\xe9")
        assert type(error) is kind
        assert os.fsdecode(b"some/caf\xe9") in error.message


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _cut_off(path: Path) -> None:
    os.truncate(path, 5 << 20)


def _overwrite(path: Path) -> None:
    """The hardest to see: same size, and the old time put back."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    (path.parent.parent / "new").write_bytes(path.read_bytes())
    (path.parent.parent / "new").rename(path)


def _remove(path: Path) -> None:
    path.unlink()


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_link(path: Path) -> None:
    path.rename(path.parent.parent / "aside")
    path.symlink_to("../aside")


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("event", ["scanned", "opening", "piece"])
@pytest.mark.parametrize(
    "change",
    [
        _append, _cut_off, _overwrite, _replace, _remove, _make_directory, _make_link, _make_fifo,
    ],
)  # fmt: skip
def test_a_file_that_changes_meanwhile_is_noticed_and_named(
    store: Store, tree: Path, event: str, change: Callable[[Path], None]
) -> None:
    before = store.push(ListedSource({b"old": b"content"}))
    changed = []

    def act(now: str, path: bytes) -> None:
        if now == event and path in (b"large", b"") and not changed:
            changed.append(path)
            change(tree / "large")

    with pytest.raises(ChangedError, match="large changed while it was being read") as caught:
        store.push(WatchedSource(tree, act))
    assert changed
    assert caught.value.hint
    assert store.repository.resolve("tree") == before.snapshot
    assert threading.active_count() == 1
    if change is not _make_fifo:
        store.push(tree)
        store.assert_sound()


def test_a_small_file_that_changes_meanwhile(store: Store, tree: Path) -> None:
    def act(event: str, path: bytes) -> None:
        if event == "piece" and path == b"file 0":
            _overwrite(tree / "file 0")

    with pytest.raises(ChangedError, match="file 0 changed"):
        store.push(WatchedSource(tree, act))
    with pytest.raises(NotFoundError):
        store.repository.resolve("tree")


def test_a_directory_that_vanishes_meanwhile(store: Store, tree: Path) -> None:
    def act(event: str, path: bytes) -> None:
        if event == "scanned":
            (tree / "folder 1").rename(tree.parent / "away")

    with pytest.raises(ChangedError, match="folder 1/"):
        store.push(WatchedSource(tree, act))
