from __future__ import annotations

import os
import random
import signal
import threading
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnavailableError
from envstore.store import scatter as scatter_module
from envstore.store import seals
from envstore.store.cache import BlobCache, Held
from envstore.store.cachespace import CacheFullError
from envstore.store.digest import digest
from envstore.store.frames import Codec
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, FrameRef, Locations
from envstore.store.packing import PackWriter
from envstore.store.packs import pack_key
from envstore.store.ranges import Content, Range, affordable_gap
from envstore.store.repository import Repository
from envstore.store.scatter import prefetch, scatter
from tests.faulty import FaultyStore
from tests.scattering import (
    MIB,
    OTHER,
    TENSORS,
    FarStore,
    Opened,
    fill,
    no_thread_left,
    some_ranges,
    tensor_start,
    unmoved,
)
from tests.stores import Store
from tests.trees import noise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tree"
    fill(root)
    return root


@pytest.fixture(scope="module")
def pushed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that nobody changes."""
    with Store(tmp_path_factory.mktemp("pushed") / "store") as store:
        store.push(source)
        yield store


@pytest.fixture
def far(pushed: Store, tmp_path: Path) -> Opened:
    """The tree in a store that is far away, with a node cache."""
    objects = FarStore(pushed.repository.objects)
    repository = Repository(objects, pushed.repository.config, BlobCache(tmp_path / "cache"))
    return Opened(repository, pushed.repository.resolve("tree"))


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Iterator[Store]:
    """A store to be damaged."""
    with Store(tmp_path / "store", wrap=FaultyStore) as store:
        store.push(source)
        yield store


def opened(store: Store) -> Opened:
    return Opened(store.repository, store.repository.resolve("tree"))


def contents(source: Path, wanted: list[tuple[str, int, int]]) -> list[bytes]:
    return [(source / path).read_bytes()[at : at + length] for path, at, length in wanted]


def blobs(cache: BlobCache | None) -> list[Path]:
    assert cache is not None
    return sorted(path for path in (cache.root / "blobs").rglob("*") if path.is_file())


def faults(far: Opened) -> FaultyStore:
    objects = far.repository.objects
    assert isinstance(objects, FaultyStore)
    return objects


# What is read.


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 1, 3]))
def test_any_ranges_are_what_was_pushed(
    source: Path, pushed: Store, rng: random.Random, threads: int | None
) -> None:
    tree = opened(pushed)
    wanted = some_ranges(rng, {path: content.size for path, content in tree.contents.items()})
    assert tree.read(wanted, threads=threads) == contents(source, wanted)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.booleans())
def test_any_ranges_come_from_afar_and_out_of_the_cache(
    source: Path,
    pushed: Store,
    tmp_path_factory: pytest.TempPathFactory,
    rng: random.Random,
    cached: bool,
) -> None:
    cache = BlobCache(tmp_path_factory.mktemp("cache")) if cached else None
    far = FarStore(pushed.repository.objects)
    repository = Repository(far, pushed.repository.config, cache)
    tree = Opened(repository, pushed.repository.resolve("tree"))
    sizes = {path: content.size for path, content in tree.contents.items()}
    for _ in range(2):
        wanted = some_ranges(rng, sizes)
        assert tree.read(wanted) == contents(source, wanted)
        before = far.count("get_range", "packs/")
        assert tree.read(wanted) == contents(source, wanted)
        assert not cached or far.count("get_range", "packs/") == before


def test_a_range_that_leaves_its_file(pushed: Store) -> None:
    tree = opened(pushed)
    for start, length in ((-1, 1), (30_000, 1), (0, 30_001), (40_000, 0)):
        with pytest.raises(ValueError, match=r"state\.json"):
            tree.read([("state.json", start, length)])


@pytest.mark.parametrize("cached", [False, True])
def test_frames_of_every_codec(own: Store, tmp_path: Path, cached: bool) -> None:
    objects, index = own.repository.objects, DedupIndex()
    first = b"".join(bytes((low, low ^ 7, 3, 63)) for low in noise("numbers", MIB // 4))
    second = bytearray(first)
    second[::4] = noise("step", MIB // 4)
    chunks = []
    for codec, data in (
        (Codec.SPLIT, first),
        (Codec.XOR, bytes(second)),
        (Codec.RAW, noise(5, MIB)),
    ):
        with closing(PackWriter(objects, index, codec=codec)) as writer:
            like = chunks[0][0] if chunks else None
            writer.add(digest(data), data, like=like)
            writer.flush()
        chunks.append((digest(data), data))
    places = [index.find(name) for name, _ in chunks]
    found = [place for place in places if place is not None]
    assert [index.frames[at].codec for at, _ in found] == [Codec.SPLIT, Codec.XOR, Codec.RAW]
    locations = Locations(
        list(index.frames),
        ref_frames=array("I", (at for at, _ in found)),
        ref_offsets=array("I", (offset for _, offset in found)),
    )
    content = Content.of("f", [(name, len(data)) for name, data in chunks], 0)
    whole = b"".join(data for _, data in chunks)
    cache = BlobCache(tmp_path / "cache") if cached else None
    repository = Repository(FarStore(objects), own.repository.config, cache)
    for _ in range(2):
        for start, length in ((0, 3 * MIB), (MIB, MIB), (MIB + 5, 2 * MIB - 9)):
            view = memoryview(bytearray(length))
            scatter(repository, unmoved(locations), [Range(content, start, view)])
            assert view == whole[start : start + length]


# What it costs.


def test_each_frame_is_fetched_once_and_no_other(source: Path, far: Opened) -> None:
    far.repository.cache = None
    counted = far.repository.objects.traffic
    before = counted.bytes_in
    # Stored once, wanted by two files, and by one of them in three ways.
    a = tensor_start(source, "a")
    wanted = [
        ("model.safetensors", a, 2 * MIB),
        (OTHER, tensor_start(source, "a", OTHER), 2 * MIB),
        ("model.safetensors", a + 7, MIB),
        ("model.safetensors", tensor_start(source, "d"), 3 * MIB),
    ]
    assert far.read(wanted) == contents(source, wanted)
    assert counted.bytes_in - before <= 1.02 * 5 * MIB
    assert far.read([("holes", MIB, 3 * MIB)]) == [bytes(3 * MIB)]
    assert counted.bytes_in - before <= 1.02 * 5 * MIB


def test_neighbours_come_in_one_request(source: Path, far: Opened) -> None:
    objects = faults(far)
    objects.clear()
    names = ("embed", "a", "scale", "b", "bias", "c", "d")
    wanted = [("model.safetensors", tensor_start(source, name), TENSORS[name]) for name in names]
    far.repository.cache = None
    assert far.read(wanted, threads=1) == contents(source, wanted)
    assert objects.count("get_range") <= 3


_frame = st.tuples(st.sampled_from([b"p" * 32, b"q" * 32]), st.integers(1, 4 * MIB))


@given(st.lists(st.tuples(_frame, st.integers(0, 300_000)), max_size=30))
@example([((b"p" * 32, 1), 43_691)] * 4)
def test_gaps_that_are_fetched_too_cost_a_hundredth(
    layout: list[tuple[tuple[bytes, int], int]],
) -> None:
    ends = {b"p" * 32: 8, b"q" * 32: 8}
    frames = []
    for (pack, size), gap in layout:
        frames.append(FrameRef(pack, ends[pack] + gap, size, size, 0, b"d" * 32))
        ends[pack] += gap + size
    most = affordable_gap(frames)
    last: dict[bytes, int] = {}
    wasted = 0
    for frame in frames:
        gap = frame.offset - last.get(frame.pack, frame.offset)
        wasted += gap if gap <= most else 0
        last[frame.pack] = frame.offset + frame.stored
    wanted = sum(frame.stored for frame in frames)
    assert wasted <= max(0.01 * wanted, 64 << 10)


# The cache.


def test_what_came_from_afar_is_kept(source: Path, far: Opened) -> None:
    everything = far.everything()
    assert far.read(everything) == contents(source, everything)
    objects = faults(far)
    objects.clear()
    assert far.read(everything) == contents(source, everything)
    assert objects.calls == []


def test_ranks_that_want_the_same_begin_at_different_places(
    pushed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = set()
    for number in range(3):
        far = FarStore(pushed.repository.objects)
        cache = BlobCache(tmp_path / f"cache-{number}")
        repository = Repository(far, pushed.repository.config, cache)
        tree = Opened(repository, pushed.repository.resolve("tree"))
        far.clear()
        monkeypatch.setattr(random, "randrange", lambda count, number=number: number % count)
        tree.read(tree.everything(), threads=1)
        firsts.add((far.calls[0].key, far.calls[0].length))
    assert len(firsts) == 3


def test_a_store_on_this_machine_is_not_copied_into_the_cache(
    source: Path, pushed: Store, tmp_path: Path
) -> None:
    objects, config = pushed.repository.objects, pushed.repository.config
    repository = Repository(objects, config, BlobCache(tmp_path / "cache"))
    tree = Opened(repository, pushed.repository.resolve("tree"))
    kept = blobs(repository.cache)
    wanted = tree.everything()
    assert tree.read(wanted) == contents(source, wanted)
    assert blobs(repository.cache) == kept
    assert prefetch(repository, tree.locations, [(tree.contents["text"], 0, 100)]) == 0


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "directory", "restart"])
def test_damage_in_the_cache_is_noticed_and_mended(
    source: Path, far: Opened, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = far.everything()
    far.read(everything)
    for path in blobs(far.repository.cache):
        before = path.stat()
        if how in ("flip", "restart"):
            with path.open("r+b") as file:
                file.seek(before.st_size // 2)
                byte = file.read(1)[0]
                file.seek(before.st_size // 2)
                file.write(bytes((byte ^ 1,)))
            if how == "restart":
                # As if the power had failed before it reached the disk: no time stamp tells.
                os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
        elif how in ("cut", "empty"):
            os.truncate(path, before.st_size // 2 if how == "cut" else 0)
        else:
            path.unlink()
            if how == "directory":
                path.mkdir()
    if how == "restart":
        monkeypatch.setattr(seals, "_boot", lambda: b"another")
    objects = faults(far)
    objects.clear()
    assert far.read(everything) == contents(source, everything)
    assert objects.count("get_range", "packs/") > 0
    if how not in ("directory", "cut", "empty"):
        objects.clear()
        assert far.read(everything) == contents(source, everything)
        assert objects.calls == []


def test_the_cap_is_kept_and_what_was_just_kept_is_not_pushed_out(
    source: Path, far: Opened, tmp_path: Path
) -> None:
    cache = far.repository.cache = BlobCache(tmp_path / "small", 8 * MIB)
    everything = far.everything()
    assert far.read(everything) == contents(source, everything)
    usage = cache.usage()
    assert 4 * MIB < usage.bytes <= 8 * MIB
    kept = blobs(cache)
    assert far.read(everything) == contents(source, everything)
    assert blobs(cache) == kept
    far.repository.cache = BlobCache(tmp_path / "none", 0)
    assert far.read(everything) == contents(source, everything)


def test_prefetched_files_are_read_without_the_store(source: Path, far: Opened) -> None:
    model = far.contents["model.safetensors"]
    objects = faults(far)
    fetched = prefetch(far.repository, far.locations, [(model, 0, model.size)])
    assert 0.99 * model.size <= fetched <= 1.02 * model.size
    objects.clear()
    assert prefetch(far.repository, far.locations, [(model, 0, model.size)]) == 0
    wanted = [("model.safetensors", 0, model.size)]
    assert far.read(wanted) == contents(source, wanted)
    assert objects.calls == []


def test_no_more_is_prefetched_than_the_cache_takes(far: Opened, tmp_path: Path) -> None:
    cache = far.repository.cache = BlobCache(tmp_path / "small", 4 * MIB)
    ranges = [(content, 0, content.size) for content in far.contents.values()]
    fetched = prefetch(far.repository, far.locations, ranges)
    assert 0 < fetched <= 4 * MIB
    assert cache.usage().bytes <= 4 * MIB
    # One that is full of what is pinned or being written takes nothing, and that is all.
    filling = cache.begin(4 * MIB - 4096)
    with pytest.raises(CacheFullError):
        cache.put(digest(b"x" * 9000), b"x" * 9000)
    assert prefetch(far.repository, far.locations, ranges) == 0
    cache.abandon(filling)


# Seals.


def test_a_blob_is_sealed_from_its_filling_to_its_first_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path / "cache")
    data = noise(1, 10_000)
    name = digest(data)
    view = memoryview(bytearray(10_000))
    assert cache.read_into(name, (view,)) is Held.NOT
    cache.put(name, data)
    assert cache.read_into(name, (view[:4000], view[4000:])) is Held.SEALED
    assert view == data
    # Use by others keeps it.
    again = BlobCache(tmp_path / "cache")
    assert again.read(name) == data
    assert BlobCache(tmp_path / "cache").read_into(name, (view,)) is Held.SEALED
    assert cache.read_into(name, (memoryview(bytearray(10_001)),)) is Held.NOT
    with open(cache.path(name), "r+b") as file:
        file.write(data[:1])
    assert cache.read_into(name, (view,)) is Held.DOUBTFUL
    cache.seal(name)
    assert cache.read_into(name, (view,)) is Held.SEALED
    with monkeypatch.context() as patch:
        patch.setattr(seals, "_boot", lambda: b"after a restart")
        assert cache.read_into(name, (view,)) is Held.DOUBTFUL
        patch.setattr(seals, "_boot", lambda: None)
        cache.seal(name)
        assert cache.read_into(name, (view,)) is Held.DOUBTFUL
    cache.drop(name)
    cache.seal(name)
    assert not cache.contains(name)


def test_another_file_has_another_seal() -> None:
    stamps = [seals.seal(digest(b"%d" % number), 1_700_000_000_123_456_789) for number in range(99)]
    assert len({stamp & (1 << 20) - 1 for stamp in stamps}) > 90
    for number, stamp in enumerate(stamps):
        assert abs(stamp - 1_700_000_000_123_456_789) < 1 << 20
        assert seals.is_sealed(digest(b"%d" % number), stamp)
        assert not seals.is_sealed(digest(b"%d" % (number + 1)), stamp)


# What goes wrong.


def test_every_flipped_frame_is_refused_and_named(source: Path, own: Store) -> None:
    tree = opened(own)
    for number in set(tree.locations.ref_frames) - {NOWHERE}:
        frame = tree.locations.frames[number]
        path = own.path(pack_key(frame.pack))
        with path.open("r+b") as file:
            file.seek(frame.offset + frame.stored // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes((byte ^ 0x10,)))
        with pytest.raises(CorruptError) as caught, no_thread_left():
            tree.read(tree.everything())
        assert f"pack {frame.pack.hex()}, byte {frame.offset}" in str(caught.value)
        assert any(path in str(caught.value) for path in tree.contents)
        with path.open("r+b") as file:
            file.seek(frame.offset + frame.stored // 2)
            file.write(bytes((byte,)))
    assert tree.read(tree.everything()) == contents(source, tree.everything())


def test_a_pack_cut_off_or_missing(own: Store) -> None:
    tree = opened(own)
    model = [("model.safetensors", 0, tree.contents["model.safetensors"].size)]
    number = tree.locations.ref_frames[tree.contents["model.safetensors"].first]
    path = own.path(pack_key(tree.locations.frames[number].pack))
    os.truncate(path, 100_000)
    with pytest.raises(CorruptError, match=r"model\.safetensors.* too short"), no_thread_left():
        tree.read(model)
    path.unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors.*packs/"), no_thread_left():
        tree.read(model)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_store_that_fails_midway_and_then_works(source: Path, far: Opened, threads: int) -> None:
    everything = far.everything()
    objects = faults(far)
    fault = objects.fail("get_range", UnavailableError("gone"), key="packs/", skip=2, times=1)
    with pytest.raises(UnavailableError, match="gone"), no_thread_left():
        far.read(everything, threads=threads)
    assert fault.hits == 1
    assert far.read(everything, threads=threads) == contents(source, everything)


def test_an_interrupt_leaves_no_thread(source: Path, far: Opened) -> None:
    objects = faults(far)
    gate = objects.gate("get_range", key="packs/")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        gate.wait_entered(3)
        signal.pthread_kill(main, signal.SIGINT)
        gate.open()

    other = threading.Thread(target=interrupt)
    with no_thread_left():
        other.start()
        with pytest.raises(KeyboardInterrupt):
            far.read(far.everything(), threads=3)
        other.join()
    assert far.read(far.everything()) == contents(source, far.everything())


def test_locations_that_lie(far: Opened) -> None:
    content = far.contents["model.safetensors"]
    wanted = [("model.safetensors", 0, content.size)]
    truth = far.locations
    embed = content.first + 1
    assert content.refs[1][1] == 4 * MIB

    def lie(frame: FrameRef | None = None, **columns: int) -> Locations:
        lies = replace(
            truth, **{name: getattr(truth, name)[:] for name in ("ref_frames", "ref_offsets")}
        )
        for name, value in columns.items():
            getattr(lies, name)[embed] = value
        if frame is not None:
            lies.frames = [*truth.frames, frame]
            lies.ref_frames[embed] = len(truth.frames)
        return lies

    honest = truth.frames[truth.ref_frames[embed]]
    elsewhere = next(number for number, frame in enumerate(truth.frames) if 0 < frame.raw < 4 * MIB)
    for lies, message in (
        (lie(ref_frames=NOWHERE), "nowhere"),
        (lie(ref_frames=elsewhere), "ends behind its frame"),
        (lie(ref_offsets=1), "ends behind its frame"),
        (lie(replace(honest, offset=honest.offset + 1)), "does not match its digest"),
        (lie(replace(honest, digest=bytes(32))), "does not match its digest"),
        (lie(replace(honest, stored=honest.stored - 1)), "of two lengths"),
        (lie(replace(honest, codec=99)), "unknown codec"),
        (lie(replace(honest, codec=1)), "frame"),
    ):
        far.locations = lies
        with pytest.raises(EnvstoreError, match=message), no_thread_left():
            far.read(wanted)


def test_memory_is_bounded_by_what_one_request_may_hold() -> None:
    scratch = scatter_module._Scratch()
    for size in (10, 3, 1000, 5):
        scratch.begin(size)
        first = scratch.take(size // 2)
        second = scratch.take(size - size // 2)
        first[:] = b"a" * len(first)
        second[:] = b"b" * len(second)
        assert first == b"a" * (size // 2)
    assert len(scratch._buffer) == 1000
