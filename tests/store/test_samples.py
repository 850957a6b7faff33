"""Old segments are found again through samples, and samples stay few."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store import known
from envstore.store.digest import digest
from envstore.store.frames import Frame
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.packs import Pack
from envstore.store.samples import (
    RATE,
    build_sample,
    is_hook,
    merge_samples,
    open_sample,
)
from tests.stores import Store

names = st.binary(min_size=32, max_size=32)


def file_of(directory: Path, seed: int, size: int) -> Path:
    directory.mkdir()
    (directory / "data").write_bytes(random.Random(seed).randbytes(size))
    return directory


def test_one_chunk_in_rate_is_a_hook() -> None:
    hooks = sum(is_hook(digest(number.to_bytes(4, "big"))) for number in range(100 * RATE))
    assert 50 < hooks < 150


@given(st.lists(st.tuples(names, st.integers(0, 5)), max_size=30))
def test_hooks_lead_to_their_segments(owned: list[tuple[bytes, int]]) -> None:
    segments: dict[int, list[bytes]] = {}
    for chunk, number in owned:
        segments.setdefault(number, []).append(chunk)
    named = []
    for number, chunks in segments.items():
        frame = Frame(
            0, 1, len(chunks), digest(b""), array("I", [1] * len(chunks)), b"".join(chunks)
        )
        named.append((digest(bytes([number])), [Pack(digest(b"p"), 9, (frame,))]))
    whole = build_sample(named)
    merged = merge_samples([build_sample([pair]) for pair in named])
    owners: dict[bytes, set[bytes]] = {}
    for number, chunks in segments.items():
        for chunk in chunks:
            owners.setdefault(chunk[:8], set()).add(digest(bytes([number])))
    for sample in (whole, merged):
        name, data = sample.encode()
        again = open_sample(data, name)
        assert again == sample
        for chunk, _ in owned:
            found = again.find(chunk)
            assert found in owners[chunk[:8]] if is_hook(chunk) else found is None


def test_a_damaged_sample_is_refused_or_the_same() -> None:
    sample = build_sample([(digest(b"segment"), [])])
    name, stored = sample.encode()
    harmless = 0
    for at in range(len(stored)):
        for bit in range(8):
            damaged = bytearray(stored)
            damaged[at] ^= 1 << bit
            try:
                assert open_sample(bytes(damaged), name) == sample
            except (CorruptError, UnsupportedFormatError):
                continue
            harmless += 1
    # The zstd format has bits that no decoder looks at (RFC 8878, 3.1.1.1.1.3).
    assert harmless < 8


def test_many_segments_are_folded_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 3)
    monkeypatch.setattr(known, "MERGE", 2)
    old = file_of(tmp_path / "old", 1, 24 << 20)
    with Store(tmp_path / "store") as store:
        first = store.push(old, "old")
        for number in range(16):
            store.push(file_of(tmp_path / f"tree{number}", 100 + number, 40_000), f"t{number}")
        assert 0 < len(store.object_keys("samples/")) <= known.MERGE + 1
        index = DedupIndex()
        KnownChunks(store.repository, index).learn_segments()
        assert len(index) < 100, "a segment was read although a sample covers it"
        store.forget()
        again = store.push(old, "copy")
        # What precedes the first hook is stored again, what follows it is found.
        assert again.new_chunk_bytes < first.new_chunk_bytes * 3 // 4
        assert again.manifest == first.manifest
        assert store.verify().ok


def test_a_sample_of_segments_that_are_gone_costs_nothing_but_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "RECENT", 0)
    old = file_of(tmp_path / "old", 1, 24 << 20)
    with Store(tmp_path / "store") as store:
        store.push(old, "old")
        store.push(file_of(tmp_path / "small", 2, 1000), "small")
        assert store.object_keys("samples/")
        for key in store.object_keys("index/"):
            store.repository.objects.delete(key)
        store.forget()
        again = store.push(old, "copy")
        assert again.new_chunk_bytes == 24 << 20
        assert store.verify(whole=False).ok
