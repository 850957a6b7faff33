from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError, UnavailableError
from envstore.store import packs
from envstore.store.digest import digest
from envstore.store.frames import encode_frame
from envstore.store.index import encode_segment
from envstore.store.packs import FOOTER_SIZE
from envstore.store.samples import build_sample, sample_key
from envstore.store.verify import Report, verify
from tests import trees
from tests.faulty import FaultyStore
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Two refs of one tree, a third of another that shares some of it; several packs."""
    monkeypatch.setattr(packs, "TARGET_SIZE", 150_000)
    trees.plain(tmp_path / "tree", 1, files=20)
    trees.plain(tmp_path / "other", 1, files=20)
    (tmp_path / "other" / "more").write_bytes(trees.noise("more", 200_000))
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        opened.push(tmp_path / "tree", "one")
        opened.push(tmp_path / "other", "two")
        opened.push(tmp_path / "tree", "team/three")
        name, packs_listed = (
            bytes.fromhex(opened.object_keys("index/")[0].rpartition("/")[2]),
            opened.repository.segment(
                bytes.fromhex(opened.object_keys("index/")[0].rpartition("/")[2])
            ),
        )
        sample_name, data = build_sample([(name, packs_listed)]).encode()
        opened.repository.objects.put(sample_key(sample_name), data)
        assert len(opened.object_keys("packs/")) > 3
        yield opened


@contextmanager
def _damaged(store: Store, key: str, change: Callable[[bytes], bytes | None]) -> Iterator[None]:
    path = store.path(key)
    data = path.read_bytes()
    new = change(data)
    if new is None:
        path.unlink()
    else:
        path.write_bytes(new)
    yield
    path.write_bytes(data)


def _flip(at: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = at % len(data)
        return data[:place] + bytes((data[place] ^ 0x01,)) + data[place + 1 :]

    return change


def _changes(size: int, seed: str) -> list[Callable[[bytes], bytes | None]]:
    rng = random.Random(seed)
    # 6 and 7 make another format version of most objects' first bytes.
    places = [0, 6, 7, 8, 12, -1, -FOOTER_SIZE, *(rng.randrange(size) for _ in range(4))]
    return [
        *(_flip(at) for at in places),
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda _: b"",
        lambda _: None,
    ]


def _named(report: Report, key: str) -> bool:
    name = key.rpartition("/")[2]
    return any(name in problem.object or name in problem.reason for problem in report.problems)


def test_a_sound_store(store: Store) -> None:
    for read_data in (False, True):
        report = store.verify(read_data=read_data)
        assert report.problems == []
        assert report.ok
        assert report.snapshots == len({snapshot for _, snapshot in store.targets()}) >= 2
        assert report.packs == len(store.object_keys("packs/"))
        assert report.frames >= report.packs
        assert report.chunks >= report.frames
    assert report.bytes_read == sum(
        store.path(key).stat().st_size for key in store.object_keys("packs/")
    )


def test_without_data_little_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.store.examining.TAIL", 4096)
    report = store.verify(read_data=False)
    assert report.ok
    assert report.bytes_read < 0.5 * store.verify().bytes_read


@pytest.mark.parametrize("kind", ["packs", "manifests", "locations", "snapshots"])
def test_every_damage_is_found_named_and_its_victims_too(store: Store, kind: str) -> None:
    for key in store.object_keys(f"{kind}/"):
        size = store.path(key).stat().st_size
        for change in _changes(size, key):
            with _damaged(store, key, change):
                report = store.verify(whole=False)
            assert not report.ok
            assert _named(report, key)
            assert all(problem.harms for problem in report.problems)
            assert all(problem.reason for problem in report.problems)
    assert store.verify().ok


@pytest.mark.parametrize("kind", ["index", "samples"])
def test_damage_to_the_index_is_found(store: Store, kind: str) -> None:
    for key in store.object_keys(f"{kind}/"):
        for change in _changes(store.path(key).stat().st_size, key)[:-1]:
            with _damaged(store, key, change):
                for read_data in (False, True):
                    report = store.verify(read_data=read_data)
                    assert [problem.object for problem in report.problems] == [key]
                # It harms no ref.
                assert store.verify(whole=False).ok


def test_the_victims_of_a_pack_are_those_that_use_it(store: Store, tmp_path: Path) -> None:
    trees.plain(tmp_path / "alone", 2, files=4)
    before = set(store.object_keys("packs/"))
    store.push(tmp_path / "alone", "alone")
    (own, *_) = set(store.object_keys("packs/")) - before
    with _damaged(store, own, lambda _: None):
        report = store.verify()
    assert {problem.harms for problem in report.problems} == {("alone:latest",)}
    with _damaged(store, sorted(before)[0], _flip(100)):
        report = store.verify()
    harmed = {name for problem in report.problems for name in problem.harms}
    assert harmed
    assert "alone:latest" not in harmed


def test_a_damaged_snapshot_harms_every_ref_that_names_it(store: Store, tmp_path: Path) -> None:
    store.push(tmp_path / "tree", "one")
    objects = store.repository.objects
    name = store.repository.resolve("one").hex()
    key = f"snapshots/{name}"
    targets = [("a", bytes.fromhex(name)), ("b", bytes.fromhex(name))]
    with _damaged(store, key, _flip(20)):
        report = verify(store.repository, targets)
    (problem,) = report.problems
    assert problem.harms == ("a", "b")
    assert problem.object == f"snapshot {name}"
    assert objects.size(key)


def test_frames_that_were_lost_are_counted_and_the_others_are_not(store: Store) -> None:
    key = max(store.object_keys("packs/"), key=lambda key: store.path(key).stat().st_size)
    pack = packs.parse_pack(store.path(key).read_bytes(), bytes.fromhex(key.rpartition("/")[2]))
    # A flip in the middle of the first frame's bytes.
    with _damaged(store, key, _flip(len(packs.HEADER) + pack.frames[0].stored // 2)):
        report = store.verify()
    reasons = [problem.reason for problem in report.problems if key[-64:] in problem.object]
    (lost,) = reasons
    assert lost.startswith("frame ")
    assert pack.frames[0].digest.hex() in lost


def test_a_pack_in_anothers_place(store: Store) -> None:
    one, two = store.object_keys("packs/")[:2]
    with _damaged(store, one, lambda _: store.path(two).read_bytes()):
        report = store.verify(read_data=False)
        assert _named(report, one)
        assert _named(store.verify(), one)


def test_packs_that_only_the_index_lists_are_checked(store: Store, tmp_path: Path) -> None:
    trees.plain(tmp_path / "gone", 3, files=4)
    before = set(store.object_keys("packs/"))
    store.push(tmp_path / "gone", "gone")
    (own, *_) = set(store.object_keys("packs/")) - before
    store.repository.objects.delete("refs/default/gone/latest")
    assert store.verify().ok
    for change in (_flip(30), _flip(-1), lambda _: None):
        with _damaged(store, own, change):
            assert _named(store.verify(), own)
            assert store.verify(whole=False).ok
    with _damaged(store, own, lambda _: None):
        assert _named(store.verify(read_data=False), own)


def test_an_index_that_lists_what_a_pack_does_not_hold(store: Store) -> None:
    # Right names, right checksums, and a lie: what a push would then rely on is not there.
    name = bytes.fromhex(store.object_keys("index/")[0].rpartition("/")[2])
    listed = store.repository.segment(name)
    frame = replace(listed[0].frames[0], digest=digest(b"other"))
    wrong = replace(listed[0], frames=(frame, *listed[0].frames[1:]))
    segment, data = encode_segment([wrong])
    store.repository.objects.put(f"index/{segment.hex()}", data)
    (problem,) = store.verify(read_data=False).problems
    assert problem.object == f"index/{segment.hex()}"
    assert listed[0].digest.hex() in problem.reason


def test_locations_that_lead_into_the_middle_of_chunks(store: Store) -> None:
    manifest = store.snapshot("one").manifest
    _, locations = store.repository.located(manifest)
    locations.ref_offsets[3] += 1
    store.repository.objects.put(f"locations/{manifest.hex()}", locations.seal())
    for read_data in (False, True):
        (problem,) = store.verify(read_data=read_data).problems
        assert problem.object == f"locations of manifest {manifest.hex()}"
        assert problem.harms == ("one:latest", "team/three:latest")
        assert problem.lost == len(problem.files) == 1


def test_a_pack_that_names_its_chunks_wrongly(store: Store) -> None:
    data = trees.prose(9, 5000)
    frame, stored = encode_frame([(digest(b"something else"), data), (digest(b"x"), b"x")])
    builder = packs.PackBuilder()
    builder.add(replace(frame, digest=digest(data + b"x")), stored)
    finished = builder.finish()
    assert finished is not None
    pack, whole = finished
    store.repository.objects.put(packs.pack_key(pack.digest), whole)
    name, segment = encode_segment([pack])
    store.repository.objects.put(f"index/{name.hex()}", segment)
    assert store.verify(read_data=False).ok
    (problem,) = store.verify().problems
    assert problem.object == f"pack {pack.digest.hex()}"
    assert digest(b"something else").hex() in problem.reason


def test_what_is_cached_does_not_hide_damage(tmp_path: Path) -> None:
    trees.plain(tmp_path / "tree", 1, files=5)
    with Store(tmp_path / "cached", cache=True) as store:
        store.push(tmp_path / "tree")
        store.pull(tmp_path / "copy")
        for kind in ("snapshots", "index", "packs"):
            (key,) = store.object_keys(f"{kind}/")
            store.repository.snapshot(store.repository.resolve("tree"))
            with _damaged(store, key, _flip(30)):
                assert _named(store.verify(), key)


@pytest.mark.parametrize("error", [UnavailableError("gone"), AccessDeniedError("no")])
def test_a_store_that_cannot_be_read_is_not_called_damaged(
    store: Store, error: EnvstoreError
) -> None:
    objects = store.repository.objects
    assert isinstance(objects, FaultyStore)
    for key in ("snapshots/", "manifests/", "locations/", "packs/", "index/"):
        fault = objects.fail("*", error, key=key)
        with pytest.raises(type(error)):
            store.verify()
        fault.remove()


def test_an_unknown_snapshot(store: Store) -> None:
    name = digest(b"nothing")
    report = verify(store.repository, [("x", name)])
    (problem,) = report.problems
    assert problem.object == f"snapshot {name.hex()}"
    assert problem.harms == ("x",)


def test_progress_reaches_its_total(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    verify(store.repository, store.targets(), progress=lambda *step: seen.append(step))
    total = len(seen) - 1
    assert seen == [(i, total) for i in range(total + 1)]
    assert total > 3
