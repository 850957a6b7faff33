"""Persisters as processes: how they are started, found, watched over, and ended."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from envstore.checkpoint import backstage, watching
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.persister import main
from envstore.checkpoint.service import LOG
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.checkpoint.spawning import PersisterOptions, ask_hello, ensure_persister
from envstore.checkpoint.talking import SOCKET
from envstore.errors import AccessDeniedError
from tests.checkpoint.conftest import is_gone
from tests.checkpoint.slotfill import orders, stage, state
from tests.checkpoint.talker import Talker, assert_holds, serving, wait_for
from tests.stores import Store

_ROOT = Path(__file__).parents[2]
FILES = {"model.safetensors": (30_000, 1)}


def _end(slots: SlotDirectory) -> None:
    with Talker(slots.path, trainer=False) as talker:
        talker.ask("close")
        talker.ended()
    wait_for(lambda: not slots.path.exists(), "the slots are removed")


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}:")).split(":")[1].strip()


def test_it_is_nobodys_child_and_shares_nothing(
    slots: SlotDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONINSPECT", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        pid = ensure_persister(slots.path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write)
    try:
        os.set_blocking(read, False)
        assert os.read(read, 1) == b""  # nobody else holds the other end
        # Whoever adopts it is neither this process nor one that it started.
        parent = int(_status(pid, "PPid"))
        assert parent != os.getpid()
        assert os.getsid(pid) not in (os.getsid(0), pid)
        assert os.getpgid(pid) != os.getpgid(0)
        assert int(_status(pid, "SigBlk"), 16) == 0
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
        environ = dict(
            item.split(b"=", 1)
            for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if item
        )
        assert b"PYTHONINSPECT" not in environ
        assert b"PYTHONWARNINGS" not in environ
        assert environ[b"PYTHONPATH"] == str(_ROOT).encode()
        assert environ[b"AWS_ACCESS_KEY_ID"] == b"mine"
        assert b"LD_PRELOAD" in environ
    finally:
        os.close(read)
        _end(slots)


def test_one_that_is_there_is_used(slots: SlotDirectory) -> None:
    with serving(slots.path):
        assert ensure_persister(slots.path) == os.getpid()
        assert ensure_persister(slots.path, PersisterOptions(mode="external")) == os.getpid()


def test_one_whose_directory_is_gone_ends(slots: SlotDirectory) -> None:
    pid = ensure_persister(slots.path)
    shutil.rmtree(slots.path)
    wait_for(lambda: is_gone(pid), "it ends")


def test_two_that_are_started_at_once_are_one(slots: SlotDirectory) -> None:
    environ = {**os.environ, "PYTHONPATH": str(_ROOT)}
    code = (
        "import sys; from pathlib import Path; "
        "from envstore.checkpoint.spawning import ensure_persister; "
        "sys.stdout.write(str(ensure_persister(Path(sys.argv[1]))))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, slots.path], stdout=subprocess.PIPE, env=environ
        )
        for _ in range(2)
    ]
    pids = {process.communicate()[0] for process in both}
    assert len(pids) == 1
    _end(slots)


def test_the_trainer_does_not_import_what_the_persister_needs(slots: SlotDirectory) -> None:
    code = (
        "import sys; import envstore.checkpoint.spawning; "
        "bad = {'boto3', 'botocore', 'torch', 'numpy', 'envstore.checkpoint.service'}; "
        "sys.exit(bool(bad & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, timeout=60)


def test_a_sidecar_that_does_not_come_is_named(slots: SlotDirectory) -> None:
    with pytest.raises(CheckpointError, match="no persister has come") as caught:
        ensure_persister(slots.path, PersisterOptions(mode="external"), timeout=0.05)
    assert "--watch" in (caught.value.hint or "")


def test_one_that_cannot_start_says_why(
    slots: SlotDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ENVSTORE_SLOTS_LINGER", "soon")
    with pytest.raises(CheckpointError, match="ENVSTORE_SLOTS_LINGER: 'soon' is not a number"):
        ensure_persister(slots.path)
    with pytest.raises(CheckpointError, match="there is no slot directory"):
        ensure_persister(tmp_path / "nowhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(CheckpointError, match="cannot start the persister"):
        ensure_persister(slots.path)


def test_a_socket_of_another_kind_is_not_talked_to(slots: SlotDirectory) -> None:
    (slots.path / SOCKET).write_text("a file")
    with pytest.raises(AccessDeniedError, match="is not a socket"):
        ask_hello(slots.path)


def test_options_become_arguments() -> None:
    options = PersisterOptions(bandwidth=5e6, linger=3, store="file:///x")
    assert options.arguments() == [
        "--bandwidth", "5000000.0", "--linger", "3.0", "--store", "file:///x",
    ]  # fmt: skip
    assert PersisterOptions().arguments() == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["directory", "--watch", "root"],
        ["directory", "--bandwidth", "0"],
        ["directory", "--bandwidth", "nan"],
        ["directory", "--linger", "-1"],
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backstage, "MAX_LOG", 1000)
    log = backstage.BoundedLog(tmp_path / LOG)
    logger = logging.Logger("of this test")  # noqa: LOG001 - nobody else is to hear it
    logger.addHandler(log)
    for number in range(200):
        logger.warning("line %03d of many", number)
        assert (tmp_path / LOG).stat().st_size <= 1000
    log.close()

    lines = (tmp_path / LOG).read_text().splitlines()
    assert lines == [f"line {number:03d} of many" for number in range(200 - len(lines), 200)]
    assert len(lines) > 20


# --watch.


@contextmanager
def _watching(root: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "envstore.checkpoint.persister", "--watch", root, *arguments],
        cwd=_ROOT,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def test_a_sidecar_serves_what_appears_and_finishes_when_it_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    root = tmp_path / "slots"
    monkeypatch.setenv("ENVSTORE_SLOTS", str(root))
    files = state(FILES)
    both = [SlotDirectory(root / name / "00000") for name in ("one", "two")]
    with _watching(root, "--allow-store", f"file://{tmp_path}/store/*") as process:
        owners = []
        for directory in both:
            directory.create()
            owners.append(SlotOwner(directory))
            ensure_persister(directory.path, PersisterOptions(mode="external"))
        with Talker(both[0].path) as talker:
            stage(owners[0], orders("file:///etc/other", 1), files)
            talker.ask("writing", slot=0, id="")
            said = talker.hear("failed")
            assert (said["final"], said["kind"]) == (True, "CheckpointError")
            assert "does not write to file:///etc/other" in said["error"]
        stage(owners[0], orders(store.url, 2), files)
        for owner in owners:
            owner.close()
        process.terminate()
        assert process.wait(60) == 0

    assert_holds(store.repository, 2, files)


def test_slot_directories_are_named_by_ranks_and_no_link_is_followed(tmp_path: Path) -> None:
    for name in ("00000", "run/00001", "1000/run/00002", "a/b/c/00003", "run/other"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "outside" / "00004").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "00005").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "run" / "00006").write_text("a file")

    found = []
    for path, fd in watching.slot_directories(str(tmp_path / "root")):
        found.append(path.removeprefix(f"{tmp_path}/root/"))
        os.close(fd)

    assert sorted(found) == ["00000", "1000/run/00002", "run/00001"]
    assert list(watching.slot_directories(str(tmp_path / "nowhere"))) == []
