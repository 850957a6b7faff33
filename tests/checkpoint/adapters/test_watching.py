from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envstore.checkpoint.adapters.completeness import find_candidates, step_of, what_lacks
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.adapters.watching import Event, watch
from envstore.errors import UsageError
from tests.stores import Store


@pytest.fixture
def run(store: Store) -> Iterator[DirectoryRun]:
    with DirectoryRun("team/llm") as run:
        yield run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def safetensors(size: int = 64) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def archive() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 500)
    return data.getvalue()


def events(out: Path, run: DirectoryRun) -> Iterator[Event]:
    return watch(out, run, quiet=0.05, poll=0.02)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step-12", 12),
        ("step_12", 12),
        ("global_step40", 40),
        ("epoch=3-step=800.ckpt", 800),
        ("epoch=3.ckpt", 3),
        ("iter_0000100", 100),
        ("model_20.pt", 20),
        ("last.ckpt", None),
        ("runs", None),
        ("step-1234567890123", None),
    ],
)
def test_the_step_is_in_the_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


def lacks(out: Path) -> str | None:
    (candidate,) = find_candidates(out)
    return what_lacks(candidate)


def test_signs_of_completeness(out: Path) -> None:
    def place(name: str, data: bytes = b"data") -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def clear() -> None:
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    place("step-5/__0_0.distcp")
    assert lacks(out) == ".metadata"
    place("step-5/.metadata.tmp")
    assert lacks(out) == ".metadata"
    (out / "step-5/.metadata.tmp").rename(out / "step-5/.metadata")
    assert lacks(out) is None
    clear()

    place("checkpoint-5/model.safetensors", safetensors()[:-1])
    assert lacks(out) == "trainer_state.json"
    place("checkpoint-5/trainer_state.json", b"{}")
    assert lacks(out) == "the rest of model.safetensors"
    place("checkpoint-5/model.safetensors", safetensors())
    place("checkpoint-5/checkpoint-is-incomplete.txt")
    assert lacks(out) == "checkpoint-is-incomplete.txt to go"
    (out / "checkpoint-5/checkpoint-is-incomplete.txt").unlink()
    assert lacks(out) is None
    clear()

    place("global_step5/mp_rank_00_model_states.pt", archive())
    assert lacks(out) == "`latest` to name it"
    place("latest", b"global_step4")
    assert lacks(out) == "`latest` to name it"
    place("latest", b"global_step5\n")
    assert lacks(out) is None
    clear()

    place("epoch=0-step=5.ckpt/__0_0.distcp")
    place("epoch=0-step=5.ckpt/.metadata")
    assert lacks(out) == "meta.pt"
    place("epoch=0-step=5.ckpt/meta.pt", archive())
    assert lacks(out) is None
    clear()

    place("epoch=0-step=5.ckpt", archive()[:-10])
    assert lacks(out) == "the rest of epoch=0-step=5.ckpt"
    place("epoch=0-step=5.ckpt", archive())
    assert lacks(out) is None


def test_checkpoints_are_saved_once_they_are_whole(out: Path, run: DirectoryRun) -> None:
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "model.safetensors").write_bytes(safetensors())
    (out / "epoch=0-step=7.ckpt").write_bytes(archive())
    (out / "notes.txt").write_text("no checkpoint")
    told = events(out, run)
    first, second = next(told), next(told)
    assert (first.kind, first.step, first.message) == ("waiting", 5, "trainer_state.json")
    assert (second.kind, second.step) == ("saved", 7)
    state = {"log_history": [{"step": 5, "epoch": 1, "loss": 0.5}, {"step": 4, "loss": 1.0}]}
    (out / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    third = next(told)
    assert (third.kind, third.step) == ("saved", 5)
    assert third.commit is not None
    assert third.commit.metrics == {"loss": 0.5}
    told.close()  # type: ignore[attr-defined]
    assert run.latest() == 7


def test_a_watcher_that_starts_again_reads_nothing(
    out: Path, run: DirectoryRun, store: Store
) -> None:
    (out / "step-1.pt").write_bytes(archive())
    assert next(events(out, run)).kind == "saved"
    before = store.object_keys()
    again = events(out, run)
    assert next(again).kind == "present"
    assert store.object_keys() == before
    os.utime(out / "step-1.pt", ns=(1, 1))
    event = next(again)
    assert event.kind == "saved"  # looked at again, and found to be the same
    assert event.commit == run.run.find(1)
    assert run.run.find(1).checkpoint.attempt == 0


def test_what_grows_is_waited_for(out: Path, run: DirectoryRun) -> None:
    stop = threading.Event()
    seen: list[Event] = []

    def look() -> None:
        seen.extend(watch(out, run, quiet=1.0, poll=0.02, stop=stop))

    thread = threading.Thread(target=look)
    thread.start()
    path = out / "model_3.bin"
    for _ in range(20):
        with path.open("ab") as file:
            file.write(bytes(1000))
        stop.wait(0.02)
    wait_for(lambda: bool(seen))
    stop.set()
    thread.join()
    assert [event.kind for event in seen] == ["saved"]
    assert seen[0].commit is not None
    assert seen[0].commit.size == 20_000


def test_trouble_is_told_and_tried_again(out: Path, run: DirectoryRun, store: Store) -> None:
    (out / "step-1.pt").write_bytes(archive())
    packs = store.root / "objects" / "packs"
    packs.mkdir(exist_ok=True)
    packs.rmdir()
    packs.write_text("in the way")
    told = events(out, run)
    event = next(told)
    assert event.kind == "failed"
    packs.unlink()
    assert next(told).kind == "saved"


def test_no_such_directory(tmp_path: Path, run: DirectoryRun) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        next(watch(tmp_path / "none", run))


PROGRAM = """
import sys
from pathlib import Path
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.adapters.watching import watch
with DirectoryRun("team/llm") as run:
    for event in watch(Path(sys.argv[1]), run, quiet=0.05, poll=0.02):
        print(event.kind, event.step, flush=True)
"""


def test_ctrl_c_and_sigkill(out: Path, run: DirectoryRun) -> None:
    (out / "step-1.pt").write_bytes(archive())
    for number, expected in ((signal.SIGKILL, "saved 1"), (signal.SIGINT, "present 1")):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(out)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline().strip() == expected
            process.send_signal(number)
            process.communicate()
    assert [commit.step for commit in run.run.commits()] == [1]


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(3000):
        if done():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")
