"""Marking within bounds of memory: sorted runs, files behind them, and what they say of packs."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import NoSpaceError
from envstore.store.digest import digest
from envstore.store.gc.ahead import read_ahead
from envstore.store.gc.marking import Marks, mark
from envstore.store.gc.runs import Runs
from envstore.store.gc.survey import PackTable, survey
from envstore.store.gc.usage import measure_packs
from envstore.store.index import segment_key
from envstore.store.packs import pack_key
from envstore.store.roots import read_roots
from tests import trees
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

numbers = st.sets(st.integers(0, (1 << 64) - 1) | st.integers(0, 300), max_size=60)


def _filled(sets: list[set[int]], limit: int) -> Runs:
    runs = Runs(limit)
    for found in sets:
        runs.add(array("Q", sorted(found)))
    runs.finish()
    return runs


@given(st.lists(numbers, max_size=60), st.sampled_from([64, 1000, 1 << 20]), numbers)
def test_runs_are_a_set(sets: list[set[int]], limit: int, ends: set[int]) -> None:
    runs = _filled(sets, limit)
    union = set().union(*sets)
    assert len(runs) == len(union)
    assert list(runs.between(0, 1 << 64)) == sorted(union)
    for low in ends:
        for high in ends:
            expected = sorted(number for number in union if low <= number < high)
            assert list(runs.between(low, high)) == expected


def test_runs_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.store.gc.runs._SHARD", 2000)
    rng = random.Random(1)
    limit = 100_000
    runs = Runs(limit)
    tracemalloc.start()
    try:
        for _ in range(40):
            runs.add(array("Q", sorted(rng.randrange(1 << 64) for _ in range(2500))))
        runs.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(runs) == 100_000
    assert runs.spilled >= 800_000
    # What is held, its successor, and a shard of Python's integers.
    assert peak < 600_000


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    runs = Runs(8)
    with pytest.raises(NoSpaceError, match="missing") as caught:
        runs.add(array("Q", range(10)))
    assert "TMPDIR" in (caught.value.hint or "")


def test_what_is_read_ahead_comes_in_order_and_within_bounds() -> None:
    asked: list[int] = []

    def read(item: int) -> int:
        asked.append(item)
        return item * item

    def items() -> Iterator[int]:
        for number in range(100):
            assert number - done <= 17
            yield number

    done = 0
    for item, result in read_ahead(items(), read):
        assert result == item * item
        done += 1
    assert done == 100
    asked.clear()
    heavy = read_ahead(range(100), read, weigh=lambda item: 60 << 20)
    next(heavy)
    heavy.close()
    assert len(asked) <= 3


def test_an_error_of_what_is_read_ahead_is_raised_in_its_turn() -> None:
    def read(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    found = read_ahead(range(20), read)
    assert [next(found)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(found)


@given(st.sets(st.integers(0, (1 << 32) - 1), min_size=2, max_size=50), st.integers(1, 3))
def test_no_two_frames_of_a_small_store_share_a_number(offsets: set[int], number: int) -> None:
    table = PackTable((digest(bytes([n])), 1) for n in range(3))
    marks = Marks(table, Runs(), bytearray(4), bytearray(4), bytearray(4))
    found = {marks.frame(number, offset) for offset in offsets}
    assert len(found) == len(offsets)
    assert all(value >> 23 + marks.hash_bits == number for value in found)


@pytest.mark.parametrize("limit", [100, 1 << 30])
def test_marks_are_the_same_wherever_they_are_kept(
    store: Store, tmp_path: Path, limit: int
) -> None:
    for name in "abc":
        root = tmp_path / name
        trees.plain(root, name, files=20)
        (root / "shared").write_bytes(trees.noise("shared", 1 << 20))
        trees.settle(root)
        store.push(root, name)
    store.repository.objects.delete("refs/default/a/latest")
    objects = store.repository.objects
    found = survey(objects.list(""))
    marks = mark(store.repository, found, read_roots(objects), limit=limit)
    assert (marks.chunks.spilled > 0) == (limit == 100)
    # Every chunk that a live snapshot has is marked, and the packs of live ones are live.
    places = set()
    for name in "bc":
        manifest = store.snapshot(name).manifest
        _, locations = store.repository.located(manifest)
        pairs = [
            *zip(locations.part_frames, locations.part_offsets, strict=True),
            *zip(locations.ref_frames, locations.ref_offsets, strict=True),
        ]
        for number, offset in pairs:
            frame = locations.frames[number]
            places.add((found.packs.number(frame.pack), frame.offset, offset))
    assert len(marks.chunks) == len(places)
    for number, offset, place in places:
        assert marks.frame(number, offset) + place in marks.of_pack(number)
        assert marks.why[number]
    assert sum(map(bool, marks.why)) == len({number for number, _, _ in places})


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_needed_of_packs_is_known_with_and_without_an_index(
    store: Store, tmp_path: Path, listed: bool
) -> None:
    root = tmp_path / "tree"
    trees.plain(root, "tree", files=20)
    (root / "noise").write_bytes(trees.noise("noise", 3 << 20))
    trees.settle(root)
    store.push(root, "old")
    (root / "noise").write_bytes(trees.noise("noise", 3 << 20)[: 1 << 20])
    trees.settle(root)
    store.push(root, "new")
    objects = store.repository.objects
    (old,) = {key for key in store.object_keys("packs/") if (objects.size(key) or 0) > 3 << 20}
    if not listed:
        for key in store.object_keys("index/"):
            objects.delete(key)
    objects.delete("refs/default/old/latest")
    found = survey(objects.list(""))
    marks = mark(store.repository, found, read_roots(objects))
    usage = measure_packs(objects, found, marks, lambda what, done, total: None)
    number = found.packs.number_of(old)
    dead = found.packs.sizes[number] - usage.needed[number]
    assert (2 << 20) - 300_000 < dead < (2 << 20) + 300_000
    assert usage.lost == frozenset()
    objects.delete(old)
    again = survey(objects.list(""))
    lost = measure_packs(objects, again, marks, lambda what, done, total: None).lost
    assert {pack_key(pack) for pack in lost} == ({old} if listed else set())


def test_a_damaged_segment_keeps_its_packs_whole(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    trees.plain(root, "tree", files=5)
    trees.settle(root)
    store.push(root)
    (key,) = store.object_keys("index/")
    assert key == segment_key(bytes.fromhex(key[-64:]))
    store.path(key).write_bytes(b"rubbish")
    (pack,) = store.object_keys("packs/")
    store.path(pack).write_bytes(store.path(pack).read_bytes()[:-1])
    objects = store.repository.objects
    found = survey(objects.list(""))
    marks = mark(store.repository, found, read_roots(objects))
    usage = measure_packs(objects, found, marks, lambda what, done, total: None)
    assert list(usage.needed) == list(found.packs.sizes)
