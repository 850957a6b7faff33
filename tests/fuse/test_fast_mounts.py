"""Fast mounts of real snapshots through the real server, and of hydrated ones without any."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.background import MountRequest, start_background, start_mount
from envstore.fuse.fast import lay_fast_path
from envstore.fuse.hydrate import hydrate
from envstore.fuse.mount import active_mounts, unmount
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.records import MountRecord
from envstore.fuse.stats import read_stats
from envstore.store.cache import BlobCache
from envstore.store.repository import Repository
from tests.composing import store_composed
from tests.fuse.images import mounts_below
from tests.stores import Store
from tests.trees import describe, fill, noise, prose

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount overlayfs")

PATIENCE = 30


class Site:
    """A pushed tree, and the place where it is mounted fast, with an empty cache."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.tree = base / "tree"
        self.store = Store(base / "store")
        self.cache = BlobCache(base / "node cache")
        self.places: list[Path] = []
        monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(self.cache.root))
        monkeypatch.setenv("XDG_STATE_HOME", str(base / "state"))

    def push(self) -> bytes:
        self.store.push(self.tree)
        return self.store.repository.resolve("tree")

    def place(self) -> Path:
        made = self.base / f"place {len(self.places)}"
        made.mkdir()
        self.places.append(made)
        return made

    def mount(self) -> tuple[Path, MountRecord]:
        place = self.place()
        request = MountRequest(self.store.url, "tree", str(place), fast_path="on")
        return place, start_background(request)

    def files(self) -> set[bytes]:
        return {path.read_bytes() for path in self.cache.files.glob("*/*")}

    def hydrate(self, snapshot: bytes) -> None:
        stored = self.store.repository
        hydrate(Repository(stored.objects, stored.config, self.cache), snapshot, ref="tree")

    def close(self) -> None:
        self.store.close()
        for place in self.places:
            if os.path.ismount(place):
                unmount(place)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path, monkeypatch)
    yield made
    made.close()
    assert mounts_below(tmp_path) == []


def test_an_awkward_tree(site: Site) -> None:
    fill(site.tree)
    site.push()
    place, record = site.mount()
    found = find_mount(str(place))
    assert found is not None
    assert (found.type, found.source) == ("overlay", "envstore:tree")
    assert record.fast_path
    assert describe(place) == describe(site.tree)
    # Once more, now that files may have become local ones.
    assert describe(place) == describe(site.tree)


def test_names_are_the_kernel_s(site: Site) -> None:
    site.tree.mkdir()
    for number in range(200):
        (site.tree / f"{number}").write_bytes(prose(number, 2000))
    site.push()
    place, record = site.mount()
    before = read_stats(Path(record.stats))["requests"]
    assert sum(path.stat().st_size for path in place.iterdir()) == 200 * 2000
    assert not (place / "missing").exists()
    assert read_stats(Path(record.stats))["requests"] == before


def test_composed_files(site: Site) -> None:
    contents = {b"header": b"{}", b"tensor": noise("tensor", 2_500_000)}
    store_composed(site.store, contents, {b"whole": [b"header", b"tensor", b"tensor"]}, "tree")
    whole = contents[b"header"] + 2 * contents[b"tensor"]
    for _ in range(2):
        place, record = site.mount()
        assert record.fast_path
        assert (place / "whole").read_bytes() == whole
        assert (place / "tensor").read_bytes() == contents[b"tensor"]
        deadline = time.monotonic() + PATIENCE
        while whole not in site.files():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        unmount(place)


def test_what_was_read_becomes_local(site: Site) -> None:
    site.tree.mkdir()
    contents = {name: noise(name, 700_000) for name in ("read", "left")}
    for name, data in contents.items():
        (site.tree / name).write_bytes(data)
    site.push()
    place, _ = site.mount()
    assert (place / "read").read_bytes() == contents["read"]
    deadline = time.monotonic() + PATIENCE
    while site.files() != {contents["read"]}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The next mount reads it without asking its server.
    second, record = site.mount()
    before = read_stats(Path(record.stats))["requests"]
    assert (second / "read").read_bytes() == contents["read"]
    assert read_stats(Path(record.stats))["requests"] == before
    assert (second / "left").read_bytes() == contents["left"]
    assert read_stats(Path(record.stats))["requests"] != before


def test_eviction_under_a_mount_harms_nobody(site: Site) -> None:
    site.tree.mkdir()
    contents = {f"{number}": noise(number, 50_000) for number in range(20)}
    for name, data in contents.items():
        (site.tree / name).write_bytes(data)
    snapshot = site.push()
    site.hydrate(snapshot)
    place, _ = site.mount()
    opened = [(place / name).open("rb") for name in ("1", "2", "3")]
    assert (place / "4").read_bytes() == contents["4"]
    shutil.rmtree(site.cache.root / "hydrated")
    site.cache.clear()
    assert site.files() == set()
    for name, file in zip(("1", "2", "3"), opened, strict=True):
        with file:
            assert file.read() == contents[name]
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert {name: (place / name).read_bytes() for name in contents} == contents


def test_hydrated_snapshots_need_neither_store_nor_server(site: Site) -> None:
    fill(site.tree)
    snapshot = site.push()
    site.hydrate(snapshot)
    shutil.rmtree(site.store.root / "objects")
    place = site.place()
    request = MountRequest("file:///nowhere", f"@{snapshot.hex()[:12]}", str(place), fast_path="on")
    record = start_mount(request, "off")
    assert (record.snapshot, record.fast_path) == (snapshot.hex(), True)
    processes = subprocess.check_output(["ps", "-eo", "args"], text=True)
    assert str(place) not in processes
    assert describe(place) == describe(site.tree)
    assert [found.mountpoint for found, _ in active_mounts()] == [str(place)]
    unmount(place)
    assert active_mounts() == []
    assert os.listdir(place) == []


def test_a_killed_server_is_not_missed(site: Site) -> None:
    site.tree.mkdir()
    contents = {f"{number}": noise(number, 300_000) for number in range(8)}
    for name, data in contents.items():
        (site.tree / name).write_bytes(data)
    site.push()
    place, record = site.mount()
    assert (place / "0").read_bytes() == contents["0"]
    children = subprocess.check_output(
        ["pgrep", "-P", str(record.holder_pid)], text=True
    ).split()  # fmt: skip
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert {name: (place / name).read_bytes() for name in contents} == contents


def test_without_an_image_the_mount_is_plain_unless_it_must_not_be(site: Site) -> None:
    site.tree.mkdir()
    (site.tree / "file").write_bytes(b"content")
    site.push()
    (site.cache.root / "images").write_text("in the way of the images")
    place = site.place()
    request = MountRequest(site.store.url, "tree", str(place), True, fast_path="auto")
    record = start_background(request)
    mounted = find_mount(str(place))
    assert mounted is not None
    assert (record.fast_path, mounted.type) == (False, "fuse.envstore")
    assert (place / "file").read_bytes() == b"content"
    with pytest.raises(EnvstoreError, match="image"):
        site.mount()


def test_what_cannot_be_laid_is_shown_by_the_server_unless_it_must_be_laid(tmp_path: Path) -> None:
    for name in ("server/tree", "server/tree.objects", "local", "place"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "server" / "tree" / "file").write_text("content")
    parts = {"image": str(tmp_path / "none"), "local": str(tmp_path / "local")}
    place = str(tmp_path / "place")
    where = (str(tmp_path / "server"), "tree", place, "envstore:x")
    with pytest.raises(EnvstoreError):
        lay_fast_path(parts, *where, required=True)
    assert find_mount(place) is None
    assert lay_fast_path(parts, *where, required=False) is False
    try:
        assert (tmp_path / "place" / "file").read_text() == "content"
    finally:
        subprocess.run(["umount", place], check=True)


def test_metrics_of_a_mount_take_a_server_of_its_own(site: Site) -> None:
    site.tree.mkdir()
    (site.tree / "file").write_bytes(b"content")
    site.push()
    place = site.place()
    socket = str(site.base / "metrics")
    request = MountRequest(site.store.url, "tree", str(place), metrics=socket)
    with pytest.raises(UsageError, match="no metrics of its own"):
        start_mount(request, "on")
    assert find_mount(str(place)) is None
    assert start_mount(request, "auto").control
