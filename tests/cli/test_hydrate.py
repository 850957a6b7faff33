"""``hydrate``: as typed, interrupted, dropped, and what the command line says of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import Cli, Process
from tests.trees import describe, noise

MIB = 1 << 20
NOTHING: dict[str, list[str]] = {"hydrated": [], "unfinished": []}


@pytest.fixture(scope="module")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cli = Cli(tmp_path_factory.mktemp("large") / "cli")
    tree = cli.root / "large tree"
    tree.mkdir()
    for number in range(24):
        (tree / f"{number}").write_bytes(noise(number, 2 * MIB))
    cli.ok("init")
    cli.ok("push", "large", tree, "--kind", "dir")
    return cli.store


@pytest.fixture
def large(cli: Cli, _large: Path) -> Cli:
    """A store with a tree called ``large`` of 24 files and 48 MiB."""
    shutil.copytree(_large, cli.store)
    return cli


def files(cli: Cli) -> list[Path]:
    return list((cli.home / ".cache/envstore/files").glob("*/*"))


def wait_for_files(cli: Cli, process: Process) -> None:
    while len(files(cli)) < 3:
        assert process.poll() is None
        time.sleep(0.01)


def test_hydrate_list_and_drop(stored: Cli) -> None:
    assert stored.json("hydrate", "--list") == NOTHING
    done = stored.json("hydrate", "tree")
    shown = stored.json("show", "tree")
    assert done["ref"] == "tree"
    assert done["digest"] == shown["digest"]
    assert done["files"] == done["missing_files"] == len(files(stored)) > 0
    assert done["bytes"] == done["missing_bytes"]
    assert done["requests"] > 0
    assert Path(done["directory"]).is_dir()
    (listed,) = stored.json("hydrate", "--list")["hydrated"]
    assert listed["digest"] == done["digest"]
    text = stored.ok("hydrate", "--list").splitlines()
    assert text[0].split() == ["REF", "DIGEST", "FILES", "SIZE", "SINCE"]
    assert f"@{done['digest'][:12]}" in text[1]
    assert stored.json("hydrate", "tree")["missing_files"] == 0
    assert stored.json("cache", "show")["pinned_bytes"] > 0
    stored.ok("cache", "clear")
    assert len(files(stored)) == done["files"]
    short = f"@{done['digest'][:12]}"
    assert stored.json("hydrate", short, "--drop") == {"digest": done["digest"], "dropped": True}
    assert stored.json("cache", "show")["pinned_bytes"] == 0
    stored.fails(1, "hydrate", short, "--drop", says=["is not hydrated"])
    stored.ok("cache", "clear")
    assert files(stored) == []


def test_dropping_needs_no_store(stored: Cli) -> None:
    digest = stored.json("hydrate", "tree")["digest"]
    (stored.store).rename(stored.root / "away")
    assert "dropped" in stored.ok("hydrate", f"@{digest[:8]}", "--drop")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount overlayfs")
def test_a_hydrated_mount_keeps_its_files(stored: Cli, tree: Path) -> None:
    digest = stored.json("hydrate", "tree")["digest"]
    place = stored.root / "place"
    place.mkdir()
    (stored.store).rename(stored.root / "away")
    made = stored.json("mount", f"@{digest[:12]}", place, "--fast-path", "on")
    try:
        assert made["digest"] == digest
        stored.fails(2, "hydrate", f"@{digest[:12]}", "--drop", says=["is mounted", str(place)])
        stored.ok("cache", "clear")
        assert describe(place, times=False, modes=False) == describe(tree, times=False, modes=False)
    finally:
        stored.ok("umount", place)
    stored.ok("hydrate", f"@{digest[:12]}", "--drop")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "REF is missing"),
        (("--list", "tree"), "takes no REF"),
        (("tree", "--drop", "--rate", "5M"), "by themselves"),
        (("--list", "--background"), "by themselves"),
        (("tree", "--rate", "fast"), "not a size"),
        (("tree", "--rate", "0"), "never end"),
        (("tree!",), "not a valid ref"),
    ],
)
def test_wrong_usage(stored: Cli, arguments: tuple[str, ...], says: str) -> None:
    stored.fails(2, "hydrate", *arguments, says=[says])


def test_a_ref_that_is_not_there(stored: Cli) -> None:
    stored.fails(1, "hydrate", "nothing", says=["nothing"])
    assert stored.json("hydrate", "--list") == NOTHING


def test_a_cache_that_is_too_small(large: Cli) -> None:
    large.fails(
        1, "hydrate", "large", "--cache-size", "40M", says=["capped", "ENVSTORE_CACHE_SIZE"]
    )
    assert files(large) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_goes_on(large: Cli, number: signal.Signals) -> None:
    with large.start("hydrate", "large", "--rate", "6M", stderr=subprocess.PIPE) as process:
        wait_for_files(large, process)
        process.send_signal(number)
        process.wait(30)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert large.json("hydrate", "--list")["hydrated"] == []
    done = large.json("hydrate", "large")
    assert done["files"] == 24
    assert 0 < done["missing_files"] < 24
    contents = {path.read_bytes() for path in files(large)}
    assert contents == {noise(number, 2 * MIB) for number in range(24)}
    partial = large.home / ".cache/envstore/partial"
    large.ok("cache", "clear")
    assert os.listdir(partial) == []
    assert len(files(large)) == 24


def test_in_the_background(large: Cli) -> None:
    digest = large.json("show", "large")["digest"]
    started = large.json("hydrate", "large", "--background", "--rate", "24M")
    assert started["digest"] == digest
    listed = large.json("hydrate", "--list")
    while not listed["hydrated"]:
        assert Path(f"/proc/{started['pid']}").exists(), Path(started["log"]).read_text()
        time.sleep(0.1)
        listed = large.json("hydrate", "--list")
    assert listed["unfinished"] == []
    assert listed["hydrated"][0]["ref"] == "large"
    assert len(files(large)) == 24
    large.ok("hydrate", "large", "--drop")
    assert not Path(started["log"]).exists()


def test_only_one_at_a_time(large: Cli) -> None:
    with large.start("hydrate", "large", "--rate", "6M") as process:
        wait_for_files(large, process)
        process.send_signal(signal.SIGSTOP)  # on its way for as long as this takes
        listed = large.json("hydrate", "--list")["unfinished"]
        assert [item["running"] for item in listed] == [True]
        assert "is on its way" in large("hydrate", "--list").err
        for more in ((), ("--background",), ("--drop",)):
            large.fails(1, "hydrate", "large", *more, says=["another process"])
        process.kill()
        process.wait()
    assert "is not whole" in large("hydrate", "--list").err
    large.ok("hydrate", "large", "--drop")
    assert large.json("hydrate", "--list") == NOTHING


def test_it_steps_back(large: Cli) -> None:
    with large.start("hydrate", "large", "--rate", "4M") as process:
        stat = Path(f"/proc/{process.pid}/stat")
        while int(stat.read_text().rpartition(") ")[2].split()[16]) != min(19, os.nice(0) + 10):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()


def test_summary(stored: Cli) -> None:
    said = stored("hydrate", "tree")
    assert said.status == 0
    assert re.search(r"hydrated tree @[0-9a-f]{12}: \d+ files, ", said.out + said.err)
