"""Fixtures for the tests of the store."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: for tests that are not about power failures."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
