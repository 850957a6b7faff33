"""Fixtures for the tests of the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import trees
from tests.faulty import FaultyStore
from tests.stores import Store


@pytest.fixture
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: for tests that are not about power failures."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An everyday tree that was written a while ago."""
    root = tmp_path / "tree"
    trees.plain(root, "tree")
    (root / "large").write_bytes(trees.noise("large", 9 << 20))
    trees.settle(root)
    return root
