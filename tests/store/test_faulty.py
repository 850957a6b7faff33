from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from envstore.errors import CorruptError, NoSpaceError, NotFoundError, UnavailableError
from envstore.store.objects import open_objects
from tests.faulty import FaultyStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultyStore]:
    with closing(FaultyStore(open_objects(str(tmp_path / "objects"), create=True))) as store:
        store.put("packs/x", b"0123456789")
        yield store


def test_an_error_before_and_an_error_after(store: FaultyStore) -> None:
    store.fail("put", NoSpaceError("full"), key="packs/", times=1)
    store.fail("put", UnavailableError("no answer"), key="packs/", skip=1, times=1, after=True)
    with pytest.raises(NoSpaceError):
        store.put("packs/y", b"1")
    assert store.size("packs/y") is None
    with pytest.raises(UnavailableError):
        store.put("packs/y", b"2")
    assert store.get("packs/y") == b"2"
    store.put("packs/y", b"3")
    assert store.get("packs/y") == b"3"
    assert store.count("put", "packs/y") == 3


def test_bytes_that_change_on_the_way(store: FaultyStore) -> None:
    fault = store.corrupt("get", at=-1)
    assert store.get("packs/x") == b"012345678\xc6"
    fault.remove()
    store.truncate("get_range", times=1, by=2)
    with pytest.raises(CorruptError):
        store.get_range("packs/x", 0, 5)
    assert store.get_range("packs/x", 0, 5) == b"01234"
    store.replace("put", b"other")
    store.put("packs/y", b"mine")
    assert store.get("packs/y") == b"other"


def test_lost_writes_and_lost_objects(store: FaultyStore) -> None:
    store.drop("put", key="packs/y")
    store.put("packs/y", b"1")
    assert store.inner.size("packs/y") is None
    store.drop("get", key="packs/x")
    with pytest.raises(NotFoundError):
        store.get("packs/x")
    store.drop("list")
    assert list(store.list("")) == []
    store.clear()
    assert store.get("packs/x") == b"0123456789"
    assert store.counts() == {"get": 1}


def test_a_gate_holds_calls_until_it_opens(store: FaultyStore) -> None:
    gate = store.gate("delete", key="packs/")
    thread = threading.Thread(target=store.delete, args=("packs/x",))
    thread.start()
    gate.wait_entered()
    assert store.get("packs/x") == b"0123456789"
    gate.open()
    thread.join()
    assert store.size("packs/x") is None
