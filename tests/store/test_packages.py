"""Stored packages: one object says all, and nothing damaged is believed."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError, EnvstoreError
from envstore.store.digest import digest
from envstore.store.index import DedupIndex
from envstore.store.locations import NOWHERE, FrameRef, Locations
from envstore.store.manifest import HOLE, Entry, sort_key
from envstore.store.packages import (
    StoredPackage,
    decode_package,
    describe_package,
    encode_package,
    load_packages,
    package_key,
    save_packages,
)
from envstore.store.source import Kind
from tests.stores import Store

SHA = "ab" * 32


def _package(sizes: list[int], facts: dict[str, object]) -> StoredPackage:
    """Return a package with one file of each size; 0 is a hole of a MiB."""
    entries = [Entry(b"lib", Kind.DIRECTORY)]
    locations = Locations()
    for number, size in enumerate(sizes):
        name = b"lib/%d" % number
        if not size:
            entries.append(Entry(name, Kind.FILE, False, 1 << 20, b"h" * 32, ((HOLE, 1 << 20),)))
            locations.ref_frames.append(NOWHERE)
            locations.ref_offsets.append(0)
            continue
        chunk = digest(b"%d %d" % (number, size))
        entries.append(Entry(name, Kind.FILE, True, size, chunk, ((chunk, size),)))
        locations.ref_frames.append(len(locations.frames))
        locations.ref_offsets.append(7)
        frame = FrameRef(digest(b"pack %d" % (number % 3)), 100 * number, 50, size + 7, 1, chunk)
        locations.frames.append(frame)
    return StoredPackage(tuple(sorted(entries, key=lambda e: sort_key(e.path))), locations, facts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    sizes=st.lists(st.integers(0, 4 << 20), max_size=12),
    facts=st.dictionaries(st.text(), json_values, max_size=4),
)
def test_what_is_decoded_is_what_was_encoded(sizes: list[int], facts: dict[str, object]) -> None:
    package = _package(sizes, facts)
    # Locations are in the order of the entries, which by name need not be that of the numbers.
    order = sorted(range(len(sizes)), key=lambda n: b"lib/%d" % n)
    package.locations.ref_frames[:] = array("I", (package.locations.ref_frames[n] for n in order))
    package.locations.ref_offsets[:] = array("I", (package.locations.ref_offsets[n] for n in order))
    again = decode_package(encode_package(package), "it")
    assert again == package
    index = DedupIndex()
    again.learn(index)
    for name in again.chunks():
        assert name == HOLE or index.find(name) is not None
    assert describe_package(again.entries, facts, index).entries == package.entries


def test_damage_is_noticed_or_harmless() -> None:
    package = _package([10, 20, 0], {"name": "x"})
    sealed = encode_package(package)
    harmless = 0
    for at in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[at] ^= 1 << bit
            try:
                assert decode_package(bytes(damaged), "it") == package
            except EnvstoreError:
                continue
            harmless += 1
    # The zstd format has a few bits that no decoder looks at (RFC 8878, 3.1.1.1.1.3); what comes
    # out is compared with its digest all the same.
    assert harmless < 16


@pytest.mark.parametrize("wrong", ["beyond its frame", "in no frame", "as many places"])
def test_places_that_cannot_be_are_refused(wrong: str) -> None:
    package = _package([10, 20], {})
    locations = package.locations
    if wrong == "beyond its frame":
        locations.ref_offsets[1] = 8
    elif wrong == "in no frame":
        locations.ref_frames[1] = NOWHERE
    else:
        locations.ref_frames.append(0)
        locations.ref_offsets.append(0)
    with pytest.raises(CorruptError, match=wrong):
        decode_package(encode_package(package), "it")


def test_a_damaged_package_counts_as_not_there(tmp_path: Path) -> None:
    package = _package([10], {})
    key = package_key(SHA, "any.1")
    with Store(tmp_path / "store") as store:
        objects = store.repository.objects
        warnings: list[str] = []
        assert load_packages(objects, [key], warnings) == [None]
        assert warnings == []
        save_packages(objects, [(key, package)])
        assert load_packages(objects, [key], warnings) == [package]
        objects.put(key, b"not that")
        assert load_packages(objects, [key], warnings) == [None]
        assert len(warnings) == 1
        assert key in warnings[0]
        assert [problem.object for problem in store.verify().problems] == [key]


@pytest.mark.parametrize(("sha256", "variant"), [("AB" * 32, "any"), (SHA, "../x"), (SHA, "")])
def test_no_key_leads_elsewhere(sha256: str, variant: str) -> None:
    with pytest.raises(ValueError, match="no package"):
        package_key(sha256, variant)
