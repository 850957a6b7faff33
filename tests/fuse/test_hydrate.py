"""Whole snapshots on this machine: fetched once, verified, kept, and mounted without a store."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import (
    ConflictError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    UnavailableError,
    UsageError,
)
from envstore.fuse import hydrate as hydration
from envstore.fuse.hydrate import hydrate
from envstore.fuse.hydrated import (
    Hydrated,
    claim,
    drop_hydrated,
    find_hydrated,
    hydrated,
    list_hydrated,
)
from envstore.fuse.overlay import mount_fast
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.repository import Repository
from tests.faulty import FaultyStore
from tests.stores import Store
from tests.trees import describe, fill, noise, prose

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount overlayfs")


class Site:
    """A pushed tree, and a node with an empty cache."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tree = base / "tree"
        self.store = Store(base / "store", wrap=FaultyStore)
        self.mounts: list[Path] = []
        self.use(1 << 30)

    def use(self, capacity: int) -> None:
        """Begin anew with a cache of so many bytes, empty unless there is one."""
        self.cache = BlobCache(self.base / "node", capacity)
        stored = self.store.repository
        self.repository = Repository(stored.objects, stored.config, self.cache)

    def plain(self) -> None:
        self.tree.mkdir()
        for number in range(300):
            (self.tree / f"file {number}").write_bytes(prose(number, 500 + 37 * number))
        (self.tree / "twin").write_bytes(prose(7, 500 + 37 * 7))
        (self.tree / "empty").touch()
        (self.tree / "large").write_bytes(noise("large", 5 * MIB + 3))

    def push(self) -> bytes:
        self.store.push(self.tree)
        self.faults.clear()
        return self.store.repository.resolve("tree")

    @property
    def faults(self) -> FaultyStore:
        return self.store.faults

    def mount(self, found: Hydrated) -> Path:
        place = self.base / f"place {len(self.mounts)}"
        place.mkdir()
        mount_fast(found.image(), found.local, None, place, source="envstore:tree")
        self.mounts.append(place)
        return place

    def close(self) -> None:
        self.store.close()
        for place in self.mounts:
            subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()
    assert os.listdir(made.cache.root / "partial") == []


def lose(store: Store) -> None:
    """Let nothing of the store be found any more."""
    shutil.rmtree(store.root / "objects")


@needs_root
def test_an_awkward_tree_mounts_without_its_store(site: Site) -> None:
    fill(site.tree)
    snapshot = site.push()
    done = hydrate(site.repository, snapshot, ref="tree")
    lose(site.store)
    shutil.rmtree(site.cache.root / "blobs")
    found = hydrated(site.cache, snapshot)
    assert found is not None
    assert found == done.hydrated
    assert describe(site.mount(found)) == describe(site.tree)


def test_what_is_recorded(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    assert list_hydrated(site.cache) == []
    assert hydrated(site.cache, snapshot) is None
    done = hydrate(site.repository, snapshot, ref="team/tree")
    manifest = site.repository.snapshot(snapshot).manifest
    record = done.hydrated.record
    assert (record.snapshot, record.manifest) == (snapshot.hex(), manifest.hex())
    assert (record.ref, record.files) == ("team/tree", 301)  # a twin, and one without content
    assert record.bytes == sum(p.stat().st_size for p in site.tree.iterdir()) - 500 - 37 * 7
    assert (done.missing_files, done.missing_bytes) == (301, record.bytes)
    assert list_hydrated(site.cache) == [done.hydrated]
    for name in (snapshot, manifest):
        assert hydrated(site.cache, name) == done.hydrated
    assert hydrated(site.cache, digest(b"other")) is None
    text = f"@{snapshot.hex()}"
    for given in (text, text[:13], text[:5]):
        assert find_hydrated(site.cache, given) == done.hydrated
    for given in ("tree", "team/tree", text[:4], "@ffff0000", "@", text + "0"):
        assert find_hydrated(site.cache, given) is None


def test_each_frame_is_fetched_once_with_few_requests(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    done = hydrate(site.repository, snapshot)
    assert site.faults.count("get_range") <= 4
    packs = site.store.root / "objects" / "packs"
    stored = sum(path.stat().st_size for path in packs.rglob("*") if path.is_file())
    assert done.fetched_bytes <= stored * 1.05 + 100_000
    site.faults.clear()
    again = hydrate(site.repository, snapshot)
    assert (again.missing_files, again.missing_bytes) == (0, 0)
    assert site.faults.count("get_range") == 0


def test_frames_that_several_batches_need_are_fetched_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.tree.mkdir()
    blocks = [noise(number, 300_000) for number in range(6)]
    for number in range(40):
        mixed = [blocks[(number * step) % 6] for step in (1, 2, 3, 5)]
        (site.tree / f"{number:02}").write_bytes(b"".join(mixed) + b"%d" % number)
    monkeypatch.setattr(hydration, "_BATCH_FILES", 3)
    snapshot = site.push()
    done = hydrate(site.repository, snapshot)
    packs = site.store.root / "objects" / "packs"
    stored = sum(path.stat().st_size for path in packs.rglob("*") if path.is_file())
    assert done.fetched_bytes <= stored * 1.05 + 100_000
    for number in range(40):
        path = site.tree / f"{number:02}"
        assert path.read_bytes() in {p.read_bytes() for p in site.cache.files.glob("*/*")}


def test_what_the_cache_has_is_not_fetched(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    manifest = site.repository.snapshot(snapshot).manifest
    locations = site.repository.locations(manifest, site.repository.root(manifest))
    for frame in locations.frames:
        site.repository.fetcher.load(frame)
    site.faults.clear()
    hydrate(site.repository, snapshot)
    assert site.faults.count("get_range") == 0


def test_damaged_blobs_are_fetched_again(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    manifest = site.repository.snapshot(snapshot).manifest
    locations = site.repository.locations(manifest, site.repository.root(manifest))
    for frame in locations.frames:
        site.repository.fetcher.load(frame)
        path = os.fsdecode(site.cache.path(frame.digest))
        with open(path, "r+b") as blob:
            blob.write(b"damaged")
    done = hydrate(site.repository, snapshot)
    assert done.hydrated.record.files == 301
    contents = {path.read_bytes() for path in site.cache.files.glob("*/*")}
    assert contents == {path.read_bytes() for path in site.tree.iterdir()} - {b""}


def test_two_snapshots_share_their_files(site: Site) -> None:
    site.plain()
    first = site.push()
    hydrate(site.repository, first)
    (site.tree / "one more").write_bytes(b"more")
    second = site.push()
    done = hydrate(site.repository, second)
    assert (done.missing_files, done.missing_bytes) == (1, 4)
    assert len(list_hydrated(site.cache)) == 2
    assert drop_hydrated(site.cache, first)
    site.cache.clear()
    assert len(list(site.cache.files.glob("*/*"))) == 302
    assert drop_hydrated(site.cache, second)
    assert not drop_hydrated(site.cache, second)
    site.cache.clear()
    assert list(site.cache.files.glob("*/*")) == []
    assert list_hydrated(site.cache) == []
    assert site.cache.usage().bytes == 0


def test_a_store_that_fails_in_the_middle(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.tree.mkdir()
    for number in range(12):
        (site.tree / f"{number}").write_bytes(noise(number, 3 * MIB))
    monkeypatch.setattr(hydration, "_BATCH_BYTES", 6 * MIB)
    snapshot = site.push()
    error = UnavailableError("the store has gone away")
    fault = site.faults.fail("get_range", error, skip=5)
    with pytest.raises(UnavailableError, match="gone away"):
        hydrate(site.repository, snapshot)
    assert hydrated(site.cache, snapshot) is None
    made = len(list(site.cache.files.glob("*/*")))
    assert 0 < made < 12
    assert os.listdir(site.cache.root / "partial") == []
    fault.remove()
    assert hydrate(site.repository, snapshot).missing_files == 12 - made


def test_a_damaged_store_is_refused(site: Site) -> None:
    site.tree.mkdir()
    (site.tree / "large").write_bytes(noise("large", 20 * MIB))
    snapshot = site.push()
    for pack in (site.store.root / "objects" / "packs").rglob("*"):
        if pack.is_file() and pack.stat().st_size > 10 * MIB:
            with pack.open("r+b") as opened:
                opened.seek(9 * MIB)
                opened.write(b"damage")
    with pytest.raises(CorruptError, match="frame"):
        hydrate(site.repository, snapshot)
    assert list(site.cache.files.glob("*/*")) == []
    assert hydrated(site.cache, snapshot) is None


def test_a_cap_that_is_too_small_is_said_before_anything_is_fetched(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    site.use(6 * MIB)
    with pytest.raises(NoSpaceError, match="capped at 6291456 bytes"):
        hydrate(site.repository, snapshot)
    assert list(site.cache.files.glob("*/*")) == []
    site.use(9 * MIB)
    hydrate(site.repository, snapshot)
    assert site.cache.usage().bytes <= 9 * MIB


def test_a_cache_full_of_other_things_makes_room(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    site.use(9 * MIB)
    for number in range(8):
        blob = noise(number, MIB)
        site.cache.put(digest(blob), blob)
    hydrate(site.repository, snapshot)
    assert site.cache.usage().pinned > 6 * MIB
    assert site.cache.usage().bytes <= 9 * MIB


def test_two_at_once_do_not_mix(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    with claim(site.cache, snapshot):
        with pytest.raises(ConflictError, match="another process"):
            hydrate(site.repository, snapshot)
        with pytest.raises(ConflictError):
            drop_hydrated(site.cache, snapshot)
    hydrate(site.repository, snapshot)


@needs_root
def test_a_damaged_image_is_made_again_without_the_store(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    found = hydrate(site.repository, snapshot).hydrated
    good = found.image().read_bytes()
    lose(site.store)
    found.image().write_bytes(good[:-1])
    assert found.image().read_bytes() == good
    found.image().unlink()
    assert describe(site.mount(found)) == describe(site.tree)
    shutil.rmtree(found.directory / "image")
    (found.directory / "parts").write_bytes(b"damaged")
    with pytest.raises(CorruptError):
        found.image()
    (found.directory / "parts").unlink()
    with pytest.raises(CorruptError, match="not whole"):
        found.image()


def test_its_tree_can_be_served_without_the_store(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    found = hydrate(site.repository, snapshot, ref="tree").hydrated
    lose(site.store)
    content = found.content()
    os.close(content.fd)
    assert (content.name, content.snapshot, content.manifest) == (
        "tree",
        snapshot,
        found.manifest,
    )
    assert len(content.tree) == 304


def test_records_that_make_no_sense_are_passed_over(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    record = hydrate(site.repository, snapshot).hydrated.directory / "record.json"
    good = record.read_text()
    for bad in ("", "{}", "[]", good[:-9], good.replace('"format": 1', '"format": 2')):
        record.write_text(bad)
        assert list_hydrated(site.cache) == []
    record.write_text(good)
    assert len(list_hydrated(site.cache)) == 1


def test_a_rate_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[float, int]] = []

    class Pace:
        def __init__(self, rate: float, **options: object) -> None:
            self._rate = rate

        def wait(self, size: int) -> None:
            waited.append((self._rate, size))

    monkeypatch.setattr(hydration, "Pace", Pace)
    site.plain()
    snapshot = site.push()
    done = hydrate(site.repository, snapshot, rate=3 * MIB)
    assert {rate for rate, _ in waited} == {3 * MIB}
    assert sum(size for _, size in waited) > done.fetched_bytes // 2


def test_hydrating_needs_a_cache(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    stored = site.store.repository
    with pytest.raises(UsageError):
        hydrate(Repository(stored.objects, stored.config, None), snapshot)


def test_progress_comes_to_its_end(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    told: list[tuple[int, int]] = []
    done = hydrate(site.repository, snapshot, progress=lambda at, total: told.append((at, total)))
    assert told[0] == (0, done.missing_bytes)
    assert told[-1] == (done.missing_bytes, done.missing_bytes)
    assert [at for at, _ in told] == sorted(at for at, _ in told)


def test_errors_are_the_cache_s(site: Site) -> None:
    site.plain()
    snapshot = site.push()
    (site.cache.root / "hydrated").write_text("in the way")
    with pytest.raises(EnvstoreError, match="the cache"):
        hydrate(site.repository, snapshot)
