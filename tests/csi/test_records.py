"""Records of what is published: in one piece, without secrets, and whatever happens to the disk."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.csi.records import MAX_RECORD, Publication, Records
from envstore.csi.request import Pod, VolumeRequest
from envstore.errors import AccessDeniedError, EnvstoreError

POD = Pod("team-a", "train-0", "0b9ee1d2-6a8c-4d0e-9d5e-0f7b1c2d3e4f", "default")
RECORD = Publication(
    volume="csi-1",
    target="/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/env/mount",
    lease="0123456789abcdef",
    store="main",
    url="s3://envs/prod?endpoint=https://s3.example",
    access="SINGLE_NODE_WRITER",
    readonly=False,
    request=VolumeRequest("main", "team/env:v1", pod=POD, ephemeral=True),
    started="2026-01-01T00:00:00+00:00",
)
FULL = replace(
    RECORD,
    request=VolumeRequest("", "default/x:latest", "a" * 64, "/opt/x", "off", "train"),
    complete=True,
    ending=True,
    digest="b" * 64,
    asked="@" + "b" * 64,
    of="default/x:latest",
    entries=5,
    size=1 << 40,
    fast=True,
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "published"


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("record", [RECORD, FULL])
def test_what_was_saved_is_there_for_the_next_life(place: Path, record: Publication) -> None:
    Records(place).save(record)
    again = Records(place)
    assert again.find(record.target) == record
    assert again.all() == again.of(record.volume) == [record]
    assert again.of("csi-2") == []
    again.remove(record.target)
    assert again.find(record.target) is None
    again.remove(record.target)
    assert names(place) == [] == Records(place).all()


def test_the_last_record_of_a_target_counts(place: Path) -> None:
    records = Records(place)
    records.save(RECORD)
    records.save(replace(RECORD, complete=True))
    records.note(replace(RECORD, digest="c" * 64))
    assert records.all() == [replace(RECORD, digest="c" * 64)]
    assert Records(place).all() == [replace(RECORD, complete=True)]


def test_only_the_owner_can_look(place: Path) -> None:
    place.mkdir(parents=True, mode=0o755)
    Records(place).save(RECORD)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (path,) = place.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_any_target_makes_a_file_in_the_directory(place: Path) -> None:
    targets = ["/a/b", "/a\nb", "/" + "long/" * 800 + "x", "/ü/☃/'\"", "/a\udc80b"]
    records = Records(place)
    for target in targets:
        records.save(replace(RECORD, target=target))
    assert len(names(place)) == len(targets)
    assert {record.target for record in Records(place).all()} == set(targets)


GOOD = RECORD.encode()


def changed(**values: object) -> bytes:
    return json.dumps({**json.loads(GOOD), **values}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4096,
        b"\xff\xfe",
        GOOD[: len(GOOD) // 2],
        GOOD + b"x",
        b"[]",
        b"{}",
        b"[" * 50_000,
        b'"' + b"x" * MAX_RECORD + b'"',
        changed(format=2),
        changed(volume=7),
        changed(complete="yes"),
        changed(entries=True),
        changed(lease="0123456789ABCDEF"),
        changed(lease="../../etc/passwd"),
        changed(target="/another"),
        changed(attributes=[]),
        changed(attributes=None),
        changed(attributes={"ref": "../../x"}),
        changed(attributes={"ref": "x", "url": "s3://mine"}),
        changed(pod="me"),
        changed(pod={"name": "train-0"}),
    ],
)
def test_a_damaged_record_is_set_aside(
    place: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(RECORD, target="/other")
    records = Records(place)
    records.save(RECORD)
    (path,) = place.iterdir()
    records.save(other)
    path.write_bytes(data)
    again = Records(place)
    assert again.all() == [other]
    assert path.with_suffix(".damaged").read_bytes() == data
    assert "setting aside the damaged record" in caplog.text
    again.save(RECORD)
    assert Records(place).find(RECORD.target) == RECORD


@given(st.binary() | st.integers(0, len(GOOD) * 8 - 1))
def test_whatever_is_in_a_file_it_is_a_record_or_refused(data: bytes | int) -> None:
    if isinstance(data, int):
        flipped = bytearray(GOOD)
        flipped[data // 8] ^= 1 << data % 8
        data = bytes(flipped)
    try:
        found = Publication.decode(data)
    except (ValueError, RecursionError):
        return
    assert Publication.decode(found.encode()) == found


def test_set_aside_is_not_kept_for_ever(place: Path) -> None:
    Records(place)
    for number in range(20):
        (place / f"{number:032x}.json").write_bytes(b"damaged")
    assert Records(place).all() == []
    assert len(names(place)) == 16


def test_other_files_are_left_alone_and_unfinished_ones_are_not(place: Path) -> None:
    records = Records(place)
    records.save(RECORD)
    (place / ("0" * 32 + ".tmp")).write_bytes(b"half")
    (place / "notes").write_text("mine")
    assert Records(place).all() == [RECORD]
    assert [name for name in names(place) if not name.endswith(".json")] == ["notes"]


def test_a_link_is_not_followed(place: Path, tmp_path: Path) -> None:
    Records(place).save(RECORD)
    (path,) = place.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert Records(place).all() == []
    assert names(place) == [path.with_suffix(".damaged").name]


def test_a_full_or_forbidden_disk_is_said_so_and_nothing_changes(place: Path) -> None:
    records = Records(place)
    records.save(RECORD)
    (path,) = place.iterdir()
    (path.with_suffix(".tmp")).mkdir()
    with pytest.raises(EnvstoreError, match="cannot keep records"):
        records.save(replace(RECORD, complete=True))
    assert records.find(RECORD.target) == RECORD
    (path.with_suffix(".tmp")).rmdir()
    assert Records(place).all() == [RECORD]
    if os.geteuid():
        place.chmod(0o500)
        with pytest.raises(AccessDeniedError):
            records.save(RECORD)


def test_a_directory_that_somebody_removes_keeps_nothing_from_ending_or_beginning(
    place: Path,
) -> None:
    records = Records(place)
    records.save(RECORD)
    shutil.rmtree(place.parent)
    records.remove(RECORD.target)
    assert records.find(RECORD.target) is None
    records.save(FULL)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert Records(place).all() == [FULL]
