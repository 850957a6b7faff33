"""Every target over its corpus, and over some inputs changed at random, always the same."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.harness import CORPUS, load_targets

_RUNS = 120
_TARGETS = sorted(load_targets())
_MOST_CORPUS = 300 << 10


@cache
def _results() -> dict[str, Any]:
    """Run all targets in one process, whose limits are its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.short", str(_RUNS)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=280,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", _TARGETS)
def test_nothing_but_errors_comes_of_hostile_input(name: str) -> None:
    found = _results()[name]
    assert found["executions"] >= _RUNS
    assert not found["findings"]


def test_the_corpus_is_small_and_of_targets_there_are() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(_TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < _MOST_CORPUS


def test_a_finding_is_told_kept_and_can_be_repeated(tmp_path: Path) -> None:
    broken = tmp_path / "tests" / "fuzz" / "targets" / "broken.py"
    copy = tmp_path / "tests" / "fuzz"
    copy.mkdir(parents=True)
    for path in Path(__file__).parent.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    broken.parent.mkdir()
    broken.write_text(
        "from __future__ import annotations\n"
        "from tests.fuzz.harness import target\n"
        "@target('broken', lambda: [b'seed'])\n"
        "def broken(data: bytes) -> None:\n"
        "    {b'seed': 1}[data]\n"
    )
    fuzz = [sys.executable, "-m", "tests.fuzz", "--target", "broken", "--work", "work"]
    run = [*fuzz, "--engine", "own", "--time", "1"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "KeyError" in done.stdout
    (kept,) = (tmp_path / "work/broken/found").glob("crash-*")
    assert f"--repeat {kept.relative_to(tmp_path)}" in done.stdout
    again = [*fuzz[:-2], "--repeat", str(kept)]
    repeated = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert repeated.returncode == 1
    assert "KeyError" in repeated.stdout
