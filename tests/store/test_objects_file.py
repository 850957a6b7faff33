from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, cycle
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.objects import ObjectStore, nofollow, open_objects

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def objects(root: Path) -> ObjectStore:
    return open_objects(str(root), create=True)


@contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs ``code``; killed at the end if it still lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that ``process`` writes."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Opening.


def test_a_store_that_is_not_there(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"does not exist.*envstore init"):
        open_objects(str(root))
    assert not root.exists()


def test_create_makes_the_directory_and_keeps_what_is_there(root: Path) -> None:
    open_objects(f"file://{root}/deep/er", create=True).put("x", b"1")
    assert open_objects(f"{root}/deep/er", create=True).get("x") == b"1"
    assert open_objects(f"{root}/deep/er").url == f"file://{root}/deep/er"


def test_a_store_that_is_a_file(root: Path) -> None:
    root.write_bytes(b"")
    for create in (False, True):
        with pytest.raises(EnvstoreError, match=f"{root}"):
            open_objects(str(root), create=create)


def test_a_store_that_goes_away(objects: ObjectStore, root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    for operation in (
        lambda: objects.get("x"),
        lambda: objects.get_range("x", 0, 1),
        lambda: objects.get_versioned("x"),
        lambda: objects.put("x", b""),
        lambda: objects.put_if("x", b"", None),
        lambda: objects.size("x"),
        lambda: objects.delete("x"),
        lambda: list(objects.list("x/")),
    ):
        with pytest.raises(NotFoundError, match=f"the store {root} does not exist"):
            operation()
    assert not root.exists()


# Keys and links.


@given(key=st.text(min_size=1, max_size=40) | st.text("./\\~a", min_size=1, max_size=12))
def test_no_key_leads_out_of_the_store(key: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        outside = Path(directory)
        root = outside / "objects"
        objects = open_objects(str(root), create=True)
        try:
            objects.put(key, b"data")
        except UsageError:
            assert sum(path.is_file() for path in outside.rglob("*")) == 0
        else:
            written = root / key
            assert written.read_bytes() == b"data"
            assert written.resolve().is_relative_to(root)
            assert [info.key for info in objects.list("")] == [key]
        assert {path.name for path in outside.iterdir()} == {"objects"}


def test_a_link_to_a_directory_is_not_followed(objects: ObjectStore, root: Path) -> None:
    outside = root.with_name("outside")
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    (root / "packs").symlink_to(outside)
    for operation in (
        lambda: objects.put("packs/y", b""),
        lambda: objects.put_if("packs/y", b"", None),
        lambda: objects.get("packs/x"),
        lambda: objects.get_range("packs/x", 0, 1),
        lambda: objects.size("packs/x"),
        lambda: objects.delete("packs/x"),
        lambda: list(objects.list("packs/")),
        lambda: list(objects.list("")),
    ):
        with pytest.raises(AccessDeniedError, match="packs is a symbolic link"):
            operation()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"x": b"secret"}


def test_a_link_in_the_place_of_an_object_is_not_followed(objects: ObjectStore, root: Path) -> None:
    outside = root.with_name("outside")
    outside.write_bytes(b"secret")
    (root / "x").symlink_to(outside)
    for operation in (
        lambda: objects.get("x"),
        lambda: objects.get_range("x", 0, 1),
        lambda: objects.size("x"),
        lambda: objects.put_if("x", b"mine", None),
    ):
        with pytest.raises(AccessDeniedError, match="x is a symbolic link"):
            operation()
    objects.put("x", b"mine")  # replaces the link itself
    assert objects.get("x") == b"mine"
    assert outside.read_bytes() == b"secret"


@pytest.mark.parametrize("internal", [".tmp", ".locks"])
def test_the_internal_directories_may_not_be_links(
    objects: ObjectStore, root: Path, internal: str
) -> None:
    outside = root.with_name("outside")
    outside.mkdir()
    (root / internal).symlink_to(outside)
    with pytest.raises(AccessDeniedError, match="symbolic link"):
        objects.put("x", b"")
    assert list(outside.iterdir()) == []


def test_the_store_itself_may_be_behind_a_link(objects: ObjectStore, root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    open_objects(str(link)).put("x", b"1")
    assert objects.get("x") == b"1"


def test_what_is_no_file_is_no_object(objects: ObjectStore, root: Path) -> None:
    os.mkfifo(root / "fifo")
    with pytest.raises(NotFoundError):
        objects.get("fifo")
    assert objects.size("fifo") is None
    assert list(objects.list("")) == []


def test_a_key_below_another_key(objects: ObjectStore) -> None:
    objects.put("a/b", b"1")
    for key in ("a", "a/b/c"):
        with pytest.raises(UsageError, match="collide"):
            objects.put(key, b"2")
        with pytest.raises(UsageError, match="collide"):
            objects.put_if(key, b"2", None)
    objects.delete("a")
    assert [info.key for info in objects.list("")] == ["a/b"]


def test_names_that_are_no_keys_are_not_listed(objects: ObjectStore, root: Path) -> None:
    objects.put("packs/x", b"1")
    (root / "packs" / "caf\u00e9").write_bytes(b"")
    (root / ".hidden").write_bytes(b"")
    assert [info.key for info in objects.list("")] == ["packs/x"]


def test_the_umask_rules(objects: ObjectStore, root: Path) -> None:
    for mask in (0o077, 0o022, 0o002):
        before = os.umask(mask)
        try:
            objects.put(f"mask-{mask:o}/x", b"")
        finally:
            os.umask(before)
        folder = root / f"mask-{mask:o}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
        assert stat.S_IMODE((folder / "x").stat().st_mode) == 0o666 & ~mask


# Processes.

COUNT = """
import sys
from envstore.errors import ConflictError
from envstore.store.objects import open_objects
objects = open_objects(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    while True:
        data, version = objects.get_versioned("refs/counter")
        try:
            objects.put_if("refs/counter", b"%d" % (int(data) + 1), version)
            break
        except ConflictError:
            pass
print("done", flush=True)
"""


def test_a_counter_moved_by_many_processes_is_exact(objects: ObjectStore, root: Path) -> None:
    objects.put_if("refs/counter", b"0", None)
    each = 15
    with (
        child(COUNT, root, each) as a,
        child(COUNT, root, each) as b,
        child(COUNT, root, each) as c,
        child(COUNT, root, each) as d,
    ):
        processes = (a, b, c, d)
        assert [said(process) for process in processes] == ["ready"] * 4
        for process in processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        assert [said(process) for process in processes] == ["done"] * 4
    assert int(objects.get("refs/counter")) == each * 4
    assert list((root / ".tmp").iterdir()) == []


WRITE = """
import itertools, sys
from envstore.store.objects import open_objects
objects = open_objects(sys.argv[1])
size = int(sys.argv[2])
for number in itertools.count():
    objects.put("packs/x", bytes([number % 256]) * size)
    objects.put(f"packs/{number % 50}", bytes([number % 256]) * size)
    print(number, flush=True)
"""


def test_a_killed_writer_never_leaves_part_of_an_object(objects: ObjectStore, root: Path) -> None:
    size = 1 << 20
    leftovers = 0
    for kill in range(12):
        with child(WRITE, root, size) as process:
            assert said(process) == "0"
            # Not when it says a number, but somewhere in the write after it.
            time.sleep(0.003 * kill)
            process.kill()
            process.wait()
        found = list(objects.list(""))
        assert found
        for info in found:
            assert info.size == size
            assert len(set(objects.get(info.key))) == 1
        leftovers += len(list((root / ".tmp").iterdir()))
        objects.put("packs/x", b"the store can be written to")
    assert leftovers, "no kill hit a write: the test shows nothing"


LOCK = """
import fcntl, os, sys
for name in range(256):
    fcntl.flock(os.open(f"{sys.argv[1]}/.locks/{name:02x}", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
"""

PUT = """
import sys
from envstore.store.objects import open_objects
print("started", flush=True)
open_objects(sys.argv[1]).put_if("refs/x", b"1", None)
print("done", flush=True)
"""


def test_a_lock_dies_with_its_holder(objects: ObjectStore, root: Path) -> None:
    (root / ".locks").mkdir()
    with child(LOCK, root) as holder, child(PUT, root) as writer:
        assert said(holder) == "locked"
        assert said(writer) == "started"
        assert objects.size("refs/x") is None
        holder.kill()
        assert said(writer) == "done"
    assert objects.get("refs/x") == b"1"


def test_old_temporary_files_are_removed_young_ones_are_not(root: Path) -> None:
    open_objects(str(root), create=True).put("x", b"1")
    old, young = root / ".tmp" / "1-old", root / ".tmp" / "2-young"
    for path in (old, young):
        path.write_bytes(b"half an obj")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    later = open_objects(str(root))
    assert [info.key for info in later.list("")] == ["x"]
    assert old.exists()
    later.put("y", b"2")
    assert not old.exists()
    assert young.exists()


# Disks.


def broken(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize("call", ["writev", "fsync", "rename"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EACCES, AccessDeniedError),
        (errno.EROFS, AccessDeniedError),
        (errno.EIO, UnavailableError),
    ],
)
def test_a_write_that_fails_changes_nothing_and_leaves_nothing(
    objects: ObjectStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    error: type[EnvstoreError],
) -> None:
    version = objects.put_if("refs/x", b"before", None)

    def fail(*_: object, **__: object) -> NoReturn:
        raise broken(code)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error, match=f"{root}/refs/x"):
            objects.put("refs/x", b"after")
        with pytest.raises(error, match=f"{root}/refs/x"):
            objects.put_if("refs/x", b"after", version)
    assert objects.get("refs/x") == b"before"
    assert list((root / ".tmp").iterdir()) == []


@given(st.lists(st.integers(0, 300), max_size=8), st.lists(st.integers(1, 200), min_size=1))
def test_a_write_that_takes_less_than_it_was_given(sizes: list[int], takes: list[int]) -> None:
    data = random.Random(1).randbytes(sum(sizes))
    ends = list(accumulate(sizes))
    buffers = [memoryview(data)[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    rhythm = cycle(takes)
    writev = os.writev

    def lazy(fd: int, given: list[memoryview]) -> int:
        return writev(fd, [memoryview(b"".join(given))[: next(rhythm)]])

    with (
        tempfile.TemporaryDirectory() as folder,
        patch("os.writev", lazy),
        patch.object(nofollow, "_AT_ONCE", 3),
    ):
        open_objects(folder).put("x", buffers)
        assert open_objects(folder).get("x") == data


def test_nothing_is_in_place_before_it_is_on_the_disk(
    objects: ObjectStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(fd: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).parent.name}")
        fsync(fd)

    def watched_rename(*arguments: str, **directories: int) -> None:
        events.append("rename")
        rename(*arguments, **directories)

    objects.put("packs/aa/x", b"makes the directories")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    objects.put("packs/aa/y", b"data")
    # The file in .tmp; then, renamed, the directory aa (whose parent is packs).
    assert events == ["fsync .tmp", "rename", "fsync packs"]
    events.clear()
    objects.delete("packs/aa/y")
    assert events == ["fsync packs"]


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of ``size`` bytes; only root may mount one."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "envstore-test", directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk() -> None:
    with small_disk("256k") as disk:
        objects = open_objects(str(disk / "store"), create=True)
        objects.put("packs/small", bytes(10_000))
        with pytest.raises(NoSpaceError, match=f"{disk}/store/packs/large") as caught:
            objects.put("packs/large", bytes(1_000_000))
        assert "free space" in str(caught.value)
        assert list((disk / "store" / ".tmp").iterdir()) == []
        assert [info.key for info in objects.list("")] == ["packs/small"]
        objects.put("packs/small-too", bytes(10_000))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_read_only_disk() -> None:
    with small_disk("256k") as disk:
        objects = open_objects(str(disk), create=True)
        objects.put("x", b"1")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(AccessDeniedError, match=r"(?i)read-only"):
            objects.put("y", b"")
        with pytest.raises(AccessDeniedError, match=r"(?i)read-only"):
            objects.delete("x")
        assert objects.get("x") == b"1"


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Be nobody for a while, if this is root, whom no mode stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_permission() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        objects = open_objects(str(root), create=True)
        objects.put("closed/x", b"1")
        objects.put("open/x", b"1")
        (root / "closed").chmod(0)
        for folder in (root, root / "open", root / ".tmp"):
            folder.chmod(0o555)
        try:
            with ordinary_user():
                assert objects.get("open/x") == b"1"
                for operation in (
                    lambda: objects.get("closed/x"),
                    lambda: objects.size("closed/x"),
                    lambda: list(objects.list("")),
                    lambda: objects.put("open/y", b""),
                    lambda: objects.put_if("open/y", b"", None),
                    lambda: objects.delete("open/x"),
                ):
                    with pytest.raises(AccessDeniedError, match=r"(?i)permission denied"):
                        operation()
                with pytest.raises(AccessDeniedError, match=r"(?i)permission denied"):
                    open_objects(f"{root}/new/store", create=True)
        finally:
            for folder in (root, root / "open", root / "closed", root / ".tmp"):
                folder.chmod(0o755)
        assert objects.get("open/x") == b"1"


def test_losing_leaves_nothing_behind(objects: ObjectStore, root: Path) -> None:
    objects.put_if("refs/x", b"1", None)
    with pytest.raises(ConflictError):
        objects.put_if("refs/x", b"2", None)
    assert list((root / ".tmp").iterdir()) == []
