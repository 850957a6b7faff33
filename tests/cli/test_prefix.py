"""Trees that hold their own prefix, on the command line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.store.push import push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.statcache import StatCache
from tests.commands import Cli
from tests.relocating import Made, RelocatingSource, compare, sample

_FILES = {path: made for path, made in sample().items() if made.package != "short-0.1"}
_ALL = sample()


@pytest.fixture
def held(cli: Cli, tmp_path: Path) -> Iterator[Cli]:
    """The command line with a store of ``fits`` and ``tight``, and what is mounted cleared away."""
    cli.ok("init")
    for ref, files in (("fits", _FILES), ("tight", _ALL)):
        with Repository.open(str(cli.store)) as repository:
            cache = StatCache(tmp_path / "stat.db")
            push(repository, RelocatingSource(files, ref), RefName.parse(ref), cache)
            cache.close()
    yield cli
    for mounted in cli.json("mounts")["mounts"]:
        cli.ok("umount", "--lazy", mounted["mountpoint"])


def _place(cli: Cli, name: str) -> Path:
    made = cli.root / name
    made.mkdir()
    return made


def test_mounts_are_made_for_the_path_as_it_is_given(held: Cli) -> None:
    real = _place(held, "real")
    link = held.root / "link"
    link.symlink_to(real)
    assert held.json("mount", "fits", "link/../link/")["prefix"] == str(link)
    compare(_FILES, link, bytes(link))
    (mounted,) = held.json("mounts")["mounts"]
    assert (mounted["prefix"], mounted["mountpoint"]) == (str(link), str(real))


def test_mounts_for_another_place(held: Cli) -> None:
    one, two = _place(held, "one"), _place(held, "two")
    held.ok("mount", "tight", one, "--prefix", "/opt/env/")
    held.ok("mount", "tight", two, "--prefix", "/with a/blank")
    compare(_ALL, one, b"/opt/env")
    compare(_ALL, two, b"/with a/blank")
    prefixes = [one["prefix"] for one in held.json("mounts")["mounts"]]
    assert sorted(prefixes) == ["/opt/env", "/with a/blank"]


def test_pulls(held: Cli) -> None:
    held.ok("pull", "fits", "here")
    compare(_FILES, held.root / "here", bytes(held.root / "here"))
    held.ok("pull", "tight", "there", "--prefix", "/opt/env")
    compare(_ALL, held.root / "there", b"/opt/env")


def test_what_is_too_long(held: Cli) -> None:
    place = _place(held, "p" * 80)
    says = ("short-0.1 has room for 80 only (in lib/libshort.so)", "shorter --prefix")
    for command in ("mount", "pull"):
        held.fails(2, command, "tight", place, says=says)
        held.fails(2, command, "tight", place, "--prefix", "/" + "x" * 80, says=says)
    assert os.listdir(place) == []
    assert held.json("mounts") == {"mounts": []}
    held.ok("pull", "tight", place, "--prefix", "/" + "x" * 79)


@pytest.mark.parametrize("prefix", ["relative", "/", "", "/two\nlines", "/" + "x" * 5000])
def test_what_is_no_prefix(held: Cli, prefix: str) -> None:
    place = _place(held, "place")
    for command in ("mount", "pull"):
        held.fails(2, command, "fits", place, "--prefix", prefix, says=("prefix",))


def test_run(held: Cli) -> None:
    script = "cat $ENVSTORE_PREFIX/bin/perl; readlink $ENVSTORE_PREFIX/share/here"
    said = held.ok("run", "fits", "--", "sh", "-c", f"echo $ENVSTORE_PREFIX; {script}")
    prefix, *lines = said.encode().splitlines()
    assert b"\n".join(lines[:-1]) + b"\n" == _FILES[b"bin/perl"].at(prefix)
    assert lines[-1] == prefix + b"/share"


def test_scripts_run_where_they_are(held: Cli, tmp_path: Path) -> None:
    from envstore.store.relocation import Mode
    from tests.relocating import BUILD

    python = b'#!/bin/sh\nexec python3 "$@"\n'
    tool = b"#!%b/bin/python\nimport sys\nprint(sys.argv[0])\n" % BUILD
    files = {
        b"bin/python": Made(python, executable=True),
        b"bin/tool": Made(tool, Mode.TEXT, executable=True),
    }
    with Repository.open(str(held.store)) as repository:
        cache = StatCache(tmp_path / "stat.db")
        push(repository, RelocatingSource(files, "tool"), RefName.parse("tool"), cache)
        cache.close()
    for name in ("short", "with a blank", "l" * 200):
        place = _place(held, name)
        held.ok("mount", "tool", place)
        assert subprocess.check_output([place / "bin/tool"], text=True) == f"{place}/bin/tool\n"


def test_a_snapshot_that_is_hydrated(held: Cli) -> None:
    done = json.loads(held.ok("--json", "hydrate", "fits"))
    assert done["relocates"] is True
    (listed,) = held.json("hydrate", "--list")["hydrated"]
    assert listed["relocates"] is True
    place = _place(held, "place")
    mounted = held.json("mount", f"@{done['digest']}", place, env={"ENVSTORE_URL": "file:///none"})
    assert mounted["prefix"] == str(place)
    compare(_FILES, place, bytes(place))
