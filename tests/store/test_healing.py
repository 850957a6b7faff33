"""Pushing a tree mends what a damaged store can no longer give, and never claims what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stores import Store
from tests.trees import describe, plain

Damage = Callable[[Path], None]


def _remove(pack: Path) -> None:
    pack.unlink()


def _cut(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes()[:-100])


def _scramble(pack: Path) -> None:
    pack.write_bytes(bytes(byte ^ 0x55 for byte in pack.read_bytes()))


def _packs(store: Store) -> list[Path]:
    return [store.path(key) for key in store.object_keys("packs/")]


@pytest.mark.parametrize("damage", [_remove, _cut])
def test_a_push_to_another_ref_stores_lost_packs_again(tmp_path: Path, damage: Damage) -> None:
    tree = tmp_path / "tree"
    plain(tree, "first")
    with Store(tmp_path / "store") as store:
        store.push(tree)
        (tree / "file 0").write_bytes(b"changed")
        store.push(tree)
        for pack in _packs(store):
            damage(pack)
        for ref in ("second", "third"):
            done = store.push(tree, ref)
            store.pull(tmp_path / ref, ref)
            assert describe(tmp_path / ref, times=False) == describe(tree, times=False)
        assert done.new_chunk_bytes == 0
        # The first ref has the same manifest, so it is mended, too.
        store.pull(tmp_path / "again")
        assert describe(tmp_path / "again", times=False) == describe(tree, times=False)


def test_a_push_onto_a_ref_whose_metadata_is_unreadable(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    plain(tree, "first")
    with Store(tmp_path / "store") as store:
        store.push(tree)
        for pack in _packs(store):
            _scramble(pack)
        store.forget()
        done = store.push(tree)
        assert any("damaged" in warning for warning in done.warnings)
        assert done.new_chunk_bytes >= done.logical_bytes * 0.9
        store.pull(tmp_path / "copy")
        assert describe(tmp_path / "copy", times=False) == describe(tree, times=False)
