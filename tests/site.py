"""A pushed tree and readers of it, over a store and a cache that can be made to misbehave."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from envstore.fuse.complaints import Complaints
from envstore.fuse.content import load_content
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.reader import Reader
from envstore.store.cache import BlobCache
from envstore.store.fetch import FrameFetcher
from envstore.store.locations import Locations
from tests.faulty import FaultyStore
from tests.stores import Store
from tests.trees import noise, prose

MIB = 1 << 20


class Site:
    """A pushed tree, its content, and readers of it over a store that can be made to fail."""

    def __init__(self, base: Path) -> None:
        self.tree = base / "tree"
        self.tree.mkdir()
        self.files = {
            "large": noise("large", 5 * MIB + 77),
            "text": prose("text", 3 * MIB),
            "small": b"a few bytes",
            "twin": b"a few bytes",
            "empty": b"",
            "other": noise("other", 900_000),
        }
        for name, data in self.files.items():
            (self.tree / name).write_bytes(data)
        with open(self.tree / "sparse", "wb") as sparse:
            sparse.truncate(9 * MIB)
            sparse.seek(4 * MIB + 5)
            sparse.write(b"an island")
        self.files["sparse"] = (self.tree / "sparse").read_bytes()
        self.store = Store(base / "store")
        self.store.push(self.tree)
        repository = self.store.repository
        self.content = load_content(repository, repository.resolve("tree"))
        self.base = base
        self.patience = 0.0
        self.times = 0
        self.again()

    def again(self, locations: Locations | None = None, capacity: int = 1 << 30) -> None:
        """Begin anew with an empty cache, no faults and perhaps other locations."""
        self.objects = FaultyStore(self.store.repository.objects)
        self.times += 1
        self.cache = BlobCache(self.base / f"cache {self.times}", capacity)
        self.fetcher = FrameFetcher(self.objects, self.cache)
        self.metrics = Metrics()
        self.locations = locations or self.content.locations
        self.objects.clear()

    def node(self, name: str) -> int:
        node = self.content.tree.lookup(1, name.encode())
        assert node is not None
        return node

    def run(self, main: Callable[[Reader], Awaitable[None]]) -> None:
        """Run ``main`` with a new reader in an event loop of its own."""

        async def loop(loader: FrameLoader) -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            tree = self.content.tree
            await main(Reader(tree, self.locations, loader, self.cache, self.metrics, complaints))

        self.load(loop)

    def load(self, main: Callable[[FrameLoader], Awaitable[None]]) -> None:
        """Run ``main`` with a new loader in an event loop of its own."""

        async def loop() -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            loader = FrameLoader(
                self.fetcher, self.cache, self.metrics, complaints, patience=self.patience
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(loader.run)
                await main(loader)
                nursery.cancel_scope.cancel()

        trio.run(loop)

    async def read(
        self, reader: Reader, name: str, offset: int = 0, size: int | None = None
    ) -> bytes:
        """Read as the kernel's requests are answered."""
        size = len(self.files[name]) if size is None else size
        data = reader.read_now(self.node(name), offset, size)
        return await reader.read(self.node(name), offset, size) if data is None else data

    async def fails(self, reader: Reader, name: str) -> None:
        with pytest.raises(OSError, match="Input/output error") as caught:
            await self.read(reader, name)
        assert caught.value.errno == errno.EIO

    def fetches(self) -> int:
        return self.objects.count("get_range", "packs/")
