"""Fixtures for the tests of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An everyday tree that was written a while ago."""
    root = tmp_path / "tree"
    trees.plain(root, "tree")
    (root / "large").write_bytes(trees.noise("large", 9 << 20))
    trees.settle(root)
    return root
