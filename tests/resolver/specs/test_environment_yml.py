"""conda's environment files: dependencies, selectors, the pip section, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.request import Request
from envstore.resolver.specs import read_specs


def read(
    tmp_path: Path, text: str, *, platform: str = "linux-64", warnings: list[str] | None = None
) -> Request:
    path = tmp_path / "environment.yml"
    path.write_text(text)
    request = read_specs([path], platform=platform, warnings=warnings)
    assert isinstance(request, Request)
    return request


WHOLE = """\
name: science
channels:
  - https://conda.example/team
  - conda-forge
  - nodefaults
  - ./local
prefix: /home/somebody/env
platforms: [linux-64, linux-aarch64]
dependencies:
  - python=3.11
  - numpy>=1.26,<3  # fast
  - pytorch=2.4=*cuda*  # [linux64]
  - conda-forge::cudatoolkit=11.8
  - python_abi 3.11.* *_cp311
  - tool[version='>=1', build='x*']
  - win-only  # [win]
  - arm-only  # [aarch64]
  - sel(linux): patchelf
  - sel(osx): cctools
  - sel(unix): [bash, zsh]
  - pip
  - pip:
    - requests>=2
    - -r more.txt
    - torch ; python_version < "4"
    - --extra-index-url https://index.example/whl/cu124
    - win-wheel  # [win]
    - sel(linux): linux-wheel
variables:
  MODE: fast
  THREADS: 4
"""


def test_everything_a_file_may_hold(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("six\n")
    warnings: list[str] = []
    found = read(tmp_path, WHOLE, warnings=warnings)
    assert warnings == []
    assert found.name == "science"
    assert found.conda.channels == (
        "https://conda.example/team",
        "conda-forge",
        f"file://{tmp_path}/local",
    )
    assert found.conda.specs == (
        "python 3.11.*",
        "numpy >=1.26,<3",
        "pytorch ==2.4 *cuda*",
        "conda-forge::cudatoolkit 11.8.*",
        "python_abi 3.11.* *_cp311",
        "tool >=1 x*",
        "patchelf",
        "bash",
        "zsh",
        "pip",
    )
    assert found.pypi.requirements == (
        "requests>=2",
        "six",
        'torch; python_version < "4"',
        "linux-wheel",
    )
    assert found.pypi.indexes == ("https://index.example/whl/cu124",)
    assert found.variables == {"MODE": "fast", "THREADS": "4"}
    assert found.platforms == ("linux-64", "linux-aarch64")
    assert [Path(source.name).name for source in found.sources] == ["environment.yml", "more.txt"]


def test_another_platform_has_other_packages(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("six\n")
    specs = read(tmp_path, WHOLE, platform="linux-aarch64").conda.specs
    assert "arm-only" in specs
    assert "pytorch ==2.4 *cuda*" not in specs
    with pytest.raises(UsageError, match="is for linux-64, linux-aarch64, not linux-s390x"):
        read(tmp_path, WHOLE, platform="linux-s390x")


def test_channels_that_are_not_given(tmp_path: Path) -> None:
    text = "dependencies: [zlib]\n"
    assert read(tmp_path, text).conda.channels == ("conda-forge",)
    path = tmp_path / "environment.yml"
    found = read_specs([path], platform="linux-64", default_channels=["https://conda.example/a"])
    assert isinstance(found, Request)
    assert found.conda.channels == ("https://conda.example/a",)


def test_a_whole_section_goes_with_its_selector(tmp_path: Path) -> None:
    text = "dependencies:\n  - zlib\n  - pip:  # [win]\n    - six\n  - bzip2\n"
    found = read(tmp_path, text)
    assert found.conda.specs == ("zlib", "bzip2")
    assert found.pypi.requirements == ()


def test_what_has_no_meaning_is_told(tmp_path: Path) -> None:
    warnings: list[str] = []
    read(tmp_path, "dependencies: [a]\nextra: 1\n# [x]\nname: n  # [my name]\n", warnings=warnings)
    assert [text.partition("environment.yml")[2] for text in warnings] == [
        ":4: [my name] is not taken for a selector: 'my' is no platform",
        ": 'extra' has no meaning in an environment file",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dependencies:\n  - [a\n", r":3:1: not YAML: .*expected"),
        ("dependencies: [a]\n\tname: x\n", r":2:1: not YAML: .*cannot start any token"),
        ("dependencies: [a]\ndependencies: [b]\n", r":2:1: not YAML: 'dependencies' is given tw"),
        ("dependencies: !!python/object:os.system {}\n", r":1:15: not YAML: could not determine"),
        ("dependencies: [a]\nname: [1]\n", "name is not a string"),
        ("dependencies: [a]\nchannels: x\n", "channels is not a list of strings"),
        ("dependencies:\n- a\x7f\n", r":2: not YAML: special characters are not allowed"),
        ("dependencies: [1]\n", "neither a string nor one section: 1"),
        ("dependencies: [{pip: [{a: b}]}]\n", "a line below pip is not a string"),
        ("dependencies: [{npm: [x]}]\n", "unknown section 'npm'.*known: pip, sel"),
        ("dependencies: [{sel(amiga): x}]\n", "'sel\\(amiga\\)' is no selector: 'amiga' is no pl"),
        ("dependencies: ['foo >=']\n", "'foo >=' is not a conda package specification: unable"),
        ("dependencies: [a]\nvariables: {A: [1]}\n", "neither a string nor a number"),
        ("dependencies: [a]\nvariables: {'A B': 1}\n", "'A B' is no name for a variable"),
        ("name: x\nchannels: [y]\n", "has no dependencies"),
        ("dependencies: [pip: ['-e .']]\n", "editable"),
        ("dependencies: [a]\nchannels: ['https://u:hunter2@c.example']\n", "user name or passw"),
        ("dependencies: [a]\nchannels: ['https://c.example/t/hunter2/x']\n", "channel's token"),
        ("dependencies: ['https://u:hunter2@c.example/x::a']\n", "user name or password"),
        ("dependencies: [a]\nvariables: {A: 'https://u:hunter2@c.example'}\n", "variable A: a URL"),
        ("name: 2024-99-99\ndependencies: [a]\n", "not YAML: month must be"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"environment.yml.*{message}") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_bombs(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for name in "bcdefghijk":
        before = chr(ord(name) - 1)
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 200)}]\n"
    with pytest.raises(UsageError, match="too many aliases"):
        read(tmp_path, f"{bomb}dependencies: [*k]\n")
    with pytest.raises(UsageError, match="nested too deeply"):
        read(tmp_path, f"dependencies: {'[' * 10000}\n")
    with pytest.raises(UsageError, match="more than 4 MiB of YAML"):
        read(tmp_path, "dependencies: [a]\n" + "# comment\n" * 500_000)
