"""Scratch directories: what a killed process left is removed, what is in use is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from envstore.resolver.scratch import scratch_directory

_USE = """
import sys
from pathlib import Path
from envstore.resolver.scratch import scratch_directory

with scratch_directory(Path(sys.argv[1])) as path:
    (path / "deep").mkdir()
    (path / "deep" / "file").write_text("x")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_only_what_nobody_uses_is_removed(tmp_path: Path) -> None:
    parent = tmp_path / "archives"
    with subprocess.Popen(
        [sys.executable, "-c", _USE, parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().decode().strip())
        with scratch_directory(parent) as ours:
            assert sorted(parent.iterdir()) == sorted((ours, theirs))
            assert (theirs / "deep/file").exists()
        assert list(parent.iterdir()) == [theirs]
        other.kill()
    with scratch_directory(parent) as ours:
        assert list(parent.iterdir()) == [ours]
    assert list(parent.iterdir()) == []


def test_what_is_nobodys_scratch_stays(tmp_path: Path) -> None:
    (tmp_path / "unpacked-file").touch()
    (tmp_path / "unpacked-link").symlink_to(tmp_path.parent)
    (tmp_path / "archive.whl").touch()
    with scratch_directory(tmp_path):
        pass
    assert len(list(tmp_path.iterdir())) == 3
