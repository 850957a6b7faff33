"""docs/security.md says what is: which keys commands need, which tests show what, which objects."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, Cli

DOCUMENT = REPOSITORY / "docs" / "security.md"
FORMAT = REPOSITORY / "docs" / "format.md"

Rights = dict[str, set[str]]

_RECORD = """
import atexit, json, sys
from envstore.store.objects.file import FileObjects
seen = set()
def record(name, right):
    method = getattr(FileObjects, name)
    def recorded(self, key, *arguments, **options):
        seen.add((right, key.split("/")[0]))
        return method(self, key, *arguments, **options)
    setattr(FileObjects, name, recorded)
for name in ("get", "get_range", "get_range_into", "iter_range", "get_versioned", "size"):
    record(name, "get")
for name in ("put", "put_if"):
    record(name, "put")
record("delete", "delete")
record("list", "list")
out = sys.argv.pop(1)
def save():
    with open(out, "w") as file:
        json.dump(sorted(seen), file)
atexit.register(save)
from envstore.cli.main import main
sys.exit(main())
"""


def rows(text: str, heading: str) -> Iterator[list[str]]:
    for line in text.partition(heading)[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def granted() -> dict[str, Rights]:
    """What the document says that each sort of keys needs, by the first part of a key."""
    found: dict[str, Rights] = {"reader": {}, "writer": {}, "collector": {}}
    for name, *rights in rows(DOCUMENT.read_text(), "## What keys may do"):
        for sort, words in zip(found, rights, strict=True):
            found[sort][name.strip("`").strip("/")] = set(words.split())
    return found


class Recorder:
    """Runs commands and collects what they do to the store."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli

    def __call__(self, *arguments: str | Path) -> set[tuple[str, str]]:
        out = self.cli.root / "recorded"
        done = subprocess.run(
            [sys.executable, "-c", _RECORD, out, *arguments],
            env=self.cli.env, cwd=self.cli.root, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr.decode())
        return {(right, prefix) for right, prefix in json.loads(out.read_text())}


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(Cli(tmp_path / "cli"))


def beyond(done: set[tuple[str, str]], rights: Rights) -> set[tuple[str, str]]:
    return {(right, prefix) for right, prefix in done if right not in rights.get(prefix, ())}


def test_commands_need_no_more_than_the_document_says(recorder: Recorder, tmp_path: Path) -> None:
    rights, tree = granted(), tmp_path / "tree"
    assert all(len(each) > 15 for each in rights.values())
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(300_000))
    writer: set[tuple[str, str]] = set()
    reader: set[tuple[str, str]] = set()
    init = recorder("init") - {("list", "")}
    writer |= recorder("push", "t", tree)
    (tree / "file").write_bytes(os.urandom(300_000))
    writer |= recorder("push", "t", tree)
    read = "cat $ENVSTORE_PREFIX/file >/dev/null"
    writer |= recorder("profile", "t", "--", "sh", "-c", read)
    writer |= recorder("repack", "t")
    writer |= recorder("tag", "t", "u")
    writer |= recorder("rm", "--yes", "u")
    writer |= recorder("repair")
    reader |= recorder("pull", "t", tmp_path / "pulled")
    reader |= recorder("hydrate", "t")
    for command in (["ls"], ["show", "t"], ["log", "t"], ["ls", "t"]):
        reader |= recorder(*command)
    (tree / "file").write_bytes(os.urandom(300_000))
    recorder("push", "u", tree)
    recorder("rm", "--yes", "u")
    collector = recorder("gc", "--grace", "0s") | recorder("gc", "--grace", "0s")
    assert ("delete", "packs") in collector
    assert beyond(reader, rights["reader"]) == set()
    assert beyond(writer, rights["writer"]) == set()
    assert beyond(collector - {("list", "")}, rights["collector"]) == set()
    assert beyond(init - {("put", "envstore.json")}, rights["writer"]) == set()


def test_every_kind_of_object_is_in_the_table() -> None:
    kinds = {
        cells[0].strip("`").split("/")[0] for cells in rows(FORMAT.read_text(), "## 2. Objects")
    }
    for rights in granted().values():
        assert rights.keys() == kinds


def test_every_test_that_is_named_is_there() -> None:
    text = DOCUMENT.read_text()
    named = set(re.findall(r"`((?:tests|deploy)/[\w/.]+)`", text))
    assert len(named) > 12
    for path in named:
        assert (REPOSITORY / path).exists(), path
    assert len(text.splitlines()) <= 200
