"""The model of commits and collections holds in every order of its steps, and without any one of
its rules it does not.

By default the small scenes are explored whole, and the large ones only as far as a mutation of
them is found out. ``ENVSTORE_TEST_MODEL=full`` explores them all: half an hour and 6 GB.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("protocol.pml")
FULL = os.environ.get("ENVSTORE_TEST_MODEL") == "full"
_MEGABYTES = 8000 if FULL else 1500

SMALL = (1, 5, 7, 9)
LARGE = (2, 3, 4, 6, 8, 10)

# By mutation the scene in which it is found out soonest.
MUTATIONS = {
    "AGE_ONLY": 1,
    "NO_FRESH_MARK": 1,
    "MARK_FIRST": 1,
    "NO_CLAIM": 1,
    "LATE_SESSION": 1,
    "NO_REREAD": 1,
    "NO_DECLARE": 1,
    "NO_EPOCHS": 1,
    "NO_CAS": 1,
    "REUSE_DOOMED": 1,
    "FENCE_DROPS": 1,
    "BLIND_LOCATIONS": 1,
    "END_UNCLEAR": 1,
    "NO_TAKEOVER": 1,
    "NO_FENCE": 1,
    "UNDECLARED_PACKS": 7,
    "UNSEEN": 9,
    "LATE_DELETE": 6,
}
# What these leave undone is not lost but never freed.
_GARBAGE = {"NO_TAKEOVER", "NO_FENCE"}


def _explore(program: Path, place: Path, scene: int, mutation: int = 0) -> str:
    """Explore ``scene`` until something is wrong or there is nothing new; returns what was said.

    Fails the test if it had to stop before that.
    """
    env = {"PATH": os.environ["PATH"], "MUTATION": str(mutation), "SCENE": str(scene)}
    said = _run(place, str(program), "-m400000", "-w22", "-n", env=env)
    for words in ("out of memory", "max search depth", "Search not completed"):
        assert words not in said or "errors: 1" in said, said
    return said


def _run(place: Path, *argv: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (argv, done.stdout[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model, compiled."""
    place = tmp_path_factory.mktemp("model")
    _run(place, "spin", "-a", str(MODEL))
    flags = ("-O2", "-w", f"-DMEMLIM={_MEGABYTES}", "-DVECTORSZ=512", "-DCOLLAPSE")
    _run(place, "gcc", *flags, "-o", "pan", "pan.c")
    return place / "pan"


def _number(mutation: str) -> int:
    found = re.search(rf"^#define {mutation} (\d+)", MODEL.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("scene", (*SMALL, *LARGE) if FULL else SMALL)
@pytest.mark.timeout(7200 if FULL else 300)
def test_nothing_is_lost_and_garbage_goes(program: Path, tmp_path: Path, scene: int) -> None:
    said = _explore(program, tmp_path, scene)
    assert "errors: 0" in said, said
    states = re.search(r"(\d+) states, stored", said)
    assert states is not None
    assert int(states[1]) > 10_000, said


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_a_rule_something_goes_wrong(program: Path, tmp_path: Path, mutation: str) -> None:
    said = _explore(program, tmp_path, MUTATIONS[mutation], _number(mutation))
    assert "errors: 1" in said, said
    assert "assertion violated" in said, said
    assert ("there==live" in said) == (mutation in _GARBAGE), said
