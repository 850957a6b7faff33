"""Locking real specifications over the tests' own channel and index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.resolver.lock import Lock
from envstore.resolver.lockfile import encode_lock, load_lock
from tests.channel.conda import Channel
from tests.channel.pypi import Index, build_index
from tests.commands import Cli

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("index") / "index", native=False)


@pytest.fixture
def work(cli: Cli) -> Path:
    """Return the directory that commands run in."""
    return cli.root


def requirements(work: Path, index: Index, *lines: str) -> Path:
    path = work / "requirements.txt"
    text = ["--no-index", f"--find-links {index.find_links}", *lines]
    path.write_text("".join(f"{line}\n" for line in text))
    return path


def environment(work: Path, channel: Channel, *lines: str) -> Path:
    path = work / "environment.yml"
    specs = "".join(f"  - {line}\n" for line in lines)
    path.write_text(f"name: analysis\nchannels: ['{channel.url}']\ndependencies:\n{specs}")
    return path


def versions(lock: Lock) -> dict[str, str]:
    return {item.name: item.version for item in (*lock.conda(), *lock.pypi())}


def test_requirements_are_locked(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "tool-pkg[fancy]==1.0", "from-source")
    said = cli.ok("lock", "requirements.txt")
    assert said == "locked envstore.lock: 0 conda packages, 4 Python packages for linux-64\n"
    lock = load_lock(work / "envstore.lock")
    assert encode_lock(lock) == (work / "envstore.lock").read_bytes()
    assert versions(lock) == {
        "from-source": "1.0",
        "leaf": "1.1",
        "schemes": "1.0",
        "tool-pkg": "1.0",
    }
    python = lock.local_python()
    assert python is not None
    assert python.version.startswith(MINOR)
    (made, leaf, _, tool) = lock.pypi()
    sdist = index.file("from-source", "1.0")
    assert made.build is not None
    assert made.build.sha256 == hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert made.url == ""
    assert leaf.sha256 == hashlib.sha256(index.file("leaf", "1.1").read_bytes()).hexdigest()
    assert tool.requested
    assert tool.extras == ("fancy",)
    assert not leaf.requested
    assert lock.tools.keys() >= {"envstore", "uv"}
    assert [source.name for source in lock.sources] == ["requirements.txt"]
    assert "through tool-pkg" in cli.ok("explain", "envstore.lock", "leaf")


def test_an_environment_of_both_kinds_is_locked(
    cli: Cli, work: Path, index: Index, conda_channel: Channel
) -> None:
    environment(work, conda_channel, f"python {MINOR}.*", "hello-pkg")
    requirements(work, index, "leaf")
    cli.ok("lock", "--conda", "environment.yml", "--pip", "requirements.txt", "-o", "both.lock")
    lock = load_lock(work / "both.lock")
    found = versions(lock)
    assert found.keys() >= {"python", "hello-pkg", "greeting", "leaf"}
    assert lock.local_python() is None
    assert lock.request.conda.specs == (f"python {MINOR}.*", "hello-pkg")
    names = [item.name for item in lock.conda()]
    assert names.index("python") < names.index("hello-pkg")
    for package in lock.conda():
        assert package.channel.rstrip("/") == conda_channel.url
    assert "hello-pkg 1.1 needs greeting >=2.0" in cli.ok("explain", "both.lock", "greeting")


def test_a_lock_that_still_holds_is_left_alone(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf<1.1")
    cli.ok("lock", "requirements.txt")
    path = work / "envstore.lock"
    before = path.stat()
    assert cli.ok("lock", "requirements.txt").startswith("unchanged envstore.lock: ")
    assert cli.ok("lock", "requirements.txt", "--check").startswith("unchanged envstore.lock: ")
    # Another version of what made it is no reason to write it again.
    lock = load_lock(path)
    path.write_bytes(encode_lock(replace(lock, tools={"uv": "0.0.1"})))
    found = cli.json("lock", "requirements.txt")
    assert (found["changed"], found["changes"], found["pypi"]) == (False, [], 1)
    assert load_lock(path).tools == {"uv": "0.0.1"}
    assert stat.S_IMODE(before.st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_versions_stay_unless_an_upgrade_is_asked_for(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf==1.0")
    cli.ok("lock", "requirements.txt")
    requirements(work, index, "leaf", "schemes")
    said = cli.fails(1, "lock", "requirements.txt", "--check")
    assert "envstore.lock is not up to date: schemes 1.0 is new (" in said
    assert versions(load_lock(work / "envstore.lock")) == {"leaf": "1.0"}
    assert cli.ok("lock", "requirements.txt").splitlines()[1].split() == [
        "schemes", "pypi", "-", "1.0",
    ]  # fmt: skip
    assert versions(load_lock(work / "envstore.lock")) == {"leaf": "1.0", "schemes": "1.0"}
    found = cli.json("lock", "requirements.txt", "--upgrade")
    assert found["changes"] == [{"kind": "pypi", "name": "leaf", "before": "1.0", "after": "1.1"}]
    assert found["changed"]


def test_conda_versions_stay_too(cli: Cli, work: Path, conda_channel: Channel) -> None:
    environment(work, conda_channel, "greeting ==1.0")
    cli.ok("lock", "environment.yml")
    environment(work, conda_channel, "greeting")
    cli.ok("lock", "environment.yml")
    assert versions(load_lock(work / "envstore.lock")) == {"greeting": "1.0"}
    cli.ok("lock", "environment.yml", "-U")
    assert versions(load_lock(work / "envstore.lock")) == {"greeting": "2.0"}


def test_locks_are_the_same_from_everywhere(
    cli: Cli, work: Path, index: Index, conda_channel: Channel
) -> None:
    found = []
    for name in ("one", "two"):
        place = work / name
        place.mkdir()
        environment(place, conda_channel, f"python {MINOR}.*", "hello-pkg")
        requirements(place, index, "from-source")
        arguments = ("lock", "environment.yml", "--pip", "requirements.txt")
        with cli.start(*arguments, "--cache-dir", str(place / "cache"), cwd=place) as process:
            process.communicate(timeout=120)
        assert process.returncode == 0
        found.append((place / "envstore.lock").read_bytes())
    assert found[0] == found[1]


def test_standard_output_gets_the_bytes_of_the_file(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    text = cli.ok("lock", "requirements.txt", "-o", "-")
    assert not (work / "envstore.lock").exists()
    cli.ok("lock", "requirements.txt")
    assert text == (work / "envstore.lock").read_text()


def test_a_pipe_may_be_named_as_a_file(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    cli.ok("lock", "requirements.txt")
    text = (work / "envstore.lock").read_text()
    assert cli.ok("-q", "lock", "requirements.txt", "-o", "/dev/stdout") == text


def test_other_formats_come_from_a_lock(
    cli: Cli, work: Path, index: Index, conda_channel: Channel
) -> None:
    environment(work, conda_channel, f"python {MINOR}.*")
    requirements(work, index, "leaf")
    cli.ok("lock", "environment.yml", "--pip", "requirements.txt")
    leaf = load_lock(work / "envstore.lock").pypi()[0]
    for form, part in (
        ("pylock", 'lock-version = "1.0"'),
        ("requirements", f"leaf==1.1 \\\n    --hash=sha256:{leaf.sha256}"),
        ("pixi", "version: 7"),
        ("explicit", "@EXPLICIT\n"),
    ):
        text = cli.ok("lock", "envstore.lock", "--format", form)
        assert part in text
        assert cli.json("lock", "envstore.lock", "--format", form) == {"format": form, "text": text}
    assert (
        cli.ok("lock", "envstore.lock", "--format", "envstore", "-o", "-")
        == (work / "envstore.lock").read_text()
    )
    cli.ok("lock", "envstore.lock", "--format", "pixi", "-o", "pixi.lock")
    cli.ok("lock", "pixi.lock", "-o", "again.lock")
    assert versions(load_lock(work / "again.lock")) == versions(load_lock(work / "envstore.lock"))


def test_what_another_tool_leaves_open_is_found(
    cli: Cli, work: Path, index: Index, conda_channel: Channel
) -> None:
    hello = conda_channel.package("hello-pkg", "1.0")
    urls = {
        name: conda_channel.package_url(name, version)
        for name, version in (("greeting", "1.0"), ("hello-pkg", "1.0"), ("python", ""))
    }
    lines = []
    for url in (urls["greeting"], urls["python"], urls["hello-pkg"]):
        data = Path(url.removeprefix("file://")).read_bytes()
        lines.append(f"{url}#{hashlib.md5(data).hexdigest()}\n")
    (work / "explicit.txt").write_text("@EXPLICIT\n" + "".join(lines))
    cli.ok("lock", "explicit.txt")
    lock = load_lock(work / "envstore.lock")
    assert [item.name for item in lock.conda()] == ["greeting", "python", "hello-pkg"]
    found = lock.conda()[2]
    assert found.depends == hello.about.depends
    assert found.noarch == "python"
    assert len(found.sha256) == 64
    (work / "explicit.txt").write_text(f"@EXPLICIT\n{urls['greeting']}#{'0' * 32}\n")
    assert "md5" in cli.fails(1, "lock", "explicit.txt", "-o", "other.lock")


def test_wheels_alone_get_an_interpreter(
    cli: Cli, work: Path, index: Index, conda_channel: Channel
) -> None:
    requirements(work, index, "leaf", "from-source")
    cli.ok("lock", "requirements.txt")
    cli.ok("lock", "envstore.lock", "--format", "pylock", "-o", "pylock.toml")
    cli.ok("lock", "pylock.toml", "-o", "local.lock")
    lock = load_lock(work / "local.lock")
    assert lock.local_python() is not None
    assert versions(lock) == {"leaf": "1.1", "from-source": "1.0"}
    assert lock.pypi()[-1].sha256 or lock.pypi()[0].sha256
    cli.ok("lock", "pylock.toml", "-o", "channel.lock", "--channel", conda_channel.url)
    lock = load_lock(work / "channel.lock")
    assert lock.local_python() is None
    assert versions(lock)["python"].startswith(MINOR)


def test_another_platform_is_resolved_for(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    said = cli("lock", "requirements.txt", "--platform", "linux-aarch64", "--python", MINOR)
    # Its interpreter cannot come from this machine.
    assert said.status != 0
    assert "linux-aarch64" in said.err


def test_what_cannot_be_had_leaves_the_lock_as_it_is(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    cli.ok("lock", "requirements.txt")
    before = (work / "envstore.lock").read_bytes()
    requirements(work, index, "leaf", "wants-missing")
    assert "not-in-the-index" in cli.fails(1, "lock", "requirements.txt")
    assert (work / "envstore.lock").read_bytes() == before
    assert sorted(path.name for path in work.glob("*.tmp")) == []


def test_usage_errors(cli: Cli, work: Path, index: Index) -> None:
    path = requirements(work, index, "leaf")
    assert "nothing to lock" in cli.fails(2, "lock")
    assert "requirements.txt is what is to be read" in cli.fails(
        2, "lock", path, "-o", "requirements.txt"
    )
    assert "there is no envstore.lock to check" in cli.fails(2, "lock", path, "--check")
    assert "--check compares" in cli.fails(2, "lock", path, "--check", "-o", "-")
    assert "cannot write" in cli.fails(1, "lock", path, "-o", "no/where.lock")
    assert "isn't-a-time" in cli.fails(2, "lock", path, "--exclude-newer", "isn't-a-time")
    assert "--output is empty" in cli.fails(2, "lock", path, "-o", "")
    said = cli.fails(2, "lock", path, "--channel", "https://me:word@channel.example/main")
    assert "--channel: a URL holds a user name or password" in said
    assert "word@" not in said
    cli.ok("lock", path)
    assert "--find-links changes nothing" in cli.fails(
        2, "lock", "envstore.lock", "-o", "x.lock", "--find-links", str(index.find_links)
    )
    assert "this lock is for linux-64, not linux-aarch64" in cli.fails(
        2, "lock", "envstore.lock", "-o", "x.lock", "--platform", "linux-aarch64"
    )
    assert "is an environment" in cli.fails(2, "lock", sys.prefix)


def test_a_lock_that_is_broken_is_not_overwritten(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    (work / "envstore.lock").write_text("{}")
    assert "not a lock of envstore" in cli.fails(1, "lock", "requirements.txt")
    assert (work / "envstore.lock").read_text() == "{}"


def test_a_link_is_written_through(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "leaf")
    (work / "real").mkdir()
    (work / "envstore.lock").symlink_to("real/env.lock")
    cli.ok("lock", "requirements.txt")
    assert (work / "envstore.lock").is_symlink()
    assert json.loads((work / "real" / "env.lock").read_text())["format"] == "envstore-lock"


def test_what_only_tells_how_a_lock_came_about_does_not_change_the_tree(
    cli: Cli, work: Path, conda_channel: Channel
) -> None:
    environment(work, conda_channel, "settings", "greeting")
    cli.ok("lock", "environment.yml")
    lock = load_lock(work / "envstore.lock")
    other = replace(
        lock,
        tools={"other": "1"},
        virtual={},
        sources=(),
        request=replace(lock.request, sources=(), exclude_newer="2026-01-01T00:00:00Z"),
    )
    (work / "other.lock").write_bytes(encode_lock(other))
    cli.ok("init")
    first = cli.json("push", "first", "envstore.lock")
    second = cli.json("push", "second", "other.lock")
    assert first["manifest"] == second["manifest"]
    assert first["digest"] != second["digest"]
    (work / "third.lock").write_bytes(encode_lock(replace(lock, variables={"A": "1"})))
    assert cli.json("push", "third", "third.lock")["manifest"] != first["manifest"]


def test_a_lock_is_for_the_same_machine_wherever_it_is_made(
    cli: Cli, work: Path, conda_channel: Channel
) -> None:
    environment(work, conda_channel, "settings")
    cli.ok("lock", "environment.yml", "--glibc", "2.17", "--cuda", "12.4")
    lock = load_lock(work / "envstore.lock")
    assert (lock.virtual["__glibc"], lock.virtual["__cuda"]) == ("2.17", "12.4")
    cli.ok("lock", "environment.yml", "--check")
    cli.ok("lock", "environment.yml", "--cuda", "none")
    lock = load_lock(work / "envstore.lock")
    assert lock.virtual["__glibc"] == "2.17"
    assert "__cuda" not in lock.virtual
    cli.ok("lock", "environment.yml", "--upgrade", "--glibc", "2.28")
    assert load_lock(work / "envstore.lock").virtual["__glibc"] == "2.28"


def test_a_wheel_that_was_built_goes_with_the_store(cli: Cli, work: Path, index: Index) -> None:
    requirements(work, index, "from-source")
    cli.ok("lock", "requirements.txt")
    cli.ok("init")
    other = work / "other"
    elsewhere = ("--cache-dir", other / "cache")
    said = cli.fails(1, "push", "analysis", "envstore.lock", *elsewhere)
    assert "from-source-1.0 was built on another machine" in said
    first = cli.json("push", "analysis", "envstore.lock")
    second = cli.json("push", "again", "envstore.lock", *elsewhere)
    assert first["manifest"] == second["manifest"]
    assert second["downloaded_bytes"] == second["new_packages"] == 0


def test_nothing_stays_from_a_channel_that_is_not_named_any_more(
    cli: Cli, work: Path, conda_channel: Channel
) -> None:
    environment(work, conda_channel, "greeting ==1.0")
    cli.ok("lock", "environment.yml")
    moved = work / "moved"
    shutil.copytree(conda_channel.path, moved)
    environment(work, replace(conda_channel, path=moved), "greeting")
    cli.ok("lock", "environment.yml")
    (package,) = load_lock(work / "envstore.lock").conda()
    assert package.url.startswith(moved.as_uri())
