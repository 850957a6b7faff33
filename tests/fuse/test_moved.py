"""Packs that move, or are lost, under the readers of a mount."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from envstore.errors import NotFoundError, UnavailableError
from envstore.fuse import moved as moved_module
from envstore.fuse.complaints import Complaints
from envstore.fuse.image import open_image
from envstore.fuse.loader import FrameLoader
from envstore.fuse.moved import Moved
from envstore.fuse.overlay import probe
from envstore.fuse.prefetch import ProfileSearch, follow
from envstore.fuse.reader import Reader
from envstore.store.locations import Located
from envstore.store.profiles import NO_PROFILE, Range, new_profile, save_profile
from tests.fuse.lives import ROOT, Live, lived
from tests.moving import drop, move
from tests.site import Site

REFRAME = pytest.mark.parametrize("reframe", [False, True], ids=["copied", "reframed"])


class Moving(Site):
    """Readers that look for what has moved."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.images: list[int] = []

    def follow(self, main: Callable[[Reader, Moved, FrameLoader], Awaitable[None]]) -> None:
        """Run ``main`` with a reader, what it asks for moved packs, and its loader."""

        def image() -> int:
            return os.dup(self.images[-1] if self.images else self.content.fd)

        def found(fd: int, locations: Located) -> None:
            self.images.append(fd)

        async def loop(loader: FrameLoader) -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            content = self.content
            moved = Moved(
                self.locations, self.objects, content.manifest, complaints, self.patience,
                image, found,
            )  # fmt: skip
            reader = Reader(
                content.tree, self.locations, loader, self.cache, self.metrics, complaints,
                moved=moved,
            )  # fmt: skip
            await main(reader, moved, loader)

        self.load(loop)

    def move(self, *, reframe: bool) -> None:
        move(self.store.repository, self.content.manifest, reframe=reframe)
        self.objects.clear()

    def lose(self) -> None:
        """Delete every pack."""
        repository = self.store.repository
        drop(repository, repository.located(self.content.manifest)[1])
        self.objects.clear()

    def looks(self) -> int:
        return self.objects.count("get", "locations/")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moving]:
    monkeypatch.setattr(moved_module, "_APART", 0.0)
    made = Moving(tmp_path)
    yield made
    for fd in made.images:
        os.close(fd)
    made.store.close()


@REFRAME
def test_everything_is_read_after_its_packs_have_moved(site: Moving, reframe: bool) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        assert await site.read(reader, "small") == site.files["small"]
        assert site.objects.count("get") == 0  # nothing more is asked as long as all is in place
        for _ in range(2):
            before = moved.locations
            site.move(reframe=reframe)
            for frame in before.frames:
                site.cache.drop(frame.digest)
            for name, data in site.files.items():
                assert await site.read(reader, name) == data
            # Once for the mount, and not at each fault.
            assert site.looks() == 1
            assert moved.locations is not before

    site.follow(main)
    assert site.metrics.errors == 0


@REFRAME
def test_the_next_server_finds_them_at_once(site: Moving, reframe: bool) -> None:
    async def first(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.move(reframe=reframe)
        assert await site.read(reader, "other") == site.files["other"]

    async def second(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        for name, data in site.files.items():
            assert await site.read(reader, name) == data

    site.follow(first)
    (fd,) = site.images
    image = open_image(fd)
    assert image.manifest == site.content.manifest
    assert [image.tree.path(node) for node in range(1, len(image.tree) + 1)] == [
        site.content.tree.path(node) for node in range(1, len(site.content.tree) + 1)
    ]
    site.again(image.locations)  # type: ignore[arg-type]
    site.follow(second)
    assert site.looks() == 0


def test_many_who_wait_ask_once(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.move(reframe=True)
        gate = site.objects.gate("get", key="locations/")

        async def one(name: str) -> None:
            assert await reader.read(site.node(name), 0, 1 << 30) == site.files[name]

        async with trio.open_nursery() as nursery:
            for name in [*site.files] * 4:
                nursery.start_soon(one, name)
            await trio.to_thread.run_sync(gate.wait_entered)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()

    site.follow(main)
    # Who fails while the answer is on its way cannot know whether that is late enough.
    assert 1 <= site.looks() <= 2


def test_a_profile_is_followed_to_where_packs_have_moved(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        ranges = [Range(name.encode(), 0, 1 << 20) for name in ("large", "other", "text")]
        profile = new_profile(ranges, [])
        save_profile(site.store.repository.objects, site.content.manifest, "start", profile)
        site.move(reframe=True)
        search = ProfileSearch(site.store.repository, site.content.snapshot, "")
        await follow(search, site.content.tree, moved, loader, reader, 1 << 40)
        frames = moved.locations.frames
        assert frames is not site.locations.frames
        assert any(site.cache.contains(frame.digest) for frame in frames)
        assert site.fetcher.fetched.frames > 3

    site.follow(main)
    assert site.looks() == 1
    assert site.metrics.errors == 0


def test_nothing_is_followed_without_a_profile(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.move(reframe=False)
        search = ProfileSearch(site.store.repository, site.content.snapshot, NO_PROFILE)
        await follow(search, site.content.tree, moved, loader, reader, 1 << 40)

    site.follow(main)
    assert site.looks() == 0


def test_what_is_lost_is_told_and_not_looked_for_at_each_read(
    site: Moving, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.lose()
        for _ in range(5):
            await site.fails(reader, "other")

    site.follow(main)
    assert site.looks() == 1
    number = site.content.tree.file_refs(site.node("other")).start
    frame = site.locations.frames[site.locations.ref_frames[number]]
    (told,) = [one for one in caplog.messages if one.startswith("cannot read other: ")]
    assert frame.pack.hex() in told


def test_what_is_stored_again_is_found_after_a_while(
    site: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_module, "_LOST", 0.0)

    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        move(site.store.repository, site.content.manifest, reframe=True, delete=False)
        drop(site.store.repository, site.locations)
        gone = site.objects.drop("get", key="locations/")
        await site.fails(reader, "other")
        gone.remove()
        assert await site.read(reader, "other") == site.files["other"]

    site.follow(main)


def test_a_snapshot_that_was_removed_is_told_as_what_was_met_first(
    site: Moving, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.lose()
        site.objects.drop("get")
        await site.fails(reader, "other")

    site.follow(main)
    assert any(one.startswith("cannot read other: ") and "packs/" in one for one in caplog.messages)
    assert any(one.startswith("no other locations: ") for one in caplog.messages)


def test_a_pack_that_is_too_short_has_perhaps_moved(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        packs = {frame.pack.hex() for frame in site.locations.frames}
        move(site.store.repository, site.content.manifest, reframe=False, delete=False)
        for pack in packs:
            os.truncate(site.store.path(f"packs/{pack[:2]}/{pack}"), 100)
        for name, data in site.files.items():
            assert await site.read(reader, name) == data

    site.follow(main)
    assert site.looks() == 1


def test_a_store_that_is_away_meanwhile_is_waited_for(site: Moving) -> None:
    site.patience = 60.0

    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.move(reframe=True)
        away = UnavailableError("cannot reach the store")
        site.objects.fail("get", away, times=3)
        assert await site.read(reader, "other") == site.files["other"]

    site.follow(main)
    assert site.metrics.errors == 0


def test_a_store_that_stays_away_is_told(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        site.move(reframe=True)
        site.objects.fail("get", UnavailableError("cannot reach the store"))
        with pytest.raises(OSError, match="Input/output") as caught:
            await site.read(reader, "other")
        assert caught.value.errno == errno.EIO

    site.follow(main)


def test_locations_of_another_tree_are_refused(site: Moving) -> None:
    async def main(reader: Reader, moved: Moved, loader: FrameLoader) -> None:
        (site.tree / "more").write_bytes(b"more")
        other = site.store.push(site.tree, "other").manifest
        site.lose()
        lie = site.objects.inner.get(f"locations/{other.hex()}")
        site.objects.replace("get", lie, key="locations/")
        await site.fails(reader, "other")

    site.follow(main)
    assert site.images == []


# Real mounts.


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with lived(tmp_path, monkeypatch) as made:
        made.push(files=12)
        yield made


@REFRAME
def test_a_mount_goes_on_while_its_packs_move(live: Live, reframe: bool) -> None:
    live.mount()
    repository = live.store.repository
    manifest = live.store.snapshot().manifest
    with live.readers(3):
        for _ in range(3):
            # What is cached would hide what has moved.
            move(repository, manifest, reframe=reframe)
            for path in (live.base / "cache" / "blobs").rglob("*"):
                if path.is_file():
                    path.unlink()
    live.check()
    assert live.stats()["errors"] == 0


@pytest.mark.skipif(not ROOT, reason="the fast path takes root")
def test_the_fast_path_goes_on_while_its_packs_move(live: Live) -> None:
    reason = probe(live.base)
    if reason is not None:
        pytest.skip(reason)
    live.mount(fast_path="on", allow_other=True)
    (live.place / "file 3").read_bytes()
    move(live.store.repository, live.store.snapshot().manifest, reframe=True)
    live.check()
    assert live.stats()["errors"] == 0


def test_the_server_that_comes_next_knows_where_they_are(live: Live) -> None:
    live.mount()
    standby = live.settled()["standby_pid"]
    repository = live.store.repository
    manifest = live.store.snapshot().manifest
    move(repository, manifest, reframe=True)
    (live.place / "file 1").read_bytes()
    live.kill_server()
    # Were it to look for them now, it would find nothing.
    repository.objects.delete(f"locations/{manifest.hex()}")
    live.check()
    assert live.settled()["server_pid"] == standby


def test_what_is_lost_fails_by_its_name(live: Live) -> None:
    live.mount()
    repository = live.store.repository
    locations = repository.located(live.store.snapshot().manifest)[1]
    drop(repository, locations)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            (live.place / "file 1").read_bytes()
    told = [line for line in live.log().splitlines() if "cannot read file 1: " in line]
    assert told
    assert any(frame.pack.hex() in told[0] for frame in locations.frames)
    with pytest.raises(NotFoundError):
        repository.load_frames([locations.frames[0]])
