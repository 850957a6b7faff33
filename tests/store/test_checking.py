"""What is garbage and half collected is no damage; what a root keeps is, however little."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.store.catalog import remove_refs
from envstore.store.checking import Reading, check_store
from envstore.store.refs import RefName
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


def test_a_part_of_what_nothing_keeps_may_be_gone(store: Store, tree: Path) -> None:
    store.push(tree)
    (pack,) = store.object_keys("packs/")
    (segment,) = store.object_keys("index/")
    store.path(segment).unlink()  # as a collector does it, before the pack
    store.path(pack).unlink()
    assert not check_store(store.repository).ok
    remove_refs(store.repository, [RefName.parse("tree")])
    assert check_store(store.repository).ok


def test_what_is_wrong_with_what_is_there_is_still_told(store: Store, tree: Path) -> None:
    store.push(tree)
    remove_refs(store.repository, [RefName.parse("tree")])
    (pack,) = store.object_keys("packs/")
    data = bytearray(store.path(pack).read_bytes())
    data[100] ^= 1
    store.path(pack).write_bytes(data)
    found = check_store(store.repository, (), Reading(read_data=True))
    assert any(pack.rpartition("/")[2] in problem.object for problem in found.problems)
