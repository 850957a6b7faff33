"""A driver, a node server and a store for a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.csi.driving import FILES, Site
from tests.fuse.lives import ROOT, lived


@pytest.fixture(scope="module")
def node_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node server and a store with ``default/env``, and no driver yet."""
    if not ROOT:
        pytest.skip("a node server takes root")
    base = tmp_path_factory.mktemp("csi")
    with pytest.MonkeyPatch.context() as patch, lived(base, patch, Site) as site:
        site.add("env", FILES)
        site.mount()
        yield site


@pytest.fixture(scope="module")
def driven(node_site: Site) -> Site:
    """The same with a driver, which tests may restart."""
    node_site.start()
    return node_site


@pytest.fixture
def site(driven: Site) -> Iterator[Site]:
    """A driver that answers. A test leaves nothing published, or what it leaves is seen."""
    assert driven.driver is not None
    if driven.driver.poll() is not None:
        driven.start()
    yield driven
    assert driven.remains() == []
