"""One object of each kind is damaged in each way: found, named, never served; healed, or told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.checkpoint.protocol import RunStore
from envstore.errors import EnvstoreError
from envstore.store import packs
from envstore.store.canonical import encode_checked
from envstore.store.checking import Reading, check_store
from envstore.store.damage import Damage, note_damage
from envstore.store.digest import digest
from envstore.store.doomed import Condemned, State, put_state, read_state, write_list
from envstore.store.index import DedupIndex
from envstore.store.locks import save_lock
from envstore.store.packages import describe_package, package_key, save_packages
from envstore.store.profiles import Range, new_profile, save_profile
from envstore.store.refs import RefName, move_ref
from envstore.store.repair import advice, repair
from envstore.store.repository import Repository
from envstore.store.samples import build_sample, sample_key
from envstore.store.sessions import Session
from envstore.store.snapshots import save_snapshot
from tests.checkpoint.rankfiles import RUN
from tests.checkpoint.test_protocol import newest, save
from tests.stores import Store
from tests.trees import describe, noise, plain

pytestmark = pytest.mark.usefixtures("_no_fsync")

_DATA = Reading(read_data=True)
_TREES = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trees, and at least two objects of every kind. Returns the directory of all."""
    root = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr(packs, "TARGET_SIZE", 150_000)
        for name, seed in _TREES.items():
            plain(root / name, seed, files=6)
            (root / name / "large").write_bytes(noise(name, 200_000))
        with Store(root / "store") as store:
            for name in _TREES:
                store.push(root / name, name)
                _add_what_belongs_to(store, name)
            _add_what_steers(store)
    return root


def _add_what_belongs_to(store: Store, name: str) -> None:
    """Give a tree a lock, a profile, a stored package, a draft, a lease and a sample."""
    objects = store.repository.objects
    snapshot = store.snapshot(name)
    lock = save_lock(objects, f"the lock of {name}".encode())
    new = save_snapshot(objects, replace(snapshot, lock=lock))
    ref = RefName.parse(f"{name}:locked")
    move_ref(objects, ref, new, None)
    save_profile(objects, snapshot.manifest, "start", new_profile([Range(b"file 0", 0, 9)], [name]))
    index = DedupIndex()
    for key in store.object_keys("index/"):
        index.add_packs(store.repository.segment(bytes.fromhex(key.rpartition("/")[2])))
    entries = list(store.repository.entries(snapshot.manifest))
    package = describe_package(entries, {"name": name}, index)
    save_packages(objects, [(package_key(digest(name.encode()).hex(), "any.1"), package)])
    body = {"format": 1, "path": name, "size": 1, "snapshot": new.hex(), "created": "now"}
    key = f"drafts/default/{name}/latest/{digest(name.encode()).hex()}"
    objects.put(key, encode_checked(body))
    lease = {"format": 1, "snapshot": new.hex(), "holder": name, "until": 1 << 40}
    objects.put(f"leases/{new.hex()}/{'0' * 16}", encode_checked(lease))
    listed = store.object_keys("index/")[-1].rpartition("/")[2]
    segment = bytes.fromhex(listed), store.repository.segment(bytes.fromhex(listed))
    sample_name, data = build_sample([segment]).encode()
    objects.put(sample_key(sample_name), data)


def _add_what_steers(store: Store) -> None:
    """Leave a run's objects, sessions of writers, and what a collector writes down."""
    objects = store.repository.objects
    run = RunStore(store.repository, RUN)
    for number, name in enumerate(("a", "b"), 1):
        run.open_epoch(name, 2, newest)
        commit = save(run, number, number, world_size=2)
        run.pin(commit, "release")
        lease = {"format": 1, "snapshot": commit.snapshot.hex(), "holder": "x", "until": 1 << 40}
        key = f"runs/team/llm/leases/{commit.checkpoint}/{number:016x}"
        objects.put(key, encode_checked(lease))
        note_damage(objects, Damage(digest(name.encode()), "gone", 1))
        with Session.begin(objects, name) as session:
            data = objects.get(session.key)
        objects.put(session.key, data)
    doomed = [Condemned("packs/00/" + "0" * 64, 1, 1.0)]
    _, version = read_state(objects)
    first, second = write_list(objects, doomed), write_list(objects, doomed * 1)
    put_state(objects, State(epoch=1, condemned=first, deleting=second), version)


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Iterator[Store]:
    """The store of this test."""
    shutil.copytree(template / "store", tmp_path / "store")
    with Store(tmp_path / "store") as opened:
        yield opened


_KINDS = {
    "pack header": "packs/",
    "frame": "packs/",
    "table": "packs/",
    "footer": "packs/",
    "segment": "index/",
    "sample": "samples/",
    "manifest": "manifests/",
    "locations": "locations/",
    "profile": "profiles/",
    "package": "packages/",
    "lock": "locks/",
    "snapshot": "snapshots/",
    "ref": "refs/",
    "claim": "runs/team/llm/epochs/00000001/claim",
    "start": "runs/team/llm/epochs/00000001/start",
    "part": "runs/team/llm/parts/",
    "commit": "runs/team/llm/commits/",
    "pin": "runs/team/llm/pins/",
    "run's lease": "runs/team/llm/leases/",
    "draft": "drafts/",
    "session": "sessions/",
    "state": "gc/state",
    "list": "gc/lists/",
    "lease": "leases/",
    "damaged": "damaged/",
}
_MAY_GO = {
    # Each of these may be removed at any time, by design.
    "sample", "profile", "package", "claim", "start", "part", "commit", "pin", "run's lease",
    "draft", "session", "state", "lease", "damaged", "ref",
}  # fmt: skip
_INTERCHANGEABLE = {
    # Hints, and objects that say nothing of what they are about but by their names.
    "profile", "package", "claim", "start", "pin", "run's lease", "session", "state",
}  # fmt: skip
_HEALED = {
    # By repair alone, from the store itself.
    "pack header", "table", "footer", "segment", "sample", "locations", "profile", "package",
    "damaged", "state", "list",
}  # fmt: skip


def _keys(store: Store, kind: str) -> list[str]:
    """Return an object of a kind, one that a ref leads to where there is such, and another."""
    keys = store.object_keys(_KINDS[kind])
    snapshot = store.snapshot("one")
    _, located = store.repository.located(snapshot.manifest)
    needed = {
        packs.pack_key(located.frames[located.ref_frames[0]].pack),
        f"snapshots/{store.repository.resolve('one').hex()}",
        *(f"{prefix}/{snapshot.manifest.hex()}" for prefix in ("manifests", "locations")),
        f"locks/{(store.snapshot('one:locked').lock or b'').hex()}",
        "refs/default/one/latest",
    }
    return sorted(keys, key=lambda key: key not in needed)


def _places(kind: str, data: bytes) -> list[int]:
    """Return bits to flip in an object."""
    size = 8 * len(data)
    if kind == "pack header":
        return [0, 50]
    if kind == "frame":
        return [8 * 60, 8 * 2000]
    if kind == "table":
        return [size - 8 * 20, size - 8 * 100]
    if kind == "footer":
        return [size - 1, size - 8 * 11]
    return [5, size // 2, size - 2]


def _damages(kind: str, data: bytes, other: bytes | None) -> Iterator[tuple[str, bytes | None]]:
    for bit in _places(kind, data):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield "flipped", bytes(flipped)
    yield "truncated", data[: len(data) // 2]
    yield "truncated", b""
    if kind not in _MAY_GO:
        yield "missing", None
    if other is not None and kind not in _INTERCHANGEABLE:
        yield "swapped", other


def _write(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _assert_never_served(store: Store, template: Path, place: Path) -> None:
    for name in _TREES:
        try:
            store.pull(place / name, name)
        except EnvstoreError:
            continue
        assert describe(place / name, times=False) == describe(template / name, times=False)
        shutil.rmtree(place / name)


@pytest.mark.parametrize("kind", _KINDS)
def test_damage_is_found_named_and_never_served(
    store: Store, template: Path, tmp_path: Path, kind: str
) -> None:
    key, *others = _keys(store, kind)
    path = store.path(key)
    data = path.read_bytes()
    other = store.path(others[0]).read_bytes() if others else None
    for way, damaged in _damages(kind, data, other):
        _write(path, damaged)
        report = check_store(store.repository, reading=_DATA)
        assert not report.ok, way
        # A segment that is gone is named by what it listed.
        names = (
            [key, key.rpartition("/")[2]] if (kind, way) != ("segment", "missing") else ["index/"]
        )
        said = [f"{problem.object} {problem.reason}" for problem in report.problems]
        assert any(name in line for name in names for line in said), (way, said)
        if kind in ("snapshot", "manifest", "locations"):
            assert "one:latest" in {name for one in report.problems for name in one.harms}
        _assert_never_served(store, template, tmp_path / "pulled")
        _write(path, data)
    assert check_store(store.repository, reading=_DATA).ok


@pytest.mark.parametrize("kind", _KINDS)
def test_damage_is_healed_or_said_what_would_heal_it(
    store: Store, template: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = _keys(store, kind)[0]
    path = store.path(key)
    data = path.read_bytes()
    (_, damaged), *_ = _damages(kind, data, None)
    _write(path, damaged)
    # No collector is at work.
    monkeypatch.setattr("envstore.store.resetting.QUIET_SECONDS", 0.0)
    done = repair(store.repository, reading=_DATA)
    if kind in _HEALED:
        assert done.after.problems == []
        return
    assert done.after.problems
    assert all(advice(problem) for problem in done.after.problems)
    # Who has the tree pushes it again, without anything that was remembered here.
    if kind in ("frame", "manifest", "snapshot"):
        if kind == "frame":
            assert {file.path for one in done.after.problems for file in one.files}
        store.forget()
        if kind == "snapshot":
            # Its digest has the time in it: what comes back is another one.
            store.repository.objects.delete(key)
        for name in _TREES:
            store.push(template / name, name)
        report = check_store(store.repository, ["one", "two"], _DATA)
        assert report.problems == []
        _assert_never_served(store, template, tmp_path / "pulled")


@pytest.mark.parametrize("change", ["flip", "cut", "gone"])
def test_without_its_description_nothing_is_read(store: Store, change: str) -> None:
    path = store.path("envstore.json")
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(data[:-5])
    for bit in range(0, 8 * len(data), 7) if change == "flip" else [0]:
        if change == "flip":
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
        with pytest.raises(EnvstoreError, match="envstore"):
            Repository.open(store.url)


def test_a_lost_index_is_found_and_made_anew(store: Store) -> None:
    for key in (*store.object_keys("index/"), *store.object_keys("samples/")):
        store.path(key).unlink()
    (problem,) = check_store(store.repository).problems
    assert problem.object == "index/"
    done = repair(store.repository)
    assert done.after.problems == []
    assert store.object_keys("index/")
