from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.checkpoint.adapters.directory import DirectoryRun, restore_dir, save_dir
from envstore.checkpoint.errors import FencedError, NoCheckpointError
from envstore.checkpoint.policies import last
from envstore.errors import NotFoundError, UsageError
from envstore.store.source import ChangedError
from tests.stores import Store

# Saves when it is too late, which is when nothing has waited for a save.
ENDING = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from envstore.checkpoint.adapters.background import BackgroundSaves
from envstore.checkpoint.adapters.directory import DirectoryRun

class Late(DirectoryRun):
    def save(self, *given, **options):
        while True:
            try:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(int)
            except RuntimeError:
                return super().save(*given, **options)

saves = BackgroundSaves(Late("team/llm"))
saves.submit(3, Path(sys.argv[1]))
"""


def write(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def read(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_directory_comes_back(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=os.urandom(100_000), empty=b"")
    write(tree / "below", optimizer=b"state")
    commit = save_dir("team/llm", 10, tree, metrics={"loss": 0.5})
    assert (commit.step, commit.world_size, commit.metrics) == (10, 1, {"loss": 0.5})
    assert restore_dir(tmp_path / "back", "team/llm") == 10
    assert read(tmp_path / "back") == read(tree)
    # It is an ordinary checkpoint: known by refs, pulled like any other tree.
    assert store.snapshot("team/llm:step-10").kind == "checkpoint"
    store.pull(tmp_path / "pulled", "team/llm:latest")
    assert read(tmp_path / "pulled") == read(tree)
    store.assert_sound()


def test_steps_are_found_and_missing_ones_named(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=b"1")
    assert restore_dir(tmp_path / "back", "team/llm") is None
    assert not (tmp_path / "back").exists()
    with DirectoryRun(f"{store.url}#team/llm") as run:
        assert run.latest() is None
        for step in (10, 20):
            (tree / "model").write_bytes(str(step).encode())
            run.save(step, tree)
        assert run.latest() == 20
    assert restore_dir(tmp_path / "back", "team/llm", 10) == 10
    assert (tmp_path / "back" / "model").read_bytes() == b"10"
    with pytest.raises(NoCheckpointError, match="step 30"):
        restore_dir(tmp_path / "other", "team/llm", 30)
    with pytest.raises(UsageError, match="not empty"):
        restore_dir(tmp_path / "back", "team/llm")
    (tmp_path / "back" / "half").touch()
    assert restore_dir(tmp_path / "back", "team/llm", overwrite=True) == 20
    assert read(tmp_path / "back") == {"model": b"20"}
    assert sorted(path.name for path in tmp_path.iterdir() if "envstore" in path.name) == []


def test_bad_input(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such path"):
        save_dir("team/llm", 1, tmp_path / "none")
    with pytest.raises(UsageError, match="not a step"):
        save_dir("team/llm", -1, tmp_path)
    with pytest.raises(UsageError, match="name of a run"):
        save_dir("team/llm:tag", 1, tmp_path)
    tree = write(tmp_path / "out", model=b"1")
    with DirectoryRun("team/llm") as run:
        with pytest.raises(ChangedError):
            run.save(1, tree, settled=lambda: False)
        assert run.latest() is None


def test_the_same_tree_is_not_committed_twice(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=b"1")
    first = save_dir("team/llm", 1, tree)
    assert save_dir("team/llm", 1, tree) == first
    (tree / "model").write_bytes(b"2")
    second = save_dir("team/llm", 1, tree)
    assert (second.checkpoint.attempt, first.checkpoint.attempt) == (1, 0)
    assert restore_dir(tmp_path / "back", "team/llm", 1) == 1
    assert (tmp_path / "back" / "model").read_bytes() == b"2"


def test_retention(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=b"1")
    with DirectoryRun("team/llm", keep=last(2)) as run:
        for step in range(4):
            (tree / "model").write_bytes(bytes([step]))
            run.save(step, tree)
        assert [commit.step for commit in run.run.commits()] == [2, 3]


def test_a_job_that_starts_again_from_an_earlier_step(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=b"1")
    with DirectoryRun("team/llm") as old, DirectoryRun("team/llm") as new:
        old.begin(None)
        for step in (10, 20):
            (tree / "model").write_bytes(bytes([step]))
            old.save(step, tree)
        new.begin(10)
        assert new.latest() == 10
        with pytest.raises(FencedError):
            old.save(30, write(tmp_path / "zombie", model=b"z"))
        (tree / "model").write_bytes(b"new")
        new.save(15, tree)
        assert new.latest() == 15
        with pytest.raises(NoCheckpointError):
            new.begin(20)


def test_the_users_own_store_is_made(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENVSTORE_URL")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    save_dir("team/llm", 1, write(tmp_path / "out", model=b"1"))
    assert restore_dir(tmp_path / "back", "team/llm") == 1
    assert (tmp_path / "home" / ".local" / "share" / "envstore" / "store").is_dir()


def test_a_program_that_does_not_wait_is_told_what_it_loses(store: Store, tmp_path: Path) -> None:
    tree = write(tmp_path / "out", model=b"1")
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(tree)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert "1 checkpoints of team/llm were not saved" in done.stderr
    with DirectoryRun("team/llm") as run:
        assert run.latest() is None
