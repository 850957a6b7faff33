from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.store.catalog import remove_refs, tag
from envstore.store.checking import check_store
from envstore.store.refs import RefName
from envstore.store.witness import Witness
from tests.stores import Store
from tests.trees import plain

pytestmark = pytest.mark.usefixtures("_no_fsync")

_REF = RefName.parse("tree")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A ref that has moved twice, and a machine that has seen it."""
    plain(tmp_path / "tree", 1, files=2)
    with Store(tmp_path / "store") as opened:
        opened.repository.witness = Witness(tmp_path / "state" / "refs")
        for text in ("one", "two"):
            (tmp_path / "tree" / "text").write_text(text)
            opened.push(tmp_path / "tree")
        yield opened


def _elsewhere(store: Store) -> Witness:
    """Go on as on another machine, which remembers nothing; returns this one's memory."""
    witness = store.repository.witness
    assert witness is not None
    store.repository.witness = None
    return witness


def _verdict(store: Store) -> tuple[list[str], list[str]]:
    report = check_store(store.repository)
    return [problem.reason for problem in report.problems], report.warnings


def test_a_ref_that_is_put_back_is_named(store: Store, tmp_path: Path) -> None:
    path = store.path(_REF.key)
    second = path.read_bytes()
    (tmp_path / "tree" / "text").write_text("three")
    store.push(tmp_path / "tree")
    assert _verdict(store) == ([], [])
    third = path.read_bytes()
    path.write_bytes(second)
    for _ in range(2):
        ((reason,), warnings) = _verdict(store)
        assert "went back" in reason
        assert "move 3" in reason
        assert "move 2" in reason
        assert warnings == []
    path.write_bytes(third)
    assert _verdict(store) == ([], [])


def test_what_was_only_seen_counts_too(store: Store, tmp_path: Path) -> None:
    witness = _elsewhere(store)
    (tmp_path / "tree" / "text").write_text("three")
    store.push(tmp_path / "tree", "other")
    before = store.path("refs/default/other/latest").read_bytes()
    (tmp_path / "tree" / "text").write_text("four")
    store.push(tmp_path / "tree", "other")
    store.repository.witness = witness
    assert _verdict(store) == ([], [])
    store.path("refs/default/other/latest").write_bytes(before)
    assert len(_verdict(store)[0]) == 1


def test_another_history_of_the_same_length(store: Store, tmp_path: Path) -> None:
    path = store.path(_REF.key)
    ours = path.read_bytes()
    witness = _elsewhere(store)
    store.repository.objects.delete(_REF.key)
    for text in ("x", "y"):
        (tmp_path / "tree" / "text").write_text(text)
        store.push(tmp_path / "tree")
    theirs = path.read_bytes()
    path.write_bytes(ours)
    store.repository.witness = witness
    assert _verdict(store) == ([], [])
    path.write_bytes(theirs)
    reasons, warnings = _verdict(store)
    # A ref that was made later may well have been removed between.
    assert len(reasons) + len(warnings) == 1


def test_a_ref_that_vanishes_is_told_of_once(store: Store) -> None:
    store.path(_REF.key).unlink()
    reasons, (warning,) = _verdict(store)
    assert reasons == []
    assert "tree:latest" in warning
    assert "move 2" in warning
    assert _verdict(store) == ([], [])


def test_what_was_removed_and_moved_from_here_is_no_news(store: Store, tmp_path: Path) -> None:
    tag(store.repository, "tree", RefName.parse("other"))
    remove_refs(store.repository, [_REF])
    assert _verdict(store) == ([], [])
    # Made anew, it begins at 1.
    (tmp_path / "tree" / "text").write_text("new")
    store.push(tmp_path / "tree")
    assert _verdict(store) == ([], [])
    store.path("refs/default/other/latest").unlink()
    assert len(_verdict(store)[1]) == 1


def test_a_damaged_ref_has_not_vanished(store: Store) -> None:
    path = store.path(_REF.key)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    (reasons, warnings) = _verdict(store)
    assert len(reasons) == 1
    assert warnings == []
    path.write_bytes(good)
    assert _verdict(store) == ([], [])


def test_a_memory_that_is_lost_or_cannot_be_kept(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = tmp_path / "state" / "refs"
    for rubbish in (b"", b"{", b"[]", b'{"format":1,"refs":{"refs/default/tree/latest":[1]}}'):
        memory.write_bytes(rubbish)
        assert _verdict(store) == ([], [])
    store.repository.witness = Witness(tmp_path / "tree" / "file 0" / "refs")
    (tmp_path / "tree" / "text").write_text("more")
    with caplog.at_level(logging.WARNING):
        store.push(tmp_path / "tree")
    assert "cannot remember refs" in caplog.text
