from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.store import frames, packs, rebuild
from envstore.store.digest import digest
from envstore.store.index import encode_segment, segment_key
from envstore.store.rebuild import rebuild_index
from envstore.store.repository import Repository
from envstore.store.samples import build_sample, open_sample, sample_key
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A dozen packs, of several pushes."""
    monkeypatch.setattr(frames, "TARGET_SIZE", 50_000)
    monkeypatch.setattr(packs, "TARGET_SIZE", 50_000)
    with Store(tmp_path / "store") as opened:
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir()
            for number in range(4):
                (tmp_path / name / f"{number}").write_bytes(noise(f"{name}{number}", 60_000))
            opened.push(tmp_path / name, name)
        yield opened


def _listed(store: Store) -> set[bytes]:
    names = (bytes.fromhex(key.rpartition("/")[2]) for key in store.object_keys("index/"))
    return {pack.digest for name in names for pack in store.repository.segment(name)}


def _packs(store: Store) -> set[bytes]:
    return {bytes.fromhex(key.rpartition("/")[2]) for key in store.object_keys("packs/")}


def test_all_of_it_from_packs_alone(store: Store, tmp_path: Path) -> None:
    before = _listed(store)
    for key in store.object_keys("index/"):
        store.path(key).unlink()
    steps: list[tuple[int, int]] = []
    done = rebuild_index(store.repository, progress=lambda *step: steps.append(step))
    assert done.packs == len(before) == steps[-1][0] == steps[-1][1] > 8
    assert len(done.stored) == 2, "eight packs each at most"
    assert _listed(store) == before
    store.assert_sound()
    # What is there is found again by whoever pushes it.
    store.forget()
    assert store.push(tmp_path / "a", "again").new_chunk_bytes == 0
    assert rebuild_index(store.repository).stored == []


def test_only_what_is_damaged_is_replaced(store: Store) -> None:
    one, *others = store.object_keys("index/")
    store.path(one).write_bytes(b"ESINDX01")
    lie = store.repository.segment(bytes.fromhex(others[0].rpartition("/")[2]))
    name, data = encode_segment([packs.Pack(lie[0].digest, lie[0].size, lie[-1].frames)])
    store.repository.objects.put(segment_key(name), data)
    done = rebuild_index(store.repository)
    assert segment_key(name) in done.removed
    assert set(store.object_keys("index/")) >= set(others)
    assert _listed(store) == _packs(store)
    assert store.verify().ok


def test_damaged_packs_are_not_listed(store: Store) -> None:
    for key in store.object_keys("index/"):
        store.path(key).unlink()
    cut, known, *_ = sorted(_packs(store))
    path = store.path(packs.pack_key(cut))
    path.write_bytes(path.read_bytes()[:-3])
    done = rebuild_index(store.repository, {known})
    assert set(done.unreadable) == {cut}
    assert _listed(store) == _packs(store) - {cut, known}


def test_samples_are_made_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "RECENT", 2)
    keys = store.object_keys("index/")
    segments = [bytes.fromhex(key.rpartition("/")[2]) for key in keys]
    rows = [(name, store.repository.segment(name)) for name in segments]
    name, data = build_sample(rows).encode()
    store.repository.objects.put(sample_key(name), data[:-1])
    done = rebuild_index(store.repository)
    # It says what the damaged one said, and has its name.
    assert done.stored == [sample_key(name)]
    (key,) = store.object_keys("samples/")
    found = open_sample(store.path(key).read_bytes(), name)
    assert set(found.segments) == set(segments)
    assert rebuild_index(store.repository).stored == []


def test_what_the_cache_has_does_not_hide_damage(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(noise("x", 60_000))
    with Store(tmp_path / "store", cache=True) as store:
        store.push(tmp_path / "tree")
        (key,) = store.object_keys("index/")
        store.repository.segment(bytes.fromhex(key.rpartition("/")[2]))
        store.path(key).write_bytes(digest(b""))
        assert rebuild_index(store.repository).stored == [key]
        plain = Repository(store.repository.objects, store.repository.config, None)
        assert plain.segment(bytes.fromhex(key.rpartition("/")[2]))
