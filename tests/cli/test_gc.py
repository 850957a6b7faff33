"""``envstore gc`` as it is called from a shell and from cron."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.cli.params import ShareType
from envstore.store.doomed import Owner, put_state, read_state
from envstore.store.hosts import here
from envstore.store.objects import open_objects
from tests.commands import Cli
from tests.trees import noise


def test_what_is_removed_is_freed_after_the_grace_period(stored: Cli, tmp_path: Path) -> None:
    done = stored.json("gc", "--grace", "0s")
    assert done["freed_bytes"] == done["condemned_bytes"] == done["kept_bytes"] == 0
    assert done["live_bytes"] > 0
    stored.ok("rm", "tree", "--yes")
    said = stored.ok("gc")
    assert "condemned" in said
    assert "grace period" in said
    first = stored.json("gc", "--dry-run")
    assert first["freed_bytes"] == 0
    assert first["condemned_bytes"] == first["kept"]["grace"] == first["kept_bytes"] > 0
    assert stored.json("gc", "--dry-run", "--grace", "0s")["freed_bytes"] > 0
    second = stored.json("gc", "--grace", "0s")
    assert second["freed_bytes"] >= first["condemned_bytes"]
    assert (second["busy"], second["kept"], second["writers"]) == (None, {}, [])
    assert second["epoch"] == 1
    assert "freed 0 B" in stored.ok("gc")


def test_a_removed_ref_can_be_taken_back(stored: Cli) -> None:
    (snapshot,) = (stored.store / "snapshots").iterdir()
    stored.ok("rm", "tree", "--yes")
    stored.ok("gc")
    stored.ok("tag", f"@{snapshot.name}", "tree")
    stored.ok("gc", "--grace", "0s")
    stored.ok("verify", "--read-data")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--grace", "1"),
        ("--grace", "-1s"),
        ("--grace", "1y"),
        ("--grace", "999999999w"),
        ("--max-unused", "5"),
        ("--max-unused", "101%"),
    ],
)
def test_what_cannot_be_meant_is_refused(stored: Cli, option: str, value: str) -> None:
    stored.fails(2, "gc", f"{option}={value}", says=[value])


def test_damage_stops_it_with_one_line(stored: Cli) -> None:
    (snapshot,) = (stored.store / "snapshots").iterdir()
    snapshot.write_bytes(b"{}")
    stored.fails(1, "gc", "--grace", "0s", says=["refs/default/tree/latest", "repair"])


def test_a_second_collector_says_so_and_is_content(stored: Cli) -> None:
    objects = open_objects(f"file://{stored.store}")
    state, version = read_state(objects)
    owner = Owner("0" * 32, "somewhere", int(time.time()) + 60)
    put_state(objects, replace(state, owner=owner), version)
    objects.close()
    assert "another collection is at work (somewhere)" in stored.ok("gc")
    assert stored.json("gc")["busy"]["host"] == "somewhere"


def test_a_second_collector_on_this_machine_is_named_by_its_process(stored: Cli) -> None:
    objects = open_objects(f"file://{stored.store}")
    state, version = read_state(objects)
    owner = Owner("0" * 32, here(), int(time.time()) + 60)
    put_state(objects, replace(state, owner=owner), version)
    objects.close()
    assert f"at work (process {os.getpid()} of this machine)" in stored.ok("gc")


def test_a_pack_that_was_cut_hides_nothing_that_stays(stored: Cli) -> None:
    (pack,) = (path for path in (stored.store / "packs").rglob("*") if path.is_file())
    os.truncate(pack, 10)
    assert stored.json("gc", "--grace", "0s")["kept_bytes"] == 0
    assert "kept" not in stored.ok("gc", "--dry-run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_time_it_can_be_run_again(
    stored: Cli, tmp_path: Path, number: signal.Signals
) -> None:
    for name in "abc":
        root = tmp_path / name
        root.mkdir()
        (root / "data").write_bytes(noise(name, 1 << 20))
        stored.ok("push", name, root, "--kind", "dir")
        stored.ok("rm", name, "--yes")
    with stored.start("gc", "--grace", "0s") as process:
        state = stored.store / "gc" / "state"
        while not state.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        process.wait()
    stored.ok("verify", "--read-data")
    done = stored.json("gc", "--grace", "0s")
    assert done["busy"] is None
    assert len(list((stored.store / "snapshots").iterdir())) == 1
    stored.ok("verify", "--read-data")


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1), ("0", 0)])
def test_shares(text: str, share: float) -> None:
    assert ShareType().convert(text, None, None) == pytest.approx(share)
