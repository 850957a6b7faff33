"""``profile`` and ``repack``: recording a command's reads, and what becomes of the recording."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from envstore.cli.profile import profile as command
from envstore.store.profiles import DEFAULT_NAME
from tests.commands import Cli, one_line
from tests.trees import noise

MIB = 1 << 20


@pytest.fixture
def started(cli: Cli, tmp_path: Path) -> Cli:
    """A store with a tree of twelve files of 1.5 MiB as ``tree``."""
    tree = tmp_path / "large"
    tree.mkdir()
    for number in range(12):
        (tree / f"{number:02}").write_bytes(noise(number, 3 * MIB // 2))
    cli.ok("init")
    cli.ok("push", "tree", tree, "--kind", "dir")
    return cli


def _heads(*names: str) -> list[str]:
    """Return a command that reads the first bytes of files of the mount."""
    script = "; ".join(f"head -c 1000 {name} > /dev/null" for name in names)
    return ["sh", "-c", f"cd $ENVSTORE_PREFIX; {script}"]


def _listed(cli: Cli) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in cli.json("profile", "tree", "--list")["profiles"]}


def _paths(cli: Cli, name: str = "start") -> list[str]:
    return [row["path"] for row in cli.json("profile", "tree", "--show", name)["read"]]


def test_recorded_shown_and_removed(started: Cli) -> None:
    before = started.json("show", "tree")["digest"]
    assert _listed(started) == {}
    done = started("profile", "tree", "--", *_heads("07", "02", "11"))
    assert (done.status, done.out) == (0, "")
    assert "read 3 files" in done.err
    assert "stored as profile 'start'" in done.err
    assert started.json("show", "tree")["digest"] == before
    assert _paths(started) == ["07", "02", "11"]
    row = _listed(started)["start"]
    assert (row["files"], row["recordings"]) == (3, 1)
    assert row["command"] == _heads("07", "02", "11")
    assert "sh -c cd" in started.ok("profile", "tree", "--list")
    assert "07" in started.ok("profile", "tree", "--show", "start")
    started.ok("profile", "tree", "--name", "train", "--", *_heads("05"))
    assert set(_listed(started)) == {"start", "train"}
    started.ok("profile", "tree", "--remove", "train")
    assert set(_listed(started)) == {"start"}
    started.fails(1, "profile", "tree", "--show", "train", says=["no profile 'train'"])
    started.fails(1, "profile", "tree", "--remove", "train", says=["no profile 'train'"])
    started.ok("verify", "--read-data")


def test_recordings_are_merged_or_replaced(started: Cli) -> None:
    for names in (("01", "02"), ("01", "03")):
        started.ok("profile", "tree", "--", *_heads(*names))
    assert set(_paths(started)) == {"01", "02", "03"}
    assert _listed(started)["start"]["recordings"] == 2
    started.ok("profile", "tree", "--replace", "--", *_heads("09"))
    assert _paths(started) == ["09"]
    assert _listed(started)["start"]["recordings"] == 1


def test_every_first_read_is_seen_whatever_is_cached(started: Cli) -> None:
    for _ in range(2):
        started.ok("profile", "tree", "--replace", "--", *_heads("04", "05"))
        assert _paths(started) == ["04", "05"]


def test_the_status_is_that_of_the_command(started: Cli) -> None:
    failing = ["sh", "-c", "cat $ENVSTORE_PREFIX/03 > /dev/null; exit 7"]
    done = started("profile", "tree", "--", *failing)
    assert (done.status, done.out) == (7, "")
    assert "not stored" in done.err
    assert _listed(started) == {}
    done = started("--json", "profile", "tree", "--keep-failed", "--", *failing)
    assert done.status == 7
    facts = json.loads(done.err)
    assert facts["stored"]
    assert (facts["files"], facts["bytes"], facts["exit_code"]) == (1, 3 * MIB // 2, 7)
    assert facts["frames"] >= 1
    assert _paths(started) == ["03"]
    one_line(done := started("profile", "tree", "--", "no-such-program"), ["no command"])
    assert done.status == 127


def test_what_reads_nothing_is_not_stored(started: Cli) -> None:
    done = started("profile", "tree", "--", "true")
    assert (done.status, done.out) == (0, "")
    assert "nothing was read" in done.err
    assert _listed(started) == {}


def test_one_thing_at_a_time(started: Cli) -> None:
    for arguments in ((), ("--list", "--show", "x"), ("--list", "--", "true")):
        started.fails(2, "profile", "tree", *arguments, says=["one thing"])
    for name in ("none", "a/b", ".."):
        one_line(
            done := started("profile", "tree", "--name", name, "--", "true"), ["profile's name"]
        )
        assert done.status == 2
    started.fails(1, "repack", "tree", says=["no profile"])
    started.fails(1, "repack", "nosuch", says=["no ref"])


def _run(cli: Cli, *names: str) -> dict[str, int]:
    cli.ok("cache", "clear")
    done = cli("run", "--json", "tree", "--", *_heads(*names))
    assert done.status == 0
    fetched = json.loads(done.err)["mount"]["fetched"]
    assert isinstance(fetched, dict)
    return fetched


def test_a_start_that_is_known_takes_fewer_requests(started: Cli) -> None:
    # None of them lie side by side, so nothing but a profile can bring them together.
    names = ["11", "01", "09", "03", "07", "05"]
    unknown = _run(started, *names)
    assert unknown["requests"] >= len(names)
    started.ok("profile", "tree", "--", *_heads(*names))
    done = started.json("repack", "tree")
    assert not done["unchanged"]
    assert done["after"]["requests"] == 1 < done["before"]["requests"]
    known = _run(started, *names)
    assert known["requests"] < unknown["requests"]
    assert known["bytes"] < unknown["bytes"]
    assert "nothing to do" in started.ok("repack", "tree")
    started.ok("verify", "--read-data")


def test_the_default_is_what_mounts_follow() -> None:
    (option,) = [found for found in command.params if found.name == "name"]
    assert option.default == DEFAULT_NAME


def test_what_is_mounted_on_top_inherits(started: Cli, tmp_path: Path) -> None:
    started.ok("profile", "tree", "--", *_heads("02", "08"))
    (tmp_path / "large" / "new").write_bytes(os.urandom(1000))
    started.ok("push", "tree", tmp_path / "large", "--kind", "dir")
    assert _listed(started) == {}
    assert started.json("repack", "tree")["profile"] == "start"
