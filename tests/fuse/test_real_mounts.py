"""Real mounts of real snapshots: every byte, whoever reads it, and what happens on failures."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, NotFoundError, UsageError
from envstore.fuse.background import MountRequest, start_background
from envstore.fuse.mount import active_mounts, unmount
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.sockets import ask
from envstore.fuse.stats import read_stats
from tests.stores import Store
from tests.trees import describe, fill, noise, plain

MIB = 1 << 20
ROOT = os.geteuid() == 0


class Mount:
    """A store, a tree in it, and the place where it is mounted with an empty cache."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.store = Store(base / "store")
        self.tree = base / "tree"
        self.place = base / "place"
        self.place.mkdir()
        self.cache = base / "node cache"
        self.record: MountRecord | None = None
        monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(self.cache))
        monkeypatch.setenv("XDG_STATE_HOME", str(base / "state"))

    def mount(self) -> Path:
        self.record = start_background(MountRequest(self.store.url, "tree", str(self.place)))
        return self.place

    def push(self, *, kind: str = "dir") -> None:
        self.store.push(self.tree, kind=kind, normalise=kind != "dir")

    def log(self) -> str:
        assert self.record is not None
        return Path(self.record.log).read_text()

    def stats(self) -> dict[str, dict[str, int]]:
        assert self.record is not None
        return read_stats(Path(self.record.stats))

    def packs(self) -> Path:
        return self.base / "store" / "objects" / "packs"

    def close(self) -> None:
        self.store.close()
        if os.path.ismount(self.place):
            unmount(self.place)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    made = Mount(tmp_path, monkeypatch)
    yield made
    made.close()


def fails_with(number: int, path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno == number
    return False


def test_every_entry_of_an_awkward_tree(site: Mount) -> None:
    fill(site.tree)
    site.push()
    assert describe(site.mount()) == describe(site.tree)


def test_a_normalised_tree(site: Mount) -> None:
    plain(site.tree, "normal")
    (site.tree / "program").write_text("#!/bin/sh\necho ran\n")
    (site.tree / "program").chmod(0o700)
    site.push(kind="model")
    place = site.mount()
    assert describe(place, times=False, modes=False) == describe(
        site.tree, times=False, modes=False
    )
    assert (place / "program").stat().st_mode & 0o7777 == 0o755
    assert subprocess.check_output([place / "program"]) == b"ran\n"
    assert {path.stat().st_mtime for path in place.rglob("*")} == {315_619_200}


def test_a_single_file(site: Mount) -> None:
    site.tree.write_bytes(b"weights")
    site.push()
    place = site.mount()
    assert os.listdir(place) == ["tree"]
    assert (place / "tree").read_bytes() == b"weights"
    assert place.stat().st_mode & 0o777 == 0o755


def test_equal_content_is_one_inode(site: Mount) -> None:
    site.tree.mkdir()
    for name in ("a", "b", "c"):
        (site.tree / name).write_bytes(b"the same")
    (site.tree / "c").chmod(0o755)
    site.push(kind="model")
    place = site.mount()
    inodes = {name: (place / name).stat().st_ino for name in ("a", "b", "c")}
    assert inodes["a"] == inodes["b"] != inodes["c"]


def test_a_large_directory_is_listed_whole(site: Mount) -> None:
    site.tree.mkdir()
    for number in range(20_000):
        (site.tree / f"{number:06}").touch()
    site.push()
    place = site.mount()
    assert sorted(os.listdir(place)) == [f"{number:06}" for number in range(20_000)]
    with os.scandir(place) as listing:
        first = [next(listing).name for _ in range(5000)]
    assert len(set(first)) == 5000


def test_ten_readers_of_one_file_fetch_it_once(site: Mount) -> None:
    site.tree.mkdir()
    content = noise("shared", 3 * MIB)
    (site.tree / "shared").write_bytes(content)
    site.push()
    place = site.mount()
    before = site.stats()["fetched"]
    with ThreadPoolExecutor(10) as pool:
        read = list(pool.map(lambda _: (place / "shared").read_bytes(), range(10)))
    assert all(data == content for data in read)
    after = site.stats()["fetched"]
    assert after["bytes"] - before["bytes"] < 1.1 * len(content)


def test_random_and_mapped_reads(site: Mount) -> None:
    site.tree.mkdir()
    content = noise("mapped", 9 * MIB + 123)
    (site.tree / "big").write_bytes(content)
    site.push()
    place = site.mount()
    with open(place / "big", "rb") as file:
        for offset in (0, 1, 4095, MIB - 1, 5 * MIB + 77, len(content) - 3, len(content), 10 * MIB):
            assert os.pread(file.fileno(), 70_000, offset) == content[offset : offset + 70_000]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[7 * MIB : 7 * MIB + 9] == content[7 * MIB : 7 * MIB + 9]
            assert hashlib.sha256(mapped).digest() == hashlib.sha256(content).digest()


def test_concurrent_readers_of_many_files(site: Mount) -> None:
    plain(site.tree, "many", files=300)
    site.push()
    place = site.mount()
    files = [path.relative_to(site.tree) for path in site.tree.rglob("*") if path.is_file()]

    def same(path: Path) -> bool:
        return (place / path).read_bytes() == (site.tree / path).read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(same, files * 3))


def test_nothing_can_be_changed(site: Mount) -> None:
    plain(site.tree, "fixed", files=3)
    site.push()
    place = site.mount()
    file = next(path for path in place.rglob("*") if path.is_file())
    changes: list[Callable[[], object]] = [
        partial(file.write_bytes, b"x"),
        (place / "new").touch,
        (place / "new").mkdir,
        file.unlink,
        partial(file.chmod, 0o777),
        partial(file.rename, place / "other"),
        partial(os.symlink, "x", place / "link"),
    ]
    for change in changes:
        with pytest.raises(OSError, match="Read-only file system"):
            change()


def test_a_damaged_frame_hurts_its_file_alone_and_heals(site: Mount) -> None:
    site.tree.mkdir()
    # Each fills frames of its own.
    for name in ("first", "second", "third"):
        (site.tree / name).write_bytes(noise(name, 4 * MIB))
    site.push()
    place = site.mount()
    (pack,) = [path for path in site.packs().rglob("*") if path.is_file()]
    sound = pack.read_bytes()
    at = sound.index(noise("second", 4 * MIB)[2 * MIB : 2 * MIB + 32])
    pack.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    assert fails_with(errno.EIO, place / "second")
    assert (place / "first").read_bytes() == noise("first", 4 * MIB)
    assert (place / "third").read_bytes() == noise("third", 4 * MIB)
    assert "second" in site.log()
    assert pack.name in site.log()
    assert "Traceback" not in site.log()
    pack.write_bytes(sound)
    assert (place / "second").read_bytes() == noise("second", 4 * MIB)


def test_a_store_that_goes_away_and_comes_back(site: Mount) -> None:
    site.tree.mkdir()
    (site.tree / "before").write_bytes(noise("before", 2 * MIB))
    (site.tree / "after").write_bytes(noise("after", 2 * MIB))
    site.push()
    place = site.mount()
    assert (place / "before").read_bytes() == noise("before", 2 * MIB)
    away = site.packs().with_name("away")
    site.packs().rename(away)
    assert fails_with(errno.EIO, place / "after")
    assert (place / "before").read_bytes() == noise("before", 2 * MIB)
    assert sorted(os.listdir(place)) == ["after", "before"]
    away.rename(site.packs())
    assert (place / "after").read_bytes() == noise("after", 2 * MIB)


def test_a_damaged_cache_is_noticed_and_mended(site: Mount) -> None:
    site.tree.mkdir()
    (site.tree / "file").write_bytes(noise("cached", 3 * MIB))
    site.push()
    place = site.mount()
    assert (place / "file").read_bytes() == noise("cached", 3 * MIB)
    unmount(place)
    for blob in (site.cache / "blobs").rglob("*"):
        if blob.is_file() and blob.stat().st_size > MIB // 2:
            data = bytearray(blob.read_bytes())
            data[1000] ^= 1
            blob.write_bytes(data)
    assert (site.mount() / "file").read_bytes() == noise("cached", 3 * MIB)
    assert site.stats()["damaged_blobs"]


@pytest.mark.skipif(not ROOT, reason="mounting a small tmpfs takes root")
def test_a_full_cache_disk_makes_reading_slow_and_not_impossible(site: Mount) -> None:
    site.tree.mkdir()
    (site.tree / "file").write_bytes(noise("large", 5 * MIB))
    site.push()
    site.cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", site.cache], check=True)
    try:
        place = site.mount()
        ballast = site.cache / "somebody else's"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(4 * MIB))
        assert (place / "file").read_bytes() == noise("large", 5 * MIB)
        assert "No space left" in site.log()
        ballast.unlink()
        # A frame at a time fits, older ones making room.
        assert (place / "file").read_bytes() == noise("large", 5 * MIB)
        unmount(place)
    finally:
        subprocess.run(["umount", "--lazy", site.cache], check=True)


def test_a_mount_whose_processes_were_all_killed_can_be_cleared(site: Mount) -> None:
    plain(site.tree, "killed", files=3)
    site.push()
    place = site.mount()
    assert site.record is not None
    found = ask(site.record.control, 60, ask="status")
    processes = [os.pidfd_open(found[name]) for name in ("holder_pid", "server_pid")]
    # Stopped first, or one would replace the other before it is killed, too.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            signal.pidfd_send_signal(process, number)
    # The mount dies before the processes have let go of everything.
    for process in processes:
        select.select([process], [], [])
        os.close(process)
    RecordFiles(str(place)).wait()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.listdir(place)
    with pytest.raises(UsageError, match="has died"):
        site.mount()
    unmount(place)
    assert os.listdir(place) == []
    assert describe(site.mount()) == describe(site.tree)


def test_where_nothing_can_be_mounted(site: Mount) -> None:
    plain(site.tree, "places", files=3)
    site.push()
    full = site.base / "full"
    full.mkdir()
    (full / "file").touch()
    for place, error, says in (
        (full, UsageError, "not empty"),
        (full / "file", UsageError, "not a directory"),
        (site.base / "nowhere", NotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=says):
            start_background(MountRequest(site.store.url, "tree", str(place)))
    site.mount()
    with pytest.raises(UsageError, match="already a mount"):
        start_background(MountRequest(site.store.url, "tree", str(site.place)))
    with pytest.raises(EnvstoreError, match="no ref"):
        start_background(MountRequest(site.store.url, "other", str(_made(site.base / "free"))))
    assert [record.mountpoint for record, _ in active_mounts()] == [str(site.place)]


def _made(path: Path) -> Path:
    path.mkdir()
    return path
