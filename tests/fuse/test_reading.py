"""The way from a range of a file to its bytes, over a store and a cache that misbehave."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError, EnvstoreError, NoSpaceError, UnavailableError
from envstore.fuse.content import Content, load_content
from envstore.fuse.loader import FrameLoader
from envstore.fuse.reader import Reader
from envstore.store.locations import Locations
from tests.site import MIB, Site


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.store.close()


@pytest.fixture
def site(whole_site: Site) -> Site:
    whole_site.again()
    return whole_site


def test_everything_is_read_as_it_was_pushed(site: Site) -> None:
    async def main(reader: Reader) -> None:
        for _ in ("cold", "warm"):
            for name, data in site.files.items():
                assert await site.read(reader, name) == data

    site.run(main)
    assert site.metrics.errors == 0
    assert site.metrics.inline > 0
    assert site.metrics.missed > 0


@given(
    name=st.sampled_from(["large", "text", "small", "empty", "sparse", "other"]),
    ranges=st.lists(st.tuples(st.floats(0, 1.1), st.integers(0, 2 * MIB)), max_size=8),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ranges_in_any_order(site: Site, name: str, ranges: list[tuple[float, int]]) -> None:
    async def main(reader: Reader) -> None:
        data = site.files[name]
        for place, size in ranges:
            offset = int(place * len(data))
            found = await site.read(reader, name, offset, size)
            assert found == data[offset : offset + size]

    site.run(main)


def test_ten_readers_make_one_request_of_each_range(site: Site) -> None:
    gate = site.objects.gate("get_range", key="packs/")

    async def main(reader: Reader) -> None:
        found: list[bytes] = []

        async def one() -> None:
            found.append(await site.read(reader, "other"))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
            await trio.to_thread.run_sync(gate.wait_entered)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
        assert found == [site.files["other"]] * 10

    site.run(main)
    frames = set(_places(site, "other"))
    assert site.fetcher.fetched.frames == len(frames)
    assert site.fetches() == 1


def _places(site: Site, name: str) -> list[tuple[bytes, int]]:
    refs = site.content.tree.file_refs(site.node(name))
    frames = [site.locations.frames[site.locations.ref_frames[ref]] for ref in refs]
    return [(frame.pack, frame.offset) for frame in frames]


def test_who_gives_up_waiting_takes_nothing_from_the_others(site: Site) -> None:
    gate = site.objects.gate("get_range", key="packs/")

    async def main(reader: Reader) -> None:
        async with trio.open_nursery() as nursery:
            scopes: list[trio.CancelScope] = []

            async def impatient() -> None:
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    await site.read(reader, "other")
                assert scope.cancelled_caught

            async def patient() -> None:
                assert await site.read(reader, "other") == site.files["other"]

            nursery.start_soon(impatient)
            nursery.start_soon(patient)
            await trio.to_thread.run_sync(gate.wait_entered)
            await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()
            await trio.testing.wait_all_tasks_blocked()
            gate.open()

    site.run(main)
    assert site.fetches() == 1


def test_an_urgent_read_overtakes_what_is_queued_to_be_read_ahead(site: Site) -> None:
    frames = list(site.locations.frames)
    gate = site.objects.gate("get_range", key="packs/", times=1)

    async def main(loader: FrameLoader) -> None:
        # One request at a time is made ahead: the first holds up all others.
        loader.prefetch(frames[:1])
        await trio.to_thread.run_sync(gate.wait_entered)
        for frame in frames[1:]:
            loader.prefetch([frame])
        found = await loader.load([frames[-1]])
        assert len(found[frames[-1].digest]) == frames[-1].raw  # type: ignore[arg-type]
        gate.open()
        everything = await loader.load(frames)
        assert all(isinstance(data, bytes) for data in everything.values())

    site.load(main)
    assert site.fetcher.fetched.frames <= len(frames) + 1


def test_a_failure_hurts_one_read_and_is_not_remembered(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    error = UnavailableError("cannot reach the store", hint="see whether it runs")
    fault = site.objects.fail("get_range", error, key="packs/")

    async def main(reader: Reader) -> None:
        for _ in range(3):
            await site.fails(reader, "other")
        fault.remove()
        assert await site.read(reader, "other") == site.files["other"]

    site.run(main)
    assert site.metrics.errors == 3
    said = [record.getMessage() for record in caplog.records if "cannot read" in record.message]
    assert said == ["cannot read other: cannot reach the store (see whether it runs)"]


def test_a_bug_in_the_backend_costs_one_read(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fault = site.objects.fail("get_range", RuntimeError("a bug"), key="packs/")

    async def main(reader: Reader) -> None:
        await site.fails(reader, "other")
        fault.remove()
        assert await site.read(reader, "other") == site.files["other"]

    site.run(main)
    assert "a bug" in caplog.text


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_wrong_bytes_are_never_passed_on(
    site: Site, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    fault = site.objects.corrupt("get_range", key="packs/", at=at)

    async def main(reader: Reader) -> None:
        await site.fails(reader, "other")
        fault.remove()
        assert await site.read(reader, "other") == site.files["other"]

    site.run(main)
    pack = site.locations.frames[site.locations.ref_frames[_ref(site, "other")]].pack
    assert pack.hex() in caplog.text


def _ref(site: Site, name: str) -> int:
    return site.content.tree.file_refs(site.node(name)).start


def test_one_damaged_frame_spares_its_neighbours(site: Site) -> None:
    refs = site.content.tree.file_refs(site.node("large"))
    frames = list(dict.fromkeys(site.locations.ref_frames[ref] for ref in refs))
    bad = site.locations.frames[frames[2]]
    path = site.store.path(f"packs/{bad.pack.hex()[:2]}/{bad.pack.hex()}")
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(
        before[: bad.offset + 9] + bytes([before[bad.offset + 9] ^ 1]) + before[bad.offset + 10 :]
    )
    start = sum(
        site.content.tree.chunk_size(ref)
        for ref in refs
        if site.locations.ref_frames[ref] in frames[:2]
    )

    async def main(reader: Reader) -> None:
        data = site.files["large"]
        assert await site.read(reader, "large", 0, start) == data[:start]
        with pytest.raises(OSError, match="Input/output"):
            await site.read(reader, "large", start, 10)
        after = start + bad.raw
        assert await site.read(reader, "large", after, len(data)) == data[after:]
        path.write_bytes(before)
        assert await site.read(reader, "large") == data

    try:
        site.run(main)
    finally:
        path.write_bytes(before)


def _changed(site: Site, change: Callable[[Locations], None]) -> Locations:
    """Return a copy of the locations with a change to it."""
    ours = site.content.locations
    copy = Locations(
        list(ours.frames),
        ref_frames=array("I", ours.ref_frames),
        ref_offsets=array("I", ours.ref_offsets),
    )
    change(copy)
    return copy


def test_locations_that_lie_are_found_out(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    one, two = _ref(site, "small"), _ref(site, "text")

    def elsewhere(found: Locations) -> None:
        found.ref_frames[one] = found.ref_frames[two]

    def moved(found: Locations) -> None:
        found.ref_offsets[one] += 1

    def beyond(found: Locations) -> None:
        found.ref_offsets[one] = found.frames[found.ref_frames[one]].raw

    def nowhere(found: Locations) -> None:
        found.ref_frames[one] = 0xFFFFFFFF

    fetches: list[int] = []
    for change in (elsewhere, moved, beyond, nowhere):
        site.again(_changed(site, change))

        async def main(reader: Reader) -> None:
            await site.fails(reader, "small")
            fetches.append(site.fetches())
            assert await site.read(reader, "text") == site.files["text"]
            # Also once everything is in the cache.
            await site.fails(reader, "small")

        site.run(main)
        name = site.content.tree.chunk_digest(one).hex()
        assert name in caplog.text
        caplog.clear()
    # What cannot be right is not even asked for.
    assert fetches == [1, 1, 0, 0]


@pytest.mark.parametrize("damage", ["changed", "short", "empty"])
def test_a_damaged_cache_is_mended(site: Site, damage: str) -> None:
    async def fill(reader: Reader) -> None:
        await site.read(reader, "other")

    site.run(fill)
    for path in (site.cache.root / "blobs").rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            kept = {"changed": data, "short": data[:-1], "empty": b""}[damage]
            path.chmod(0o644)
            path.write_bytes(kept)

    async def main(reader: Reader) -> None:
        before = site.fetches()
        assert await site.read(reader, "other") == site.files["other"]
        fetched = site.fetches()
        assert fetched > before
        assert await site.read(reader, "other") == site.files["other"]
        assert site.fetches() == fetched

    # In a new server, for what was proven once is not proven again.
    site.run(main)
    assert site.metrics.damaged > 0


def test_a_cache_too_small_for_a_frame_makes_reading_slow_and_not_impossible(site: Site) -> None:
    site.again(capacity=256 << 10)

    async def main(reader: Reader) -> None:
        for name in ("large", "text", "empty"):
            assert await site.read(reader, name) == site.files[name]

    site.run(main)
    assert site.cache.usage().bytes <= 256 << 10


def test_a_cache_smaller_than_the_file_still_serves_it(site: Site) -> None:
    site.again(capacity=4 * MIB)

    async def main(reader: Reader) -> None:
        for name in ("large", "text", "large"):
            data = site.files[name]
            for offset in range(0, len(data), 100_000):
                assert await site.read(reader, name, offset, 100_000) == data[offset:][:100_000]

    site.run(main)
    assert site.cache.usage().bytes <= 4 * MIB


def test_a_sequential_reader_is_fetched_for_ahead(site: Site) -> None:
    data = site.files["large"]

    async def main(reader: Reader) -> None:
        for offset in range(0, len(data), 128 << 10):
            found = await site.read(reader, "large", offset, 128 << 10)
            assert found == data[offset : offset + (128 << 10)]

    site.run(main)
    assert site.metrics.ahead >= 3
    frames = len(set(_places(site, "large")))
    assert site.fetcher.fetched.frames == frames


def test_a_failure_ahead_of_a_reader_is_not_the_readers(site: Site) -> None:
    data = site.files["large"]
    first = site.locations.frames[site.locations.ref_frames[_ref(site, "large")]].raw
    fault = site.objects.fail("get_range", NoSpaceError("nothing left"), key="packs/", skip=1)

    async def main(reader: Reader) -> None:
        # So much that the window opens, and all of it from the first frame.
        for offset in range(0, first - (256 << 10), 128 << 10):
            found = await site.read(reader, "large", offset, 128 << 10)
            assert found == data[offset : offset + (128 << 10)]
        fault.remove()
        assert await site.read(reader, "large") == data

    site.run(main)
    assert site.metrics.errors == 0


def test_frames_leave_memory_without_the_garbage_collector(site: Site) -> None:
    async def main(reader: Reader) -> None:
        await site.read(reader, "small")  # what is kept from the first fetch on
        before, _ = tracemalloc.get_traced_memory()
        for name in ("large", "text", "other"):
            assert await site.read(reader, name) == site.files[name]
        # A worker thread lets go of its last frame in its own time.
        with trio.fail_after(60):
            while tracemalloc.get_traced_memory()[0] - before >= MIB:
                await trio.sleep(0.01)

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        site.run(main)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_what_was_used_is_counted_once(site: Site) -> None:
    async def main(reader: Reader) -> None:
        for name in ("small", "twin", "other", "other"):
            await site.read(reader, name)
        raw, stored = reader.used()
        assert raw == len(site.files["small"]) + len(site.files["other"])
        assert 0 < stored <= raw

    site.run(main)


def test_content_of_a_damaged_manifest_is_refused(site: Site) -> None:
    repository = site.store.repository
    digest = repository.resolve("tree")
    manifest = repository.snapshot(digest).manifest
    path = site.store.path(f"manifests/{manifest.hex()}")
    before = path.read_bytes()
    path.chmod(0o644)
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CorruptError):
            load_content(repository, digest)
        path.write_bytes(before[:20])
        with pytest.raises(EnvstoreError):
            load_content(repository, digest)
    finally:
        path.write_bytes(before)
    assert isinstance(load_content(repository, digest), Content)
