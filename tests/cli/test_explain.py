from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from envstore.resolver.lock import Lock
from envstore.resolver.lockfile import encode_lock
from envstore.resolver.request import CondaRequest, PypiRequest, Request
from envstore.store.locks import save_lock
from envstore.store.refs import RefName, move_ref
from envstore.store.repository import Repository
from envstore.store.snapshots import save_snapshot
from tests.commands import Cli
from tests.locks import conda, wheel


def environment() -> Lock:
    return Lock(
        "linux-64",
        (
            conda("python", "3.11.7", depends=("__glibc >=2.17", "libzlib >=1.2")),
            conda("libzlib", "1.3"),
            wheel("pandas", "2.2", requires=("six>=1.5",), requires_python=">=3.9"),
            wheel("six", "1.17"),
            wheel("lonely"),
        ),
        virtual={"__glibc": "2.28"},
        request=Request(
            conda=CondaRequest(("python 3.11.*",)), pypi=PypiRequest(("pandas>=2", "six"))
        ),
    )


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "envstore.lock"
    path.write_bytes(encode_lock(environment()))
    return path


def test_a_lock_file_is_explained(cli: Cli, lock: Path) -> None:
    assert cli.ok("explain", lock, "six").splitlines() == [
        "six 1.17, a Python package",
        "asked for: six",
        "through pandas>=2:",
        "  pandas 2.2 needs six>=1.5",
        "needed by 1 package:",
        "  pandas 2.2 needs six>=1.5",
    ]
    assert "python 3.11.7 needs libzlib >=1.2" in cli.ok("explain", lock, "libzlib")


def test_what_nothing_leads_to_is_said(cli: Cli, lock: Path) -> None:
    said = cli.ok("explain", lock, "lonely")
    assert "nothing that was asked for leads to it" in said


def test_what_the_target_must_have_is_explained(cli: Cli, lock: Path) -> None:
    said = cli.ok("explain", lock, "__glibc").splitlines()
    assert said[0] == "__glibc 2.28, a virtual package: what the target must have"
    assert "  python 3.11.7 needs __glibc >=2.17" in said


def test_json_has_the_chains(cli: Cli, lock: Path) -> None:
    (found,) = cli.json("explain", lock, "six")["found"]
    need = {"kind": "pypi", "name": "pandas", "version": "2.2", "constraint": "six>=1.5"}
    assert found == {
        "kind": "pypi",
        "name": "six",
        "version": "1.17",
        "needed_by": [need],
        "chains": [{"asked": "six", "needs": []}, {"asked": "pandas>=2", "needs": [need]}],
    }


def test_the_lock_of_a_ref_is_explained(stored: Cli) -> None:
    with Repository.open(str(stored.store)) as repository:
        old = repository.snapshot(repository.resolve("tree"))
        digest = save_lock(repository.objects, encode_lock(environment()))
        new = save_snapshot(repository.objects, replace(old, kind="env", lock=digest))
        move_ref(repository.objects, RefName.parse("analysis"), new, None)
    assert "pandas 2.2 needs six>=1.5" in stored.ok("explain", "analysis", "six")


def test_what_has_no_lock_cannot_be_explained(stored: Cli) -> None:
    said = stored.fails(1, "explain", "tree", "numpy")
    assert "tree has no lock: what was pushed is no environment" in said
    assert "push it from a specification or a lock" in said


def test_what_is_not_there_is_named_with_what_is_similar(cli: Cli, lock: Path) -> None:
    said = cli.fails(1, "explain", lock, "panda")
    assert "panda is not in this environment (there is pandas" in said


def test_a_specification_is_no_lock(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("numpy\n")
    said = cli.fails(2, "explain", path, "numpy")
    assert f"{path} is no lock (make one: envstore lock {path})" in said


def test_a_broken_lock_is_said_where(cli: Cli, lock: Path) -> None:
    text = lock.read_text()
    lock.write_text(text.replace('"name": "six"', '"name": "../six"'))
    assert "packages[3].name: is not a normalised name" in cli.fails(1, "explain", lock, "six")
    lock.write_text(text[:300])
    assert "envstore.lock, line " in cli.fails(1, "explain", lock, "six")
