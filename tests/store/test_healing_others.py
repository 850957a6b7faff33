"""What one push stores again heals every tree that had it in damaged packs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, UnavailableError
from envstore.store import packs
from envstore.store.checking import Reading, check_store, keep_list, try_to_keep_list
from envstore.store.config import init_store
from envstore.store.damage import Damage, damaged_packs, note_damage
from envstore.store.digest import digest
from envstore.store.objects import open_objects
from envstore.store.push import PushResult, push
from envstore.store.rebuild import rebuild_index
from envstore.store.refs import RefName
from envstore.store.repair import repair
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from tests.faulty import FaultyStore
from tests.s3server import S3Server
from tests.stores import Store
from tests.trees import describe, noise, plain

pytestmark = pytest.mark.usefixtures("_no_fsync")

_DATA = Reading(read_data=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A ref, and another of a tree that shares most of it and has a pack of its own."""
    monkeypatch.setattr(packs, "TARGET_SIZE", 100_000)
    plain(tmp_path / "one", 1, files=20)
    plain(tmp_path / "two", 1, files=20)
    (tmp_path / "two" / "more").write_bytes(noise("more", 150_000))
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        opened.push(tmp_path / "one", "one")
        opened.push(tmp_path / "two", "two")
        yield opened


def _shared_pack(store: Store) -> Path:
    """Return the pack that holds the most of files of both trees."""
    _, locations = store.repository.located(store.snapshot("one").manifest)
    frames = [locations.frames[at] for at in locations.ref_frames]
    name = max((frame.pack for frame in frames), key=[f.pack for f in frames].count)
    return store.path(packs.pack_key(name))


def _flip(pack: Path) -> bytes:
    data = bytearray(pack.read_bytes())
    for at in range(20, 60_000, 1000):
        data[at] ^= 1
    pack.write_bytes(data)
    return bytes.fromhex(pack.name)


def _found(store: Store) -> None:
    report = check_store(store.repository, reading=_DATA)
    assert not report.ok
    keep_list(store.repository, report)


def test_a_push_of_one_tree_heals_the_other(store: Store, tmp_path: Path) -> None:
    pack = _flip(_shared_pack(store))
    _found(store)
    assert damaged_packs(store.repository.objects) == {pack}
    # Somebody else, who has never pushed from here, has the files in another tree.
    store.forget()
    (tmp_path / "one" / "different").write_bytes(b"so that the packs are others")
    done = store.push(tmp_path / "one", "three")
    assert any("healed" in warning for warning in done.warnings)
    for ref in ("two", "three"):
        store.pull(tmp_path / f"copy {ref}", ref)
    assert describe(tmp_path / "copy two", times=False) == describe(tmp_path / "two", times=False)
    report = check_store(store.repository, reading=_DATA)
    assert report.problems == []
    # Nothing needs the pack any more, and nobody will build on it before it is collected.
    assert report.quarantined == {pack}
    assert damaged_packs(store.repository.objects) == {pack}
    store.path(packs.pack_key(pack)).unlink()
    rebuild_index(store.repository)
    report = check_store(store.repository)
    assert report.ok
    assert keep_list(store.repository, report) == (0, 1)


def test_the_same_tree_is_read_again_though_it_has_not_changed(
    store: Store, tmp_path: Path
) -> None:
    pack = _flip(_shared_pack(store))
    assert store.push(tmp_path / "one", "one").unchanged
    _found(store)
    done = store.push(tmp_path / "one", "one")
    assert done.unchanged
    assert done.uploaded_bytes > 0
    report = check_store(store.repository, reading=_DATA)
    assert report.problems == []
    keep_list(store.repository, report)
    # It may have been overwritten by the very same one, or be left for the collector.
    assert damaged_packs(store.repository.objects) == report.quarantined <= {pack}


def test_a_pack_that_is_overwritten_is_off_the_list_at_once(tmp_path: Path) -> None:
    plain(tmp_path / "tree", 1, files=5)
    with Store(tmp_path / "store") as store:
        store.push(tmp_path / "tree")
        (pack,) = (store.path(key) for key in store.object_keys("packs/"))
        _flip(pack)
        _found(store)
        store.forget()
        store.repository.objects.delete("refs/default/tree/latest")
        done = store.push(tmp_path / "tree")
        assert damaged_packs(store.repository.objects) == frozenset()
        assert any("healed 1 damaged pack by" in line for line in done.warnings)
        assert check_store(store.repository, reading=_DATA).ok


def test_a_push_that_cannot_heal_has_still_succeeded(store: Store, tmp_path: Path) -> None:
    _flip(_shared_pack(store))
    _found(store)
    (tmp_path / "one" / "different").write_bytes(b"x")
    gate = store.faults.fail("list", UnavailableError("gone"), key="locations/")
    done = store.push(tmp_path / "one", "three")
    gate.remove()
    assert any("not healed yet" in warning for warning in done.warnings)
    store.pull(tmp_path / "copy", "three")
    # The next one does it, although it has nothing to store.
    done = store.push(tmp_path / "one", "four")
    assert any("healed" in warning for warning in done.warnings)
    assert check_store(store.repository, reading=_DATA).ok


def test_who_may_only_read_is_told_so(store: Store) -> None:
    _flip(_shared_pack(store))
    report = check_store(store.repository, reading=_DATA)
    store.faults.fail("put_if", AccessDeniedError("you may not"), key="damaged/")
    assert try_to_keep_list(store.repository, report) == (0, 0)
    (warning,) = report.warnings
    assert "you may not" in warning


def test_a_note_that_nothing_is_about_goes(store: Store) -> None:
    note_damage(store.repository.objects, Damage(digest(b"no pack"), "why", 1))
    whole = bytes.fromhex(store.object_keys("packs/")[0].rpartition("/")[2])
    note_damage(store.repository.objects, Damage(whole, "why", 1))
    # Without data, too: what is on the list is always read.
    report = check_store(store.repository)
    assert report.ok
    assert keep_list(store.repository, report) == (0, 2)
    assert damaged_packs(store.repository.objects) == frozenset()


def test_on_a_real_server(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    plain(tmp_path / "tree", 1, files=4)
    objects = open_objects(s3_server.url(s3_server.new_bucket(), "prefix"), create=True)
    config, _ = init_store(objects)
    with Repository(objects, config, None) as repository:

        def push_it(ref: str) -> PushResult:
            with (
                closing(StatCache(tmp_path / f"stat {ref}")) as cache,
                closing(DirectorySource(tmp_path / "tree", kind="dir", normalise=False)) as source,
            ):
                return push(repository, source, RefName.parse(ref), cache)

        push_it("one")
        (info,) = objects.list("packs/")
        data = bytearray(objects.get(info.key))
        data[100] ^= 1
        objects.put(info.key, bytes(data))
        report = check_store(repository, reading=_DATA)
        assert keep_list(repository, report) == (1, 0)
        assert not repair(repository).ok
        (tmp_path / "tree" / "more").write_bytes(noise("more", 1000))
        done = push_it("two")
        assert any("healed" in warning for warning in done.warnings)
        report = check_store(repository, reading=Reading(True, rate=1 << 30))
        assert (report.problems, len(report.quarantined)) == ([], 1)
