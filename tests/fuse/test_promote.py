"""Promotion: what was read becomes a file once all of it is cached and the server is idle."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from envstore.fuse import promote
from envstore.fuse.content import Content, load_content
from envstore.fuse.local import LocalFiles
from envstore.fuse.promote import Promoter
from envstore.store.cache import BlobCache
from envstore.store.fetch import FrameFetcher
from tests.stores import Store
from tests.trees import noise, prose

MIB = 1 << 20
PATIENCE = 60
CONTENTS = {
    "small": prose("small", 9000),
    "large": noise("large", 20 * MIB),
    "other": noise("other", 3 * MIB),
    "empty": b"",
}


class Site:
    """A pushed tree, its content, an empty cache and how to fill it."""

    def __init__(self, base: Path, store: Store) -> None:
        self.contents = CONTENTS
        self.store = store
        repository = self.store.repository
        self.content: Content = load_content(repository, repository.resolve("tree"))
        self.base = base
        self.asked = 0
        self.busy = False
        self.use(1 << 30)

    def use(self, capacity: int) -> None:
        self.cache = BlobCache(self.base / "cache", capacity)
        self.fetcher = FrameFetcher(self.store.repository.objects, self.cache)
        self.local = LocalFiles(self.cache)

    def activity(self) -> int:
        """Return how many requests there were: one more each time, as long as it is busy."""
        self.asked += self.busy
        return self.asked

    def node(self, name: str) -> int:
        node = self.content.tree.lookup(1, name.encode())
        assert node is not None
        return node

    def read(self, name: str, *, but: int = 0) -> None:
        """Bring the frames of a file into the cache, all or all ``but`` some."""
        locations = self.content.locations
        refs = self.content.tree.file_refs(self.node(name))
        numbers = sorted({locations.ref_frames[ref] for ref in refs})
        for number in numbers[: len(numbers) - but]:
            self.fetcher.load(locations.frames[number])

    def there(self, name: str) -> bool:
        tree, node = self.content.tree, self.node(name)
        key = tree.content_key(node)
        if not self.local.contains(key, tree.size(node)):
            return False
        with open(self.local.path(key), "rb") as file:
            return file.read() == self.contents[name]

    def run(self, main: Callable[[Promoter], Awaitable[None]]) -> Promoter:
        made: list[Promoter] = []

        async def loop() -> None:
            promoter = Promoter(self.cache, self.activity)
            made.append(promoter)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(promoter.run)
                await main(promoter)
                nursery.cancel_scope.cancel()

        trio.run(loop)
        return made[0]

    def opened(self, promoter: Promoter, *names: str) -> None:
        for name in names:
            promoter.opened(self.content.tree, self.content.locations, self.node(name))

    async def until(self, *names: str) -> None:
        with trio.fail_after(PATIENCE):
            while not all(map(self.there, names)):
                await trio.sleep(0.01)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    base = tmp_path_factory.mktemp("promoted")
    tree = base / "tree"
    tree.mkdir()
    for name, data in CONTENTS.items():
        (tree / name).write_bytes(data)
    with Store(base / "store") as made:
        made.push(tree)
        yield made


@pytest.fixture
def site(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(promote, "_QUIET_SECONDS", 0.02)
    monkeypatch.setattr(promote, "_RETRY_SECONDS", 0.05)
    return Site(tmp_path, store)


def test_what_is_cached_becomes_files(site: Site) -> None:
    for name in ("small", "large", "other"):
        site.read(name)

    async def main(promoter: Promoter) -> None:
        site.opened(promoter, "small", "large", "other", "empty", "small")
        await site.until("small", "large", "other")

    assert site.run(main).promoted == 3
    assert os.listdir(site.cache.root / "partial") == []
    requests = site.fetcher.fetched.requests

    async def again(promoter: Promoter) -> None:
        site.opened(promoter, "small", "large")
        await trio.sleep(0.3)

    assert site.run(again).promoted == 0
    assert site.fetcher.fetched.requests == requests


def test_a_busy_server_comes_first(site: Site) -> None:
    site.read("small")

    async def main(promoter: Promoter) -> None:
        site.busy = True
        site.opened(promoter, "small")
        with trio.fail_after(PATIENCE):
            while site.asked < 10:
                await trio.sleep(0.01)
        assert not site.there("small")
        site.busy = False
        await site.until("small")

    site.run(main)


def test_what_is_not_wholly_cached_is_tried_again_a_few_times(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.read("large", but=1)

    async def main(promoter: Promoter) -> None:
        tries: list[tuple[int, bool]] = []
        once = promoter._promote

        def counted(item: Any) -> bool:
            done = once(item)
            tries.append((item.node, done))
            return done

        monkeypatch.setattr(promoter, "_promote", counted)

        async def failed(name: str, times: int) -> None:
            with trio.fail_after(PATIENCE):
                while tries.count((site.node(name), False)) < times:
                    await trio.sleep(0.01)

        site.opened(promoter, "large")
        await failed("large", 1)
        assert not site.there("large")
        site.read("large")
        site.opened(promoter, "large")
        await site.until("large")
        site.opened(promoter, "other")
        await failed("other", 3)
        site.read("other")
        await trio.sleep(0.3)
        assert not site.there("other")
        site.opened(promoter, "other")
        await site.until("other")

    site.run(main)


def test_nothing_is_evicted_for_it(site: Site) -> None:
    site.use(30 * MIB)
    site.read("small")
    site.read("large")
    blobs = site.cache.usage().blobs

    async def main(promoter: Promoter) -> None:
        site.opened(promoter, "large")
        with trio.fail_after(PATIENCE):
            while promoter._waiting:
                await trio.sleep(0.01)
        await trio.sleep(0.2)
        assert not site.there("large")

    assert site.run(main).promoted == 0
    assert site.cache.usage().blobs == blobs


def test_damage_is_left_to_the_reader(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site.read("small")
    site.read("other")
    frames = site.content.locations.frames
    ref = site.content.tree.file_refs(site.node("small"))[0]
    blob = site.cache.path(frames[site.content.locations.ref_frames[ref]].digest)
    size = os.stat(blob).st_size
    with open(blob, "r+b") as opened:
        opened.write(bytes(size))

    async def main(promoter: Promoter) -> None:
        site.opened(promoter, "small")
        with trio.fail_after(PATIENCE):
            while "is not kept whole" not in caplog.text:
                await trio.sleep(0.01)
        assert not site.there("small")

    site.run(main)
    assert os.listdir(site.cache.root / "partial") == []


def test_a_bug_does_not_end_the_server(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.read("small")
    site.read("other")

    async def main(promoter: Promoter) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(site.cache, "begin", lambda *_, **__: 1 // 0)
            site.opened(promoter, "small")
            with trio.fail_after(PATIENCE):
                while "modulo by zero" not in caplog.text:
                    await trio.sleep(0.01)
        site.opened(promoter, "small")
        await site.until("small")

    site.run(main)


def test_the_queue_is_bounded_and_forgets(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "_QUEUED", 2)
    for name in ("small", "other", "large"):
        site.read(name)

    async def main(promoter: Promoter) -> None:
        site.opened(promoter, "small", "other", "large")
        assert len(promoter._waiting) == 2
        promoter.forget(site.content.tree)
        await trio.sleep(0.2)
        assert not any(map(site.there, ("small", "other", "large")))
        site.opened(promoter, "other")
        await site.until("other")

    site.run(main)
