"""Real mounts over a real S3 server while the server, the network, or the cache fails."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from envstore.fuse.background import MountRequest, start_background
from envstore.fuse.mount import unmount
from envstore.fuse.records import MountRecord
from envstore.fuse.stats import read_stats
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.push import push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from tests.fuse.lives import until
from tests.s3server import S3Server
from tests.tcpproxy import TcpProxy, tcp_proxy
from tests.trees import noise

MIB = 1 << 20


class Bucket:
    """Files of noise in a bucket, each in a pack of its own, for all tests."""

    def __init__(self, base: Path, server: S3Server) -> None:
        self.server, self.name = server, server.new_bucket()
        self.files = {f"file-{n}": noise(f"faults {n}", 3 * MIB) for n in range(3)}
        # Many that hang together are more than the kernel has in the air at once.
        self.crowd = {f"crowd-{n}": noise(f"crowd {n}", MIB // 2) for n in range(100)}
        self.packs: dict[str, bytes] = {}
        objects = open_objects(server.url(self.name), create=True)
        config, _ = init_store(objects)
        repository = Repository(objects, config, None)
        stat_cache = StatCache(base / "stat.sqlite")
        (base / "tree").mkdir()
        seen: set[str] = set()
        for names in (self.crowd, *({name: data} for name, data in self.files.items())):
            for name, data in names.items():
                (base / "tree" / name).write_bytes(data)
            source = DirectorySource(base / "tree", kind="dir", normalise=False)
            push(repository, source, RefName.parse("tree"), stat_cache, state=base / "pushes")
            source.close()
            packs = {info.key: info.size for info in objects.list("packs/") if info.size > MIB}
            for key in packs.keys() - seen:
                self.packs[next(iter(names))] = key.encode()
            seen |= packs.keys()
        stat_cache.close()
        repository.close()


class Site:
    """The bucket behind a proxy, and a place to mount it with an empty cache."""

    def __init__(self, base: Path, bucket: Bucket, proxy: TcpProxy) -> None:
        self.base, self.proxy = base, proxy
        self.files, self.crowd, self.packs = bucket.files, bucket.crowd, bucket.packs
        keys = (bucket.server.access_key, bucket.server.secret_key)
        self.url = S3Server(proxy.endpoint, *keys, 0).url(bucket.name)
        self.place = base / "place"
        self.place.mkdir()
        self.cache = base / "cache"
        self.record: MountRecord

    def mount(self, patience: float = 200.0) -> None:
        request = MountRequest(self.url, "tree", str(self.place), profile="none", patience=patience)
        self.record = start_background(request)

    def read(self, name: str) -> None:
        data = self.files.get(name) or self.crowd[name]
        assert (self.place / name).read_bytes() == data

    def forget(self, name: str) -> None:
        """Have the kernel ask for the file again."""
        with (self.place / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fails(self, name: str) -> None:
        with pytest.raises(OSError, match="Input/output error") as caught:
            (self.place / name).read_bytes()
        assert caught.value.errno == errno.EIO

    def stats(self) -> dict[str, Any]:
        return read_stats(Path(self.record.stats))

    def log(self) -> str:
        return Path(self.record.log).read_text()

    def wait_for_log(self, words: str) -> None:
        while words not in self.log():
            time.sleep(0.05)

    @contextmanager
    def reading(self, *names: str) -> Iterator[list[Future[None]]]:
        with ThreadPoolExecutor(len(names)) as pool:
            yield [pool.submit(self.read, name) for name in names]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        yield Bucket(tmp_path_factory.mktemp("faults"), s3_server)


@pytest.fixture
def site(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "4")
    with tcp_proxy(bucket.server.endpoint) as proxy:
        made = Site(tmp_path, bucket, proxy)
        try:
            yield made
        finally:
            proxy.restore()
            if os.path.ismount(made.place):
                unmount(made.place, lazy=True)


def test_a_server_that_goes_and_comes_back_makes_a_reader_wait(site: Site) -> None:
    site.mount()
    site.read("file-2")
    with (site.place / "file-0").open("rb") as file:
        # In the middle of a file: what comes next is not there yet.
        begun = file.read(1)
        site.proxy.cut()
        with site.reading("file-1") as (waiting,):
            site.wait_for_log("trying again")
            site.read("file-2")
            assert not waiting.done()
            time.sleep(1)
            assert not waiting.done()
            site.proxy.restore()
        waiting.result()
        assert begun + file.read() == site.files["file-0"]
    assert site.stats()["errors"] == 0
    assert site.stats()["retries"] > 0


def test_a_reader_waits_no_longer_than_it_is_told_to(site: Site) -> None:
    site.mount(patience=1.0)
    site.read("file-2")
    site.proxy.cut()
    site.fails("file-1")
    site.read("file-2")
    site.proxy.restore()
    site.read("file-1")


@pytest.mark.parametrize("status", [500, 503])
def test_errors_of_the_server_are_waited_out(site: Site, status: int) -> None:
    site.mount()
    site.proxy.answer(status, about=b"/packs/", times=4)
    for name in site.files:
        site.read(name)
    assert site.stats()["errors"] == 0
    assert site.stats()["retries"] > 0


def test_refusals_are_not_waited_out_for_ever(site: Site) -> None:
    site.mount()
    site.proxy.answer(403, about=b"/packs/")
    site.fails("file-0")
    site.proxy.restore()
    site.read("file-0")
    # Credentials that expire are renewed by and by.
    site.proxy.answer(403, about=b"/packs/", times=1)
    site.read("file-1")


def test_answers_that_break_off_are_asked_for_again(site: Site) -> None:
    site.mount()
    site.proxy.cut_answers_after(MIB + 12345, times=3)
    for name in site.files:
        site.read(name)
    assert site.stats()["errors"] == 0


def test_altered_bytes_are_asked_for_again_and_never_passed_on(site: Site) -> None:
    site.mount()
    for name in site.files:
        site.proxy.alter_answers_after(200_000, about=site.packs[name], times=1)
        site.read(name)
    stats = site.stats()
    assert stats["errors"] == 0
    assert stats["corrupt_frames"] == len(site.files)


def test_bytes_that_are_always_altered_are_an_error(site: Site) -> None:
    site.mount()
    site.proxy.alter_answers_after(200_000, about=site.packs["file-0"])
    site.fails("file-0")
    site.read("file-1")
    site.proxy.restore()
    site.read("file-0")


def test_hanging_answers_leave_other_files_alone(site: Site) -> None:
    site.mount()
    site.read("file-2")
    site.proxy.hang(about=site.packs["file-0"])
    with site.reading(*["file-0"] * 8) as waiting:
        site.wait_for_log("trying again")
        site.read("file-1")  # from the server
        site.forget("file-2")
        site.read("file-2")  # from the cache
        assert not any(one.done() for one in waiting)
        site.proxy.restore()
    for one in waiting:
        one.result()
    assert site.stats()["errors"] == 0


def test_a_crowd_that_waits_keeps_nobody_from_the_cache(site: Site) -> None:
    site.mount()
    site.read("file-2")
    site.proxy.hang(about=b"/packs/")
    with site.reading(*site.crowd) as waiting:
        site.wait_for_log("trying again")
        for _ in range(3):
            site.forget("file-2")
            site.read("file-2")
        assert not any(one.done() for one in waiting)
        site.proxy.restore()
    for one in waiting:
        one.result()
    assert site.stats()["errors"] == 0


def test_a_cache_that_is_removed_is_made_again(site: Site) -> None:
    site.mount()
    site.read("file-0")
    shutil.rmtree(site.cache)
    for name in site.files:
        site.read(name)
    # The server may write nowhere else: another one comes, which makes it.

    def is_used() -> bool:
        site.forget("file-0")
        site.read("file-0")
        return any(path.is_file() for path in (site.cache / "blobs").rglob("*"))

    until(is_used, "another cache")
    assert site.stats()["errors"] == 0


def test_a_cache_that_stays_away_makes_reading_slow_and_not_impossible(site: Site) -> None:
    site.mount()
    site.read("file-0")
    shutil.rmtree(site.cache)
    site.cache.write_text("no directory")
    for name in site.files:
        site.read(name)
    assert site.stats()["errors"] == 0
    assert str(site.cache) in site.log()


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_cache_that_is_damaged_is_mended(site: Site, damage: str) -> None:
    site.mount()
    with (site.place / "file-0").open("rb") as file:
        file.read(1)
        for blob in (site.cache / "blobs").rglob("*"):
            if blob.is_file():
                data = bytearray(blob.read_bytes())
                data[len(data) // 2] ^= 1
                kept = {"truncated": data[: len(data) // 3], "altered": data, "empty": b""}
                blob.write_bytes(kept[damage])
        file.seek(0)
        assert file.read() == site.files["file-0"]
    assert site.stats()["errors"] == 0


def test_two_hundred_readers_at_once(site: Site) -> None:
    site.mount()
    expected = {name: hashlib.sha256(data).digest() for name, data in site.files.items()}
    start = threading.Barrier(200)

    def read(number: int) -> None:
        name = sorted(site.files)[number % len(site.files)]
        chosen = random.Random(number)
        start.wait()
        with (site.place / name).open("rb", buffering=0) as file:
            for _ in range(10):
                offset = chosen.randrange(len(site.files[name]))
                size = chosen.randrange(1 << 18)
                found = os.pread(file.fileno(), size, offset)
                assert found == site.files[name][offset : offset + size]
            assert hashlib.sha256(Path(file.name).read_bytes()).digest() == expected[name]

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(read, range(200)))
    stats = site.stats()
    assert stats["errors"] == 0
    # Each frame once, whoever waits for it.
    total = sum(map(len, site.files.values()))
    assert stats["fetched"]["bytes"] < 1.1 * total
