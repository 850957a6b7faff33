from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnavailableError, UsageError
from envstore.store.entries import NORMAL_MTIME_NS
from tests import trees
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


def _holes(path: Path | str) -> bool:
    st = os.stat(path)
    return st.st_blocks * 512 < st.st_size


def test_every_byte_mode_time_and_link_comes_back(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    trees.fill(tree)
    pushed = store.push(tree)
    result = store.pull(copy)
    assert trees.describe(copy) == trees.describe(tree)
    assert (result.files, result.logical_bytes) == (pushed.files, pushed.logical_bytes)
    for name in ("only a hole", "holes", "hole first", "dense zeros"):
        assert _holes(copy / "sparse" / name)


def test_a_normalised_tree_has_plain_modes_and_one_time(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    trees.fill(tree)
    store.push(tree, kind="env", normalise=True)
    store.pull(copy)
    left, right = trees.describe(tree), trees.describe(copy)
    assert set(left) == set(right)
    for path in set(right) - {b"."}:
        old, new = left[path], right[path]
        assert (new.kind, new.size, new.digest, new.target) == (
            old.kind, old.size, old.digest, old.target,
        )  # fmt: skip
        assert (new.mtime_ns, new.names) == (NORMAL_MTIME_NS, ())
        if new.kind == "directory":
            assert new.mode == 0o755
        elif new.kind == "file":
            assert new.mode == (0o755 if old.mode & 0o111 else 0o644)


def test_more_than_four_gigabytes(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    tree.mkdir()
    with open(tree / "huge", "wb") as file:
        file.truncate(trees.HUGE_SIZE)
        for at, data in {
            0: b"start",
            (4 << 30) + 3: b"beyond",
            trees.HUGE_SIZE - 7: b"the end",
        }.items():
            file.seek(at)
            file.write(data)
    pushed = store.push(tree)
    assert pushed.logical_bytes == trees.HUGE_SIZE
    assert pushed.stored_bytes < 1 << 20
    store.pull(copy)
    assert _holes(copy / "huge")
    with open(tree / "huge", "rb") as old, open(copy / "huge", "rb") as new:
        assert os.fstat(new.fileno()).st_size == trees.HUGE_SIZE
        at = 0
        while True:
            # Compare wherever either of them holds data.
            starts = []
            for file in (old, new):
                try:
                    starts.append(os.lseek(file.fileno(), at, os.SEEK_DATA))
                except OSError:
                    continue
            if not starts:
                break
            at = min(starts)
            piece = os.pread(old.fileno(), 1 << 20, at)
            assert os.pread(new.fileno(), 1 << 20, at) == piece
            at += len(piece)


def test_an_empty_tree(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    store.push(tmp_path / "tree")
    store.pull(tmp_path / "copy")
    assert trees.describe(tmp_path / "copy") == trees.describe(tmp_path / "tree")


def test_one_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(trees.noise(1, 300_000))
    store.push(tmp_path / "model.bin")
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.bin").read_bytes() == trees.noise(1, 300_000)
    assert os.listdir(tmp_path / "copy") == ["model.bin"]


def test_few_and_large_requests(store: Store, tmp_path: Path) -> None:
    trees.plain(tmp_path / "tree", 1, files=600, size=40_000)
    store.push(tmp_path / "tree")
    result = store.pull(tmp_path / "copy")
    assert result.requests <= 12
    assert result.fetched_bytes < 1.1 * sum(
        path.stat().st_size for path in (store.root / "objects" / "packs").rglob("*")
        if path.is_file()
    )  # fmt: skip


# Destinations.


@pytest.fixture
def small(store: Store, tmp_path: Path) -> Store:
    trees.plain(tmp_path / "tree", "small", files=12)
    store.push(tmp_path / "tree")
    return store


def test_into_an_empty_directory(small: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    before = copy.stat().st_ino
    small.pull(copy)
    assert trees.describe(copy) == trees.describe(tmp_path / "tree")
    # The directory itself stays: it may be a mount point, or somebody's working directory.
    assert copy.stat().st_ino == before


def test_into_the_working_directory(
    small: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    small.pull(Path("."))
    assert trees.describe(Path(".")) == trees.describe(tmp_path / "tree")


def test_into_a_very_long_name(small: Store, tmp_path: Path) -> None:
    small.pull(tmp_path / ("x" * 255))
    assert trees.describe(tmp_path / ("x" * 255)) == trees.describe(tmp_path / "tree")


@pytest.mark.parametrize("what", ["file", "full directory", "symlink", "dangling", "no parent"])
def test_destinations_in_use_are_left_alone(small: Store, tmp_path: Path, what: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    target = place / "target"
    if what == "file":
        target.write_text("mine")
    elif what == "full directory":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif what == "symlink":
        (place / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    elif what == "dangling":
        target.symlink_to("nowhere")
    else:
        target = place / "no" / "parent"
    before = trees.describe(place)
    with pytest.raises(UsageError, match=str(target if what != "no parent" else place / "no")):
        small.pull(target)
    assert trees.describe(place) == before


def _break_pack(store: Store) -> None:
    for key in store.object_keys("packs/"):
        path = store.path(key)
        data = bytearray(path.read_bytes())
        data[20] ^= 0xFF
        path.write_bytes(data)


def _lose_packs(store: Store) -> None:
    for key in store.object_keys("packs/"):
        store.path(key).unlink()


def _lose_locations(store: Store) -> None:
    for key in store.object_keys("locations/"):
        store.path(key).unlink()


def _cut_the_wire(store: Store) -> None:
    # The first range holds the manifest's parts.
    store.faults.fail("get_range", UnavailableError("gone"), skip=1)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_break_pack, CorruptError),
        (_lose_packs, NotFoundError),
        (_lose_locations, NotFoundError),
        (_cut_the_wire, UnavailableError),
    ],
)
def test_a_failed_pull_leaves_no_trace(
    small: Store,
    tmp_path: Path,
    damage: Callable[[Store], None],
    error: type[EnvstoreError],
    existing: bool,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        (place / "copy").mkdir()
    before = trees.describe(place, times=False)
    damage(small)
    with pytest.raises(error):
        small.pull(place / "copy")
    assert trees.describe(place, times=False) == before
    assert set(os.listdir(tmp_path)) == {"place", "store", "tree"}


def test_a_write_that_fails_is_told_and_leaves_no_trace(small: Store, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    code = """
import resource, signal, sys
from pathlib import Path
from envstore.errors import EnvstoreError
from envstore.store.pull import pull
from envstore.store.repository import Repository

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with Repository.open(sys.argv[1]) as repository:
    try:
        pull(repository, repository.resolve("tree"), Path(sys.argv[2]))
    except EnvstoreError as error:
        sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, small.url, str(place / "copy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"cannot write {place}/copy: File too large" in done.stderr
    assert os.listdir(place) == []
