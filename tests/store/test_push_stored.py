"""What a push stores, and where it comes to lie."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from envstore.store import known, packing, packs, samples
from envstore.store.dedup import MAX_RANGES
from envstore.store.locations import FrameRef
from envstore.store.profiles import Range, new_profile, profile_key, save_profile
from envstore.store.push import PushResult
from envstore.store.source import (
    WINDOW,
)
from tests import trees
from tests.sources import ListedSource, WatchedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


def test_everything_legal_can_be_pushed_and_pushed_again(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "nasty"
    trees.fill(tree)
    trees.settle(tree)
    first = store.push(tree)
    facts = trees.describe(tree)
    assert first.files == sum(item.kind == "file" for item in facts.values())
    assert first.logical_bytes == sum(item.size for item in facts.values())
    assert store.push(tree).unchanged
    store.forget()
    assert store.push(tree).manifest == first.manifest
    store.assert_sound()


def test_copies_cost_nothing(store: Store, tmp_path: Path) -> None:
    data = trees.noise(1, 3 << 20)
    result = store.push(ListedSource({b"a": data, b"b": data, b"c": data[1 << 20 :]}))
    assert result.new_chunk_bytes < 1.2 * len(data)
    again = store.push(ListedSource({b"elsewhere": data}), "other")
    assert again.new_chunk_bytes == 0


def test_one_chunk_over_and_over(store: Store, tmp_path: Path) -> None:
    block = trees.noise(1, 256 << 10)
    data = (b"\1" * (256 << 10)) * 20 + block * 3
    result = store.push(ListedSource({b"a": data, b"b": data}))
    assert result.new_chunk_bytes < 2 << 20
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy/a").read_bytes() == data


def test_hard_links_are_read_once(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "b").write_bytes(trees.noise(1, 100_000))
    for name in "acd":
        os.link(tree / "b", tree / name)
    source = WatchedSource(tree)
    result = store.push(source)
    assert source.opened == [b"a"]
    assert (result.files, result.logical_bytes, result.read_bytes) == (4, 400_000, 100_000)


def test_holes_and_zeros_are_the_same(store: Store, tmp_path: Path) -> None:
    content = {"zeros": bytes(5 << 20), "mixed": bytes(2 << 20) + b"x" * 999 + bytes(4 << 20)}
    manifests = set()
    for sparse in (False, True):
        tree = tmp_path / f"tree {sparse}"
        tree.mkdir()
        for name, data in content.items():
            with open(tree / name, "wb") as file:
                if not sparse:
                    file.write(data)
                else:
                    file.truncate(len(data))
                    file.seek(2 << 20)
                    file.write(data[2 << 20 : 3 << 20] if any(data) else b"")
        assert ((tree / "zeros").stat().st_blocks == 0) == sparse
        result = store.push(tree, f"sparse-{sparse}", kind="model", normalise=True)
        manifests.add(result.manifest)
    assert len(manifests) == 1


def test_the_same_content_has_the_same_manifest_anywhere(store: Store, tmp_path: Path) -> None:
    manifests = set()
    for number, umask in enumerate((0o022, 0o077, 0o002)):
        tree = tmp_path / f"place {number}" / ("x" * (1 + 40 * number))
        tree.parent.mkdir()
        old = os.umask(umask)
        try:
            trees.plain(tree, "same", files=200, size=5000)
            (tree / "program").write_text("#!/bin/sh\n")
            os.chmod(tree / "program", (0o755, 0o700, 0o711)[number])
            if number:
                os.link(tree / "file 0", tree / "file 0 twin")
            else:
                (tree / "file 0 twin").write_bytes((tree / "file 0").read_bytes())
            os.symlink("program", tree / "link")
        finally:
            os.umask(old)
        for i, path in enumerate(sorted(tree.rglob("*"))):
            os.utime(path, (i * number, i * number), follow_symlinks=False)
        with Store(tmp_path / f"store {number}") as own:
            manifests.add(own.push(tree, kind="env", normalise=True).manifest)
        manifests.add(store.push(tree, kind="env", normalise=True).manifest)
    assert len(manifests) == 1


def test_time_stamps_beyond_the_format_are_kept_as_near_as_can_be(
    store: Store, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "late").write_text("x")
    os.utime(tree / "late", (0, 13_000_000_000))  # in 2381: more nanoseconds than 63 bits hold
    if (tree / "late").stat().st_mtime != 13_000_000_000:
        pytest.skip("this file system has no such times")
    trees.settle(tree)
    result = store.push(tree)
    assert len(result.warnings) == 1
    assert "late" in result.warnings[0]
    assert store.push(tree).unchanged
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy/late").stat().st_mtime_ns == (1 << 63) - 1


def test_fifty_thousand_small_files_take_few_requests(store: Store) -> None:
    files = {
        b"lib/%03d/%05d.py" % (i % 500, i): b"# %d\n" % i + trees.noise(i % 97, i % 1500)
        for i in range(50_000)
    }
    result = store.push(ListedSource(files))
    assert result.files == 50_000
    assert result.requests <= 30
    again = store.push(ListedSource({**files, b"lib/000/new": b"x"}))
    assert again.requests <= 30
    assert again.new_chunk_bytes == 1


def test_memory_is_not_filled_by_a_slow_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", 1 << 20)
    gate = store.faults.gate("put", key="packs/")
    source = ListedSource({b"%03d" % i: trees.noise(i, 4 << 20) for i in range(60)})
    done: list[PushResult] = []
    thread = threading.Thread(
        target=store.in_this_thread, args=(lambda: done.append(store.push(source)),)
    )
    thread.start()
    try:
        gate.wait_entered(packing.UPLOADS)
        thread.join(0.5)  # it gets all the time it could want to read on
        opened = len(source.opened)
    finally:
        gate.open()
        thread.join()
    assert opened < 45
    assert done[0].files == len(source.opened) == 60


def test_old_segments_are_found_again_through_samples(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 3)
    monkeypatch.setattr(known, "MERGE", 2)
    monkeypatch.setattr(samples, "RATE", 4)
    data = [trees.noise(i, 3 << 20) for i in range(14)]
    for i, content in enumerate(data):
        store.push(ListedSource({b"file": content}), f"ref-{i}")
    assert 1 <= len(store.object_keys("samples/")) <= 3
    assert len(store.object_keys("index/")) == 14
    store.forget()
    # The cost of knowing stays bounded, and nearly everything is found.
    result = store.push(ListedSource({b"file": data[0] + data[5]}), "again")
    assert result.new_chunk_bytes < 0.2 * (6 << 20)
    assert result.requests < 14 + 6 + 7  # the last are of the session
    store.assert_sound()


def test_a_damaged_sample_or_segment_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 2)
    monkeypatch.setattr(samples, "RATE", 4)
    for i in range(6):
        store.push(ListedSource({b"file": trees.noise(i, 1 << 20)}), f"ref-{i}")
    assert store.object_keys("samples/")
    for key in (*store.object_keys("samples/"), *store.object_keys("index/")):
        data = bytearray(store.path(key).read_bytes())
        data[len(data) // 2] ^= 0xFF
        store.path(key).write_bytes(data)
    result = store.push(ListedSource({b"file": trees.noise(0, 1 << 20)}), "again")
    assert result.new_chunk_bytes == 1 << 20
    assert len(result.warnings) >= 2


def test_a_file_pieced_together_is_not_scattered(store: Store) -> None:
    pieces = [trees.noise(i, 300 << 10) for i in range(32)]
    for i, piece in enumerate(pieces):
        store.push(ListedSource({b"piece": piece}), f"ref-{i}")
    result = store.push(ListedSource({b"file": b"".join(pieces)}), "whole")
    # Some of it is taken from where it lies, and some stored again.
    assert 0.3 < result.new_chunk_bytes / result.logical_bytes < 0.9
    manifest = store.snapshot("whole").manifest
    _, locations = store.repository.located(manifest)
    (entry,) = store.repository.entries(manifest)
    window: list[FrameRef] = []
    size = windows = 0
    for number, (_, length) in enumerate(entry.refs):
        window.append(locations.frames[locations.ref_frames[number]])
        size += length
        if size >= WINDOW or number == len(entry.refs) - 1:
            # What is new may go on in a second pack.
            assert len(store.repository.fetcher.plan(window)) <= MAX_RANGES + 1
            window, size, windows = [], 0, windows + 1
    assert windows == 3
    assert store.verify().problems == []


def test_a_manifest_stays_in_few_places_however_often_it_changes(store: Store) -> None:
    files = {
        b"lib/" + trees.noise(i % 60, 3).hex().encode() + b"/%d" % i: b"%d" % (i % 7)
        for i in range(6000)
    }
    sent = []
    for number in range(25):
        files[sorted(files)[number * 239]] = b"changed"
        sent.append(store.push(ListedSource(files)).stored_bytes)
        root, locations = store.repository.located(store.snapshot().manifest)
        frames = (locations.frames[number] for number in locations.part_frames)
        assert len(store.repository.fetcher.plan(frames)) <= 3
    assert len(root.parts) > 8
    # Nor is all of it written each time.
    assert sum(sent[1:]) < 0.3 * sent[0] * len(sent)
    assert store.verify().problems == []


def test_what_a_start_reads_comes_first(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "profiled"
    root.mkdir()
    for number in range(6):
        (root / f"{number}").write_bytes(trees.noise(number, 700_000))
    first = store.push(root)
    ranges = [
        Range(b"4", 0, 700_000),
        Range(b"1", 0, 300_000),
        Range(b"2", 0, 5),
        Range(b"x", 0, 9),
    ]
    save_profile(store.repository.objects, first.manifest, "start", new_profile(ranges, []))
    for number in range(6):
        (root / f"{number}").write_bytes(trees.noise(f"new {number}", 700_000))
    store.push(root)
    assert _order(store) == [b"4", b"1", b"0", b"2", b"3", b"5"]
    # The profile of the first is that of the third, too.
    for number in range(6):
        (root / f"{number}").write_bytes(trees.noise(f"newer {number}", 700_000))
    store.push(root)
    assert _order(store) == [b"4", b"1", b"0", b"2", b"3", b"5"]
    _, locations = store.repository.located(store.snapshot().manifest)
    frames = {}
    number = 0
    for entry in store.repository.entries(store.snapshot().manifest):
        frames[entry.path] = {locations.ref_frames[number + at] for at in range(len(entry.refs))}
        number += len(entry.refs)
    assert frames[b"1"].isdisjoint(frames[b"0"])
    store.assert_sound()


def test_a_damaged_profile_keeps_nobody_from_pushing(store: Store, tree: Path) -> None:
    first = store.push(tree)
    store.repository.objects.put(profile_key(first.manifest, "start"), b"damaged")
    (tree / "large").write_bytes(trees.noise("other", 1 << 20))
    again = store.push(tree)
    assert any("not laid out by a profile" in warning for warning in again.warnings)
    (problem,) = store.verify().problems
    assert problem.object.startswith("profiles/")
    assert problem.harms == ()
    store.repository.objects.delete(profile_key(first.manifest, "start"))
    store.assert_sound()


def _order(store: Store) -> list[bytes]:
    """Return the files of the pushed tree as they lie in its pack."""
    _, locations = store.repository.located(store.snapshot().manifest)
    places = []
    number = 0
    for entry in store.repository.entries(store.snapshot().manifest):
        frame = locations.frames[locations.ref_frames[number]]
        places.append((frame.offset, locations.ref_offsets[number], entry.path))
        number += len(entry.refs)
    return [path for _, _, path in sorted(places)]
