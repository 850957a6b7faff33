"""``stats``: what a mount has done, for people and as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Cli


@pytest.fixture
def place(stored: Cli) -> Iterator[Path]:
    found = stored.root / "a place"
    found.mkdir()
    stored.ok("mount", "tree", found)
    yield found
    stored.ok("umount", found)


def test_what_was_read_is_shown(stored: Cli, place: Path) -> None:
    before = stored.json("stats", place)
    size = len((place / "lib" / "deep" / "data").read_bytes())
    after = stored.json("stats", place)
    assert (after["mountpoint"], after["ref"]) == (str(place), "tree")
    assert after["bytes_read"] - before["bytes_read"] == size
    assert after["fetched"]["frames"] > 0
    text = stored.ok("stats", place)
    for said in ("mount", "tree on", "read", "cache", "fetched", "frame", "store"):
        assert said in text
    assert "errors" not in text


def test_it_is_shown_again_and_again(stored: Cli, place: Path) -> None:
    with stored.start("--json", "stats", "--watch", "0.1", place, stdout=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        for _ in range(3):
            assert json.loads(shown.stdout.readline())["ref"] == "tree"
        shown.send_signal(signal.SIGINT)
        shown.stdout.read()
    assert shown.returncode == 130


def test_of_what_is_no_mount_nothing_is_shown(stored: Cli, tmp_path: Path) -> None:
    stored.fails(1, "stats", tmp_path, says=[str(tmp_path), "no mount of yours"])
    stored.fails(2, "stats", says=["DIR"])
    stored.fails(2, "stats", "--watch", "0", tmp_path)
    assert os.path.isdir(tmp_path)
