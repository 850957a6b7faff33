from __future__ import annotations

import os
from pathlib import Path

import pytest

from envstore.fuse.places import place_of

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("analysis", "analysis-"),
        ("analysis:latest", "analysis-"),
        ("team/train:2026-11", "team+train+2026-11-"),
        ("@0123", ""),
    ],
)
def test_a_name_that_may_be_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert place_of(name, DIGEST) == tmp_path / "envstore/envs" / f"{label}0123456789ab"


def test_without_a_directory_of_ones_own_it_is_below_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "data/envstore/envs/a-0123456789ab"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for wrong in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", wrong)
        assert place_of("a", DIGEST) == expected
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    assert place_of("a", DIGEST) == expected
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of("a", DIGEST) == tmp_path / ".local/share/envstore/envs/a-0123456789ab"
