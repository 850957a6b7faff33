"""Pulls of trees that hold their own prefix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.store.pull import pull
from tests.relocating import RelocatingSource, compare, sample
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def snapshot(store: Store) -> bytes:
    return store.push(RelocatingSource(sample()), "tree").snapshot


def test_a_tree_is_made_for_the_directory_that_it_is_written_to(
    store: Store, snapshot: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path: made for path, made in sample().items() if made.package != "short-0.1"}
    name = store.push(RelocatingSource(files, "fits"), "fits").snapshot
    monkeypatch.chdir(tmp_path)
    pull(store.repository, name, Path("here/../copy"))
    compare(files, tmp_path / "copy", bytes(tmp_path / "copy"))


@pytest.mark.parametrize("length", [13, 18, 80])
def test_a_tree_is_made_for_where_it_is_said_to_go(
    store: Store, snapshot: bytes, tmp_path: Path, length: int
) -> None:
    prefix = b"/mnt/".ljust(length, b"e")
    (tmp_path / "copy").mkdir()
    pull(store.repository, snapshot, tmp_path / "copy", prefix=prefix)
    compare(sample(), tmp_path / "copy", prefix)


def test_what_has_no_room_is_named_before_anything_is_written(
    store: Store, snapshot: bytes, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"short-0\.1 has room for 80 only \(in lib/libshort\.so"):
        pull(store.repository, snapshot, tmp_path / "copy", prefix=b"/" + b"l" * 80)
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


def test_texts_have_room_for_any_path(store: Store, tmp_path: Path) -> None:
    files = {path: made for path, made in sample().items() if made.mode != 2}
    name = store.push(RelocatingSource(files), "texts").snapshot
    prefix = b"/with blank/" + b"x" * 900
    pull(store.repository, name, tmp_path / "copy", prefix=prefix)
    compare(files, tmp_path / "copy", prefix)


@pytest.mark.parametrize("prefix", [b"relative", b"/two\nlines", b"/ends/", b"/" + b"x" * 4095])
def test_what_is_no_prefix_is_refused(
    store: Store, snapshot: bytes, tmp_path: Path, prefix: bytes
) -> None:
    with pytest.raises(UsageError, match="prefix"):
        pull(store.repository, snapshot, tmp_path / "copy", prefix=prefix)
    assert not (tmp_path / "copy").exists()


def test_a_package_that_says_nothing_of_itself_is_no_obstacle(store: Store, tmp_path: Path) -> None:
    files = {path: replace(made, package="") for path, made in sample().items()}
    name = store.push(RelocatingSource(files), "tree").snapshot
    with pytest.raises(UsageError, match="a package has room for 80"):
        pull(store.repository, name, tmp_path / "copy", prefix=b"/" + b"l" * 80)
