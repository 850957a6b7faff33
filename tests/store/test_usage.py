from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import CorruptError, NotFoundError
from envstore.store.locations import NOWHERE, locations_key
from envstore.store.refs import RefName
from envstore.store.usage import measure
from tests import trees
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

_A, _B, _C = (RefName.parse(name) for name in "abc")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def _write(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def test_sizes_of_one_ref(store: Store, tmp_path: Path) -> None:
    noise, prose = trees.noise(1, 300_000), trees.prose(1, 300_000)
    tree = _write(tmp_path / "a", noise=noise, again=noise, prose=prose, empty=b"")
    with open(tree / "sparse", "wb") as file:
        file.truncate(5 << 20)
    pushed = store.push(tree, "a")
    found = measure(store.repository, [_A])
    usage = found.refs[_A]
    assert usage.logical == 900_000 + (5 << 20) == pushed.logical_bytes
    assert usage.unique == 600_000  # neither the copy nor the hole
    assert 300_000 < usage.stored < 500_000
    assert usage.exclusive == usage.stored
    assert found.total == usage
    assert found.objects == len(store.object_keys())
    assert found.object_bytes == sum(store.path(key).stat().st_size for key in store.object_keys())
    assert usage.stored < found.object_bytes < usage.stored + 20_000


def test_shared_bytes_are_counted_once_in_total(store: Store, tmp_path: Path) -> None:
    shared, own_a, own_b = (trees.noise(i, 200_000) for i in range(3))
    store.push(_write(tmp_path / "a", shared=shared, own=own_a), "a")
    store.push(_write(tmp_path / "b", shared=shared, own=own_b), "b")
    found = measure(store.repository, [_A, _B])
    for name in (_A, _B):
        assert found.refs[name].logical == found.refs[name].unique == 400_000
        assert found.refs[name].stored == 400_000
        assert found.refs[name].exclusive == 200_000
    assert found.total.logical == 800_000
    assert found.total.unique == found.total.stored == 600_000


def test_two_names_of_one_tree_share_everything(store: Store, tmp_path: Path) -> None:
    tree = _write(tmp_path / "a", x=trees.noise(1, 100_000))
    store.push(tree, "a")
    store.push(tree, "c")
    found = measure(store.repository, [_A, _C])
    assert [found.refs[name].exclusive for name in (_A, _C)] == [0, 0]
    assert found.total.logical == 200_000
    assert found.total.stored == 100_000


def test_nothing_measured(store: Store) -> None:
    found = measure(store.repository, [])
    assert (found.total.logical, found.total.stored, found.objects) == (0, 0, 1)


def test_an_unknown_ref(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no ref a:latest"):
        measure(store.repository, [_A])


def test_locations_that_lead_nowhere(store: Store, tmp_path: Path) -> None:
    store.push(_write(tmp_path / "a", x=trees.noise(1, 100_000)), "a")
    manifest = store.snapshot("a").manifest
    _, locations = store.repository.located(manifest)
    for i in range(len(locations.ref_frames)):
        locations.ref_frames[i] = NOWHERE
    store.repository.objects.put(locations_key(manifest), locations.seal())
    with pytest.raises(CorruptError, match="nowhere"):
        measure(store.repository, [_A])
