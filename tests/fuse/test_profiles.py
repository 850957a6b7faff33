"""From reads to a recording, and from a profile to the frames that a mount fetches ahead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import UnavailableError
from envstore.fuse import recorder as recorders
from envstore.fuse.complaints import Complaints
from envstore.fuse.content import Content, load_content
from envstore.fuse.default_profile import default_ranges
from envstore.fuse.loader import FrameLoader
from envstore.fuse.metrics import Metrics
from envstore.fuse.moved import Moved
from envstore.fuse.prefetch import Choice, ProfileSearch, follow, plan, resolve
from envstore.fuse.readahead import Readahead
from envstore.fuse.reader import Reader
from envstore.fuse.recorder import Recorder, read_recording
from envstore.store.cache import BlobCache
from envstore.store.fetch import FrameFetcher
from envstore.store.profiles import Range, new_profile, save_profile
from tests.faulty import FaultyStore
from tests.stores import Store
from tests.trees import noise

MIB = 1 << 20


class Site:
    """A tree of six files of 3 MiB each, one of them sparse, pushed to a store."""

    def __init__(self, base: Path) -> None:
        self.tree = base / "tree"
        (self.tree / "deep" / "er").mkdir(parents=True)
        self.names = ["a", "b", "c", "deep/d", "deep/er/e"]
        for name in self.names:
            (self.tree / name).write_bytes(noise(name, 3 * MIB))
        with open(self.tree / "sparse", "wb") as sparse:
            sparse.truncate(3 * MIB)
        (self.tree / "link").symlink_to("a")
        self.store = Store(base / "store", wrap=FaultyStore)
        self.pushed = self.store.push(self.tree)
        self.content = self.load()
        self.base = base

    def load(self) -> Content:
        repository = self.store.repository
        return load_content(repository, repository.resolve("tree"))

    def node(self, path: str) -> int:
        node = 1
        for name in path.split("/"):
            found = self.content.tree.lookup(node, name.encode())
            assert found is not None
            node = found
        return node

    def frames(self, *ranges: tuple[str, int, int]) -> list[bytes]:
        found = resolve(
            [Range(path.encode(), offset, length) for path, offset, length in ranges],
            self.content.tree,
            self.content.locations,
        )
        return [frame.digest for frame in found]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.store.close()


@pytest.fixture
def site(shared: Site) -> Site:
    shared.store.faults.clear()
    for key in shared.store.object_keys("profiles/"):
        shared.store.repository.objects.delete(key)
    return shared


def _recorder(site: Site, limit: int = 1000) -> Recorder:
    return Recorder(site.content.tree, site.content.locations, limit)


def test_a_recording_is_in_order_of_first_touch(site: Site) -> None:
    recorder = _recorder(site)
    a, b, d = map(site.node, ("a", "b", "deep/d"))
    recorder.watch(b, 0, 4096)
    recorder.watch(a, 2 * MIB, 9 * MIB)
    recorder.watch(b, 4096, 4096)
    recorder.watch(d, 0, 10)
    recorder.watch(a, 0, 100)
    recorder.watch(b, 100, 50)
    recorder.watch(d, 3 * MIB, 10)
    assert recorder.ranges() == [
        Range(b"b", 0, 8192),
        Range(b"a", 2 * MIB, MIB),
        Range(b"deep/d", 0, 10),
        Range(b"a", 0, 100),
    ]
    report = recorder.report()
    assert read_recording(report) == recorder.ranges()
    assert report["complete"]
    assert report["frames"] == len(
        site.frames(("b", 0, 8192), ("a", 2 * MIB, MIB), ("deep/d", 0, 10), ("a", 0, 100))
    )


_reads = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3 * MIB + 9), st.integers(0, 600_000)), max_size=30
)


@given(_reads)
def test_a_recording_covers_every_read(shared: Site, reads: list[tuple[int, int, int]]) -> None:
    recorder = _recorder(shared)
    nodes = shared.node("a"), shared.node("deep/er/e")
    for which, offset, size in reads:
        recorder.watch(nodes[which], offset, size)
    ranges = recorder.ranges()
    paths = b"a", b"deep/er/e"
    for which, offset, size in reads:
        end = min(offset + size, 3 * MIB)
        if end > offset:
            assert any(
                item.path == paths[which]
                and item.offset <= offset
                and end <= item.offset + item.length
                for item in ranges
            )
    by_place = sorted((item.path, item.offset, item.offset + item.length) for item in ranges)
    for one, two in pairwise(by_place):
        assert one[0] != two[0] or one[2] + recorders._NEAR < two[1]
    new_profile(ranges, ["cmd"]).seal()


def test_a_recording_is_bounded(site: Site) -> None:
    recorder = _recorder(site, limit=3)
    a = site.node("a")
    for at in range(8):
        recorder.watch(a, at * 300_000, 10)
    recorder.watch(a, 0, 20)
    assert [item.offset for item in recorder.ranges()] == [0, 300_000, 600_000]
    assert not recorder.report()["complete"]


def test_a_reader_tells_of_every_read_and_of_no_guess(site: Site) -> None:
    recorder = _recorder(site)
    cache = BlobCache(site.base / "watched")
    objects, metrics = FaultyStore(site.store.repository.objects), Metrics()
    content = site.content

    async def main() -> None:
        complaints = Complaints(logging.getLogger("test"))
        loader = FrameLoader(FrameFetcher(objects, cache), cache, metrics, complaints)
        reader = Reader(
            content.tree, content.locations, loader, cache, metrics, complaints, recorder.watch
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(loader.run)
            for _ in range(2):
                await reader.read(site.node("a"), MIB, 5000)
            data = reader.read_now(site.node("a"), MIB + 5000, 5000)
            assert data == noise("a", 3 * MIB)[MIB + 5000 : MIB + 10_000]
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert recorder.ranges() == [Range(b"a", MIB, 10_000)]


def test_ranges_become_frames_in_order(site: Site) -> None:
    whole = site.frames(("c", 0, 3 * MIB), ("a", 0, 3 * MIB))
    assert len(whole) == len(set(whole))
    assert site.frames(("c", 0, 1))[0] == whole[0]
    assert site.frames(("a", 3 * MIB - 1, 99))[0] == whole[-1]
    assert site.frames(("c", 0, 1 << 60), ("a", 0, 1 << 60)) == whole
    nothing = [
        ("gone", 0, 1), ("deep", 0, 1), ("link", 0, 1), ("a/b", 0, 1), ("deep/gone/x", 0, 1),
        ("sparse", 0, 3 * MIB), ("a", 3 * MIB, 5), ("a", 1 << 62, 1 << 62),
        ("../a", 0, 1), ("deep//d", 0, 1), ("a/", 0, 1),
    ]  # fmt: skip
    assert site.frames(*nothing) == []
    assert site.frames(*nothing, ("deep/er/e", 0, 1), *nothing) != []


def _search(site: Site, wanted: str = "", snapshot: bytes = b"") -> Choice:
    return ProfileSearch(site.store.repository, snapshot or site.pushed.snapshot, wanted).result()


def test_which_profile_is_followed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    objects, manifest = site.store.repository.objects, site.pushed.manifest
    assert _search(site) == Choice("default")
    assert _search(site, "none") == Choice("none")
    assert caplog.text == ""
    assert _search(site, "train") == Choice("default")
    assert "no profile 'train'" in caplog.text
    ranges = Range(b"a", 0, 5), Range(b"gone", 0, 5)
    save_profile(objects, manifest, "train", new_profile(ranges, []))
    assert _search(site) == _search(site, "train") == Choice("recorded", "train", ranges)
    save_profile(objects, manifest, "start", new_profile(ranges[:1], []))
    assert _search(site) == Choice("recorded", "start", ranges[:1])
    (site.tree / "new").write_text("new")
    child = site.store.push(site.tree, "child").snapshot
    assert _search(site, snapshot=child) == Choice("default")
    site.store.push(site.tree, "tree")
    child = site.store.repository.resolve("tree")
    assert _search(site, snapshot=child) == Choice("inherited", "start", ranges[:1])
    assert _search(site, "none", child) == Choice("none")


def test_a_store_that_fails_costs_the_profile_and_no_more(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.store.faults.fail("list", UnavailableError("away"), key="profiles/")
    assert _search(site) == Choice("default")
    assert "away" in caplog.text
    site.store.faults.clear()
    objects = site.store.repository.objects
    objects.put(f"profiles/{site.pushed.manifest.hex()}/start", b"damaged")
    assert _search(site) == Choice("default")


def test_no_more_is_planned_than_there_is_room_for(site: Site) -> None:
    choice = Choice("recorded", "x", tuple(Range(n.encode(), 0, 3 * MIB) for n in site.names))
    tree, locations = site.content.tree, site.content.locations
    whole = plan(choice, tree, locations, 1 << 40)
    assert sum(frame.raw for frame in whole) >= 15 * MIB
    some = plan(choice, tree, locations, 5 * MIB)
    assert some == whole[: len(some)]
    assert 3 * MIB < sum(frame.raw for frame in some) <= 5 * MIB
    assert plan(choice, tree, locations, 0) == []
    assert plan(Choice("default"), tree, locations, 1 << 40) == []
    assert plan(Choice("none"), tree, locations, 1 << 40) == []


def test_a_followed_profile_saves_requests(site: Site) -> None:
    objects = site.store.repository.objects
    # From the end of each file to its start, and no two files that lie side by side in turn.
    reads = [
        (name, at) for name in ("deep/er/e", "b", "deep/d", "a", "c") for at in (2 * MIB, MIB, 0)
    ]
    ranges = [Range(name.encode(), at, 4096) for name, at in reads]

    def requests(wanted: str) -> int:
        cache = BlobCache(site.base / f"cache {wanted}")
        counted, metrics = FaultyStore(objects), Metrics()
        content = site.content

        async def main() -> None:
            complaints = Complaints(logging.getLogger("test"))
            loader = FrameLoader(FrameFetcher(counted, cache), cache, metrics, complaints)
            reader = Reader(content.tree, content.locations, loader, cache, metrics, complaints)
            moved = Moved(
                content.locations, counted, content.manifest, complaints, 0.0,
                lambda: content.fd, lambda fd, locations: None,
            )  # fmt: skip
            async with trio.open_nursery() as nursery:
                await nursery.start(loader.run)
                search = ProfileSearch(site.store.repository, site.pushed.snapshot, wanted)
                await follow(search, content.tree, moved, loader, reader, 1 << 40)
                for name, at in reads:
                    data = await reader.read(site.node(name), at, 4096)
                    assert data == noise(name, 3 * MIB)[at : at + 4096]
                nursery.cancel_scope.cancel()

        trio.run(main)
        return len(counted.calls)

    save_profile(objects, site.pushed.manifest, "start", new_profile(ranges, []))
    without, followed = requests("none"), requests("start")
    assert without >= 5
    assert followed <= 3


def test_who_knows_does_not_guess(site: Site) -> None:
    gate = site.store.faults.gate("get_range", key="packs/")
    cache = BlobCache(site.base / "certain")
    frames = list(site.content.locations.frames)

    async def main() -> None:
        complaints = Complaints(logging.getLogger("test"))
        fetcher = FrameFetcher(site.store.repository.objects, cache)
        loader = FrameLoader(fetcher, cache, Metrics(), complaints)
        async with trio.open_nursery() as nursery:
            await nursery.start(loader.run)
            assert not loader.certain
            async with trio.open_nursery() as streams:
                streams.start_soon(partial(loader.stream, frames, certain=True))
                await trio.to_thread.run_sync(gate.wait_entered)
                assert loader.certain
                gate.open()
            assert not loader.certain
            await loader.stream(frames)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_is_known_is_not_read_ahead_before_it_surprises(site: Site) -> None:
    readahead = Readahead(site.content.tree, site.content.locations.ref_frames)
    known, other = site.node("a"), site.node("b")
    readahead.known.add(known)
    step = 256 << 10
    for at in range(0, MIB, step):
        assert readahead.plan(known, at, step, missed=False) == []
    assert readahead.plan(known, MIB, step, missed=True) == []
    assert readahead.plan(known, MIB + step, step, missed=False) != []
    assert readahead.plan(other, 0, step, missed=False) == []
    assert readahead.plan(other, step, step, missed=False) != []


def _environment(base: Path, *, own: bool) -> list[bytes]:
    """Return what would be fetched of an environment, with or without its own interpreter."""
    home = base / "lib" / "python3.12"
    packages = home / "site-packages"
    files = {
        base / "pyvenv.cfg": "home = /usr",
        packages / "distutils-precedence.pth": "import os",
        packages / "_distutils_hack" / "__pycache__" / "__init__.cpython-312.pyc": "hack",
        packages / "numpy" / "__pycache__" / "__init__.cpython-312.pyc": "numpy",
        packages / "empty.pth": "",
        base / "bin" / "activate": "script",
    }
    if own:
        files |= {
            base / "bin" / "python3.12": "program",
            base / "lib" / "libpython3.12.so.1.0": "library",
            home / "os.py": "source",
            home / "__pycache__" / "os.cpython-312.pyc": "os",
            home / "__pycache__" / "os.cpython-311.pyc": "of another",
            home / "__pycache__" / "turtle.cpython-312.pyc": "turtle",
            home / "__pycache__" / "typing.cpython-312.pyc": "typing",
            home / "encodings" / "__pycache__" / "utf_8.cpython-312.pyc": "utf8",
            home / "lib-dynload" / "math.cpython-312-x86_64-linux-gnu.so": "math",
            home / "lib-dynload" / "_tkinter.cpython-312-x86_64-linux-gnu.so": "tk",
        }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (base / "bin" / "python").symlink_to("python3.12")
    with Store(base.parent / f"store {own}") as store:
        store.push(base, kind="env", normalise=True)
        content = load_content(store.repository, store.repository.resolve("tree"))
    return [item.path for item in default_ranges(content.tree)]


def test_what_every_start_of_an_environment_reads(tmp_path: Path) -> None:
    site = [
        b"pyvenv.cfg",
        b"lib/python3.12/site-packages/distutils-precedence.pth",
        b"lib/python3.12/site-packages/_distutils_hack/__pycache__/__init__.cpython-312.pyc",
    ]
    assert _environment(tmp_path / "venv", own=False) == site
    assert _environment(tmp_path / "whole", own=True) == [
        b"bin/python3.12",
        b"lib/libpython3.12.so.1.0",
        *site,
        b"lib/python3.12/encodings/__pycache__/utf_8.cpython-312.pyc",
        b"lib/python3.12/__pycache__/os.cpython-312.pyc",
        b"lib/python3.12/lib-dynload/math.cpython-312-x86_64-linux-gnu.so",
        b"lib/python3.12/__pycache__/typing.cpython-312.pyc",
    ]
