"""A home, a store and a tree for each test of the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Cli, can_be_ordinary
from tests.s3server import s3_server

__all__ = ["s3_server"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command line with a store that is not made yet."""
    return Cli(tmp_path / "cli")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree: text, a program, a link, a file of several chunks, odd names."""
    return _make_tree(tmp_path / "tree")


def _make_tree(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "lib" / "deep").mkdir(parents=True)
    program = root / "bin" / "hello"
    program.write_text("#!/bin/sh\necho hello from $ENVSTORE_PREFIX\n")
    program.chmod(0o755)
    (root / "lib" / "text").write_text("some text\n")
    (root / "lib" / "link").symlink_to("text")
    (root / "lib" / "deep" / "data").write_bytes(bytes(range(256)) * 3000)
    (root / "lib" / "empty").touch()
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).write_text("latin")
    (root / "two\nlines\x1b[31m").write_text("mean")
    return root


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to copy, with a ``tree`` as ``tree:latest``."""
    base = tmp_path_factory.mktemp("template")
    cli = Cli(base / "cli")
    cli.ok("init")
    cli.ok("push", "tree", _make_tree(base / "tree"), "--kind", "dir")
    return cli.store


@pytest.fixture
def stored(cli: Cli, _template: Path) -> Cli:
    """The command line with a store that holds one like ``tree`` as ``tree:latest``."""
    shutil.copytree(_template, cli.store)
    return cli


@pytest.fixture
def ordinary() -> Iterator[Cli]:
    """The command line of a user without privileges."""
    if not can_be_ordinary():
        pytest.skip("needs root, and a Python that other users may run")
    # Not pytest's directory, which no other user may enter.
    with tempfile.TemporaryDirectory(prefix="envstore-cli-") as directory:
        os.chmod(directory, 0o755)
        yield Cli(Path(directory) / "cli", ordinary=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
