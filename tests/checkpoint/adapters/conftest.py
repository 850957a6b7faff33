"""A store that the environment names, as frameworks are told of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores import Store


@pytest.fixture
def store(
    tmp_path: Path, slots_root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Return a store of the test's own, with slots and a cache of its own."""
    with Store(tmp_path / "store") as opened:
        monkeypatch.setenv("ENVSTORE_URL", opened.url)
        yield opened
