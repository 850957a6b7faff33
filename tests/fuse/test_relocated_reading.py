"""Reading relocated files: what is asked of the store, and that nothing unproven is relocated."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from envstore.fuse import relocating
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import load_content
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.reader import Reader
from envstore.fuse.relocating import RelocatingReader
from envstore.store.cache import BlobCache
from envstore.store.fetch import FrameFetcher
from tests.manifests import must_find
from tests.relocating import RelocatingSource, sample
from tests.stores import Store

PREFIX = b"/mnt/somewhere"
FILES = {path: made for path, made in sample().items() if not made.link}


class Site:
    """The sample at a prefix, an empty cache, and what its readers are asked for."""

    def __init__(self, base: Path) -> None:
        self.store = Store(base / "store")
        snapshot = self.store.push(RelocatingSource(sample())).snapshot
        self.content = load_content(self.store.repository, snapshot, "", PREFIX)
        self.cache = BlobCache(base / "cache", 1 << 30)
        self.watched: list[tuple[int, int, int]] = []

    def node(self, path: bytes) -> int:
        return must_find(self.content.tree, path)

    def run(self, main: Callable[[RelocatingReader], Awaitable[None]]) -> None:
        async def loop() -> None:
            complaints, metrics = Complaints(logging.getLogger("envstore.fuse")), Metrics()
            fetcher = FrameFetcher(self.store.repository.objects, self.cache)
            loader = FrameLoader(fetcher, self.cache, metrics, complaints, patience=0)
            tree = self.content.tree
            reader = Reader(
                *(tree, self.content.locations, loader, self.cache, metrics, complaints),
                watch=lambda *read: self.watched.append(read),
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(loader.run)
                await main(RelocatingReader(reader, tree))
                nursery.cancel_scope.cancel()

        trio.run(loop)


async def read(reader: RelocatingReader, node: int, offset: int, size: int) -> bytes:
    data = reader.read_now(node, offset, size)
    return await reader.read(node, offset, size) if data is None else data


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("held", [1, 1 << 20])
def test_any_range(site: Site, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(relocating, "_HELD", held)
    rng = random.Random(1)

    async def main(reader: RelocatingReader) -> None:
        for turn in range(400):
            path = rng.choice([*FILES])
            expected = FILES[path].at(PREFIX)
            offset = rng.randrange(len(expected) + 3)
            size = rng.choice([1, 13, 4096, 70_000, 2_000_000])
            if turn % 3:
                found = await read(reader, site.node(path), offset, size)
            else:
                found = await reader.read(site.node(path), offset, size)
            assert found == expected[offset : offset + size], path

    site.run(main)


def test_what_is_read_is_noted_as_it_is_stored(site: Site) -> None:
    path = b"etc/many.conf"
    stored, node = FILES[path].data, site.node(path)

    async def main(reader: RelocatingReader) -> None:
        whole = await read(reader, node, 0, 1 << 20)
        assert site.watched == [(node, 0, len(stored))]
        site.watched.clear()
        # Within the prefix nothing stored is needed at all.
        at = whole.index(PREFIX)
        assert await read(reader, node, at + 1, 5) == PREFIX[1:6]
        assert site.watched == []
        assert await read(reader, node, at + len(PREFIX), 4) == b"/etc"
        assert site.watched == [(node, stored.index(FILES[path].placeholder) + 255, 4)]

    site.run(main)


def test_nothing_that_is_wrong_is_relocated(site: Site) -> None:
    node = site.node(b"lib/libsample.so")
    expected = FILES[b"lib/libsample.so"].at(PREFIX)

    async def first(reader: RelocatingReader) -> None:
        assert await read(reader, node, 0, 1 << 24) == expected

    site.run(first)
    # What has gone bad in the cache is fetched again.
    for blob in (site.cache.root / "blobs").rglob("*"):
        if blob.is_file():
            data = bytearray(blob.read_bytes())
            data[::1000] = bytes(len(data[::1000]))
            blob.write_bytes(data)
    site.run(first)
    # In the store, too, it is gone for good.
    for pack in (site.store.root / "objects" / "packs").rglob("*"):
        if pack.is_file():
            data = bytearray(pack.read_bytes())
            data[500:-500:100] = bytes(len(data[500:-500:100]))
            pack.write_bytes(data)
    site.cache.clear()

    async def second(reader: RelocatingReader) -> None:
        with pytest.raises(OSError, match="Input/output error") as caught:
            await read(reader, node, 0, 1 << 24)
        assert caught.value.errno == errno.EIO

    site.run(second)
