"""``checkpoint``: looking at what runs saved, keeping, restoring, checking and watching for it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.checkpoint.adapters.directory import DirectoryRun
from tests.commands import NOBODY, Cli, one_line
from tests.trees import noise

RUN = "team/llm"
STEPS = (100, 200, 300)


SIZE = 300_000


def _tensors(step: int) -> bytes:
    """Return a safetensors file of ``SIZE`` bytes."""
    count = SIZE - 256
    tensor = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
    header = json.dumps({"weights": tensor}).ljust(248).encode()
    return len(header).to_bytes(8, "little") + header + noise(step, count)


def _write(place: Path, step: int) -> Path:
    place.mkdir()
    (place / "model.safetensors").write_bytes(_tensors(step))
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return place


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three checkpoints of a run, and one that no longer counts."""
    base = tmp_path_factory.mktemp("runs")
    cli = Cli(base / "cli")
    cli.ok("init")
    with DirectoryRun(RUN, str(cli.store)) as run:
        run.begin(None)
        for step in STEPS:
            tree = _write(base / str(step), step)
            run.save(step, tree, metrics={"loss": 1 / step})
        run.save(400, _write(base / "400", 400))
        run.begin(300)
    return cli.store


@pytest.fixture
def runs(cli: Cli, template: Path) -> Cli:
    shutil.copytree(template, cli.store)
    return cli


def test_runs_and_checkpoints_are_listed(runs: Cli) -> None:
    (found,) = runs.json("checkpoint", "ls")["runs"]
    assert found == {"run": RUN, "commits": 4, "last_step": 400}
    assert RUN in runs.ok("checkpoint", "ls")
    listed = runs.json("checkpoint", "ls", RUN)["checkpoints"]
    assert [row["step"] for row in listed] == list(STEPS)
    assert [row["metrics"]["loss"] for row in listed] == [1 / step for step in STEPS]
    assert not any(row["pinned"] for row in listed)
    text = runs.ok("checkpoint", "ls", "--all", RUN)
    assert "left behind" in text
    assert "loss=0.01" in text
    everything = runs.json("checkpoint", "ls", "--all", RUN)["checkpoints"]
    assert [(row["step"], row["counts"]) for row in everything][-1] == (400, False)


def test_runs_are_completed(runs: Cli) -> None:
    for command in ("ls", "show", "restore", "rm", "pin"):
        assert runs.completed(f"envstore checkpoint {command} te") == [f"plain,{RUN}"]
    assert runs.completed("envstore checkpoint latest other") == []


def test_nothing_to_list_is_said(cli: Cli) -> None:
    cli.ok("init")
    done = cli("checkpoint", "ls")
    assert (done.status, done.out) == (0, "")
    assert "no runs" in done.err
    assert "no checkpoints" in cli("checkpoint", "ls", RUN).err


def test_the_latest_step_is_for_scripts(runs: Cli) -> None:
    assert runs.ok("checkpoint", "latest", RUN) == "300\n"
    assert runs.json("checkpoint", "latest", RUN)["step"] == 300
    done = runs("checkpoint", "latest", "team/other")
    assert (done.status, done.out) == (1, "")
    assert "team/other has no checkpoint" in one_line(done)


def test_one_is_shown(runs: Cli) -> None:
    text = runs.ok("checkpoint", "show", RUN, "--step", "200")
    assert "model.safetensors" in text
    shown = runs.json("checkpoint", "show", RUN, "--step", "200")
    assert {file["path"]: file["bytes"] for file in shown["files"]}["model.safetensors"] == SIZE
    assert shown["lineage"]
    same = runs.json("show", f"{RUN}:step-200")
    assert (same["digest"], same["kind"]) == (shown["digest"], "checkpoint")
    line = one_line(runs("checkpoint", "show", RUN, "--step", "250"))
    assert "no checkpoint of step 250" in line
    assert "200" in line


def test_files_are_restored(runs: Cli, tmp_path: Path) -> None:
    assert "step 300" in runs.ok("checkpoint", "restore", RUN, tmp_path / "newest")
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == _tensors(300)
    runs.ok("checkpoint", "restore", RUN, tmp_path / "older", "--step", "100")
    assert (tmp_path / "older" / "model.safetensors").read_bytes() == _tensors(100)
    line = one_line(runs("checkpoint", "restore", RUN, tmp_path / "older"))
    assert "older" in line
    assert (tmp_path / "older" / "model.safetensors").read_bytes() == _tensors(100)


def test_pinned_ones_are_not_removed(runs: Cli) -> None:
    runs.ok("checkpoint", "pin", RUN, "--step", "100", "--reason", "released")
    assert "pinned: released" in runs.ok("checkpoint", "ls", RUN)
    done = runs("checkpoint", "rm", "--yes", RUN, "100", "200")
    assert done.status == 1
    assert "not removed: 100" in done.err
    assert [r["step"] for r in runs.json("checkpoint", "ls", RUN)["checkpoints"]] == [100, 300]
    runs.ok("checkpoint", "unpin", RUN, "--step", "100")
    runs.ok("checkpoint", "rm", "--yes", RUN, "100")
    assert [r["step"] for r in runs.json("checkpoint", "ls", RUN)["checkpoints"]] == [300]
    assert runs("show", f"{RUN}:step-100").status == 1


def test_removing_asks_first(runs: Cli) -> None:
    done = runs("checkpoint", "rm", RUN, "100")
    assert done.status == 2
    assert "--yes" in one_line(done)
    assert runs("checkpoint", "rm", "--yes", RUN, "100", "999").status == 1
    assert runs.json("checkpoint", "show", RUN, "--step", "100")["step"] == 100


def test_damage_is_found_and_named(runs: Cli) -> None:
    assert runs.json("checkpoint", "verify", RUN, "--read-data")["ok"]
    whole = runs.json("verify", f"{RUN}:step-200", "--read-data")
    assert whole["ok"]
    packs = sorted((runs.store / "packs").rglob("*/*"))
    for pack in packs:
        data = bytearray(pack.read_bytes())
        data[len(data) // 3] ^= 1
        pack.write_bytes(data)
    done = runs("checkpoint", "verify", RUN, "--read-data")
    assert done.status == 1
    assert sum(pack.name in done.out for pack in packs) >= len(STEPS)
    assert f"{RUN}:step-" in done.out
    assert runs("checkpoint", "verify", RUN, "--step", "999").status == 1
    missing = runs("checkpoint", "verify", "team/typo")
    assert (missing.status, "team/typo has no checkpoint" in missing.err) == (1, True)


def test_one_is_brought_into_the_cache(runs: Cli) -> None:
    assert runs.json("checkpoint", "prefetch", RUN)["step"] == 300
    line = one_line(runs("checkpoint", "prefetch", RUN, "--only", "optim"))
    assert "has no optim.safetensors" in line


@pytest.mark.parametrize("words", [("ls", "a:b"), ("latest", "../x"), ("pin", "a/b/c")])
def test_a_malformed_run_is_refused(runs: Cli, words: tuple[str, str]) -> None:
    done = runs("checkpoint", *words)
    assert done.status == 2
    assert repr(words[1]) in one_line(done)


def test_what_another_program_writes_is_watched_for(cli: Cli, tmp_path: Path) -> None:
    cli.ok("init")
    output = tmp_path / "output"
    output.mkdir()
    _write(output / "checkpoint-10", 10)
    with cli.start(
        "--json", "checkpoint", "watch", output, RUN, "--quiet-for", "0.2", "--last", "1",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert (first["event"], first["step"]) == ("saved", 10)
        _write(output / "checkpoint-20", 20)
        assert json.loads(process.stdout.readline())["step"] == 20
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [r["step"] for r in cli.json("checkpoint", "ls", RUN)["checkpoints"]] == [20]
    line = one_line(cli("checkpoint", "watch", tmp_path / "nothing", RUN))
    assert "not a directory" in line


def test_a_watch_says_which_file_it_waits_for(cli: Cli, tmp_path: Path) -> None:
    cli.ok("init")
    (tmp_path / "output" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-10" / "model.bin").write_bytes(b"1")
    with cli.start(
        "checkpoint", "watch", tmp_path / "output", RUN, "--quiet-for", "0.2",
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"waiting for trainer_state.json of {tmp_path / 'output' / 'checkpoint-10'}" in line
        process.send_signal(signal.SIGINT)
        process.wait(60)


_DYING_TRAINER = """
import os, signal
from envstore import checkpoint
run = checkpoint.Run('team/side', persister='external')
run.save(7, {'values': list(range(1000))})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_persister_serves_what_appears_below_its_root(cli: Cli) -> None:
    cli.ok("init")
    root = cli.root / "slots"
    root.mkdir()
    with cli.start("checkpoint", "persister", "slots") as process:
        done = subprocess.run(
            [cli.argv()[0], "-c", _DYING_TRAINER], env={**cli.env, "ENVSTORE_SLOTS": str(root)},
            check=False, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert cli.ok("checkpoint", "latest", "team/side") == "7\n"


def test_a_persister_of_root_serves_the_slots_of_others(ordinary: Cli) -> None:
    root = ordinary.root / "slots"
    root.mkdir()
    root.chmod(0o1777)
    ordinary.ok("init")
    privileged = Cli(ordinary.root / "root")
    url = {"ENVSTORE_URL": str(ordinary.store)}
    with privileged.start("checkpoint", "persister", root, env=url) as process:
        done = subprocess.run(
            [
                "setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups",
                sys.executable, "-c", _DYING_TRAINER,
            ],
            env={**ordinary.env, "ENVSTORE_SLOTS": str(root)},
            check=False, capture_output=True, timeout=120, cwd="/",
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert ordinary.ok("checkpoint", "latest", "team/side") == "7\n"
