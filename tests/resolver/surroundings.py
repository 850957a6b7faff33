"""What tests of the resolver run in: no settings, credentials or caches of whoever runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.resolver.lock import Lock
from envstore.resolver.request import CondaRequest, PypiRequest, Request


@pytest.fixture(scope="module", autouse=True)
def _no_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("resolver-home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("UV_", "CONDA_", "RATTLER_", "NETRC")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("UV_CACHE_DIR", str(home / "uv"))
        patch.setenv("UV_NO_CONFIG", "1")
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resolver-cache")


def conda(*specs: str, channels: tuple[str, ...]) -> Request:
    return Request(conda=CondaRequest(specs, channels))


def pip(*lines: str, index: str = "", links: tuple[str, ...] = ()) -> PypiRequest:
    """Return requirements that are met from one index, or from directories alone."""
    return PypiRequest(lines, default_index=index, find_links=links, no_index=not index)


def versions(lock: Lock) -> dict[str, str]:
    """Return the versions in a lock by name; the local interpreter is ``python``."""
    return {getattr(package, "name", "python"): package.version for package in lock.packages}
