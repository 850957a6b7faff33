"""What rattler installs at a prefix, and what our plans make of the same packages' files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from envstore.resolver.rattler_call import call
from envstore.store.relocated import Relocated
from envstore.store.relocation import Mode, Relocation, plan
from tests.channel.conda import Channel
from tests.channel.packing import About, Package, index_json, pack

PREFIXES = ["/mnt/env/here", "/home/user/envs/it", "/" + "long/" * 28 + "last"]
_BUILD = ("/opt/tests/" + "placehold_" * 40)[:255].encode()


def test_the_prefixes() -> None:
    assert [len(prefix) for prefix in PREFIXES] == [13, 18, 145]


def install_for(packages: Iterable[Package], base: Path, prefix: str) -> Path:
    """Have rattler install packages for ``prefix``; returns where it put them instead."""
    from rattler import PackageRecord, RepoDataRecord
    from rattler import install as rattler_install

    records = []
    for package in packages:
        index = base / f"{package.about.stem}.json"
        index.write_text(json.dumps(index_json(package.about)))
        record = PackageRecord.from_index_json(str(index), size=package.size)
        url = package.path.as_uri()
        records.append(RepoDataRecord(record, package.path.name, url, base.as_uri()))
    target = base / "env"
    call(
        lambda: rattler_install(
            records,
            str(target),
            cache_dir=str(base / "cache"),
            show_progress=False,
            alternative_target_prefix=prefix,
        )
    )
    return target


def _prefixed(env: Path) -> Iterator[tuple[dict[str, Any], bytes, bytes]]:
    """Yield what paths.json says of each file with a prefix, its bytes in the package, and here."""
    for path in sorted((env / "conda-meta").glob("*.json")):
        facts = json.loads(path.read_bytes())
        for entry in facts["paths_data"]["paths"]:
            if "prefix_placeholder" in entry:
                name = entry["_path"]
                package = Path(facts["extracted_package_dir"])
                if not (package / name).exists():
                    name = name.replace("bin/", "python-scripts/")
                yield entry, (package / name).read_bytes(), (env / entry["_path"]).read_bytes()


def _relocated(entry: dict[str, Any], stored: bytes, prefix: str) -> Relocated | None:
    mode = Mode[entry["file_mode"].upper()]
    made = plan(stored, entry["prefix_placeholder"].encode(), mode, "package-1")
    if made is None:
        return None
    assert Relocation.decode(made.encode()) == made
    return Relocated(made, prefix.encode())


@pytest.mark.parametrize("prefix", PREFIXES, ids=map(len, PREFIXES))
def test_files_of_the_channel(conda_channel: Channel, tmp_path: Path, prefix: str) -> None:
    names = ["python", "hello-pkg", "greeting", "binprefix", "legacy", "settings"]
    names += ["shortprefix"] if len(prefix) <= 80 else []
    env = install_for(map(conda_channel.package, names), tmp_path, prefix)
    rng = random.Random(prefix)
    seen = set()
    for entry, stored, installed in _prefixed(env):
        found = _relocated(entry, stored, prefix)
        assert found is not None
        assert found.size == len(installed) == (env / entry["_path"]).stat().st_size

        def source(offset: int, size: int, stored: bytes = stored) -> bytes:
            return stored[offset : offset + size]

        whole = found.read(0, found.size, source)
        assert whole == installed, entry["_path"]
        assert hashlib.sha256(whole).hexdigest() == entry["sha256_in_prefix"]
        for _ in range(300):
            offset, size = rng.randrange(found.size + 5), rng.randrange(1, 4000)
            assert found.read(offset, size, source) == installed[offset : offset + size]
        seen.add((entry["file_mode"], stored[:2] == b"#!"))
    assert seen >= {("text", True), ("text", False), ("binary", False)}


def _awkward() -> dict[str, tuple[str, bytes]]:
    """Files by name that installers take turns to treat specially, with their mode."""
    lines = [
        *(
            b"#!" + _BUILD + rest
            for rest in (b"/bin/python", b"/bin/perl -w", b"/bin/python3.11\r")
        ),
        b"#! " + _BUILD + b"/bin/python3.11 -s",
        b"#!  " + _BUILD + b"/bin/python3.11.2",
        b"#!/usr/bin/env python",
        b"#!" + _BUILD + b"/bin/bash " + _BUILD + b"/lib/x",
        b"#!" + _BUILD + b"/bin/py\\ thon3 a b",
        b"#!" + _BUILD + b"/bin/python\t-x",
        b"#!" + _BUILD + "/bin/python\N{ARABIC-INDIC DIGIT THREE}".encode(),
        b"#!" + _BUILD + b"/bin/python\xc3( -x\xe2\x82",
        b"#!\xff\xfe" + _BUILD + b"/bin/python",
        b"#!/bin/sh -" + b"x" * 140 + b" ",
        b"#!/opt/" + b"y" * 130 + b"/python3 -u",
        b"#! bin/" + _BUILD + b"/python",
        b"#!\t" + _BUILD + b"/bin/python" + b"z" * 100,
        b"#!" + _BUILD + b"/bin/pyth\0on",
    ]
    found = {}
    for number, line in enumerate(lines):
        found[f"full {number}"] = (
            "text",
            line + b"\nimport x\n" + _BUILD + b"/a:" + _BUILD + b"/b\n",
        )
        found[f"line {number}"] = "text", line + b"\n"
        found[f"short {number}"] = "text", line
    rng = random.Random(1)
    words = [
        _BUILD,
        _BUILD + b"/bin/python",
        b"\0",
        b"\n",
        b"abc",
        b" ",
        b"/",
        b"\xff",
        _BUILD[:99],
    ]
    for number in range(150):
        data = b"".join(rng.choices(words, k=rng.randrange(1, 40)))
        found[f"binary {number}"] = "binary", data
        start = b"#!/" if number % 2 else b""
        found[f"text {number}"] = "text", start + data
    return found


@pytest.mark.parametrize("prefix", [*PREFIXES, "/with a blank/in it"])
def test_awkward_files(tmp_path: Path, prefix: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    files = _awkward()
    for name, (_, data) in files.items():
        (tree / name).write_bytes(data)
    said = {
        name: {"prefix_placeholder": _BUILD.decode(), "file_mode": mode}
        for name, (mode, _) in files.items()
    }
    about = About("awkward", paths=said)
    package = Package.of(about, pack(tmp_path / "packed", tree, about))
    compared = 0
    for entry, stored, installed in _prefixed(install_for([package], tmp_path, prefix)):
        if " " in prefix and _ends_in_prefix(stored):
            continue  # where the interpreter is the prefix itself, and so a directory
        found = _relocated(entry, stored, prefix)
        if found is None:
            whole = stored
        else:
            whole = found.read(0, found.size, lambda at, size, data=stored: data[at : at + size])
            assert found.size == len(installed)
        assert whole == installed, (entry["_path"], stored)
        compared += 1
    assert compared > 300


def _ends_in_prefix(stored: bytes) -> bool:
    line = stored.partition(b"\n")[0].split(b" ")[0]
    return line.startswith(b"#!") and not line.rpartition(_BUILD)[2].count(b"/")
