from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store import config
from envstore.store.config import init_store, load_config
from envstore.store.digest import digest
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.refs import (
    RefName,
    list_refs,
    move_ref,
    read_ref,
    read_versioned,
    resolve,
    try_read,
)
from envstore.store.snapshots import Snapshot, save_snapshot
from tests.faulty import FaultyStore

_NAME = RefName("default", "torch", "latest")
_A, _B, _C = digest(b"a"), digest(b"b"), digest(b"c")


@pytest.fixture
def objects(tmp_path: Path) -> FaultyStore:
    return FaultyStore(open_objects(f"file://{tmp_path}/store", create=True))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("torch", ("default", "torch", "latest")),
        ("torch:2.5", ("default", "torch", "2.5")),
        ("team/torch", ("team", "torch", "latest")),
        ("team/torch:v1_a-b", ("team", "torch", "v1_a-b")),
        ("1/2:3", ("1", "2", "3")),
        ("x" * 128, ("default", "x" * 128, "latest")),
    ],
)
def test_refs_parse(text: str, parsed: tuple[str, str, str]) -> None:
    name = RefName.parse(text)
    assert (name.namespace, name.name, name.tag) == parsed
    assert RefName.parse(str(name)) == name
    assert name.key == "refs/" + "/".join(parsed)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "/", "a/", "/a", "a:", ":a", "a/b/c", "a:b:c", "a b", "a\n", "a\0", "..", "../a",
        "a/..", "a..b", "-a", ".a", "_a", "a/-b", "a:-b", "é", "a@b", "x" * 129, "a/b:" + "x" * 129,
        "torch ", " torch", "a\\b", "a*b", "\u0661",
    ],
)  # fmt: skip
def test_malformed_refs(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid ref"):
        RefName.parse(text)


@given(st.text(max_size=30))
def test_any_text_is_a_ref_or_an_error_and_never_a_path_elsewhere(text: str) -> None:
    try:
        key = RefName.parse(text).key
    except UsageError:
        return
    assert key.isascii()
    assert len(key.split("/")) == 4
    assert ".." not in key


def test_refs_move_and_count(objects: FaultyStore) -> None:
    assert try_read(objects, _NAME) is None
    first = move_ref(objects, _NAME, _A, None)
    assert first.sequence == 1
    found, version = read_versioned(objects, _NAME)
    assert found == first
    second = move_ref(objects, _NAME, _B, (found, version))
    assert (second.sequence, second.snapshot) == (2, _B)
    assert read_ref(objects, _NAME) == second


def test_equal_moves_have_different_bodies(objects: FaultyStore) -> None:
    # Equal bodies would have equal versions on stores that hash them.
    moves = [move_ref(objects, _NAME, _A, try_read(objects, _NAME)) for _ in range(3)]
    assert len({move.nonce for move in moves}) == 3
    assert len({move.encode(_NAME) for move in moves}) == 3


def test_a_ref_that_went_there_and_back_is_not_the_same(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    stale = try_read(objects, _NAME)
    move_ref(objects, _NAME, _B, stale)
    move_ref(objects, _NAME, _A, try_read(objects, _NAME))
    with pytest.raises(ConflictError, match="torch:latest was moved"):
        move_ref(objects, _NAME, _C, stale)
    assert read_ref(objects, _NAME).snapshot == _A


def test_creating_what_exists_loses(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    with pytest.raises(ConflictError):
        move_ref(objects, _NAME, _B, None)
    assert read_ref(objects, _NAME).snapshot == _A


def test_moving_what_was_removed_loses(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    before = try_read(objects, _NAME)
    objects.delete(_NAME.key)
    with pytest.raises(ConflictError):
        move_ref(objects, _NAME, _B, before)
    assert try_read(objects, _NAME) is None


@pytest.mark.parametrize("error", [UnavailableError("timed out"), ConflictError("retried")])
def test_a_write_that_landed_although_its_answer_was_lost(
    objects: FaultyStore, error: Exception
) -> None:
    # A client that sends again after a lost answer is told 412 by its own first request.
    objects.fail("put_if", error, key="refs/", after=True)
    moved = move_ref(objects, _NAME, _A, None)
    assert read_ref(objects, _NAME) == moved


def test_a_write_that_did_not_land_is_told_as_such(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    before = try_read(objects, _NAME)
    objects.fail("put_if", UnavailableError("timed out"), key="refs/")
    with pytest.raises(UnavailableError, match="timed out"):
        move_ref(objects, _NAME, _B, before)
    assert read_ref(objects, _NAME).snapshot == _A


def test_a_first_write_that_did_not_land_is_told_as_such(objects: FaultyStore) -> None:
    objects.fail("put_if", UnavailableError("timed out"), key="refs/")
    with pytest.raises(UnavailableError):
        move_ref(objects, _NAME, _B, None)


def test_an_unclear_answer_and_another_winner_is_a_conflict(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    before = try_read(objects, _NAME)
    gate = objects.fail("put_if", UnavailableError("timed out"), key="refs/", times=1)

    def somebody_else() -> None:
        move_ref(objects.inner, _NAME, _C, before)
        raise UnavailableError("timed out")

    gate.before = somebody_else
    with pytest.raises(ConflictError):
        move_ref(objects, _NAME, _B, before)
    assert read_ref(objects, _NAME).snapshot == _C


def _altered(objects: ObjectStore, **changes: object) -> None:
    value = json.loads(objects.get(_NAME.key))
    del value["check"]
    for name, new in changes.items():
        if new is None:
            del value[name]
        else:
            value[name] = new
    objects.put(_NAME.key, json.dumps(value).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None}, {"format": []}, {"snapshot": None}, {"snapshot": "ab"}, {"snapshot": 1},
        {"snapshot": "é" * 64}, {"sequence": "1"}, {"sequence": None}, {"nonce": 1},
        {"updated": None},
    ],
)  # fmt: skip
def test_malformed_refs_in_the_store(objects: FaultyStore, changes: dict[str, object]) -> None:
    move_ref(objects, _NAME, _A, None)
    _altered(objects, **changes)
    with pytest.raises(CorruptError, match=r"^ref torch:latest"):
        read_ref(objects, _NAME)


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"\xff\xfe", b"[]" * 300_000])
def test_refs_that_are_not_json(objects: FaultyStore, data: bytes) -> None:
    objects.put(_NAME.key, data)
    with pytest.raises(CorruptError, match=r"^ref torch:latest"):
        read_ref(objects, _NAME)


def test_a_newer_ref(objects: FaultyStore) -> None:
    move_ref(objects, _NAME, _A, None)
    _altered(objects, format=2)
    with pytest.raises(UnsupportedFormatError):
        read_ref(objects, _NAME)


def test_unknown_refs_are_named(objects: FaultyStore) -> None:
    with pytest.raises(NotFoundError, match="no ref team/x:1 in file://"):
        read_ref(objects, RefName("team", "x", "1"))


def test_listing(objects: FaultyStore) -> None:
    names = {RefName("default", "a", "1"), RefName("default", "a", "2"), RefName("team", "b", "x")}
    for name in names:
        move_ref(objects, name, _A, None)
    objects.put("refs/stray", b"x")
    objects.put("refs/too/many/steps/here", b"x")
    objects.put("refs/default/a/_not-a-tag", b"x")
    assert set(list_refs(objects)) == names
    assert set(list_refs(objects, "team/")) == {RefName("team", "b", "x")}
    assert set(list_refs(objects, "default/a/1")) == {RefName("default", "a", "1")}


def test_resolving(objects: FaultyStore) -> None:
    snapshot = Snapshot("dir", _A, 0, 0, "now")
    name = save_snapshot(objects, snapshot)
    move_ref(objects, _NAME, name, None)
    for text in ("torch", "torch:latest", f"@{name.hex()[:8]}", f"@{name.hex()}"):
        assert resolve(objects, text) == name
    assert resolve(objects, f"torch@{name.hex()[:8]}") == name
    for text in ("", "@", "@xyz", "a b", "a b@" + name.hex(), "@" + "é" * 8):
        with pytest.raises(UsageError):
            resolve(objects, text)
    with pytest.raises(NotFoundError):
        resolve(objects, "other")


# The store's own description.


def test_init_is_idempotent(objects: FaultyStore) -> None:
    made, created = init_store(objects)
    assert created
    again, created = init_store(objects)
    assert not created
    assert again == made == load_config(objects)


def test_of_two_creators_one_wins_and_both_agree(objects: FaultyStore) -> None:
    fault = objects.fail("put_if", ConflictError("x"), key=config.KEY, times=1)
    others = []

    def somebody_else() -> None:
        others.append(init_store(objects.inner))
        raise ConflictError("x")

    fault.before = somebody_else
    assert init_store(objects) == (others[0][0], False)


def test_what_is_not_a_store(objects: FaultyStore) -> None:
    with pytest.raises(NotFoundError, match="is not an envstore store") as caught:
        load_config(objects)
    assert "envstore init" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": 2}, UnsupportedFormatError),
        ({"format": "1"}, CorruptError),
        ({"format": None}, CorruptError),
        ({"hash": "sha256"}, UnsupportedFormatError),
        ({"codec": "lz4"}, UnsupportedFormatError),
        ({"hash": 1}, CorruptError),
        ({"id": "x"}, CorruptError),
        ({"id": None}, CorruptError),
        ({"chunker": None}, CorruptError),
    ],
)
def test_descriptions_that_cannot_be_used(
    objects: FaultyStore, changes: dict[str, object], error: type[Exception]
) -> None:
    init_store(objects)
    value = json.loads(objects.get(config.KEY))
    del value["check"]
    value = {name: item for name, item in (value | changes).items() if item is not None}
    objects.put(config.KEY, json.dumps(value).encode())
    with pytest.raises(error):
        load_config(objects)
    with pytest.raises(error):
        init_store(objects)


@pytest.mark.parametrize("data", [b"", b"not a store", b"[]", b"\xff"])
def test_a_damaged_description(objects: FaultyStore, data: bytes) -> None:
    objects.put(config.KEY, data)
    with pytest.raises(CorruptError, match=config.KEY):
        load_config(objects)
