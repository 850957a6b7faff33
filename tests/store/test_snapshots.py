from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import (
    CorruptError,
    NotFoundError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store.canonical import MAX_BODY
from envstore.store.digest import digest
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.snapshots import (
    KINDS,
    Snapshot,
    find_snapshot,
    load_snapshot,
    parse_snapshot,
    save_snapshot,
    snapshot_key,
)
from tests.damage import assert_noticed

_digests = st.binary(min_size=32, max_size=32)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_snapshots = st.builds(
    Snapshot,
    kind=st.sampled_from(KINDS),
    manifest=_digests,
    files=st.integers(0, 2**63),
    logical_bytes=st.integers(0, 2**63),
    created=_text,
    parents=st.lists(_digests, max_size=3).map(tuple),
    lock=st.one_of(st.none(), _digests),
    message=_text,
    attributes=st.dictionaries(_text, _text, max_size=3),
)
_ONE = Snapshot("env", digest(b"m"), 3, 99, "2026-01-02T03:04:05+00:00", (digest(b"p"),))


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_objects(f"file://{tmp_path}/store", create=True)


@given(_snapshots)
def test_snapshots_round_trip(snapshot: Snapshot) -> None:
    data = snapshot.encode()
    assert snapshot.digest == digest(data)
    assert parse_snapshot(data, snapshot.digest) == snapshot


@given(_snapshots)
def test_equal_snapshots_have_equal_bytes(snapshot: Snapshot) -> None:
    turned = dict(reversed(snapshot.attributes.items()))
    other = Snapshot(
        snapshot.kind,
        snapshot.manifest,
        snapshot.files,
        snapshot.logical_bytes,
        snapshot.created,
        snapshot.parents,
        snapshot.lock,
        snapshot.message,
        turned,
    )
    assert other.encode() == snapshot.encode()


def test_damaged_snapshots_are_refused() -> None:
    assert_noticed(lambda data: parse_snapshot(data, _ONE.digest), _ONE.encode())


def _altered(**changes: object) -> bytes:
    value = json.loads(_ONE.encode())
    for name, new in changes.items():
        if new is None:
            del value[name]
        else:
            value[name] = new
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None}, {"format": "1"}, {"format": True}, {"kind": None}, {"kind": 5},
        {"manifest": None}, {"manifest": 1}, {"manifest": "ab"}, {"manifest": "g" * 64},
        {"manifest": "A" * 64}, {"files": "3"}, {"files": 1.5}, {"logical_bytes": None},
        {"created": 7}, {"parents": "x"}, {"parents": [1]}, {"parents": ["ab"]},
        {"parents": None}, {"attributes": []}, {"attributes": None}, {"lock": "ab"}, {"lock": 1},
    ],
)  # fmt: skip
def test_malformed_snapshots_are_refused(changes: dict[str, object]) -> None:
    # Each under its own right name: only what it says is wrong.
    data = _altered(**changes)
    with pytest.raises(CorruptError, match=r"^snapshot "):
        parse_snapshot(data, digest(data))


def test_a_newer_snapshot_is_told_apart_from_a_damaged_one() -> None:
    data = _altered(format=2)
    with pytest.raises(UnsupportedFormatError, match="newer"):
        parse_snapshot(data, digest(data))


@pytest.mark.parametrize("text", ["a\ud800", "b\udcff"])
def test_text_that_is_not_unicode_is_refused_before_it_is_stored(text: str) -> None:
    # An argument that is not UTF-8 reaches Python as a lone surrogate.
    with pytest.raises(UsageError):
        Snapshot("dir", digest(b""), 0, 0, "", message=text).encode()


def test_a_snapshot_too_long_to_be_read_is_not_written(objects: ObjectStore) -> None:
    with pytest.raises(UsageError):
        save_snapshot(objects, Snapshot("dir", digest(b""), 0, 0, "", message="x" * MAX_BODY))
    assert list(objects.list("")) == []


def test_save_and_load(objects: ObjectStore) -> None:
    name = save_snapshot(objects, _ONE)
    assert name == _ONE.digest
    assert load_snapshot(objects, name) == _ONE
    with pytest.raises(NotFoundError, match=digest(b"none").hex()):
        load_snapshot(objects, digest(b"none"))


def test_a_stored_snapshot_that_was_altered_is_refused(objects: ObjectStore) -> None:
    name = save_snapshot(objects, _ONE)
    objects.put(snapshot_key(name), _altered(files=4))
    with pytest.raises(CorruptError, match=name.hex()):
        load_snapshot(objects, name)


def test_find_by_prefix(objects: ObjectStore) -> None:
    names = [f"{'abcd' + f'{i:060x}'}" for i in range(3)] + ["abce" + "0" * 60]
    for name in names:
        objects.put(f"snapshots/{name}", b"x")
    objects.put("snapshots/abce-not-a-digest", b"x")
    assert find_snapshot(objects, "abce").hex() == names[3]
    assert find_snapshot(objects, names[1]).hex() == names[1]
    assert find_snapshot(objects, names[1][:-1] + "1").hex() == names[1]
    with pytest.raises(UsageError, match="matches 3 snapshots"):
        find_snapshot(objects, "abcd")
    with pytest.raises(NotFoundError):
        find_snapshot(objects, "dddd")


@pytest.mark.parametrize("prefix", ["", "abc", "ABCD", "xyzz", "ab/d", "../..", "a" * 65, "abcd "])
def test_malformed_prefixes(objects: ObjectStore, prefix: str) -> None:
    with pytest.raises(UsageError):
        find_snapshot(objects, prefix)
