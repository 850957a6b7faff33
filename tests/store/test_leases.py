"""Leases: what is being read is kept, and nobody fails for want of one."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, NotFoundError, UnavailableError
from envstore.store import canonical, leases
from envstore.store.catalog import remove_refs
from envstore.store.config import init_store
from envstore.store.doomed import read_doomed
from envstore.store.gc.collecting import collect
from envstore.store.leases import Lease, leased
from envstore.store.objects import KeyRing, open_objects
from envstore.store.pull import pull
from envstore.store.push import PushResult
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.roots import read_roots
from envstore.store.snapshots import snapshot_key
from tests.s3keys import running_keys
from tests.stores import Store
from tests.trees import describe, noise, prose

DAY = 86400.0


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(20):
        (source / f"file {number}").write_bytes(prose(number, 3000 + number))
    (source / "large").write_bytes(noise("large", 3 << 20))
    return source


@pytest.fixture
def pushed(store: Store, tree: Path) -> PushResult:
    return store.push(tree)


def remove(store: Store, ref: str = "tree") -> None:
    remove_refs(store.repository, [RefName.parse(ref)])


def there(store: Store, pushed: PushResult) -> bool:
    return store.repository.objects.size(snapshot_key(pushed.snapshot)) is not None


def test_a_lease_says_who_reads_what_until_when(store: Store, pushed: PushResult) -> None:
    before = store.repository.objects.now()
    lease = Lease.take(store.repository, pushed.snapshot, "node-1:7 mount /x", 1000)
    key = f"leases/{pushed.snapshot.hex()}/{lease.name}"
    assert store.object_keys("leases/") == [key] == [lease.key]
    body = canonical.decode(store.repository.objects.get(key), key)
    assert before + 999 <= body.pop("until") == lease.until <= before + 1060
    assert body == {
        "format": 1,
        "holder": "node-1:7 mount /x",
        "snapshot": pushed.snapshot.hex(),
    }
    (root,) = [one for one in read_roots(store.repository.objects) if one.key == key]
    assert (root.snapshot, root.until) == (pushed.snapshot, lease.until + 300)
    lease.release()
    assert store.object_keys("leases/") == []
    lease.release()


def test_what_is_leased_outlives_its_ref(store: Store, pushed: PushResult, tree: Path) -> None:
    lease = Lease.take(store.repository, pushed.snapshot, "test")
    remove(store)
    kept = collect(store.repository, grace=0)
    assert kept.freed_bytes == 0
    pull(store.repository, pushed.snapshot, tree.parent / "pulled")
    assert describe(tree.parent / "pulled") == describe(tree)
    lease.release()
    assert collect(store.repository, grace=0).freed_bytes > 3 << 20
    assert not there(store, pushed)


def test_one_that_has_run_out_keeps_nothing(store: Store, pushed: PushResult) -> None:
    Lease.take(store.repository, pushed.snapshot, "test", -1000)
    remove(store)
    collect(store.repository, grace=0)
    assert not there(store, pushed)


def test_what_is_condemned_is_taken_back(store: Store, pushed: PushResult) -> None:
    remove(store)
    collect(store.repository, grace=DAY)
    objects = store.repository.objects
    before = read_doomed(objects).keys()
    assert snapshot_key(pushed.snapshot) in before
    lease = Lease.take(store.repository, pushed.snapshot, "test")
    left = read_doomed(objects).keys()
    assert snapshot_key(pushed.snapshot) not in left
    assert not any(key.startswith(("packs/", "manifests/", "locations/")) for key in left)
    collect(store.repository, grace=0)
    assert there(store, pushed)
    # Whoever was away finds it as it was; and so does who comes after a crash.
    again = Lease(store.repository, pushed.snapshot, "test", name=lease.name, taken=True)
    again.renew()
    assert store.object_keys("leases/") == [lease.key]
    again.release()
    assert store.object_keys("leases/") == []


def test_who_may_write_leases_and_nothing_else(store: Store, pushed: PushResult) -> None:
    remove(store)
    collect(store.repository, grace=DAY)
    denied = AccessDeniedError("no")
    store.faults.fail("put_if", denied, key="gc/")
    store.faults.fail("put", denied, key="gc/")
    Lease.take(store.repository, pushed.snapshot, "test")
    store.faults.clear()
    collect(store.repository, grace=0)
    assert there(store, pushed)


def test_what_has_been_collected_cannot_be_leased(store: Store, pushed: PushResult) -> None:
    remove(store)
    collect(store.repository, grace=0)
    with pytest.raises(NotFoundError, match="collected"):
        Lease.take(store.repository, pushed.snapshot, "test")
    assert store.object_keys("leases/") == []


def test_without_permission_there_is_none(
    store: Store, pushed: PushResult, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.faults.fail("put", AccessDeniedError("read only"), key="leases/")
    with pytest.raises(AccessDeniedError):
        Lease.take(store.repository, pushed.snapshot, "test")
    caplog.set_level(logging.INFO)
    pull(store.repository, pushed.snapshot, tree.parent / "pulled")
    assert describe(tree.parent / "pulled") == describe(tree)
    told = [one for one in caplog.messages if "lease" in one]
    assert told == ["no lease is held: read only"]
    assert store.object_keys("leases/") == []


def test_a_pull_is_kept_while_it_lasts(store: Store, pushed: PushResult, tree: Path) -> None:
    gate = store.faults.gate("get_range", key="packs/", skip=1)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            pull(store.repository, pushed.snapshot, tree.parent / "pulled")
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    gate.wait_entered()
    others = Repository(store.faults.inner, store.repository.config, None)
    while not list(others.objects.list("leases/")):
        pass
    remove_refs(others, [RefName.parse("tree")])
    collect(others, grace=0)
    gate.open()
    thread.join()
    assert not failures
    assert describe(tree.parent / "pulled") == describe(tree)
    assert store.object_keys("leases/") == []


def test_it_is_renewed_and_tried_again(
    store: Store, pushed: PushResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.01)
    fault = store.faults.fail("put", UnavailableError("away"), key="leases/", times=2)
    third = store.faults.gate("put", key="leases/", skip=4)
    with leased(store.repository, pushed.snapshot, "test"):
        third.wait_entered()
        third.open()
    assert fault.hits == 2
    assert store.object_keys("leases/") == []


def test_whoever_hangs_is_not_waited_for(
    store: Store, pushed: PushResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_END_WITHIN", 0.01)
    gate = store.faults.gate("put", key="leases/")
    gone = store.faults.gate("delete", key="leases/", after=True)
    with leased(store.repository, pushed.snapshot, "test"):
        gate.wait_entered()
    gate.open()
    # It is given back all the same, when it comes to be.
    gone.wait_entered()
    gone.open()
    assert store.object_keys("leases/") == []


def test_on_a_server_that_lets_some_only_read(tmp_path: Path) -> None:
    with running_keys(tmp_path / "s3") as keys:
        bucket = keys.server.new_bucket()
        url = keys.server.url(bucket)
        ring = KeyRing()
        ring.add(keys.root)
        objects = open_objects(url, create=True, keys=ring)
        config, _ = init_store(objects)
        objects.put(snapshot_key(bytes(32)), b"stands for one")
        lease = Lease.take(Repository(objects, config, None), bytes(32), "test")
        assert [info.key for info in objects.list("leases/")] == [lease.key]
        lease.release()
        assert list(objects.list("leases/")) == []
        reading = KeyRing()
        reading.add(keys.grant("reader", bucket))
        reader = open_objects(url, keys=reading)
        with pytest.raises(AccessDeniedError):
            Lease.take(reader, bytes(32), "test")
        reader.close()
        objects.close()
