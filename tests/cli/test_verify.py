from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from tests.commands import Cli


def _cache(cli: Cli) -> Path:
    return cli.home / ".cache" / "envstore"


def _pack(cli: Cli) -> Path:
    (pack,) = (path for path in (cli.store / "packs").rglob("*") if path.is_file())
    return pack


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_is_named_and_healed_by_a_push(stored: Cli, tree: Path) -> None:
    pack = _pack(stored)
    # In the middle of the frame that the files share.
    _flip(pack, 60)
    assert "all is well" in stored.ok("verify"), "without --read-data only the table is read"
    done = stored("--json", "verify", "--read-data", "--dry-run")
    assert done.status == 1
    assert done.json["noted"] == 0
    assert not (stored.store / "damaged").exists()
    done = stored("--json", "verify", "--read-data")
    assert (done.status, done.json["noted"]) == (1, 1)
    (problem,) = done.json["problems"]
    assert pack.name in problem["object"]
    lost = {file["path"] for file in problem["files"]}
    assert {"bin/hello", "lib/text", "two\nlines\x1b[31m"} <= lost
    assert problem["lost_files"] == len(lost)
    assert all(file["harms"] == ["tree:latest"] for file in problem["files"])
    # What is on the list is looked at again, with --read-data and without.
    text = stored("verify")
    assert text.status == 1
    assert "  lost: lib/text [tree:latest]" in text.out
    assert r"two\nlines\x1b[31m" in text.out
    # Nothing here has the bytes.
    shutil.rmtree(_cache(stored))
    done = stored("--json", "repair")
    assert done.status == 1
    assert "push what holds them again" in done.json["unhealed"][0]["advice"]
    assert "to heal it: push what holds them again" in stored("repair").out
    # Somebody who has the files pushes them, under whatever name.
    pushed = stored.json("push", "elsewhere", tree, "--kind", "dir")
    assert any("healed" in warning for warning in pushed["warnings"])
    assert "all is well" in stored.ok("verify", "--read-data")
    assert stored.json("repair")["ok"] is True
    stored.ok("pull", "tree", stored.home / "copy")
    assert (stored.home / "copy/lib/text").read_text() == "some text\n"


def test_a_pack_that_is_gone_is_no_problem_of_the_index(stored: Cli) -> None:
    pack = _pack(stored)
    pack.unlink()
    assert f"damaged: pack {pack.name}: it is missing [" in stored("verify").out
    # What is cached here could heal it.
    shutil.rmtree(_cache(stored))
    would, done = stored("repair", "--dry-run"), stored("repair")
    assert would.status == done.status == 1
    assert "2 problems found, 2 would be left" in would.out
    # The tree's list of files was in that pack, too.
    assert "2 problems found, 2 left" in done.out
    assert "no segment" not in would.out + done.out


def test_no_reason_says_again_what_it_is_about(stored: Cli) -> None:
    pack = _pack(stored)
    os.truncate(pack, pack.stat().st_size - 1)
    assert f"damaged: pack {pack.name}: does not end as a pack does" in stored("verify").out


def test_repair_takes_what_the_cache_has(stored: Cli) -> None:
    stored.ok("pull", "tree", stored.home / "copy")
    pack = _pack(stored)
    _flip(pack, 60)
    would = stored.json("repair", "--read-data", "--dry-run")
    assert would["ok"] is True
    assert would["dry_run"] is True
    assert _pack(stored) == pack
    said = stored.ok("repair", "--read-data", "--dry-run")
    assert "would have led 1 manifest to good copies" in said
    # Nothing was written, so it is still to be found.
    assert stored("verify", "--read-data", "--dry-run").status == 1
    done = stored.json("repair", "--read-data")
    assert (done["ok"], done["unhealed"]) == (True, [])
    found = stored.json("verify", "--read-data")
    assert (found["ok"], found["quarantined"]) == (True, [pack.name])
    stored.ok("gc", "--grace", "0s")
    assert not pack.exists()
    assert stored.json("verify", "--read-data")["quarantined"] == []
    shutil.rmtree(_cache(stored))
    stored.ok("pull", "tree", stored.home / "again")
    assert (stored.home / "again/lib/text").read_text() == "some text\n"


def test_rebuild_index(stored: Cli) -> None:
    segment = next((stored.store / "index").iterdir())
    _flip(segment, 50)
    assert stored("verify").status == 1
    done = stored.json("rebuild-index")
    assert (done["packs"], done["removed"]) == (1, [])
    # It says the same as before, so it has the name of before.
    assert done["stored"] == [f"index/{segment.name}"]
    assert "all is well" in stored.ok("verify")
    assert stored.json("rebuild-index") == {
        "packs": 0, "stored": [], "removed": [], "unreadable": []
    }  # fmt: skip
    assert "listed 0 packs" in stored.ok("rebuild-index")


def _has_read(state: Path) -> bool:
    """Whether a check has remembered a pack."""
    texts = [path.read_text() for path in state.glob("*[!l]")] if state.exists() else []
    return any(line.endswith(".") for text in texts for line in text.splitlines())


def test_a_sample_a_rate_and_what_was_broken_off(cli: Cli, tmp_path: Path) -> None:
    cli.ok("init")
    for number in range(6):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "data").write_bytes(os.urandom(200_000))
        cli.ok("push", f"tree{number}", tmp_path / f"{number}", "--kind", "dir")
    whole = cli.json("verify", "--read-data")
    assert whole["data_packs"] == whole["packs"] == 6
    part = cli.json("verify", "--read-data", "--sample", "20%", "--seed", "x")
    assert 1 <= part["data_packs"] <= 2
    assert part["packs"] == 6
    again = cli.json("verify", "--read-data", "--sample", "0.2", "--seed", "x")
    assert again["bytes_read"] == part["bytes_read"] < whole["bytes_read"]
    # Slow enough to be killed while it reads, however fast this machine is.
    state = _cache(cli) / "verify"
    slow = cli.start("verify", "--read-data", "--limit-rate", "100K")
    try:
        while not _has_read(state):
            assert slow.poll() is None
    finally:
        slow.send_signal(signal.SIGKILL)
        slow.wait()
    done = cli.json("verify", "--read-data", "--resume")
    assert done["earlier_packs"] >= 1
    assert done["data_packs"] == 6 - done["earlier_packs"]
    assert done["earlier_bytes"] >= 200_000
    assert not list(state.iterdir())
    assert "there was no check to go on with" in cli.ok("verify", "--read-data", "--resume")


def test_what_cannot_be_asked(stored: Cli) -> None:
    for wrong in (
        ("--sample", "1%"),
        ("--resume",),
        ("--read-data", "--sample", "0%"),
        ("--read-data", "--sample", "101%"),
        ("--read-data", "--sample", "much"),
        ("--limit-rate", "0"),
        ("--limit-rate", "fast"),
    ):
        assert stored("verify", *wrong).status == 2, wrong
