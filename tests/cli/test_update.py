"""Updating what was pushed, over the tests' own channel and index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from envstore.resolver.lock import Lock
from envstore.resolver.lockfile import stored_lock
from envstore.store.repository import Repository
from tests.channel.conda import Channel
from tests.channel.pypi import Index, build_index
from tests.commands import Cli


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("index") / "index", native=False)


def write(cli: Cli, index: Index, *lines: str) -> Path:
    path = cli.root / "requirements.txt"
    text = ["--no-index", f"--find-links {index.find_links}", *lines]
    path.write_text("".join(f"{line}\n" for line in text))
    return path


def versions(cli: Cli, ref: str = "analysis") -> dict[str, str]:
    with Repository.open(str(cli.store)) as repository:
        lock = stored_lock(repository, ref)
    return {item.name: item.version for item in lock.pypi()}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, index: Index) -> Cli:
    """A store whose ``analysis`` was locked when there was less to choose from."""
    cli = Cli(tmp_path_factory.mktemp("template") / "cli")
    write(cli, index, "leaf==1.0", "tool-pkg==1.0", "schemes")
    cli.ok("lock", "requirements.txt")
    write(cli, index, "tool-pkg", "schemes")
    # The versions of the lock that is there stay, so that newer ones are left for later.
    cli.ok("lock", "requirements.txt")
    cli.ok("init")
    cli.ok("push", "analysis", "envstore.lock")
    assert versions(cli) == {"leaf": "1.0", "tool-pkg": "1.0", "schemes": "1.0"}
    return cli


@pytest.fixture
def outdated(cli: Cli, template: Cli) -> Cli:
    """The command line with a copy of that store."""
    shutil.copytree(template.store, cli.store)
    return cli


def test_everything_is_updated(outdated: Cli) -> None:
    before = outdated.refs()
    said = outdated.ok("update", "analysis", "--dry-run").splitlines()
    assert [line.split() for line in said] == [
        ["package", "kind", "was", "is"],
        ["leaf", "pypi", "1.0", "1.1"],
        ["tool-pkg", "pypi", "1.0", "2.0"],
    ]
    assert outdated.refs() == before
    said = outdated.ok("update", "analysis", "-m", "newer")
    assert "pushed analysis:latest" in said
    assert versions(outdated) == {"leaf": "1.1", "tool-pkg": "2.0", "schemes": "1.0"}
    assert "newer" in outdated.ok("log", "analysis")
    assert outdated.ok("update", "analysis") == "analysis is up to date\n"


def test_only_what_is_named_is_updated(outdated: Cli) -> None:
    found = outdated.json("update", "analysis", "Leaf")
    assert found["changes"] == [{"kind": "pypi", "name": "leaf", "before": "1.0", "after": "1.1"}]
    assert found["pushed"]["new_packages"] == 1
    assert versions(outdated) == {"leaf": "1.1", "tool-pkg": "1.0", "schemes": "1.0"}
    found = outdated.json("update", "analysis", "--dry-run")
    assert [change["name"] for change in found["changes"]] == ["tool-pkg"]
    assert found["pushed"] is None


def test_what_a_named_package_needs_comes_with_it(outdated: Cli) -> None:
    # tool-pkg 2.0 needs leaf >=1.1, which nobody asked for by name.
    found = outdated.json("update", "analysis", "tool-pkg", "--dry-run")["changes"]
    assert [(change["name"], change["after"]) for change in found] == [
        ("leaf", "1.1"),
        ("tool-pkg", "2.0"),
    ]


def test_nothing_newer_fits_what_stays(outdated: Cli, index: Index) -> None:
    write(outdated, index, "wants-old-leaf")
    outdated.ok("push", "old", "requirements.txt")
    said = outdated.ok("update", "old", "leaf")
    assert said == "nothing newer of leaf fits what old is made from and what stays\n"


def test_an_interpreter_stays_unless_it_is_named(outdated: Cli, index: Index) -> None:
    write(outdated, index, "tool-pkg")
    outdated.ok("pull", "analysis", "copy")
    (module,) = (outdated.root / "copy").glob("lib*/python3*/this.py")
    module.write_text("# another interpreter than that of this machine\n")
    program = outdated.root / "copy/bin/python"
    outdated.ok("push", "odd", "requirements.txt", "--python", str(program))
    shutil.rmtree(outdated.root / "copy")
    assert outdated.ok("update", "odd") == "odd is up to date\n"
    found = outdated.json("update", "odd", "python")
    assert [change["kind"] for change in found["changes"]] == ["python"]
    assert outdated.ok("update", "odd", "python").startswith("nothing newer of python")


def test_conda_packages_are_updated(cli: Cli, conda_channel: Channel) -> None:
    path = cli.root / "environment.yml"

    def lock(*specs: str) -> None:
        lines = "".join(f"  - {spec}\n" for spec in specs)
        path.write_text(f"channels: ['{conda_channel.url}']\ndependencies:\n{lines}")
        cli.ok("lock", "environment.yml")

    lock("greeting ==1.0", "settings")
    lock("greeting", "settings")
    cli.ok("init")
    cli.ok("push", "analysis", "envstore.lock")
    (change,) = cli.json("update", "analysis")["changes"]
    assert change == {"kind": "conda", "name": "greeting", "before": "1.0", "after": "2.0"}
    with Repository.open(str(cli.store)) as repository:
        found: Lock = stored_lock(repository, "analysis")
    assert {item.name: item.version for item in found.conda()}["greeting"] == "2.0"
    assert found.request.conda.specs == ("greeting", "settings")


def test_what_cannot_be_updated_is_said(outdated: Cli, tree: Path) -> None:
    assert "numpy is not in this environment" in outdated.fails(1, "update", "analysis", "numpy")
    outdated.ok("push", "data", tree, "--kind", "dir")
    assert "data has no lock" in outdated.fails(1, "update", "data")
    outdated.fails(1, "update", "other")
    outdated.fails(2, "update", "@0123456789ab")


def test_a_lock_of_another_tool_is_not_resolved_again(cli: Cli, conda_channel: Channel) -> None:
    package = conda_channel.package("settings")
    url = conda_channel.package_url("settings")
    (cli.root / "explicit.txt").write_text(f"@EXPLICIT\n{url}#sha256:{package.sha256}\n")
    cli.ok("init")
    cli.ok("push", "analysis", "explicit.txt")
    said = cli.fails(2, "update", "analysis")
    assert "the lock does not say what was asked for" in said
