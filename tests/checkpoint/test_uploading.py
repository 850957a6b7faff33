"""What is sent of a staged part, and what comes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envstore.checkpoint import recipes
from envstore.checkpoint.bandwidth import BURST_SECONDS, LimitedObjects, TokenBucket
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.hashing import HashPool, spans
from envstore.checkpoint.layout import StagedFile
from envstore.checkpoint.stores import Stores
from envstore.checkpoint.trees import SnapshotTree
from envstore.checkpoint.uploading import Knowledge, PartUpload, save_part_snapshot
from envstore.errors import NotFoundError, UnavailableError, UsageError
from envstore.store import packs
from envstore.store.chunking import TENSOR_PIECE
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.verify import verify
from tests.checkpoint.slotfill import Files, content, orders, state
from tests.checkpoint.talker import wait_for
from tests.stores import Store

MIB = 1 << 20


@pytest.fixture
def hashes() -> Iterator[HashPool]:
    pool = HashPool(2)
    yield pool
    pool.close()


def _placed(files: Files) -> tuple[list[StagedFile], memoryview]:
    """Lay ``files`` out as a slot would."""
    data = bytearray(4096)
    placed = []
    for path, segments in files.items():
        places = []
        for segment in segments:
            places.append((len(data), len(segment)))
            data += segment
            data += bytes(-len(data) % 64)
        placed.append(StagedFile(path, tuple(places)))
    return placed, memoryview(data).toreadonly()


class _Filling:
    """All is there, but what ``wait`` is to do when somebody asks for the last bytes."""

    def __init__(self, last: int = 1 << 62, wait: Callable[[], None] = lambda: None) -> None:
        self._last = last
        self._wait = wait

    def reached(self, end: int) -> bool:
        return end < self._last

    def wait(self, end: int) -> None:
        if end >= self._last:
            self._wait()


_there = _Filling()


def _upload(store: Store, knowledge: Knowledge, hashes: HashPool, files: Files, step: int) -> bytes:
    placed, view = _placed(files)
    with PartUpload(knowledge, hashes, recipes.Recipe(placed)) as upload:
        upload.add(placed, view, _there)
        root = upload.finish()
    knowledge.settle()
    return save_part_snapshot(store.repository, root, orders(store.url, step))


def _assert_holds(store: Store, snapshot: bytes, files: Files) -> None:
    assert verify(store.repository, [("it", snapshot)], read_data=True).problems == []
    tree = SnapshotTree(store.repository, snapshot)
    assert {path: tree.read(path) for path in tree.sizes} == {
        path: b"".join(segments) for path, segments in files.items()
    }


def test_segments_are_cut_from_their_own_start_and_come_as_they_lie() -> None:
    files = [
        StagedFile("b", ((20_000_000, TENSOR_PIECE + 5), (4096, 10))),
        StagedFile("a", ((5000, 0), (0, 77), (6000, 1))),
    ]

    found = [(span.file, span.segment, span.start, span.length) for span in spans(files)]

    assert found == [
        (0, 1, 4096, 10),
        (1, 2, 6000, 1),
        (0, 0, 20_000_000, TENSOR_PIECE),
        (0, 0, 20_000_000 + TENSOR_PIECE, 5),
    ]


def test_what_is_staged_is_stored_to_the_byte(store: Store, hashes: HashPool) -> None:
    files = {
        **state({"ranks/00000/model.safetensors": (TENSOR_PIECE + 7, 1), "empty": (0, 2)}),
        "optim.safetensors": [content(3, 100), b"", content(4, MIB), content(3, 100)],
        "objects/x.0.pickle": [b"x"],
    }

    snapshot = _upload(store, Knowledge(store.repository), hashes, files, 1)

    _assert_holds(store, snapshot, files)
    entries = {
        entry.path: entry
        for entry in store.repository.entries(store.repository.snapshot(snapshot).manifest)
    }
    assert entries[b"optim.safetensors"].composed
    assert [size for _, size in entries[b"optim.safetensors"].refs] == [100, MIB, 100]
    kept = store.repository.snapshot(snapshot)
    assert (kept.kind, kept.attributes["run"], kept.attributes["step"]) == (
        "checkpoint",
        "team/llm",
        "1",
    )


def test_the_same_part_is_the_same_snapshot(store: Store, hashes: HashPool) -> None:
    files = state({"model.safetensors": (MIB, 1)})

    first = _upload(store, Knowledge(store.repository), hashes, files, 1)
    again = _upload(store, Knowledge(store.repository), hashes, files, 1)

    assert first == again


def test_of_a_state_that_is_half_frozen_the_other_half_is_sent(
    store: Store, hashes: HashPool
) -> None:
    knowledge = Knowledge(store.repository)
    knowledge.learn([])
    traffic = store.repository.objects.traffic
    frozen = [content(seed, 3 * MIB // 4) for seed in range(8)]

    for step in range(3):
        trained = [content(1000 * step + seed, 3 * MIB // 4) for seed in range(100, 108)]
        files = {
            "model.safetensors": [x for pair in zip(frozen, trained, strict=True) for x in pair]
        }
        before = traffic.bytes_out
        snapshot = _upload(store, knowledge, hashes, files, step)
        sent = traffic.bytes_out - before
        _assert_holds(store, snapshot, files)
        if step:
            assert sent <= 1.02 * sum(map(len, trained))
        else:
            assert sent <= 1.005 * sum(map(len, frozen + trained))


def test_chunks_are_shared_with_what_others_pushed(
    store: Store, hashes: HashPool, tmp_path: Path
) -> None:
    base = content(1, 2 * TENSOR_PIECE)
    (tmp_path / "model").mkdir()
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(base), len(base))
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + base
    (tmp_path / "model" / "model.safetensors").write_bytes(whole)
    store.push(tmp_path / "model", "base", kind="model", normalise=True)
    (base_name,) = [name for ref, name in store.targets() if ref == "base:latest"]
    files = {"model.safetensors": [b"another header", base]}
    traffic = store.repository.objects.traffic
    knowledge = Knowledge(store.repository)
    knowledge.known.learn_snapshots([base_name])
    before = traffic.bytes_out

    snapshot = _upload(store, knowledge, hashes, files, 1)

    assert traffic.bytes_out - before < 20_000
    _assert_holds(store, snapshot, files)


def test_bases_are_refs_or_digests_and_those_that_are_gone_are_named(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f").write_bytes(b"x")
    store.push(tmp_path / "x", "team/base")
    name = store.repository.resolve("team/base").hex()
    stores = Stores(TokenBucket())
    try:
        bases = ("team/base", name, "team/gone", "no ref/at/all")
        opened, run = stores.prepare(orders(store.url, 1, bases=bases))
        missing = opened.learn(run, bases)
    finally:
        stores.close()

    assert missing == ["team/gone", "no ref/at/all"]


def test_chunks_whose_packs_are_gone_are_stored_again(store: Store, hashes: HashPool) -> None:
    knowledge = Knowledge(store.repository)
    files = state({"model.safetensors": (TENSOR_PIECE + 1, 1)})
    _upload(store, knowledge, hashes, files, 1)
    for key in store.object_keys("packs/"):
        store.path(key).unlink()

    snapshot = _upload(store, knowledge, hashes, files, 2)

    _assert_holds(store, snapshot, files)


def test_an_upload_begins_before_all_is_there(
    store: Store, hashes: HashPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", MIB)
    # More frames than may wait for a writer.
    count = 4 * (os.cpu_count() or 1) + 12
    files = {"model.safetensors": [content(seed, MIB) for seed in range(count)]}
    placed, view = _placed(files)
    waited = []

    def wait() -> None:
        wait_for(lambda: store.faults.count("put", "packs/"), "an upload")
        waited.append(True)

    filling = _Filling(placed[0].segments[-1][0] + MIB, wait)
    with PartUpload(Knowledge(store.repository), hashes, recipes.Recipe(placed)) as upload:
        upload.add(placed, view, filling)
        upload.finish()

    assert waited


def test_nothing_touches_the_slot_any_more_when_the_trainer_has_ended(
    store: Store, hashes: HashPool
) -> None:
    files = {"model.safetensors": [content(seed, 2 * MIB) for seed in range(8)]}
    placed, view = _placed(files)

    class GoneError(Exception):
        pass

    def gone() -> None:
        raise GoneError

    with (
        pytest.raises(GoneError),
        PartUpload(Knowledge(store.repository), hashes, recipes.Recipe(placed)) as upload,
    ):
        upload.add(placed, view, _Filling(placed[0].segments[5][0], gone))

    assert store.object_keys("snapshots/") == []


def test_a_part_in_waves_is_described_whole_by_another_process(
    store: Store, hashes: HashPool, tmp_path: Path
) -> None:
    files = {"state.json": [b"{}"], "m.safetensors": [content(1, MIB), content(2, 700_000)]}
    first, _ = _placed({"state.json": [b"{}"], "m.safetensors": [files["m.safetensors"][0]]})
    lengths = [len(segment) for segment in files["m.safetensors"]]
    one = [first[0], StagedFile("m.safetensors", (first[1].segments[0], (0, lengths[1])))]
    two = [
        StagedFile("state.json", ((0, 2),)),
        StagedFile("m.safetensors", ((0, lengths[0]), (4096, lengths[1]))),
    ]
    view_one = _placed({"state.json": [b"{}"], "m.safetensors": [files["m.safetensors"][0]]})[1]
    view_two = _placed({"m.safetensors": [files["m.safetensors"][1]]})[1]
    recipe = recipes.Recipe(one)
    with PartUpload(Knowledge(store.repository), hashes, recipe) as upload:
        upload.add(one, view_one, _there)
        upload.flush()
    recipes.keep(tmp_path / "waves-0", 7, 1, recipe)

    # It may not meet the segment that lists the first wave, of many that are only sampled.
    found = recipes.kept(tmp_path / "waves-0", 7, 1, two)
    with PartUpload(Knowledge(store.repository), hashes, found) as upload:
        upload.add(two, view_two, _there)
        root = upload.finish()

    _assert_holds(store, save_part_snapshot(store.repository, root, orders(store.url, 1)), files)
    for sequence, waves in ((8, 1), (7, 2)):
        with pytest.raises(CheckpointError, match="not known any more"):
            recipes.kept(tmp_path / "waves-0", sequence, waves, two)
    for info in list(store.repository.objects.list("packs/")):
        store.repository.objects.delete(info.key)
    found = recipes.kept(tmp_path / "waves-0", 7, 1, two)
    with PartUpload(Knowledge(store.repository), hashes, found) as upload:
        upload.add(two, view_two, _there)
        with pytest.raises(CheckpointError, match="lost earlier waves"):
            upload.finish()
    os.truncate(tmp_path / "waves-0", 40)
    with pytest.raises(CheckpointError, match="not known any more"):
        recipes.kept(tmp_path / "waves-0", 7, 1, two)


def test_a_part_whose_waves_did_not_all_come_is_none(store: Store, hashes: HashPool) -> None:
    placed = [StagedFile("m", ((4096, 10), (0, 5)))]
    with PartUpload(Knowledge(store.repository), hashes, recipes.Recipe(placed)) as upload:
        upload.add(placed, memoryview(bytes(5000)), _there)
        with pytest.raises(CheckpointError, match="not all of m was staged"):
            upload.finish()
        with pytest.raises(CheckpointError, match="other files"):
            upload.add([StagedFile("m", ((4096, 11), (0, 5)))], memoryview(bytes(5000)), _there)


def test_a_codec_that_there_is_not_is_refused(store: Store, hashes: HashPool) -> None:
    with pytest.raises(UsageError, match="'gzip' is not a codec"):
        PartUpload(Knowledge(store.repository), hashes, recipes.Recipe([]), codec="gzip")


def test_numbers_can_be_stored_with_their_bytes_apart(store: Store, hashes: HashPool) -> None:
    numbers = bytearray(b"\0\0\x80\x3f" * 300_000)
    numbers[0::4], numbers[1::4] = content(1, 300_000), content(2, 300_000)
    data = bytes(numbers)
    placed, view = _placed({"m": [data]})
    knowledge = Knowledge(store.repository)
    traffic = store.repository.objects.traffic
    before = traffic.bytes_out
    with PartUpload(knowledge, hashes, recipes.Recipe(placed), codec="split") as upload:
        upload.add(placed, view, _there)
        root = upload.finish()

    assert traffic.bytes_out - before < 0.7 * len(data)
    snapshot = save_part_snapshot(store.repository, root, orders(store.url, 1))
    _assert_holds(store, snapshot, {"m": [data]})


def test_what_changed_little_can_be_stored_as_a_difference(store: Store, hashes: HashPool) -> None:
    knowledge = Knowledge(store.repository)
    traffic = store.repository.objects.traffic
    tensor, frozen = bytearray(content(1, 2 * TENSOR_PIECE + MIB)), content(2, MIB)
    for step in range(3):
        tensor[step::64] = content(10 + step, len(tensor[step::64]))
        files = {"m": [b"header %d" % step, bytes(tensor), frozen]}
        placed, view = _placed(files)
        before = traffic.bytes_out
        with PartUpload(knowledge, hashes, recipes.Recipe(placed), codec="xor") as upload:
            upload.add(placed, view, _there)
            root = upload.finish()
        knowledge.settle()
        sent = traffic.bytes_out - before
        snapshot = save_part_snapshot(store.repository, root, orders(store.url, step + 1))
        _assert_holds(store, snapshot, files)
        assert sent < 0.2 * len(tensor) if step else sent > len(tensor)


def test_what_is_known_is_bounded(
    store: Store, hashes: HashPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.checkpoint.uploading.MAX_INDEX", 3)
    knowledge = Knowledge(store.repository)
    first = _upload(store, knowledge, hashes, {"m": [content(i, 10) for i in range(9)]}, 1)
    assert len(knowledge.index) > 3
    index = knowledge.index

    knowledge.learn([first])

    assert knowledge.index is not index
    assert isinstance(knowledge.index, DedupIndex)
    assert isinstance(knowledge.known, KnownChunks)
    assert knowledge.index.find(b"x" * 32) is None


def test_an_upload_that_failed_leaves_nothing_that_leads_to_it(
    store: Store, hashes: HashPool
) -> None:
    files = state({"model.safetensors": (MIB, 1)})
    knowledge = Knowledge(store.repository)
    fault = store.faults.fail("put", UnavailableError("gone"), key="packs/")
    with pytest.raises(UnavailableError):
        _upload(store, knowledge, hashes, files, 1)
    fault.remove()
    knowledge.forget()

    snapshot = _upload(store, knowledge, hashes, files, 1)

    _assert_holds(store, snapshot, files)


class _Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds


def test_no_more_passes_than_the_limit_says() -> None:
    clock = _Clock()
    bucket = TokenBucket(1000, clock=clock, sleep=clock.sleep)
    start, passed, largest = clock.now, 0, 0

    for count in [10, 500, 3000, 1, 1, 999, 2500, 40] * 50:
        bucket.take(count)
        passed += count
        largest = max(largest, count)
        assert passed <= 1000 * (clock.now - start + BURST_SECONDS) + largest

    # And not much less either.
    assert passed >= 1000 * (clock.now - start) - largest


def test_a_limit_can_be_changed_and_lifted() -> None:
    clock = _Clock()
    bucket = TokenBucket(clock=clock, sleep=clock.sleep)
    bucket.take(10**12)
    bucket.limit(100)
    bucket.take(50)
    bucket.take(50)
    assert clock.slept > 0
    slept = clock.slept
    bucket.limit(None)
    bucket.take(10**12)
    assert (clock.slept, bucket.rate) == (slept, None)


def test_uploads_are_charged_and_all_else_passes(store: Store) -> None:
    clock = _Clock()
    objects = LimitedObjects(
        store.repository.objects, TokenBucket(1000, clock=clock, sleep=clock.sleep)
    )

    objects.put("x/a", [b"1" * 1500, memoryview(b"2" * 500)])
    objects.put_if("x/b", b"3" * 100, None)
    slept = clock.slept
    assert slept >= 1.0
    assert objects.get("x/a") == b"1" * 1500 + b"2" * 500
    assert objects.get_range("x/a", 1499, 2) == b"12"
    assert b"".join(objects.iter_range("x/a", 1499, 2)) == b"12"
    into = bytearray(2)
    objects.get_range_into("x/a", 1499, [memoryview(into)])
    assert into == b"12"
    assert objects.get_versioned("x/b")[0] == b"3" * 100
    assert sorted(info.key for info in objects.list("x/")) == ["x/a", "x/b"]
    assert objects.size("x/a") == 2000
    objects.delete("x/a")
    with pytest.raises(NotFoundError):
        objects.get("x/a")
    assert clock.slept == slept
    objects.close()


def test_what_says_that_a_writer_lives_is_not_held_down(store: Store) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        bucket.limit(None)

    bucket = TokenBucket(1.0, clock=lambda: 0.0, sleep=sleep)
    limited = LimitedObjects(store.repository.objects, bucket)
    limited.put("packs/aa/x", b"larger than a second's worth")
    version = limited.put_if("sessions/" + "0" * 32, b"alive", None)
    limited.put_if("sessions/" + "0" * 32, b"still", version)
    limited.put_if("gc/state", b"claimed", None)
    assert waited == []
    limited.put_if("refs/a/b/c", b"a ref", None)
    assert len(waited) == 1
