"""``gc/state`` and its lists, and how writers take back what is doomed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    UnavailableError,
    UsageError,
)
from envstore.store import doomed, hosts
from envstore.store.binary import seal
from envstore.store.doomed import Condemned, Owner, State
from envstore.store.objects import open_objects
from tests.faulty import FaultyStore

pytestmark = pytest.mark.usefixtures("_no_fsync")

A, B, C = "packs/aa/" + "a" * 64, "snapshots/" + "b" * 64, "manifests/" + "c" * 64
GOLDEN = "3d1c186cbe899ddd5190a019b01b6780858f01b032daa17c7b8579d0ba466d80"  # of the list below


@pytest.fixture
def objects(tmp_path: Path) -> FaultyStore:
    return FaultyStore(open_objects(f"file://{tmp_path}/objects", create=True))


def doom(
    objects: FaultyStore,
    *,
    condemned: tuple[str, ...] = (),
    deleting: tuple[str, ...] = (),
    owner: Owner | None = None,
    epoch: int = 3,
) -> State:
    """Let a collector have put this into ``gc/state``."""
    now = objects.now()
    _, version = doomed.read_state(objects)
    state = State(
        epoch,
        condemned=doomed.write_list(objects, [Condemned(key, epoch, now) for key in condemned]),
        deleting=doomed.write_list(objects, [Condemned(key, epoch, now) for key in deleting]),
        owner=owner,
    )
    return doomed.put_state(objects, state, version)[0]


def dead_owner(objects: FaultyStore) -> Owner:
    place, _, began = hosts.here().rpartition("/")
    return Owner("f" * 32, f"{place}/{int(began) + 1}", int(objects.now()) + 60)


def test_a_store_that_was_never_collected_has_nothing_doomed(objects: FaultyStore) -> None:
    found = doomed.read_doomed(objects)
    assert (found.state, found.version, found.keys()) == (State(), None, frozenset())
    assert objects.counts() == {"get_versioned": 1}
    assert doomed.claim(objects, [A]).keys() == frozenset()


def test_the_state_comes_back_as_it_was_put(objects: FaultyStore) -> None:
    owner = Owner("1" * 32, hosts.here(), 1_700_000_000)
    state = doom(objects, condemned=(B, A), deleting=(C,), owner=owner)
    found = doomed.read_doomed(objects)
    assert found.state == state
    assert (state.epoch, state.owner) == (3, owner)
    assert state.nonce
    assert abs(state.updated - objects.now()) < 60
    assert [row.key for row in found.condemned] == [A, B]
    assert [(row.key, row.epoch) for row in found.deleting] == [(C, 3)]


def test_a_list_has_the_bytes_that_the_format_says() -> None:
    rows = [Condemned("snapshots/00", 2, 1_700_000_001.75), Condemned("packs/aa/00", 1, 5.0)]
    name, data = doomed.encode_list(rows, 1_700_000_002.5, bytes(range(16)))
    body = (
        (1_700_000_002).to_bytes(8, "little")
        + bytes(range(16))
        + (2).to_bytes(4, "little")
        + (24).to_bytes(4, "little")
        + b"packs/aa/00\nsnapshots/00"
        + (1).to_bytes(8, "little")
        + (2).to_bytes(8, "little")
        + (5).to_bytes(8, "little")
        + (1_700_000_001).to_bytes(8, "little")
    )
    assert data[:8] == b"ESGARB01"
    assert doomed.parse_list(body) == doomed.open_list(data, name)
    assert name.hex() == GOLDEN
    assert [row.time for row in doomed.parse_list(body)[1]] == [5.0, 1_700_000_001.0]


def test_two_lists_of_the_same_keys_have_two_names(objects: FaultyStore) -> None:
    rows = [Condemned(A, 1, 2.0)]
    assert doomed.write_list(objects, rows) != doomed.write_list(objects, rows)
    assert doomed.write_list(objects, []) is None


@pytest.mark.parametrize(
    "keys",
    [
        ["refs/default/a/latest"],
        ["envstore.json"],
        ["sessions/" + "0" * 32],
        ["packs/../refs/x/y/z"],
        ["packs/a", "packs/a"],
        ["packs/b", "packs/a"],
        ["packs/\xff"],
        [""],
    ],
)
def test_a_list_that_cannot_be_is_refused(keys: list[str]) -> None:
    text = "\n".join(keys).encode("latin-1")
    body = bytes(24) + len(keys).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    body += bytes(16 * len(keys))
    with pytest.raises(CorruptError):
        doomed.parse_list(body)


@pytest.mark.parametrize("cut", [0, 8, 24, 31, 40, -1])
def test_a_list_that_is_cut_short_is_refused(cut: int) -> None:
    text = A.encode()
    body = bytes(24) + (1).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    body += bytes(16)
    assert doomed.parse_list(body)[1] == [Condemned(A, 0, 0.0)]
    with pytest.raises(CorruptError):
        doomed.parse_list(body[:cut])
    with pytest.raises(CorruptError):
        doomed.parse_list(body + b"x")


def test_lists_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doomed, "MAX_BODY", 300)
    rows = [Condemned(f"packs/{number:04}", 1, 1.0) for number in range(30)]
    with pytest.raises(UsageError):
        doomed.encode_list(rows, 0.0, bytes(16))
    with pytest.raises(CorruptError, match="more than the limit"):
        doomed.open_list(seal(b"ESGARB01", bytes(301)), bytes(32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"format":1}',
        b'{"condemned":"x","deleting":"","epoch":1,"format":1,"nonce":"","owner":{},"updated":0}',
        b'{"condemned":"","deleting":"","epoch":-1,"format":1,"nonce":"","owner":{},"updated":0}',
        b'{"condemned":"","deleting":"","epoch":1,"format":1,"nonce":"","owner":{"id":1},'
        b'"updated":0}',
    ],
)
def test_a_state_that_cannot_be_is_refused(objects: FaultyStore, data: bytes) -> None:
    objects.put(doomed.STATE_KEY, data)
    with pytest.raises(CorruptError):
        doomed.read_doomed(objects)


def test_a_list_that_is_lost_is_damage(objects: FaultyStore) -> None:
    state = doom(objects, condemned=(A,))
    assert state.condemned is not None
    objects.delete(doomed.list_key(state.condemned))
    with pytest.raises(CorruptError, match="has lost a list"):
        doomed.read_doomed(objects)


def test_a_list_that_was_removed_meanwhile_is_read_anew(objects: FaultyStore) -> None:
    state = doom(objects, condemned=(A,))

    def move_on() -> None:
        assert state.condemned is not None
        doom(objects, condemned=(B,), epoch=4)
        objects.inner.delete(doomed.list_key(state.condemned))

    objects.call_before("get", move_on, key=doomed.LISTS, times=1)
    assert doomed.read_doomed(objects).keys() == {B}


def test_what_is_claimed_is_taken_off_the_list(objects: FaultyStore) -> None:
    doom(objects, condemned=(A, B, C))
    assert doomed.claim(objects, [A, C]).keys() == {B}
    assert doomed.read_doomed(objects).keys() == {B}
    assert doomed.claim(objects, [B]).keys() == frozenset()
    found = doomed.read_doomed(objects)
    assert (found.state.epoch, found.state.condemned) == (3, None)


def test_a_claim_that_loses_a_race_is_made_again(objects: FaultyStore) -> None:
    doom(objects, condemned=(A, B))
    objects.call_before("put_if", lambda: void_claim(objects, B), key=doomed.STATE_KEY, times=1)
    assert doomed.claim(objects, [A]).keys() == frozenset()
    assert doomed.read_doomed(objects).keys() == frozenset()


def void_claim(objects: FaultyStore, key: str) -> None:
    doomed.claim(objects.inner, [key])


def test_a_claim_whose_answer_is_lost_has_landed(objects: FaultyStore) -> None:
    doom(objects, condemned=(A, B))
    fault = objects.fail(
        "put_if", UnavailableError("no answer"), key=doomed.STATE_KEY, times=1, after=True
    )
    assert doomed.claim(objects, [A]).keys() == {B}
    assert fault.hits == 1
    assert doomed.read_doomed(objects).keys() == {B}


def test_a_claim_that_never_arrived_is_an_error(objects: FaultyStore) -> None:
    doom(objects, condemned=(A, B))
    objects.fail("put_if", UnavailableError("no answer"), key=doomed.STATE_KEY, times=1)
    with pytest.raises(UnavailableError):
        doomed.claim(objects, [A])
    assert doomed.read_doomed(objects).keys() == {A, B}


def test_what_a_living_collector_deletes_is_waited_for(objects: FaultyStore) -> None:
    objects.put(A, b"old")
    owner = Owner("f" * 32, hosts.here(), int(objects.now()) + 60)
    doom(objects, deleting=(A,), owner=owner)
    done = threading.Event()

    def claim() -> None:
        doomed.claim(objects, [A])
        done.set()

    gate = objects.gate("get_versioned", key=doomed.STATE_KEY, times=2)
    thread = threading.Thread(target=claim)
    thread.start()
    gate.wait_entered()
    gate.open()
    assert objects.size(A) is not None
    assert not done.is_set()
    objects.inner.delete(A)
    doom(objects, epoch=3)
    thread.join()
    assert done.is_set()


def test_a_collector_that_never_ends_is_told_of(
    objects: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doomed, "PATIENCE", 0.0)
    doom(objects, deleting=(A,), owner=Owner("f" * 32, hosts.here(), int(objects.now()) + 60))
    with pytest.raises(UnavailableError, match="has been deleting"):
        doomed.claim(objects, [A])


@pytest.mark.parametrize("how", ["gone", "run out", "none"])
def test_what_a_dead_collector_was_deleting_is_deleted(objects: FaultyStore, how: str) -> None:
    for key in (A, B):
        objects.put(key, b"old")
    owner = dead_owner(objects)
    if how == "run out":
        owner = Owner("f" * 32, "", int(objects.now()) - 61)
    doom(objects, condemned=(C,), deleting=(A, B), owner=owner if how != "none" else None)
    found = doomed.claim(objects, [A])
    assert objects.size(A) is None
    assert objects.size(B) is not None
    assert found.keys() == {B, C}
    state = doomed.read_doomed(objects)
    assert [row.key for row in state.deleting] == [B]
    assert state.state.owner is None


def test_an_owner_is_left_alone_until_its_lease_has_long_run_out(objects: FaultyStore) -> None:
    now = objects.now()
    assert not Owner("f" * 32, "", int(now) - 55).is_dead(now)
    assert Owner("f" * 32, "", int(now) - 65).is_dead(now)
    assert not Owner("f" * 32, hosts.here(), int(now) - 55).is_dead(now)


def test_what_nobody_may_delete_is_no_longer_deleted(objects: FaultyStore) -> None:
    objects.put(A, b"kept for seven years")
    doom(objects, deleting=(A,))
    objects.fail("delete", AccessDeniedError("it is locked"), key=A)
    assert doomed.claim(objects, [A]).keys() == frozenset()
    assert objects.size(A) is not None


def test_two_writers_never_both_finish_a_deletion(objects: FaultyStore) -> None:
    objects.put(A, b"old")
    doom(objects, deleting=(A,), owner=dead_owner(objects))
    gate = objects.gate("delete", key=A, times=1)
    first = threading.Thread(target=doomed.claim, args=(objects, [A]))
    first.start()
    gate.wait_entered()
    second = threading.Thread(target=doomed.claim, args=(objects, [A]))
    before = objects.count("get_versioned", doomed.STATE_KEY)
    second.start()
    while objects.count("get_versioned", doomed.STATE_KEY) < before + 2:
        pass
    assert objects.count("delete", A) == 1
    gate.open()
    first.join()
    second.join()
    assert objects.count("delete", A) == 1
    assert doomed.read_doomed(objects).keys() == frozenset()


def test_a_state_that_was_moved_by_others_is_not_put(objects: FaultyStore) -> None:
    doom(objects, condemned=(A,))
    _, version = doomed.read_state(objects)
    doom(objects, condemned=(B,))
    with pytest.raises(ConflictError):
        doomed.put_state(objects, State(9), version)
