"""The tests' channels as fixtures, each made when a test first asks for it."""

from __future__ import annotations

import pytest

from tests.channel.conda import Channel, build_channel


@pytest.fixture(scope="session")
def conda_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """Python and everything small (see ``content.RECIPES``), nothing that must be fetched."""
    return build_channel(tmp_path_factory.mktemp("conda") / "channel")


@pytest.fixture(scope="session")
def numpy_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """Python with numpy, click, six, python-dateutil and tzdata made of real wheels."""
    names = ["numpy", "click", "six", "python-dateutil", "tzdata", "hello-pkg", "binprefix"]
    return build_channel(tmp_path_factory.mktemp("conda") / "numpy channel", names)


__all__ = ["conda_channel", "numpy_channel"]
