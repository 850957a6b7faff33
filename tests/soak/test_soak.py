"""The soak rig for half a minute, and that it leaves nothing behind when it is told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3server import find_weed
from tests.soak.template import REPOSITORY

SECONDS = float(os.environ.get("ENVSTORE_TEST_SOAK_SECONDS", "20"))

pytestmark = [
    pytest.mark.skipif(find_weed() is None, reason="needs weed"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    # Not pytest's own directory: a Unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/var/tmp") as directory:
        yield Path(directory)


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", f"--dir={place}", "--json", "--seed=7", *words],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left_behind(place: Path) -> list[str]:
    """Return what still is of a run in ``place``: processes, mounts, files."""
    found = [str(path) for path in place.iterdir()]
    found += [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f" {place}/" in line
    ]
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.fsencode(place) + b"/" in Path(f"/proc/{name}/environ").read_bytes():
                found.append(f"process {name}: {Path(f'/proc/{name}/cmdline').read_bytes()!r}")
    return found


@pytest.mark.timeout(400)
def test_nothing_acknowledged_is_lost_and_garbage_does_not_stay(place: Path) -> None:
    process = start(place, f"--seconds={SECONDS}", "--workers=4", "--kill-every=1")
    try:
        out, err = process.communicate(timeout=380)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        raise
    assert out, err
    said = json.loads(out)
    assert said["failures"] == [], (said, err)
    assert process.returncode == 0, err
    assert (said["damaged"], said["lost"], said["problems"]) == (0, 0, 0)
    # On however slow a machine: something of each kind was tried.
    assert said["kills"] + said["stops"] > 0
    assert said["snapshots_checked"] > 0
    assert said["counts"]["push: done"] > 0
    assert said["counts"]["gc: done"] > 0
    assert left_behind(place) == []


def test_a_run_that_is_interrupted_leaves_nothing(place: Path) -> None:
    process = start(place, "--seconds=600", "--workers=4")
    end = time.monotonic() + 60
    while not any(" -> 0" in log.read_text() for log in place.glob("*/rig.log")):
        assert time.monotonic() < end, "no command has ended"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_behind(place) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for name spaces of its own")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_not_even_a_killed_rig_leaves_processes_or_mounts(place: Path) -> None:
    process = start(place, "--seconds=600", "--workers=4")
    end = time.monotonic() + 60
    while not any(" mount " in log.read_text() for log in place.glob("*/rig.log")):
        assert time.monotonic() < end, "nothing was mounted"
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    while any(str(place) not in what[:100] for what in left_behind(place)):
        assert time.monotonic() < end, left_behind(place)
        time.sleep(0.05)
