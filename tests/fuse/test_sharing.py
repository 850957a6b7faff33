"""One loader for the readers of several snapshots."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from envstore.errors import CorruptError
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content, load_content
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.reader import Reader
from envstore.store.cache import BlobCache
from envstore.store.digest import digest
from envstore.store.fetch import FrameFetcher
from envstore.store.locations import FrameRef
from tests.faulty import FaultyStore
from tests.stores import Store
from tests.trees import noise

SHARED = noise("shared", 900_000)


class Pair:
    """Two snapshots of one store that have a file in common, an empty cache, a loader."""

    def __init__(self, base: Path) -> None:
        self.store = Store(base / "store")
        contents = []
        for name in ("one", "two"):
            tree = base / name
            tree.mkdir()
            (tree / "shared").write_bytes(SHARED)
            (tree / "own").write_bytes(noise(name, 300_000))
            self.store.push(tree, name)
            repository = self.store.repository
            contents.append(load_content(repository, repository.resolve(name)))
        self.one, self.two = contents
        self.objects = FaultyStore(self.store.repository.objects)
        self.cache = BlobCache(base / "cache", 1 << 30)
        self.fetcher = FrameFetcher(self.objects, self.cache)
        self.watched: list[tuple[int, int, int]] = []

    def reader(self, content: Content, loader: FrameLoader) -> Reader:
        complaints = Complaints(logging.getLogger("envstore.fuse"))
        return Reader(
            *(content.tree, content.locations, loader, self.cache, Metrics(), complaints),
            watch=lambda *read: self.watched.append(read),
        )

    def run(self, main: Callable[[FrameLoader], Awaitable[None]]) -> None:
        async def loop() -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            loader = FrameLoader(self.fetcher, self.cache, Metrics(), complaints)
            async with trio.open_nursery() as nursery:
                await nursery.start(loader.run)
                await main(loader)
                nursery.cancel_scope.cancel()

        trio.run(loop)

    def frame(self, content: Content, name: bytes) -> FrameRef:
        node = content.tree.lookup(1, name)
        assert node is not None
        ref = content.tree.file_refs(node).start
        return content.locations.frames[content.locations.ref_frames[ref]]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.store.close()


def test_what_two_snapshots_share_is_fetched_once(pair: Pair) -> None:
    gate = pair.objects.gate("get_range", key="packs/")

    async def main(loader: FrameLoader) -> None:
        found: list[bytes] = []

        async def one(content: Content) -> None:
            node = content.tree.lookup(1, b"shared")
            assert node is not None
            found.append(await pair.reader(content, loader).read(node, 0, len(SHARED)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, pair.one)
            nursery.start_soon(one, pair.two)
            await trio.to_thread.run_sync(gate.wait_entered)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
        assert found == [SHARED, SHARED]

    pair.run(main)
    assert pair.objects.count("get_range") == 1


def test_where_another_snapshot_looked_in_vain_is_not_the_last_place(pair: Pair) -> None:
    right = pair.frame(pair.one, b"shared")
    wrong = replace(right, pack=digest(b"there is no such pack"))
    gate = pair.objects.gate("get_range", key="packs/")

    async def main(loader: FrameLoader) -> None:
        loader.prefetch([wrong])
        async with trio.open_nursery() as nursery:

            async def load() -> None:
                found = await loader.load([right])
                data = found[right.digest]
                assert isinstance(data, bytes)
                assert digest(data) == right.digest

            nursery.start_soon(load)
            await trio.to_thread.run_sync(gate.wait_entered)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()

    pair.run(main)


def test_two_frames_in_one_place_are_told_apart(pair: Pair) -> None:
    right = pair.frame(pair.one, b"shared")
    lie = replace(right, digest=digest(b"something else"))

    async def main(loader: FrameLoader) -> None:
        for order in ((right, lie), (lie, right)):
            found = await loader.load(order)
            assert isinstance(found[lie.digest], CorruptError)
            data = found[right.digest]
            assert isinstance(data, bytes)
            assert digest(data) == right.digest

    pair.run(main)


def test_every_read_is_watched_once(pair: Pair) -> None:
    async def main(loader: FrameLoader) -> None:
        reader = pair.reader(pair.one, loader)
        node = pair.one.tree.lookup(1, b"own")
        assert node is not None
        for _ in ("cold", "warm"):
            for offset in (0, 1000):
                if reader.read_now(node, offset, 1000) is None:
                    await reader.read(node, offset, 1000)
        assert pair.watched == [(node, 0, 1000), (node, 1000, 1000)] * 2

    pair.run(main)
