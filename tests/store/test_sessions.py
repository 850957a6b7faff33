"""Writers' sessions: what they see of collectors, and what collectors see of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from envstore.errors import ConflictError, CorruptError, NotFoundError, UnavailableError
from envstore.store import doomed, hosts, session_records, sessions
from envstore.store.catalog import tag
from envstore.store.config import init_store
from envstore.store.damage import Damage, note_damage
from envstore.store.doomed import Condemned, State
from envstore.store.locations import locations_key
from envstore.store.locks import lock_key, save_lock
from envstore.store.objects import open_objects
from envstore.store.packs import pack_key
from envstore.store.refs import RefName, move_ref, read_ref, try_read
from envstore.store.repository import Repository
from envstore.store.roots import closure, is_root, read_roots
from envstore.store.sessions import Session, SessionLostError, writing
from envstore.store.snapshots import Snapshot, save_snapshot, snapshot_key
from tests import trees
from tests.faulty import FaultyStore
from tests.garbage import condemn, delete_condemned
from tests.s3server import S3Server
from tests.sources import ListedSource
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

REF = RefName.parse("it")
LONG = session_records.TTL + session_records.EXPIRY_SLACK + 5


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/objects"
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server.url(server.new_bucket(), "some/prefix")


@pytest.fixture
def repository(url: str) -> Iterator[Repository]:
    objects = FaultyStore(open_objects(url, create=True))
    config, _ = init_store(objects)
    with Repository(objects, config, None) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, wrap=FaultyStore)


def faults(repository: Repository) -> FaultyStore:
    assert isinstance(repository.objects, FaultyStore)
    return repository.objects


def some_snapshot(repository: Repository) -> bytes:
    return save_snapshot(repository.objects, Snapshot("dir", bytes(32), 0, 0, "now"))


def the_session(repository: Repository) -> session_records.Stored:
    (stored,) = session_records.read_sessions(repository.objects)
    return stored


@contextmanager
def stopped_writer(url: str, wait_at: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.store.sessions_writer", url, wait_at]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# What is seen of it.


def test_a_session_is_seen_from_its_beginning_to_its_end(repository: Repository) -> None:
    condemn(repository, "packs/aa/x")
    before = repository.objects.now()
    with Session.begin(repository, "test") as session:
        stored = the_session(repository)
        assert stored.key == session.key
        record = stored.record
        assert (record.epoch, record.what, record.host) == (1, "test", hosts.here())
        assert abs(record.beat - before) < 60
        assert (record.fenced, record.roots, record.keys) == (0, (), ())
        assert session.epoch == 1
        assert session.is_doomed("packs/aa/x")
    assert session_records.read_sessions(repository.objects) == []
    with pytest.raises(SessionLostError):
        session.check()


def test_what_a_small_write_costs(repository: Repository) -> None:
    objects = faults(repository)
    objects.clear()
    with writing(repository, "test") as (session, inside):
        name = some_snapshot(inside)
        assert session.damaged_packs == frozenset()
        move_ref(inside.objects, REF, name, None)
        # Whatever else leads to the same costs nothing more.
        move_ref(inside.objects, RefName.parse("other"), name, None)
    of_session = {"get_versioned": 3, "put_if": 2, "list": 1, "delete": 1}
    assert objects.counts() == {**of_session, "put": 1, "put_if": 2 + 2}


def test_the_epoch_is_that_of_a_state_read_after_it_was_seen(repository: Repository) -> None:
    objects = faults(repository)
    objects.call_before(
        "get_versioned", lambda: condemn(repository, "packs/aa/x"), key="gc/", times=1, skip=1
    )
    with Session.begin(repository, "test") as session:
        assert session.epoch == 1
        assert session.is_doomed("packs/aa/x")
        assert the_session(repository).record.epoch == 1


def test_what_is_condemned_later_is_not_its_business(repository: Repository) -> None:
    with Session.begin(repository, "test") as session:
        condemn(repository, "packs/aa/x")
        assert not session.is_doomed("packs/aa/x")
        assert the_session(repository).record.epoch == 0
        session.check()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_whatever_ends_the_work_ends_the_session(store: Store, error: BaseException) -> None:
    with pytest.raises(type(error)), writing(store.repository, "test"):
        raise error
    assert store.object_keys("sessions/") == []
    assert threading.active_count() == 1


def test_within_a_session_that_one_goes_on(store: Store) -> None:
    with writing(store.repository, "outer") as (outer, inside):
        with writing(inside, "inner") as (inner, same):
            assert (inner, same) == (outer, inside)
        outer.check()
        assert len(store.object_keys("sessions/")) == 1


def test_a_session_is_not_its_childrens(store: Store) -> None:
    with Session.begin(store.repository, "test") as session:
        pid = os.fork()
        if pid == 0:
            try:
                session.check()
            except SessionLostError:
                session.end()
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert len(store.object_keys("sessions/")) == 1
        session.check()


def test_a_killed_writer_leaves_its_session(repository: Repository, url: str) -> None:
    with stopped_writer(url, "refs/") as process:
        key, name = said(process), bytes.fromhex(said(process))
        assert said(process) == "at refs/"
        stored = the_session(repository)
        assert (stored.key, stored.record.roots) == (key, (name,))
        assert not stored.record.is_over(repository.objects.now())
        process.kill()
        process.wait()
    record = the_session(repository).record
    assert record.is_over(repository.objects.now())
    fenced = session_records.fence(repository.objects, the_session(repository))
    assert fenced.record.gone
    assert fenced.record.kept_until == fenced.record.fenced + session_records.GONE_SECONDS


# Heartbeats.


def test_it_is_heard_of_again_and_again(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TTL", 0.2)
    with Session.begin(repository, "test") as session:
        first = the_session(repository).record
        while the_session(repository).record.nonce == first.nonce:
            pass
        session.check()
    assert session_records.read_sessions(repository.objects) == []


def test_a_heartbeat_without_an_answer_is_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TTL", 0.2)
    with Session.begin(store.repository, "test") as session:
        fault = store.faults.fail(
            "put_if", UnavailableError("no answer"), key="sessions/", times=3, after=True
        )
        while fault.hits < 3:
            pass
        session.declare([bytes(32)])
        assert the_session(store.repository).record.roots == (bytes(32),)


def test_who_is_not_heard_of_writes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TTL", 0.2)
    with writing(store.repository, "test") as (session, inside):
        name = some_snapshot(inside)
        store.faults.fail("put_if", UnavailableError("no server"), key="sessions/")
        while session._lost is None:
            with suppress(SessionLostError):
                session.check()
        with pytest.raises(SessionLostError, match="nothing was heard"):
            session.check()
        store.faults.clear()
        # Once lost, always lost.
        for write in (
            lambda: inside.objects.put("packs/aa/x", b"x"),
            lambda: inside.objects.put_if("profiles/x/y", b"x", None),
            lambda: inside.objects.delete("refs/x/y/z"),
            lambda: move_ref(inside.objects, REF, name, None),
        ):
            with pytest.raises(SessionLostError):
                write()
        assert all(call.key.startswith("sessions/") for call in store.faults.calls)
    assert try_read(store.repository.objects, REF) is None


def test_a_clock_that_jumps_is_answered_by_a_heartbeat(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.begin(store.repository, "test") as session:
        before = the_session(store.repository).record
        clocks = sessions._clocks
        for jump in ((400.0, 0.0), (0.0, 400.0)):
            monkeypatch.setattr(
                sessions,
                "_clocks",
                lambda jump=jump: tuple(a + b for a, b in zip(clocks(), jump, strict=True)),
            )
            session.check()
            assert the_session(store.repository).record.nonce != before.nonce
            monkeypatch.setattr(sessions, "_clocks", clocks)
            with session._lock:
                session._proved = clocks()


# Fencing.


def test_who_was_fenced_declares_nothing(repository: Repository) -> None:
    with writing(repository, "test") as (session, inside):
        name = some_snapshot(inside)
        fenced = session_records.fence(repository.objects, the_session(repository))
        assert not fenced.record.gone
        with pytest.raises(SessionLostError, match="took it for dead"):
            move_ref(inside.objects, REF, name, None)
        with pytest.raises(SessionLostError):
            inside.objects.put("packs/aa/x", b"x")
        with pytest.raises(SessionLostError):
            session.check()
    assert try_read(repository.objects, REF) is None
    assert session_records.read_sessions(repository.objects) == []


def test_a_session_that_moves_is_not_fenced(repository: Repository) -> None:
    with Session.begin(repository, "test") as session:
        stored = the_session(repository)
        session.declare([bytes(32)])
        with pytest.raises(ConflictError):
            session_records.fence(repository.objects, stored)
        session.check()
    with pytest.raises(NotFoundError):
        session_records.fence(repository.objects, stored)


def test_a_session_is_over_when_it_was_not_heard_of(repository: Repository) -> None:
    with Session.begin(repository, "test"):
        record = the_session(repository).record
        now = repository.objects.now()
        assert not record.is_over(now + session_records.TTL)
        assert record.is_over(now + LONG)


def test_a_stopped_writer_that_was_fenced_commits_nothing(repository: Repository, url: str) -> None:
    # It stops before its snapshot is declared.
    with stopped_writer(url, "sessions/") as process:
        key, name = said(process), bytes.fromhex(said(process))
        assert said(process) == "at sessions/"
        process.send_signal(signal.SIGSTOP)
        faults(repository).skew = LONG
        stored = the_session(repository)
        assert stored.record.is_over(repository.objects.now())
        session_records.fence(repository.objects, stored)
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert said(process) == "lost"
    assert try_read(repository.objects, REF) is None
    assert repository.objects.size(key) is None
    assert repository.objects.size(snapshot_key(name)) is not None


def test_what_a_stopped_writer_declared_is_kept_until_its_ref_is_there(
    repository: Repository, url: str
) -> None:
    with stopped_writer(url, "refs/") as process:
        _, name = said(process), bytes.fromhex(said(process))
        assert said(process) == "at refs/"
        process.send_signal(signal.SIGSTOP)
        faults(repository).skew = LONG
        fenced = session_records.fence(repository.objects, the_session(repository))
        (root,) = read_roots(repository.objects)
        assert (root.key, root.snapshot) == (fenced.key, name)
        assert root.until == fenced.record.fenced + session_records.KEEP_SECONDS
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert said(process) == "done"
    assert read_ref(repository.objects, REF).snapshot == name
    faults(repository).skew = 0.0
    assert [root.key for root in read_roots(repository.objects)] == [REF.key]


def test_what_a_fenced_session_declared_runs_out(repository: Repository) -> None:
    with Session.begin(repository, "test") as session:
        session.declare([bytes(32)], ["packs/aa/x"])
        fenced = session_records.fence(repository.objects, the_session(repository))
        now = repository.objects.now()
        assert session_records.kept_keys([fenced], now) == {"packs/aa/x"}
        assert len(list(read_roots(repository.objects))) == 1
        later = session_records.KEEP_SECONDS + 5
        faults(repository).skew = later
        assert session_records.kept_keys([fenced], now + later) == frozenset()
        assert list(read_roots(repository.objects)) == []


# Answers that never come.


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_lost_answer_about_the_session_is_found_out(
    repository: Repository, after: bool, skip: int
) -> None:
    objects = faults(repository)
    objects.fail(
        "put_if", UnavailableError("lost"), key="sessions/", times=2, skip=skip, after=after
    )
    with writing(repository, "test") as (_, inside):
        name = some_snapshot(inside)
        move_ref(inside.objects, REF, name, None)
        assert the_session(repository).record.roots == (name,)
    assert read_ref(repository.objects, REF).snapshot == name
    assert session_records.read_sessions(repository.objects) == []


def test_a_ref_whose_write_may_still_arrive_keeps_the_session(store: Store) -> None:
    late: list[tuple[str, bytes, str | None]] = []
    put_if = store.faults.inner.put_if

    def lose(key: str, data: bytes, version: str | None) -> str:
        if key.startswith("refs/"):
            late.append((key, data, version))
            raise UnavailableError("no answer")
        return put_if(key, data, version)

    store.faults.inner.put_if = lose  # type: ignore[method-assign]
    name = b""
    with suppress(UnavailableError), writing(store.repository, "test") as (_, inside):
        name = some_snapshot(inside)
        move_ref(inside.objects, REF, name, None)
    assert [root.snapshot for root in read_roots(store.repository.objects)] == [name]
    put_if(*late[0])
    assert read_ref(store.repository.objects, REF).snapshot == name


def test_a_ref_that_was_moved_by_others_keeps_no_session(store: Store) -> None:
    with writing(store.repository, "test") as (_, inside):
        name = some_snapshot(inside)
        move_ref(inside.objects, REF, name, None)
        store.faults.fail("put_if", UnavailableError("no answer"), key="refs/", times=1, after=True)
        with pytest.raises(ConflictError):
            move_ref(inside.objects, REF, name, None)  # it exists: nothing can arrive
        found = try_read(inside.objects, REF)
        move_ref(inside.objects, REF, name, found)
    assert store.object_keys("sessions/") == []


def test_an_end_without_an_answer_is_no_failure(store: Store) -> None:
    store.faults.fail("delete", UnavailableError("no answer"), key="sessions/")
    with writing(store.repository, "test") as (_, inside):
        move_ref(inside.objects, REF, some_snapshot(inside), None)
    assert len(store.object_keys("sessions/")) == 1
    assert threading.active_count() == 1


def test_a_session_that_cannot_begin_leaves_nothing(store: Store) -> None:
    store.faults.fail("get_versioned", UnavailableError("no answer"), key="gc/", skip=1)
    with pytest.raises(UnavailableError):
        Session.begin(store.repository, "test")
    assert store.object_keys("sessions/") == []
    assert threading.active_count() == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"format":1}',
        b'{"beat":1,"epoch":-1,"fenced":0,"format":1,"gone":0,"host":"","keys":[],"nonce":"",'
        b'"roots":[],"state":"open","what":""}',
        b'{"beat":1,"epoch":1,"fenced":0,"format":1,"gone":0,"host":"","keys":["refs/a/b/c"],'
        b'"nonce":"","roots":[],"state":"open","what":""}',
        b'{"beat":1,"epoch":1,"fenced":0,"format":1,"gone":0,"host":"","keys":[],"nonce":"",'
        b'"roots":["00"],"state":"open","what":""}',
        b'{"beat":1,"epoch":1,"fenced":0,"format":1,"gone":0,"host":"","keys":[],"nonce":"",'
        b'"roots":[],"state":"fenced","what":""}',
    ],
)
def test_a_session_that_cannot_be_read_is_damage(store: Store, data: bytes) -> None:
    store.repository.objects.put(f"sessions/{'0' * 32}", data)
    with pytest.raises(CorruptError):
        session_records.read_sessions(store.repository.objects)


# Roots.


@pytest.mark.parametrize(
    ("key", "root"),
    [
        ("refs/default/a/latest", True),
        ("runs/default/a/parts/000000000001-00000001-0000/00000-of-00001", True),
        ("runs/default/a/commits/000000000001-00000001-0000", True),
        ("runs/default/a/leases/000000000001-00000001-0000/0123456789abcdef", True),
        ("runs/default/a/pins/000000000001-00000001-0000", False),
        ("runs/default/a/epochs/00000001/claim", False),
        ("drafts/default/a/latest/" + "0" * 64, True),
        ("leases/" + "0" * 64 + "/0123456789abcdef", True),
        ("snapshots/" + "0" * 64, False),
        ("sessions/" + "0" * 32, False),
    ],
)
def test_what_is_a_root(key: str, root: bool) -> None:
    assert is_root(key) is root


def test_leases_are_roots_until_they_have_run_out(store: Store) -> None:
    objects = store.faults
    until = int(objects.now()) + 100
    for key in ("leases/" + "0" * 64 + "/" + "1" * 16, "runs/a/b/leases/c/" + "1" * 16):
        objects.put(key, b'{"snapshot":"%b","until":%d}' % (b"0" * 64, until))
    assert [root.until for root in read_roots(objects)] == [until + 300.0] * 2
    objects.skew = 390.0
    assert len(list(read_roots(objects))) == 2
    objects.skew = 410.0
    assert list(read_roots(objects)) == []


def test_a_root_that_cannot_be_read_is_damage(store: Store) -> None:
    store.repository.objects.put("refs/default/a/latest", b'{"snapshot":"00"}')
    with pytest.raises(CorruptError, match="refs/default/a/latest"):
        list(read_roots(store.repository.objects))


def test_a_root_that_is_removed_meanwhile_is_passed_over(store: Store, tree: Path) -> None:
    store.push(tree)
    store.faults.call_before("get", lambda: store.repository.objects.delete(REF.key), key=REF.key)
    store.push(tree, "it")
    assert [root.key for root in read_roots(store.faults)] == ["refs/default/tree/latest"]


# What is doomed.


def test_what_is_doomed_counts_as_absent_and_is_claimed_when_it_is_written(store: Store) -> None:
    name = save_lock(store.repository.objects, b"a lock")
    condemn(store.repository, lock_key(name), "packs/aa/x")
    with writing(store.repository, "test") as (session, inside):
        assert inside.objects.size(lock_key(name)) is None
        assert save_lock(inside.objects, b"a lock") == name
        assert not session.is_doomed(lock_key(name))
        assert session.is_doomed("packs/aa/x")
    assert doomed.read_doomed(store.repository.objects).keys() == {"packs/aa/x"}


def test_what_many_threads_claim_is_claimed_at_once(repository: Repository) -> None:
    keys = [f"packs/aa/{number}" for number in range(5)]
    condemn(repository, *keys, "packs/aa/x")
    objects = faults(repository)
    with writing(repository, "test") as (session, inside):
        gate = objects.gate("put_if", key="gc/state", times=1)
        threads = [threading.Thread(target=inside.objects.put, args=(key, b"")) for key in keys]
        threads[0].start()
        gate.wait_entered()
        objects.clear()
        for thread in threads[1:]:
            thread.start()
        while len(session._asked) < 4:
            pass
        gate.open()
        for thread in threads:
            thread.join()
        moved = [call for call in objects.calls if call.key == "gc/state"]
        assert [call.operation for call in moved] == ["get_versioned", "put_if"]
        assert not any(map(session.is_doomed, keys))
    assert doomed.read_doomed(repository.objects).keys() == {"packs/aa/x"}


def test_a_claim_that_fails_takes_nothing_from_those_who_wait(repository: Repository) -> None:
    condemn(repository, "packs/aa/x", "packs/aa/y")
    objects = faults(repository)
    with writing(repository, "test") as (session, inside):
        objects.fail("put_if", UnavailableError("away"), key="gc/state", times=1)
        with pytest.raises(UnavailableError):
            session.claim(["packs/aa/x"])
        inside.objects.put("packs/aa/y", b"")
        assert session.is_doomed("packs/aa/x")
    assert doomed.read_doomed(repository.objects).keys() == {"packs/aa/x"}


def test_a_push_stores_anew_what_is_doomed(store: Store, tree: Path) -> None:
    first = store.push(tree)
    store.repository.objects.delete("refs/default/tree/latest")
    condemn(store.repository, *closure(store.repository, first.snapshot))
    store.forget()
    second = store.push(tree, "again")
    assert second.new_chunk_bytes == first.new_chunk_bytes
    # Its packs have the names of the old ones, which are no longer doomed for that.
    live = closure(store.repository, second.snapshot)
    assert not live & doomed.read_doomed(store.repository.objects).keys()
    delete_condemned(store.repository)
    assert store.verify(whole=False).ok


def test_a_push_shares_nothing_with_what_is_doomed(store: Store, tree: Path) -> None:
    first = store.push(tree)
    store.repository.objects.delete("refs/default/tree/latest")
    condemn(store.repository, *closure(store.repository, first.snapshot))
    store.forget()
    (tree / "more").write_bytes(trees.noise("more", 1 << 20))
    second = store.push(tree, "more")
    assert second.new_chunk_bytes > first.new_chunk_bytes
    delete_condemned(store.repository)
    assert store.verify(whole=False).ok


def test_a_push_shares_nothing_with_what_is_damaged(store: Store) -> None:
    content = trees.noise("content", 3 << 20)
    first = store.push(ListedSource({b"file": content}))
    _, locations = store.repository.located(first.manifest)
    (pack,) = {frame.pack for frame in locations.frames}
    note_damage(store.repository.objects, Damage(pack, "flipped", 1))
    store.forget()
    second = store.push(ListedSource({b"file": content, b"other": b"x"}), "other")
    assert second.new_chunk_bytes >= len(content)
    assert pack_key(pack) not in closure(store.repository, second.snapshot)


def test_a_tag_claims_all_that_it_leads_to(store: Store, tree: Path) -> None:
    name = store.push(tree).snapshot
    keys = closure(store.repository, name)
    store.repository.objects.delete("refs/default/tree/latest")
    profile = f"profiles/{store.repository.snapshot(name).manifest.hex()}/start"
    store.repository.objects.put(profile, b"x")
    condemn(store.repository, *keys, profile, "packs/aa/x")
    tag(store.repository, f"@{name.hex()}", REF)
    assert doomed.read_doomed(store.repository.objects).keys() == {"packs/aa/x"}
    assert store.verify(whole=False).ok


@pytest.mark.parametrize("kind", ["snapshots", "manifests", "locations", "packs"])
def test_a_tag_of_what_is_not_whole_is_refused(store: Store, tree: Path, kind: str) -> None:
    name = store.push(tree).snapshot
    store.repository.objects.delete("refs/default/tree/latest")
    gone = next(key for key in closure(store.repository, name) if key.startswith(f"{kind}/"))
    # The cache has the snapshot still.
    store.repository.snapshot(name)
    store.repository.objects.delete(gone)
    with pytest.raises(NotFoundError):
        tag(store.repository, f"@{name.hex()}", REF)
    assert try_read(store.repository.objects, REF) is None


def test_a_tag_while_it_is_being_deleted_is_refused(store: Store, tree: Path) -> None:
    name = store.push(tree).snapshot
    keys = closure(store.repository, name)
    store.repository.objects.delete("refs/default/tree/latest")
    objects = store.repository.objects
    rows = [Condemned(key, 1, objects.now()) for key in keys]
    doomed.put_state(objects, State(1, deleting=doomed.write_list(objects, rows)), None)
    with pytest.raises(NotFoundError, match="no longer whole"):
        tag(store.repository, f"@{name.hex()}", REF)
    assert try_read(objects, REF) is None
    assert objects.size(snapshot_key(name)) is None


def test_a_ref_to_what_others_stored_claims_it(store: Store, tree: Path) -> None:
    name = store.push(tree).snapshot
    keys = closure(store.repository, name)
    condemn(store.repository, *keys)
    with writing(store.repository, "test") as (_, inside):
        move_ref(inside.objects, REF, name, None)
    assert doomed.read_doomed(store.repository.objects).keys() == frozenset()


def test_a_collector_that_deletes_what_it_must_not_is_noticed(store: Store, tree: Path) -> None:
    name = store.push(tree).snapshot
    objects = store.repository.objects
    with writing(store.repository, "test") as (_, inside):
        rows = [Condemned(key, 1, 0.0) for key in closure(store.repository, name)]
        doomed.put_state(objects, State(1, deleting=doomed.write_list(objects, rows)), None)
        with pytest.raises(SessionLostError, match="is being deleted"):
            move_ref(inside.objects, REF, name, None)
    assert try_read(objects, REF) is None


def test_locations_that_replace_others_declare_their_packs(store: Store, tree: Path) -> None:
    first = store.push(tree)
    key = locations_key(first.manifest)
    objects = store.repository.objects
    before = objects.get(key)
    other = store.push(ListedSource({b"file": trees.noise("x", 1 << 20)}), "other")
    _, version = objects.get_versioned(key)
    packs = {key for key in closure(store.repository, other.snapshot) if key[:6] == "packs/"}
    with writing(store.repository, "test") as (_, inside):
        inside.objects.put_if(key, objects.get(locations_key(other.manifest)), version)
        assert set(the_session(store.repository).record.keys) == packs
        # What is there already is alive by itself.
        _, version = objects.get_versioned(key)
        inside.objects.put_if(key, objects.get(locations_key(other.manifest)), version)
        assert set(the_session(store.repository).record.keys) == packs
    objects.put(key, before)
    assert store.verify(whole=False).ok


@pytest.mark.parametrize("lost", [False, True])
def test_packs_that_locations_have_come_to_name_are_claimed_at_the_end(
    store: Store, tree: Path, lost: bool
) -> None:
    objects = store.repository.objects
    first = store.push(tree)
    other = store.push(ListedSource({b"file": trees.noise("x", 1 << 20)}), "other")
    key = locations_key(first.manifest)
    body, (_, version) = objects.get(locations_key(other.manifest)), objects.get_versioned(key)
    (pack,) = {key for key in closure(store.repository, other.snapshot) if key[:6] == "packs/"}
    with suppress(UnavailableError), writing(store.repository, "test") as (_, inside):
        # Whoever begins now takes it for doomed, until locations name it that it did not write.
        condemn(store.repository, pack, "packs/aa/x")
        if lost:
            error = UnavailableError("no answer")
            store.faults.fail("put_if", error, key="locations/", times=1, after=True)
        inside.objects.put_if(key, body, version)
    assert doomed.read_doomed(objects).keys() == {"packs/aa/x"}
    assert store.object_keys("sessions/") == []


def test_who_cannot_claim_what_locations_name_leaves_the_session(store: Store, tree: Path) -> None:
    objects = store.repository.objects
    first = store.push(tree)
    other = store.push(ListedSource({b"file": trees.noise("x", 1 << 20)}), "other")
    key = locations_key(first.manifest)
    body, (_, version) = objects.get(locations_key(other.manifest)), objects.get_versioned(key)
    packs = {key for key in closure(store.repository, other.snapshot) if key[:6] == "packs/"}
    with writing(store.repository, "test") as (_, inside):
        condemn(store.repository, *packs)
        inside.objects.put_if(key, body, version)
        store.faults.fail("put_if", UnavailableError("away"), key="gc/state")
    assert session_records.kept_keys([the_session(store.repository)], objects.now()) == packs


def test_locations_whose_write_may_still_arrive_keep_the_session(store: Store, tree: Path) -> None:
    objects = store.repository.objects
    first = store.push(tree)
    other = store.push(ListedSource({b"file": trees.noise("x", 1 << 20)}), "other")
    key = locations_key(first.manifest)
    body, (_, version) = objects.get(locations_key(other.manifest)), objects.get_versioned(key)
    packs = {key for key in closure(store.repository, other.snapshot) if key[:6] == "packs/"}
    store.faults.fail("put_if", UnavailableError("no answer"), key="locations/")
    with suppress(UnavailableError), writing(store.repository, "test") as (_, inside):
        inside.objects.put_if(key, body, version)
    assert session_records.kept_keys([the_session(store.repository)], objects.now()) == packs


def test_sessions_of_many_threads(store: Store) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with writing(store.repository, f"{number}") as (session, inside):
                for step in range(5):
                    session.declare([bytes([number, step]) + bytes(30)])
                    inside.objects.put(f"packs/aa/{number}-{step}", b"x")
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert store.object_keys("sessions/") == []
