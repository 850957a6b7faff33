from __future__ import annotations

import os
import sys

import pytest
from packaging.tags import sys_tags

from envstore.errors import UsageError
from envstore.resolver.target import DEFAULT_GLIBC, MACHINES, Target, make_target, own_platform

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC", "CUDA", "LINUX", "ARCHSPEC"):
        monkeypatch.delenv(f"CONDA_OVERRIDE_{name}", raising=False)


def other_platform() -> str:
    return "linux-64" if own_platform() != "linux-64" else "linux-aarch64"


def test_this_machine_is_the_default() -> None:
    target = make_target()
    assert target.machine == os.uname().machine
    assert target.runs_here
    assert f"glibc {target.virtual['__glibc']}" == os.confstr("CS_GNU_LIBC_VERSION")
    assert target.virtual["__archspec"] == f"1={target.machine}"
    assert target.chosen == frozenset()


def test_wheel_tags_are_those_of_this_interpreter() -> None:
    ours = make_target().wheel_tags(MINOR)
    assert set(ours) == {tag for tag in sys_tags() if "musllinux" not in tag.platform}
    assert len(ours) == len(set(ours))


def test_other_machines_are_of_the_oldest_kind_in_use() -> None:
    target = make_target(other_platform())
    assert target.virtual["__glibc"] == DEFAULT_GLIBC
    assert "__cuda" not in target.virtual
    assert not target.runs_here
    assert target.uv_platform() == f"{MACHINES[other_platform()]}-manylinux_2_28"


def test_what_is_said_counts() -> None:
    target = make_target("linux-64", glibc="2.30", cuda="12.4")
    assert target.virtual["__glibc"] == "2.30"
    assert target.virtual["__cuda"] == "12.4"
    assert target.uv_platform() == "x86_64-manylinux_2_28"
    assert target.chosen == {"__glibc", "__cuda"}


def test_overrides_of_conda_count_unless_something_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONDA_OVERRIDE_GLIBC", "2.17")
    monkeypatch.setenv("CONDA_OVERRIDE_CUDA", "11.8")
    monkeypatch.setenv("CONDA_OVERRIDE_ARCHSPEC", "x86_64_v3")
    assert make_target("linux-64").virtual["__glibc"] == "2.17"
    assert make_target("linux-64").virtual["__archspec"] == "1=x86_64_v3"
    assert make_target("linux-64", glibc="2.35").virtual["__glibc"] == "2.35"
    assert "__cuda" not in make_target("linux-64", cuda="none").virtual


def test_wishes_of_a_specification_do_not_replace_what_was_said() -> None:
    target = make_target("linux-64", cuda="12.4").wanting({"__cuda": "11", "__glibc": "2.17"})
    assert target.virtual["__cuda"] == "12.4"
    assert target.virtual["__glibc"] == "2.17"
    assert target.wanting({"__unix": ""}) == target


def test_what_is_compiled_here_runs_where_the_c_library_is_as_new() -> None:
    assert not make_target(glibc="2.17").runs_here
    assert make_target(glibc="2.99").runs_here


@pytest.mark.parametrize("platform", ["osx-arm64", "win-64", "linux-65", ""])
def test_unsupported_platforms(platform: str) -> None:
    if not platform:
        assert make_target(platform) == make_target()
        return
    with pytest.raises(UsageError, match="unsupported platform"):
        make_target(platform)


@pytest.mark.parametrize("version", ["", "two", "2.28; rm", "2..3"])
def test_versions_that_are_none(version: str) -> None:
    if not version:  # an empty override, as conda has it: there is none
        assert "__cuda" not in make_target("linux-64", cuda=version).virtual
        return
    with pytest.raises(UsageError, match="no version for __glibc"):
        make_target("linux-64", glibc=version)


def test_a_c_library_that_no_wheel_is_for() -> None:
    with pytest.raises(UsageError, match="too old"):
        make_target("linux-64", glibc="2.12").uv_platform()
    with pytest.raises(UsageError, match="no GNU C library"):
        Target("linux-64").wheel_tags("3.11")


def test_other_architectures_are_resolved_only_at_home() -> None:
    with pytest.raises(UsageError, match="on another machine"):
        make_target("linux-s390x").uv_platform()
