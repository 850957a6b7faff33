"""Whatever is written outside of stores is its user's alone, even if nobody has set a umask."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.spawning import ask_hello
from envstore.fuse.peers import is_ours
from tests.commands import NOBODY, REPOSITORY, Cli
from tests.fuse.lives import kill, until
from tests.stores import Store


@pytest.fixture
def open_cli(tmp_path: Path) -> Cli:
    """The command line of somebody whose files anybody may write."""
    cli = Cli(tmp_path / "cli")
    start = cli.start

    def start_openly(*arguments: Any, **options: Any) -> Any:
        return start(*arguments, preexec_fn=lambda: os.umask(0), **options)

    cli.start = start_openly  # type: ignore[method-assign]
    return cli


def too_open(*places: Path) -> Iterator[str]:
    """Yield what others may do something with: what is behind no closed door, or writable."""
    for place in places:
        closed: set[str] = set()
        for directory, names, files in os.walk(place):
            hidden = directory in closed
            for name in (*names, *files):
                path = os.path.join(directory, name)
                found = os.lstat(path)
                if stat.S_ISLNK(found.st_mode):
                    continue
                if hidden or not found.st_mode & 0o077:
                    closed.add(path)
                # Files that the kernel serves to everybody must be readable where they lie.
                if found.st_mode & 0o022 or not (hidden or path in closed):
                    yield f"{path} {stat.filemode(found.st_mode)}"


def ok(cli: Cli, *arguments: str | Path) -> str:
    done = cli.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with done:
        out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err.decode()
    return out.decode()


def test_nothing_private_is_open_to_others(open_cli: Cli, tmp_path: Path) -> None:
    cli, place, tree = open_cli, tmp_path / "place", tmp_path / "tree"
    for directory in (place, tree / "inner"):
        directory.mkdir(parents=True)
    (tree / "file").write_bytes(os.urandom(200_000))
    (tree / "inner" / "other").write_text("text")
    cache, state = cli.home / ".cache", cli.home / ".local"
    ok(cli, "init")
    ok(cli, "push", "t", tree)
    ok(cli, "push", "t", tree)
    ok(cli, "mount", "--node", "off", "--fast-path", "off", "t", place)
    try:
        assert (place / "file").read_bytes() == (tree / "file").read_bytes()
        ok(cli, "stats", place)
        ok(cli, "run", "t", "--", "true")
        ok(cli, "pull", "t", tmp_path / "pulled")
        ok(cli, "profile", "t", "--", "sh", "-c", "cat $ENVSTORE_PREFIX/file >/dev/null")
        ok(cli, "hydrate", "t")
        ok(cli, "verify", "--read-data")
        ok(cli, "gc", "--dry-run")
        ok(cli, "repack", "t")
        assert [*too_open(cache, state, cli.home / ".config")] == []
        # Those above them are what users share with other programs.
        assert any(cache.rglob("*"))
        assert any(state.rglob("*.sock"))
    finally:
        ok(cli, "umount", place)


def test_nothing_of_a_checkpoint_is_open_to_others(tmp_path: Path) -> None:
    slots = SlotDirectory(tmp_path / "slots" / "run" / "00000")
    store = Store(tmp_path / "store")
    wanted = json.dumps({"store": store.url, "step": 1, "files": {"a.safetensors": [30_000, 1]}})
    code = "from tests.checkpoint.slotfill import *; SlotDirectory(sys.argv[1]).create(); "
    trainer = [sys.executable, "-c", code + "main(*sys.argv[1:])", slots.path, wanted]
    pid = None
    try:
        with subprocess.Popen(
            trainer, cwd=REPOSITORY, stdout=subprocess.PIPE, preexec_fn=lambda: os.umask(0)
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"staged\n"
                pid = ask_hello(slots.path)
                until(lambda: any("commits" in key for key in keys(store)), "a checkpoint")
                assert "log" in {path.name for path in slots.path.iterdir()}
                assert [*too_open(tmp_path / "slots")] == []
            finally:
                process.kill()
    finally:
        if pid:
            kill(pid)
        store.close()


def keys(store: Store) -> list[str]:
    return [found.key for found in store.repository.objects.list("runs/")]


@pytest.mark.parametrize("how", ["a link", "open to others", "of another user"])
def test_planted_directories_are_not_used_for_slots(tmp_path: Path, how: str) -> None:
    planted, elsewhere = tmp_path / "slots" / "run", tmp_path / "elsewhere"
    planted.parent.mkdir()
    elsewhere.mkdir(mode=0o700)
    if how == "a link":
        planted.symlink_to(elsewhere)
    else:
        planted.mkdir(mode=0o700)
    if how == "open to others":
        planted.chmod(0o770)
    if how == "of another user":
        if os.geteuid() != 0:
            pytest.skip("needs root, to give a directory away")
        os.chown(planted, NOBODY, NOBODY)
    with pytest.raises(CheckpointError, match="only user"):
        SlotDirectory(planted / "00000").create()
    assert [*elsewhere.iterdir()] == []


class _End:
    """The end of a connection to a process of some user's."""

    def __init__(self, user: int) -> None:
        self.user = user

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        assert size == 12
        return (7).to_bytes(4, sys.byteorder) + self.user.to_bytes(4, sys.byteorder) * 2


def test_only_root_and_oneself_are_answered() -> None:
    assert is_ours(_End(0))
    assert is_ours(_End(os.geteuid()))
    assert not is_ours(_End(65_533))
