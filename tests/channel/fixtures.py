"""The tests' channels as fixtures, each made when a test first asks for it."""

from __future__ import annotations

import pytest

from tests.channel.broken import build_broken
from tests.channel.conda import Channel, build_channel
from tests.channel.pypi import Index, build_index
from tests.channel.wheelhouse import locked_names


@pytest.fixture(scope="session")
def conda_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """Python and everything small (see ``content.RECIPES``), nothing that must be fetched."""
    return build_channel(tmp_path_factory.mktemp("conda") / "channel")


@pytest.fixture(scope="session")
def numpy_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """Python with numpy, click, six, python-dateutil and tzdata made of real wheels."""
    names = ["numpy", "click", "six", "python-dateutil", "tzdata", "hello-pkg", "binprefix"]
    return build_channel(tmp_path_factory.mktemp("conda") / "numpy channel", names)


@pytest.fixture(scope="session")
def broken_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """Packages that must be refused, see ``broken.NAMES``."""
    folder = tmp_path_factory.mktemp("broken")
    return build_broken(folder / "channel", folder / "scratch")


@pytest.fixture(scope="session")
def wheel_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The small distributions of ``pypi``, made in a moment; serve it with ``serving``."""
    return build_index(tmp_path_factory.mktemp("index") / "small")


@pytest.fixture(scope="session")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The small ones and the real wheels of wheels.lock, which may have to be fetched."""
    return build_index(tmp_path_factory.mktemp("index") / "real", real=locked_names())


__all__ = ["broken_channel", "conda_channel", "numpy_channel", "real_index", "wheel_index"]
