"""One snapshot mounted where its files do not expect it: at several paths at once, in every way."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.fuse.hydrate import hydrate
from envstore.fuse.hydrated import drop_hydrated, find_hydrated
from envstore.fuse.keeping import MountRequest
from envstore.fuse.overview import overview
from envstore.fuse.recorder import read_recording
from envstore.fuse.upgrade import upgrade_mount
from envstore.store.cache import BlobCache
from envstore.store.profiles import new_profile, save_profile
from envstore.store.repository import Repository
from tests.fuse.lives import PATIENCE, ROOT, kill, until, within
from tests.fuse.test_node import Site as NodeSite
from tests.relocating import Made, RelocatingSource, compare, sample
from tests.stores import Store

needs_root = pytest.mark.skipif(not ROOT, reason="only root has a fast path or a node server")


class Site:
    """A pushed sample, and mounts of it with an empty cache."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files = sample()
        self.store = Store(base / "store")
        self.snapshot = self.store.push(RelocatingSource(self.files), "tree").snapshot
        self.cache = BlobCache(base / "node cache")
        self.places: list[Path] = []

    def mount(self, name: str, **more: object) -> Path:
        from envstore.fuse.background import start_mount

        place = self.base / name
        place.mkdir(exist_ok=True, parents=True)
        node = str(more.pop("node", "off"))
        ref = str(more.pop("ref", "tree"))
        request = MountRequest(self.store.url, ref, str(place), **more)  # type: ignore[arg-type]
        self.places.append(place)
        start_mount(request, node)
        return place

    def hydrate(self) -> None:
        stored = self.store.repository
        hydrate(Repository(stored.objects, stored.config, self.cache), self.snapshot, ref="tree")

    def close(self) -> None:
        from envstore.fuse.mount import unmount

        self.store.close()
        for place in self.places:
            if os.path.ismount(place):
                unmount(place)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "here" / "node cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    # As a pod's path: short enough for the file that has room for 80 characters.
    short = Path("/tmp") / f"es{os.getpid()}"
    (tmp_path / "here").mkdir()
    short.symlink_to(tmp_path / "here")
    made = Site(short)
    yield made
    made.close()
    short.unlink()


def same(place: Path, prefix: bytes, files: dict[bytes, Made]) -> None:
    """Compare everything, by whole files, mapped memory and random ranges."""
    compare(files, place, prefix)
    rng = random.Random(prefix)
    for path, made in files.items():
        if made.link or not made.data:
            continue
        expected = made.at(prefix)
        with (place / path.decode()).open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                found, wanted = hashlib.sha256(mapped), hashlib.sha256(expected)
                assert found.digest() == wanted.digest(), path
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in range(30):
                at, size = rng.randrange(len(expected) + 5), rng.randrange(1, 9000)
                assert os.pread(file.fileno(), size, at) == expected[at : at + size], path


def test_at_two_paths_at_once(site: Site) -> None:
    one, two = site.mount("one"), site.mount("longer/place")
    same(one, bytes(one), site.files)
    same(two, bytes(two), site.files)
    same(one, bytes(one), site.files)
    sizes = {(place / "etc/many.conf").stat().st_size for place in (one, two)}
    assert len(sizes) == 2
    assert {mount.prefix for mount in overview()} == {str(one), str(two)}


def test_equal_files_are_one(site: Site) -> None:
    one = site.mount("one")
    assert (one / "bin/tool").stat().st_ino == (one / "bin/same").stat().st_ino
    assert (one / "lib/plain.so").stat().st_ino == (one / "lib/copy.so").stat().st_ino


def test_for_where_a_pod_sees_it(site: Site) -> None:
    place = site.mount("a" * 100 + "/place", prefix="/opt/env")
    same(place, b"/opt/env", site.files)


def test_a_path_that_is_too_long_is_refused_by_name(site: Site) -> None:
    with pytest.raises(UsageError, match=r"short-0\.1 has room for 80 only \(in lib/libshort\.so"):
        site.mount("a" * 100)
    assert overview() == []


def test_a_server_that_is_killed_and_one_that_is_replaced(site: Site) -> None:
    place = site.mount("one")
    with (place / "lib/libsample.so").open("rb") as opened:
        expected = site.files[b"lib/libsample.so"].at(bytes(place))
        for round in range(3):
            (mount,) = overview()
            before = mount.server_pid
            assert before is not None
            if round < 2:
                kill(before, signal.SIGKILL)
            else:
                upgrade_mount(place)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(opened.fileno(), 50_000, 290_000) == expected[290_000:340_000]
            same(place, bytes(place), site.files)
            until(lambda before=before: overview()[0].server_pid not in (None, before))
    assert overview()[0].prefix == str(place)


@needs_root
def test_over_the_fast_path(site: Site) -> None:
    first, second = site.mount("one", fast_path="on"), site.mount("two more", fast_path="on")
    for _ in range(2):
        same(first, bytes(first), site.files)
        same(second, bytes(second), site.files)
    assert {mount.fast_path for mount in overview()} == {True}
    images = list((site.cache.root / "images").iterdir())
    assert len(images) == 2
    # What was read becomes files of this machine, each as it is at its own prefix.
    wanted = {
        made.at(prefix)
        for prefix in (bytes(first), bytes(second))
        for made in site.files.values()
        if made.mode
    }
    until(lambda: wanted <= {path.read_bytes() for path in site.cache.files.glob("*/*")})
    again = site.mount("again", fast_path="on", prefix=str(first))
    assert len(list((site.cache.root / "images").iterdir())) == 2
    same(again, bytes(first), site.files)


@needs_root
def test_hydrated_and_without_its_store(site: Site) -> None:
    site.hydrate()
    shutil.rmtree(site.store.root / "objects")
    ref = f"@{site.snapshot.hex()}"
    one = site.mount("one", ref=ref, fast_path="on")
    two = site.mount("two more", ref=ref, fast_path="on")
    three = site.mount("three", ref=ref, prefix=str(one), fast_path="on")
    for _ in range(2):
        same(one, bytes(one), site.files)
        same(two, bytes(two), site.files)
        same(three, bytes(one), site.files)
        assert {mount.state for mount in overview()} == {"local"}
        BlobCache(site.cache.root).clear()  # what mounts need stays
        Path("/proc/sys/vm/drop_caches").write_text("3")
    found = find_hydrated(site.cache, ref)
    assert found is not None
    assert found.record.relocates
    assert len(list((found.directory / "prefixes").iterdir())) == 2
    with pytest.raises(UsageError, match=r"short-0\.1 has room"):
        site.mount("x" * 100, ref=ref, fast_path="auto")
    site.close()
    assert drop_hydrated(site.cache, site.snapshot)
    site.cache.clear()
    assert site.cache.usage().bytes == 0


@needs_root
def test_hydration_that_a_killed_mount_has_begun(site: Site) -> None:
    site.hydrate()
    ref = f"@{site.snapshot.hex()}"
    one = site.mount("one", ref=ref, fast_path="on")
    found = find_hydrated(site.cache, ref)
    assert found is not None
    subprocess.run(["umount", one], check=True)
    (prefix,) = (found.directory / "prefixes").iterdir()
    shutil.rmtree(prefix / "image")
    pins = sorted((prefix / "pins").glob("*/*"))
    pins[0].unlink()
    os.truncate(pins[1], 5)
    one = site.mount("one", ref=ref, fast_path="on")
    same(one, bytes(one), site.files)


def test_a_recording_holds_for_any_prefix(site: Site) -> None:
    place = site.mount("one", record=True, profile="none")
    conf = (place / "etc/many.conf").read_bytes()
    with (place / "lib/libsample.so").open("rb") as library:
        os.pread(library.fileno(), 100, 350_000)
    (mount,) = overview()
    from envstore.fuse.stats import read_stats

    ranges = read_recording(read_stats(Path(mount.stats))["recording"])
    stored = {path: len(made.data) for path, made in site.files.items()}
    assert {one.path for one in ranges} == {b"etc/many.conf", b"lib/libsample.so"}
    assert all(one.offset + one.length <= stored[one.path] for one in ranges)
    whole = next(one for one in ranges if one.path == b"etc/many.conf")
    assert whole.length > len(conf)
    manifest = site.store.repository.snapshot(site.snapshot).manifest
    save_profile(
        site.store.repository.objects, manifest, "start", new_profile(ranges, ["x"]), replace=True
    )
    other = site.mount("other place")
    same(other, bytes(other), site.files)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeSite]:
    from tests.fuse.lives import lived

    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, NodeSite) as made:
        made.mount()
        yield made


@needs_root
@pytest.mark.parametrize("fast", ["off", "on"])
def test_through_a_node_server(node: NodeSite, fast: str) -> None:
    from envstore.fuse.background import start_mount
    from envstore.fuse.mount import unmount

    files = sample()
    node.store.push(RelocatingSource(files), "tree")
    plain = {path: made for path, made in files.items() if not made.mode and not made.link}
    node.store.push(RelocatingSource(plain, "plain"), "plain")

    def show(name: str, prefix: str, ref: str = "tree") -> Path:
        place = node.base / name
        place.mkdir(exist_ok=True)
        request = MountRequest(
            node.store.url, ref, str(place), profile="none", fast_path=fast, prefix=prefix
        )
        start_mount(request, "on")
        return place

    mounts = {show(f"{n}", prefix): prefix for n, prefix in enumerate(["/a/b", "/long/er", "/a/b"])}
    twice = [show("plain one", "/a", "plain"), show("plain two", "/b", "plain")]
    for place, prefix in mounts.items():
        same(place, prefix.encode(), files)
    for place in twice:
        same(place, b"/whatever", plain)
    told = node.told()
    assert told["snapshots"] == 3  # one for each prefix, and what is the same at all
    assert sorted(one["prefix"] for one in told["mounts"]) == [
        *("/a", "/a/b", "/a/b", "/b", "/long/er"),
    ]
    node.kill_server()
    for place, prefix in mounts.items():
        same(place, prefix.encode(), files)
    # Dropped, and brought back by who still has a file open.
    first, second, third = mounts
    with (second / "lib/libsample.so").open("rb") as opened:
        unmount(second, lazy=True)
        expected = files[b"lib/libsample.so"].at(b"/long/er")
        assert os.pread(opened.fileno(), 90_000, 280_000) == expected[280_000:370_000]
    with pytest.raises(UsageError, match=r"short-0\.1 has room for 80"):
        show("too long", "/" + "x" * 80)
    for place in (first, third, *twice):
        within(PATIENCE, "umount", place)


@needs_root
def test_a_snapshot_that_was_dropped_comes_back_for_its_prefix(node: NodeSite) -> None:
    from envstore.fuse.background import start_mount
    from envstore.fuse.mount import unmount

    files = sample()
    node.store.push(RelocatingSource(files), "tree")

    def show(prefix: str) -> Path:
        place = node.base / prefix.strip("/")
        place.mkdir(exist_ok=True)
        request = MountRequest(node.store.url, "tree", str(place), profile="none", prefix=prefix)
        start_mount(request, "on")
        return place

    one, two = show("/one"), show("/two-two")
    kept = {place: os.stat(place / "lib/libsample.so").st_ino for place in (one, two)}
    assert len({*kept.values()}) == 2
    with (two / "etc/many.conf").open("rb") as opened:
        for place in (one, two):
            subprocess.run(["umount", "-l", place], check=True, timeout=30)
        until(lambda: node.told()["snapshots"] == 0, "the end of the leases")
        node.kill_server()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert opened.read() == files[b"etc/many.conf"].at(b"/two-two")
    for turn in range(2):
        for prefix in ("/two-two", "/one"):
            place = show(prefix)
            assert os.stat(place / "lib/libsample.so").st_ino == kept[place]
            same(place, prefix.encode(), files)
            if turn:
                unmount(place)
            else:
                subprocess.run(["umount", place], check=True, timeout=30)
                until(lambda: node.told()["mounts"] == [], "the end of the lease")
