"""``envstore check``: of refs, of locks that were pushed, of directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from envstore.resolver.abi.reading import pushed_tree
from envstore.resolver.libraries import stored_tree
from tests.channel.conda import Channel
from tests.commands import Cli
from tests.resolver.abi.builds import SITE, Build
from tests.resolver.locks import conda_lock, push
from tests.stores import Store

MODULE = f"{SITE}/gpu/_module.so"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """An environment with a module that misses the CUDA runtime and takes OpenSSL for granted."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a compiler")
    made = Build(tmp_path / "env")
    runtime = made.library("lib/libcudart.so.12", "void cudaFree(){}")
    ssl = made.library("lib/libssl.so.3", "void SSL_new(){}")
    source = "void cudaFree(); void go(){ cudaFree(); }"
    made.library(MODULE, source, str(runtime), str(ssl), "-Wl,-rpath,$ORIGIN/../../..")
    runtime.unlink()
    ssl.unlink()
    (made.root / "bin").mkdir()
    (made.root / "bin/tool").write_text("#!/bin/sh\n")
    (made.root / "bin/tool").chmod(0o755)
    return made


def test_what_a_pushed_environment_would_miss(cli: Cli, build: Build) -> None:
    cli.ok("init")
    cli.ok("push", "env", build.root, "--kind", "dir")
    done = cli("check", "env")
    assert done.status == 1
    said = "NEEDED_MISSING: libcudart.so.12: cannot open shared object file: No such file"
    assert said in done.out
    assert "HOST_LIBRARY: libssl.so.3" in done.out
    assert f"in {MODULE}" in done.out
    assert "1 ELF file, 1 error, 1 warning" in done.out
    assert done.err == "envstore: 1 thing would fail to load: gpu\n"

    build.library("lib/libcudart.so.12", "void cudaFree(){}")
    cli.ok("push", "env", build.root, "--kind", "dir")
    assert "2 ELF files, 0 errors, 1 warning" in cli.ok("check", "env")
    assert cli("check", "env", "--strict").status == 1
    assert cli("check", "env", "--cuda", "11.8").status == 1
    assert cli("check", "env", "--platform", "linux-s390x").status == 1
    assert cli.ok("-q", "check", "env", "--cuda", "none").count("ELF") == 0


def test_findings_as_json(cli: Cli, build: Build) -> None:
    cli.ok("init")
    cli.ok("push", "env", build.root, "--kind", "dir")
    done = cli("--json", "check", "env", "--cuda", "12.4", "--glibc", "2.31")
    assert done.status == 1
    found = done.json
    assert found["ok"] is False
    assert found["files"] == 1
    assert found["target"] == {
        "platform": found["target"]["platform"],
        "glibc": "2.31",
        "cuda": "12.4",
    }
    error, warning = found["findings"]
    assert (error["level"], error["code"]) == ("error", "NEEDED_MISSING")
    assert (error["package"], error["path"], error["subject"]) == ("gpu", MODULE, "libcudart.so.12")
    assert warning["code"] == "HOST_LIBRARY"
    assert json.loads(done.err)["error"]["exit_code"] == 1


def test_a_directory_gives_the_same_answer(cli: Cli, build: Build) -> None:
    cli.ok("init")
    cli.ok("push", "env", build.root, "--kind", "dir")
    there, here = cli("--json", "check", "env"), cli("--json", "check", build.root)
    assert here.json == there.json
    assert here.status == 1
    relative = cli("--json", "check", "./env", cwd=build.root.parent)
    assert relative.json == here.json


def test_what_was_read_once_is_remembered(build: Build, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "abi.sqlite"
    with Store(tmp_path / "store") as store:
        store.push(build.root)
        manifest = store.snapshot().manifest
        traffic = store.repository.objects.traffic

        def read() -> int:
            before = traffic.bytes_in
            assert list(pushed_tree(store.repository, manifest, kept).files) == [MODULE]
            return traffic.bytes_in - before

        first, second = read(), read()
        assert second < first
        kept.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
        assert (read(), read()) == (first, second)
        kept.unlink()
        kept.mkdir()
        assert (read(), read()) == (first, first)


def test_wrong_usage_is_told_in_a_line(cli: Cli, build: Build) -> None:
    cli.ok("init")
    cli.fails(1, "check", "nothing", says=["nothing"])
    cli.fails(1, "check", "/nowhere/at/all", says=["no such path"])
    cli.fails(2, "check", build.root / MODULE, says=["is a file"])
    cli.fails(2, "check", build.root, "--glibc", "new", says=["no version of glibc"])
    cli.fails(2, "check", build.root, "--platform", "osx-64", says=["osx-64"])


def test_stored_facts_and_stored_files_tell_the_same(
    conda_channel: Channel, tmp_path: Path
) -> None:
    cache = tmp_path / "solving"
    lock = conda_lock(conda_channel, "python", "speedup", "binprefix", cache=cache)
    with Store(tmp_path / "store") as store:
        push(store, lock, tmp_path / "machine")
        kept = stored_tree(store.repository, lock)
        assert kept is not None
        read = pushed_tree(store.repository, store.snapshot("env").manifest, tmp_path / "kept")
        assert {path: facts for path, (_, facts) in kept.files.items()} == {
            path: facts for path, (_, facts) in read.files.items()
        }
        assert kept.links == read.links
        owners = {owner.partition("-")[0] for owner, _ in kept.files.values()}
        assert owners == {"python", "speedup", "binprefix"}

        cli = Cli(tmp_path / "cli")
        cli.env["ENVSTORE_URL"] = store.url
        found = cli.json("check", "env")
    assert found["ok"] is True
    assert found["target"]["glibc"] == lock.virtual["__glibc"]
    assert {finding["code"] for finding in found["findings"]} <= {"HOST_LIBRARY"}


def test_real_packages_of_conda_and_pip_have_no_errors(
    numpy_channel: Channel, tmp_path: Path
) -> None:
    lock = conda_lock(numpy_channel, "python", "numpy", cache=tmp_path / "solving")
    with Store(tmp_path / "store") as store:
        push(store, lock, tmp_path / "machine")
        cli = Cli(tmp_path / "cli")
        cli.env["ENVSTORE_URL"] = store.url
        found = cli.json("check", "env")
    assert found["ok"] is True
    assert {finding["level"] for finding in found["findings"]} <= {"warning"}
