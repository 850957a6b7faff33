"""Environments as users make them: from files of their own to programs that run from a mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.channel.conda import Channel
from tests.channel.pypi import Index
from tests.commands import Cli
from tests.s3server import S3Server


def _run(prefix: Path, *command: str) -> str:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(prefix / "bin" / command[0]), *command[1:]],
        env=kept, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@contextmanager
def _mounted(cli: Cli, ref: str, path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    cli.ok("mount", ref, str(path))
    try:
        yield path
    finally:
        cli.ok("umount", str(path))


def test_conda_and_pip_in_one_environment_at_two_paths_at_once(
    cli: Cli, numpy_channel: Channel, real_index: Index, tmp_path: Path
) -> None:
    (cli.root / "environment.yml").write_text(
        f"""
name: mixed
channels:
  - '{numpy_channel.url}'
dependencies:
  - python
  - numpy
  - binprefix
  - hello-pkg
  - pip:
    - --no-index
    - --find-links {real_index.find_links}
    - pandas
    - scikit-learn
    - click
    - tool-pkg
"""
    )
    cli.ok("init")
    cli.ok("lock", "environment.yml", "-o", "envstore.lock")
    said = cli.json("push", "mixed", "envstore.lock")
    assert said["packages"] == said["new_packages"] > 10
    listed = {item["name"]: item for item in cli.json("show", "mixed", "--packages")["packages"]}
    assert listed["numpy"]["kind"] == "conda"
    assert listed["pandas"]["kind"] == "pypi"
    program = (
        "import sys, numpy, pandas, sklearn.linear_model as m, click\n"
        "fit = m.LinearRegression().fit([[0.0], [1.0]], [1.0, 3.0])\n"
        "print(sys.prefix, round(fit.coef_[0], 6), numpy.__file__, pandas.__file__)"
    )
    with ExitStack() as mounts:
        places = [
            mounts.enter_context(_mounted(cli, "mixed", tmp_path / name))
            for name in ("here", "a rather longer path, with blanks, over there")
        ]
        for place in places:
            told = _run(place, "python", "-c", program)
            assert told.startswith(f"{place} 2.0 {place}/lib/")
            assert f"{place}/lib/" in told.rpartition("numpy")[2]
            assert _run(place, "tool", "x") == f"tool 2.0 1.1 {place} ['x']\n"
            assert _run(place, "bpshow").startswith(f"{place}\n")
            assert _run(place, "hello") == f"hello 1.1 from {place} []\n"
        sizes = {(place / "bin/tool").stat().st_size for place in places}
        assert len(sizes) == 2
    assert cli.json("verify")["problems"] == []


def test_requirements_with_a_local_interpreter(
    cli: Cli, wheel_index: Index, tmp_path: Path
) -> None:
    (cli.root / "requirements.txt").write_text(
        f"--no-index\n--find-links {wheel_index.find_links}\ntool-pkg[fancy]==1.0\n"
    )
    cli.ok("init")
    first = cli.json("push", "tools", "requirements.txt")
    assert first["new_packages"] == first["packages"]
    with _mounted(cli, "tools", tmp_path / "mount") as place:
        assert _run(place, "tool") == f"tool 1.0 1.1 {place} []\n"
        assert _run(place, "python3", "-c", "import ssl, sys; print(sys.prefix)") == f"{place}\n"
    again = cli.json("push", "tools", "requirements.txt")
    assert again["unchanged"]
    assert cli.json("show", "tools")["lock"] is not None
    cli.ok("show", "tools", "--lock")


def test_what_is_no_specification_is_pushed_as_a_tree(cli: Cli) -> None:
    cli.ok("init")
    (cli.root / "data.txt").write_text("To be, or not to be, that is the question:\n")
    done = cli.json("push", "data", "data.txt")
    assert (done["kind"], done["warnings"]) == ("dir", [])
    (cli.root / "names.txt").write_text("# who knows\nleaf\ntool-pkg\n")
    done = cli.json("push", "names", "names.txt")
    assert done["kind"] == "dir"
    assert done["warnings"] == [
        "names.txt is stored as a file: if these are names of packages, push --pip names.txt"
    ]
    assert cli.json("push", "names", "names.txt", "--kind", "dir")["warnings"] == []
    (cli.root / "project").mkdir()
    (cli.root / "project" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    said = cli.json("push", "project", "project")
    assert said["kind"] == "dir"
    assert any("push project/pyproject.toml" in warning for warning in said["warnings"])
    (cli.root / "requirements.txt").write_text("leaf\n")
    assert cli.json("push", "spec", "requirements.txt", "--kind", "dir")["kind"] == "dir"


def test_packages_are_shared_over_s3(
    cli: Cli, conda_channel: Channel, s3_server: S3Server, tmp_path: Path
) -> None:
    """What one machine stored, another composes and mounts without fetching a package."""
    cli.env |= s3_server.env
    cli.env["ENVSTORE_URL"] = s3_server.url(s3_server.new_bucket(), "team")
    cli.ok("init")
    (cli.root / "environment.yml").write_text(
        f"channels: ['{conda_channel.url}']\ndependencies: [python, hello-pkg, binprefix]\n"
    )
    first = cli.json("push", "tools", "environment.yml")
    lock = cli.root / "from-the-store.lock"
    lock.write_text(cli.ok("show", "tools", "--lock"))
    other = {"ENVSTORE_CACHE_DIR": str(tmp_path / "another machine")}
    done = cli("--json", "push", "again", lock, env=other)
    second = done.json
    assert (second["new_packages"], second["downloaded_bytes"]) == (0, 0)
    assert second["manifest"] == first["manifest"]
    with _mounted(cli, "again", tmp_path / "mount") as place:
        assert _run(place, "hello") == f"hello 1.1 from {place} []\n"
        assert _run(place, "bpshow").startswith(f"{place}\n")
    assert cli.json("verify", "--read-data")["ok"] is True
