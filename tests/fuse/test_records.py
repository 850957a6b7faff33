"""Records of mounts, and who lives behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError
from envstore.fuse import mountinfo
from envstore.fuse.mount import active_mounts, check_mountpoint, unmount
from envstore.fuse.mountinfo import find_mount, list_mounts, resolve
from envstore.fuse.records import MountRecord, RecordFiles, list_records
from envstore.fuse.stats import read_stats

REPOSITORY = Path(__file__).parent.parent.parent

_HOLDER = """
import sys
from envstore.fuse.records import RecordFiles
files = RecordFiles(sys.argv[1])
files.prepare()
assert files.acquire() is not None
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def record(place: str, files: RecordFiles) -> MountRecord:
    return MountRecord(
        mountpoint=place,
        name="demo",
        snapshot="00" * 32,
        manifest="11" * 32,
        holder_pid=os.getpid(),
        store="file:///nowhere",
        started="2025-01-01T00:00:00+00:00",
        log=str(files.log),
        stats=str(files.stats),
        control=str(files.control),
    )


def held_by_another(place: str) -> subprocess.Popen[bytes]:
    """Return a process that holds the lock of a mount point until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_record_comes_back_as_it_was() -> None:
    files = RecordFiles("/some/place")
    files.prepare()
    assert files.load() is None
    ours = record("/some/place", files)
    files.save(ours)
    assert files.load() == ours
    files.save(replace(ours, name="other"))
    assert list(list_records()) == [(replace(ours, name="other"), False)]
    files.clear()
    files.clear()
    assert list(list_records()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"mountpoint": 1}', '{"mountpoint": "/x"}'])
def test_a_broken_record_is_as_good_as_none(text: str) -> None:
    files = RecordFiles("/x")
    files.prepare()
    files.record.write_text(text)
    assert files.load() is None
    assert list(list_records()) == []


def test_one_server_at_a_time() -> None:
    files = RecordFiles("/some/place")
    assert not files.alive()
    files.prepare()
    lock = files.acquire()
    assert lock is not None
    assert files.alive()
    assert files.acquire() is None
    os.close(lock)
    assert not files.alive()
    files.wait()


def test_a_killed_server_is_known_to_be_dead() -> None:
    files = RecordFiles("/some/place")
    with held_by_another("/some/place") as holder:
        assert files.alive()
        assert files.acquire() is None
        holder.kill()
        files.wait()
        assert not files.alive()
        lock = files.acquire()
        assert lock is not None
        os.close(lock)


def test_records_of_mounts_that_are_gone_are_forgotten() -> None:
    files = RecordFiles("/some/place")
    files.prepare()
    files.save(record("/some/place", files))
    with held_by_another("/some/place") as holder:
        assert [(found.mountpoint, alive) for found, alive in active_mounts()] == [
            ("/some/place", True)
        ]
        holder.kill()
        files.wait()
        assert active_mounts() == []
    assert files.load() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_for_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o500)
    with pytest.raises(AccessDeniedError, match="XDG_STATE_HOME"):
        RecordFiles("/x").prepare()


def test_a_file_in_the_way_of_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(EnvstoreError, match="XDG_STATE_HOME"):
        RecordFiles("/x").prepare()


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no mount server"):
        read_stats(tmp_path / "none.sock")
    with pytest.raises(NotFoundError, match="no mount server"):
        read_stats(tmp_path / "no directory" / "none.sock")


def test_names_of_mounts_are_read_back() -> None:
    line = b"42 27 0:39 / /a\\040b\\134c\\011\xff ro shared:1 - fuse.envstore envstore:x\\012y ro"
    found = mountinfo._parse(line)
    assert found.mountpoint == os.fsdecode(b"/a b\\c\t\xff")
    assert (found.device, found.type, found.source) == ("0:39", "fuse.envstore", "envstore:x\ny")


def test_what_is_mounted_here() -> None:
    root = find_mount("/")
    assert root is not None
    assert root in list_mounts()
    assert find_mount("/no/such/place") is None


def test_mount_points_are_found_behind_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert check_mountpoint(tmp_path / "link") == resolve(tmp_path / "real")


def test_only_our_own_mounts_are_unmounted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of envstore"):
        unmount("/proc")
    with pytest.raises(NotFoundError, match="nothing is mounted"):
        unmount(tmp_path)
