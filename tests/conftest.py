"""Settings for every test: none may see, or touch, the user's own store, cache or credentials."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
from hypothesis import settings

from tests.channel.fixtures import (
    broken_channel,
    conda_channel,
    numpy_channel,
    real_index,
    wheel_index,
)
from tests.faulty import FaultyStore
from tests.s3server import s3_server
from tests.stores import Store

__all__ = [
    "broken_channel",
    "conda_channel",
    "numpy_channel",
    "real_index",
    "s3_server",
    "wheel_index",
]

# A shared machine may stall for longer than any deadline; `timeout` still bounds a whole test.
settings.register_profile("envstore", deadline=None, print_blob=True)
settings.load_profile("envstore")


@pytest.fixture(scope="session", autouse=True)
def _ordinary_signals() -> None:
    # Under nohup, and behind a shell's &, some are ignored, and so they would be in every process
    # that a test starts.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _descriptions_are_read_once() -> Iterator[None]:
    # What S3 is takes longer to parse than most tests of it take.
    with pytest.MonkeyPatch.context() as patch:
        loader = functools.cache(botocore.session.create_loader)
        patch.setattr(botocore.session, "create_loader", loader)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("ENVSTORE_", "AWS_")):
                patch.delenv(name)
        # A node server of this machine would serve their mounts.
        patch.setenv("ENVSTORE_NODE_SOCKET", str(home / "node.sock"))
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("AWS_CONFIG_FILE", str(home / "aws-config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "aws-credentials"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: for tests that are not about power failures."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a store of the test's own, whose objects can be made to fail."""
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        yield opened
