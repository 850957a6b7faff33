"""Collections: what is dead goes and nothing else, whoever does what at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UnavailableError
from envstore.store import hosts
from envstore.store.catalog import tag
from envstore.store.creation import create_store
from envstore.store.damage import Damage, damaged_packs, note_damage
from envstore.store.doomed import (
    LEASE_SECONDS,
    SLACK_SECONDS,
    Condemned,
    Owner,
    list_key,
    put_state,
    read_doomed,
    read_state,
    write_list,
)
from envstore.store.gc import owner as owning
from envstore.store.gc.collecting import collect
from envstore.store.gc.marking import BrokenRootError
from envstore.store.gc.owner import LostOwnershipError, Ownership
from envstore.store.index import DedupIndex, segment_key
from envstore.store.known import KnownChunks
from envstore.store.locations import locations_key
from envstore.store.locks import save_lock
from envstore.store.manifest import manifest_key
from envstore.store.packages import describe_package, package_key, save_packages
from envstore.store.packs import pack_key
from envstore.store.profiles import Range, find_profile, new_profile, save_profile
from envstore.store.push import push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.samples import build_sample, open_sample, sample_key
from envstore.store.session_records import TTL, read_sessions
from envstore.store.sessions import Session, SessionLostError
from envstore.store.snapshots import save_snapshot, snapshot_key
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from envstore.store.verify import verify
from tests import trees
from tests.s3server import S3Server
from tests.store.gc.collecting import DAY, gc, keys, remove, size
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

SIZE = 300_000


@pytest.fixture
def two(store: Store, tmp_path: Path) -> Store:
    """A store with two trees that have a third of their bytes in common, as ``a`` and ``b``."""
    for name in "ab":
        root = tmp_path / name
        trees.plain(root, name, files=6)
        (root / "own").write_bytes(trees.noise(name, 2 * SIZE))
        (root / "shared").write_bytes(trees.noise("shared", SIZE))
        trees.settle(root)
        store.push(root, name)
    return store


def _gone_host() -> str:
    """Return who a process was that has ended."""
    code = "from envstore.store import hosts; print(hosts.here())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_nothing_is_taken_from_a_store_without_garbage(two: Store) -> None:
    before = keys(two)
    done = gc(two)
    assert (done.freed_bytes, done.condemned_bytes, done.kept) == (0, 0, {})
    assert (done.snapshots, done.packs) == (2, 2)
    assert keys(two) == before
    two.assert_sound()


def test_what_is_dead_goes_and_what_is_shared_stays(
    two: Store, tmp_path: Path, store: Store
) -> None:
    before, tree = keys(two), trees.describe(tmp_path / "b")
    remove(two, "a")
    done = gc(two)
    gone = before - keys(two)
    for prefix in ("snapshots/", "manifests/", "locations/"):
        assert len([key for key in gone if key.startswith(prefix)]) == 1
    assert done.freed_bytes > 2 * SIZE
    assert done.freed_objects >= 4
    two.assert_sound()
    two.pull(tmp_path / "out", "b")
    assert trees.describe(tmp_path / "out") == tree
    with Store(tmp_path / "fresh") as fresh:
        fresh.push(tmp_path / "b", "b")
        assert size(two) <= 1.05 * size(fresh)


def test_all_goes_when_nothing_is_left(two: Store) -> None:
    remove(two, "a", "b")
    done = gc(two)
    assert keys(two) == set()
    assert (done.snapshots, done.packs, done.kept_bytes) == (0, 0, 0)


def test_grace_is_counted_by_the_clock_of_the_store(two: Store) -> None:
    remove(two, "a", "b")
    first = gc(two, DAY)
    assert first.freed_bytes == 0
    assert first.condemned_bytes == first.kept["grace"] > 4 * SIZE
    assert gc(two, DAY).condemned_bytes == first.condemned_bytes
    two.faults.skew = DAY - 60
    assert gc(two, DAY).freed_bytes == 0
    two.faults.skew = DAY + 60
    assert gc(two, DAY).freed_bytes >= first.condemned_bytes
    assert keys(two) == set()


def test_what_a_dry_run_says_is_what_happens(two: Store) -> None:
    remove(two, "a", "b")
    before = two.object_keys()
    two.faults.clear()
    said = gc(two, dry_run=True)
    assert said.dry_run
    assert not {"put", "put_if", "delete"} & set(two.faults.counts())
    assert two.object_keys() == before
    done = gc(two)
    assert said.freed_packs == done.freed_packs
    assert 0.9 * done.freed_bytes <= said.freed_bytes <= done.freed_bytes
    assert gc(two, DAY, dry_run=True).freed_bytes == 0


@pytest.mark.parametrize(
    "key",
    [
        "refs/team/other/v1",
        "runs/team/run/parts/000000000001-00000001-0001/00000-of-00001",
        "runs/team/run/commits/000000000001-00000001-0001",
        "runs/team/run/leases/000000000001-00000001-0001/0123456789abcdef",
        "drafts/team/tree/latest/" + "ab" * 32,
        "leases/{snapshot}/0123456789abcdef",
    ],
)
def test_every_kind_of_root_keeps_its_snapshot(two: Store, key: str, tmp_path: Path) -> None:
    objects = two.repository.objects
    snapshot = two.repository.resolve("a")
    key = key.replace("{snapshot}", snapshot.hex())
    body = {"format": 1, "snapshot": snapshot.hex(), "until": int(objects.now() + 600)}
    objects.put(key, json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    remove(two, "a", "b")
    done = gc(two)
    assert done.snapshots == 1
    assert keys(two, "snapshots/") == {snapshot_key(snapshot)}
    assert two.verify_targets([("a", snapshot)]).ok
    if "leases/" in key or key.startswith("drafts/"):
        kind = "leases" if "leases/" in key else "drafts"
        assert done.kept[kind] > 2 * SIZE
    if "leases/" in key:
        two.faults.skew = DAY + 2000
    else:
        objects.delete(key)
    gc(two)
    assert keys(two, "snapshots/") == set()
    assert not keys(two, "leases/")


def test_what_a_writer_declared_stays_until_it_is_over(two: Store) -> None:
    snapshot = two.repository.resolve("a")
    with Session.begin(two.repository, "test") as session:
        session.declare([snapshot])
        remove(two, "a", "b")
        for _ in range(2):
            done = gc(two)
            assert two.verify_targets([("a", snapshot)]).ok
        assert done.kept["sessions"] > 2 * SIZE
    gc(two)
    assert keys(two) == set()


def test_a_writer_holds_what_was_condemned_after_it_began(two: Store) -> None:
    with Session.begin(two.repository, "a push") as session:
        remove(two, "a", "b")
        before = keys(two)
        done = gc(two)
        assert keys(two) == before
        assert done.kept == {"writers": done.condemned_bytes}
        assert [(writer.what, writer.epoch) for writer in done.writers] == [("a push", 0)]
        session.check()
    gc(two)
    assert keys(two) == set()


def test_a_writer_that_knows_what_is_condemned_holds_nothing(two: Store) -> None:
    remove(two, "a", "b")
    gc(two, DAY)
    with Session.begin(two.repository, "late") as session:
        gc(two)
        assert keys(two) == set()
        session.check()


def test_a_silent_writer_is_fenced(two: Store) -> None:
    session = Session.begin(two.repository, "asleep")
    try:
        remove(two, "a", "b")
        two.faults.skew = TTL + 120
        gc(two)
        assert keys(two) == set()
        with pytest.raises(SessionLostError):
            session.declare([bytes(32)])
    finally:
        session.end()
    assert read_sessions(two.repository.objects) == []


def test_a_writer_that_was_killed_holds_nothing(two: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from envstore.store.repository import Repository\n"
        "from envstore.store.sessions import Session\n"
        "Session.begin(Repository.open(sys.argv[1]), 'killed')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, two.url], check=False)
    assert len(read_sessions(two.repository.objects)) == 1
    remove(two, "a", "b")
    gc(two)
    assert keys(two) == set()
    assert read_sessions(two.repository.objects) == []


def test_what_is_found_alive_again_is_condemned_no_more(two: Store) -> None:
    snapshot = two.repository.resolve("a")
    remove(two, "a")
    assert gc(two, DAY).condemned_objects >= 3
    # As if it had been written by somebody who knows nothing of sessions.
    two.repository.objects.put(
        "refs/default/back/latest",
        b'{"format":1,"nonce":"00","sequence":1,"snapshot":"%s","updated":"2026-01-01T00:00:00Z"}'
        % snapshot.hex().encode(),
    )
    assert gc(two).condemned_bytes == 0
    two.assert_sound()


def test_tag_takes_back_what_is_condemned(two: Store) -> None:
    snapshot = two.repository.resolve("a")
    remove(two, "a")
    gc(two, DAY)
    tag(two.repository, f"@{snapshot.hex()}", RefName.parse("a"))
    two.faults.skew = 2 * DAY
    assert gc(two, DAY).freed_packs == 0
    two.assert_sound()


@pytest.mark.parametrize("swept", [False, True])
def test_the_same_content_can_be_pushed_again(two: Store, tmp_path: Path, swept: bool) -> None:
    tree = trees.describe(tmp_path / "a")
    remove(two, "a", "b")
    gc(two, 0 if swept else DAY)
    two.push(tmp_path / "a", "a")
    two.assert_sound()
    gc(two)
    two.assert_sound()
    two.pull(tmp_path / "out", "a")
    assert trees.describe(tmp_path / "out") == tree
    assert gc(two).condemned_bytes == 0


def test_a_push_goes_on_while_another_collects(two: Store, tmp_path: Path) -> None:
    remove(two, "a")
    gate = two.faults.gate("put_if", key="refs/")
    done: list[object] = []

    def work() -> None:
        done.append(two.push(tmp_path / "a", "c"))

    thread = threading.Thread(target=lambda: two.in_this_thread(work))
    thread.start()
    try:
        gate.wait_entered()
        gc(two)
        gc(two)
    finally:
        gate.open()
        thread.join()
    assert done
    two.assert_sound()
    gc(two)
    two.assert_sound()


def test_only_one_collects_at_a_time(two: Store) -> None:
    remove(two, "a", "b")
    owner = Ownership.take(two.repository.objects)
    assert isinstance(owner, Ownership)
    with owner:
        done = gc(two)
        assert done.busy is not None
        assert done.busy.host == hosts.here()
        assert done.freed_bytes == done.condemned_bytes == 0
    assert gc(two).freed_bytes > 0


@pytest.mark.parametrize("dead", [True, False])
def test_what_another_collector_left_is_finished(two: Store, dead: bool) -> None:
    objects = two.repository.objects
    remove(two, "a", "b")
    gc(two, DAY)
    found = read_doomed(objects)
    half = [row for row in found.condemned if row.key.startswith(("snapshots/", "manifests/"))]
    rest = [row for row in found.condemned if row not in half]
    until = int(objects.now() + LEASE_SECONDS)
    owner = Owner("0" * 32, _gone_host() if dead else "elsewhere", until)
    state = replace(
        found.state,
        condemned=write_list(objects, rest),
        deleting=write_list(objects, half),
        owner=owner,
    )
    put_state(objects, state, found.version)
    if not dead:
        assert gc(two, DAY).busy is not None
        two.faults.skew = LEASE_SECONDS + SLACK_SECONDS + 5
    assert gc(two, DAY).busy is None
    assert not keys(two, "snapshots/")
    assert not keys(two, "manifests/")
    assert keys(two, "packs/")
    assert read_doomed(objects).deleting == []
    gc(two)
    assert keys(two) == set()


def test_whoever_was_replaced_deletes_nothing(two: Store) -> None:
    objects = two.repository.objects
    remove(two, "a", "b")
    gc(two, DAY)
    before = keys(two)
    gate = two.faults.gate("list", key="", times=1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            gc(two)
        except EnvstoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        gate.wait_entered()
        state, version = read_state(objects)
        put_state(objects, replace(state, owner=Owner("1" * 32, "", 1 << 40)), version)
    finally:
        gate.open()
        thread.join()
    assert isinstance(errors[0], LostOwnershipError)
    assert keys(two) == before


def test_an_owner_that_cannot_renew_stops_in_time(
    two: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Ownership.take(two.repository.objects)
    assert isinstance(owner, Ownership)
    owner.check()
    boot, wall = owning._clocks()
    late = [(boot + LEASE_SECONDS, wall), (boot, wall + LEASE_SECONDS), (boot, wall - 60)]
    for clocks in late:
        monkeypatch.setattr(owning, "_clocks", lambda clocks=clocks: clocks)
        fault = two.faults.fail("*", UnavailableError("away"), key="gc/state")
        with pytest.raises(LostOwnershipError):
            owner.check()
        fault.remove()
        # Once it can it goes on, if nobody else has taken over.
        owner.check()
    monkeypatch.setattr(owning, "_clocks", lambda: (boot + 999, wall))
    state, version = read_state(two.repository.objects)
    put_state(two.repository.objects, replace(state, owner=None), version)
    with pytest.raises(LostOwnershipError):
        owner.check()


def test_what_cannot_be_deleted_is_told_and_tried_again(two: Store) -> None:
    remove(two, "a", "b")
    locked = keys(two, "packs/")
    one = min(locked)
    fault = two.faults.fail("delete", AccessDeniedError("object lock"), key=one)
    done = gc(two)
    assert keys(two) == {one}
    assert done.undeletable_objects == 1
    assert done.kept == {"undeletable": two.repository.objects.size(one)}
    gc(two)
    assert keys(two) == {one}
    fault.remove()
    done = gc(two)
    assert (keys(two), done.undeletable_objects) == (set(), 0)


@pytest.mark.parametrize("key", ["snapshots/", "packs/", "gc/state"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [UnavailableError("away"), KeyboardInterrupt()])
def test_interrupted_at_any_request_it_can_be_run_again(
    two: Store, key: str, after: bool, error: BaseException
) -> None:
    remove(two, "a")
    operation = "put_if" if key == "gc/state" else "delete"
    for skip in range(3):
        fault = two.faults.fail(operation, error, key=key, after=after, times=2, skip=skip)
        try:
            gc(two)
        except type(error):
            pass
        finally:
            fault.remove()
        two.assert_sound()
        state, _ = read_state(two.repository.objects)
        assert state.owner is None or state.owner.host == hosts.here()
        if state.owner is not None:
            two.faults.skew += LEASE_SECONDS + SLACK_SECONDS + 5
    gc(two)
    assert keys(two, "snapshots/") == {snapshot_key(two.repository.resolve("b"))}
    assert read_state(two.repository.objects)[0].owner is None
    assert read_doomed(two.repository.objects).deleting == []
    two.assert_sound()


@pytest.mark.parametrize("what", ["snapshot", "manifest", "locations", "ref"])
@pytest.mark.parametrize("missing", [False, True])
def test_nothing_is_condemned_while_something_live_is_damaged(
    two: Store, what: str, missing: bool
) -> None:
    objects = two.repository.objects
    snapshot = two.repository.resolve("b")
    if (what, missing) in (("ref", True), ("manifest", False)):
        return  # then it is not live; and what a manifest says takes part in nothing
    key = {
        "snapshot": snapshot_key(snapshot),
        "manifest": manifest_key(two.snapshot("b").manifest),
        "locations": locations_key(two.snapshot("b").manifest),
        "ref": RefName.parse("b").key,
    }[what]
    remove(two, "a")
    if missing:
        objects.delete(key)
    else:
        two.path(key).write_bytes(objects.get(key)[:-3])
    before = keys(two)
    with pytest.raises(EnvstoreError) as caught:
        gc(two)
    assert "repair" in (caught.value.hint or "")
    if what != "ref":
        assert isinstance(caught.value, BrokenRootError)
        assert "refs/default/b/latest" in caught.value.message or what != "snapshot"
    assert keys(two) == before
    assert read_doomed(objects).condemned == []
    assert read_state(objects)[0].owner is None


def test_small_objects_go_with_what_names_them(two: Store, tmp_path: Path) -> None:
    objects = two.repository.objects
    lock = save_lock(objects, b"a lock")
    made = replace(two.snapshot("a"), lock=lock)
    name = save_snapshot(objects, made)
    tag(two.repository, f"@{name.hex()}", RefName.parse("locked"))
    save_profile(objects, made.manifest, "start", new_profile([Range(b"own", 0, 9)], []))
    remove(two, "a")
    gc(two)
    assert objects.size(f"locks/{lock.hex()}") is not None
    assert keys(two, "profiles/")
    remove(two, "locked")
    gc(two)
    assert not keys(two, "locks/")
    assert not keys(two, "profiles/")


def test_leftovers_of_probes_go_and_unknown_keys_stay(two: Store) -> None:
    objects = two.repository.objects
    for key in ("probe/one", "future/thing", "packs/readme", "packs/aa/short", "snapshots/x"):
        objects.put(key, b"x")
    gc(two)
    left = keys(two)
    assert "probe/one" not in left
    assert {"future/thing", "packs/readme", "packs/aa/short", "snapshots/x"} <= left


def test_profiles_of_dead_ancestors_are_carried_over(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    trees.plain(root, "tree", files=5)
    for step in range(3):
        (root / "step").write_text(f"{step}")
        trees.settle(root)
        store.push(root)
        if step == 0:
            manifest = store.snapshot().manifest
            profile = new_profile([Range(b"step", 0, 1)], ["run"])
            save_profile(store.repository.objects, manifest, "start", profile)
    head = store.repository.resolve("tree")
    before = find_profile(store.repository, head)
    gc(store)
    assert len(keys(store, "snapshots/")) == 1
    after = find_profile(store.repository, head)
    assert before is not None
    assert after is not None
    assert after.profile == before.profile
    assert after.manifest == store.snapshot().manifest
    assert [name for name, _ in store.repository.history(head)] == [head]
    assert gc(store).freed_objects == 0


def test_the_index_names_nothing_that_is_gone(two: Store, tmp_path: Path) -> None:
    repository = two.repository
    objects = repository.objects
    segments = [(name, repository.segment(name)) for name in _segments(two)]
    sample = build_sample(segments)
    name, data = sample.encode()
    objects.put(sample_key(name), data)
    # A package that lies in the pack of each tree.
    for letter in "ab":
        manifest = two.snapshot(letter).manifest
        entries = [e for e in repository.entries(manifest) if e.path == b"own"]
        index = DedupIndex()
        KnownChunks(repository, index).learn_snapshots([repository.resolve(letter)])
        package = describe_package(entries, {}, index)
        save_packages(objects, [(package_key(letter * 64, "any.1"), package)])
    remove(two, "a")
    gc(two)
    packs = {key[-64:] for key in keys(two, "packs/")}
    left = [pack for name in _segments(two) for pack in repository.segment(name)]
    assert {pack.digest.hex() for pack in left} <= packs
    assert keys(two, "packages/") in (set(), {package_key("b" * 64, "any.1")})
    (key,) = keys(two, "samples/")
    found = open_sample(objects.get(key), bytes.fromhex(key[-64:]))
    assert {segment_key(segment) for segment in found.segments} <= keys(two, "index/")
    names = {digest[:8] for pack in left for f in pack.frames for digest, _, _ in f.chunks()}
    assert all(head.to_bytes(8, "big") in names for head in found.heads)
    # And so a push of the same is told of nothing lost.
    assert two.push(tmp_path / "a", "again").warnings == ()
    two.assert_sound()


def _segments(store: Store) -> list[bytes]:
    return [bytes.fromhex(key.removeprefix("index/")) for key in store.object_keys("index/")]


def test_the_note_of_damage_goes_with_the_pack(two: Store) -> None:
    objects = two.repository.objects
    for key in keys(two, "packs/"):
        note_damage(objects, Damage(bytes.fromhex(key[-64:]), "a test", 1))
    remove(two, "a")
    gc(two)
    assert {pack_key(pack) for pack in damaged_packs(objects)} == keys(two, "packs/")
    remove(two, "b")
    gc(two)
    assert damaged_packs(objects) == frozenset()


def test_a_pack_that_is_not_there_hinders_nobody(two: Store) -> None:
    two.repository.objects.delete(min(keys(two, "packs/")))
    remove(two, "a", "b")
    gc(two)
    assert keys(two) == set()


def test_a_snapshot_that_a_lease_names_in_vain_hinders_nobody(two: Store) -> None:
    objects = two.repository.objects
    name = "ab" * 32
    until = int(objects.now()) + 600
    body = b'{"format":1,"snapshot":"%s","until":%d}' % (name.encode(), until)
    objects.put(f"leases/{name}/0123456789abcdef", body)
    remove(two, "a")
    assert gc(two).freed_bytes > 0


def test_lists_that_nothing_names_go(two: Store) -> None:
    objects = two.repository.objects
    write_list(objects, read_doomed(objects).condemned or [Condemned("probe/x", 1, 1.0)])
    remove(two, "a", "b")
    gc(two, DAY)
    state, _ = read_state(objects)
    assert state.condemned is not None
    assert two.object_keys("gc/lists/") == [list_key(state.condemned)]
    gc(two)
    assert two.object_keys("gc/lists/") == []


def test_a_manifest_of_many_snapshots_is_read_once(two: Store) -> None:
    objects = two.repository.objects
    made = two.snapshot("a")
    for number in range(5):
        name = save_snapshot(objects, replace(made, message=f"{number}"))
        tag(two.repository, f"@{name.hex()}", RefName.parse(f"copy{number}"))
    two.faults.clear()
    assert gc(two, DAY).snapshots == 7
    assert two.faults.count("get", "locations/") == 2


def test_in_a_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = create_store(s3_server.url(s3_server.new_bucket()), probe=False).url
    with Repository.open(url) as repository:
        stat_cache = StatCache(tmp_path / "stat.sqlite")
        for name in "ab":
            root = tmp_path / name
            trees.plain(root, name, files=10)
            (root / "own").write_bytes(trees.noise(name, SIZE))
            (root / "shared").write_bytes(trees.noise("shared", SIZE))
            trees.settle(root)
            with closing(DirectorySource(root, kind="dir", normalise=False)) as source:
                push(repository, source, RefName.parse(name), stat_cache, state=tmp_path / "state")
        stat_cache.close()
        repository.objects.delete(RefName.parse("a").key)
        condemned = collect(repository, grace=DAY)
        assert condemned.condemned_bytes > SIZE
        done = collect(repository, grace=0)
        assert done.freed_bytes >= condemned.condemned_bytes
        assert collect(repository, grace=0).kept == {}
        report = verify(repository, [("b", repository.resolve("b"))], read_data=True, whole=True)
        assert report.problems == []
        with pytest.raises(NotFoundError):
            repository.resolve("a")
