"""pixi's manifests: environments, features, targets and what becomes of each table."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.request import Request
from envstore.resolver.specs import read_specs

MANIFEST = """\
[workspace]
name = "science"
channels = ["conda-forge", { channel = "https://conda.example/first", priority = 2 }]
platforms = ["linux-64", "linux-aarch64"]
channel-priority = "disabled"
exclude-newer = "2025-03-01"
pypi-options = { index-url = "https://index.example/simple" }

[dependencies]
python = "3.11.*"
numpy = { version = ">=1.26,<3", build = "py*", channel = "conda-forge" }
zlib = "*"
old = "1.2"

[host-dependencies]
gcc = "*"

[pypi-dependencies]
six = "*"
torch = { version = ">=2", extras = ["a", "b"], index = "https://torch.example/whl" }
tool = { git = "https://git.example/tool", rev = "abc" }
win = { version = "*", env-markers = "sys_platform == 'win32'" }
science = { path = ".", editable = true }

[pypi-options]
extra-index-urls = ["https://more.example/simple"]
no-build = ["torch"]
dependency-overrides = { click = "==8" }

[target.linux.dependencies]
old = "1.3"
patchelf = "*"
[target.linux-aarch64.dependencies]
old = "1.4"
[target.win.dependencies]
winonly = "*"
[target.linux-64.pypi-dependencies]
fast = ">=1"

[activation.env]
MODE = "fast"
LEVEL = "1"
[target.unix.activation.env]
LEVEL = "2"

[system-requirements]
libc = { family = "glibc", version = "2.28" }
linux = "5.10"

[feature.cuda]
channels = ["nvidia"]
platforms = ["linux-64"]
system-requirements = { cuda = "12" , libc = "2.34" }
[feature.cuda.dependencies]
cudart = "12.*"
[feature.cuda.activation.env]
MODE = "gpu"
[feature.test.dependencies]
pytest = "*"

[environments]
gpu = ["cuda", "test"]
bare = { features = ["test"], no-default-feature = true }

[tasks]
run = "python x.py"
"""


def read(tmp_path: Path, text: str = MANIFEST, **choices: object) -> Request:
    name = str(choices.pop("name", "pixi.toml"))
    (tmp_path / name).write_text(text)
    found = read_specs([tmp_path / name], **{"platform": "linux-64", **choices})  # type: ignore[arg-type]
    assert isinstance(found, Request)
    return found


def test_the_default_environment(tmp_path: Path) -> None:
    warnings: list[str] = []
    found = read(tmp_path, warnings=warnings)
    assert found.name == "science"
    assert found.conda.specs == (
        "old ==1.3",
        "patchelf",
        "python 3.11.*",
        "conda-forge::numpy >=1.26,<3 py*",
        "zlib",
        "gcc",
    )
    assert found.conda.channels == ("https://conda.example/first", "conda-forge")
    assert found.conda.priority == "disabled"
    assert found.pypi.requirements == (
        "fast>=1",
        "six",
        "torch[a,b]>=2",
        "tool @ git+https://git.example/tool@abc",
        'win; sys_platform == "win32"',
    )
    assert found.pypi.default_index == "https://index.example/simple"
    assert found.pypi.indexes == ("https://torch.example/whl", "https://more.example/simple")
    assert found.pypi.only_binary == ("torch",)
    assert found.pypi.overrides == ("click==8",)
    assert found.variables == {"LEVEL": "2", "MODE": "fast"}
    assert found.virtual == {"__glibc": "2.28", "__linux": "5.10"}
    assert found.platforms == ("linux-64", "linux-aarch64")
    assert found.exclude_newer == "2025-03-02T00:00:00Z"
    assert ["science, the project itself" in warning for warning in warnings] == [True]


def test_points_in_time(tmp_path: Path) -> None:
    for text, time in {
        "2025-03-01T10:00:00+02:00": "2025-03-01T10:00:00+02:00",
        "2025-03-01T10:00:00": "2025-03-01T10:00:00Z",
        "2024-12-31": "2025-01-01T00:00:00Z",
    }.items():
        assert read(tmp_path, MANIFEST.replace("2025-03-01", text)).exclude_newer == time
    warnings: list[str] = []
    for text in ("7d", "2025-13-01"):
        found = read(tmp_path, MANIFEST.replace("2025-03-01", text), warnings=warnings)
        assert found.exclude_newer == ""
    assert sum("is not a point in time, and not followed" in text for text in warnings) == 2


def test_other_platforms_and_environments(tmp_path: Path) -> None:
    assert "old ==1.4" in read(tmp_path, platform="linux-aarch64").conda.specs
    gpu = read(tmp_path, environment="gpu")
    assert gpu.conda.specs[:2] == ("cudart 12.*", "pytest")
    assert gpu.conda.channels[0] == "nvidia"
    assert gpu.variables["MODE"] == "gpu"
    assert gpu.virtual == {"__cuda": "12", "__glibc": "2.34", "__linux": "5.10"}
    assert gpu.platforms == ("linux-64",)
    assert read(tmp_path, environment="bare").conda.specs == ("pytest",)
    with pytest.raises(UsageError, match=r"no environment 'x' \(it has bare, default, gpu\)"):
        read(tmp_path, environment="x")
    with pytest.raises(UsageError, match="is for linux-64, not linux-aarch64"):
        read(tmp_path, environment="gpu", platform="linux-aarch64")


def test_a_manifest_inside_of_a_project(tmp_path: Path) -> None:
    text = """\
[project]
name = "demo"
requires-python = ">=3.10"
dependencies = ["click>=8"]
optional-dependencies = { plot = ["matplotlib"] }
[dependency-groups]
test = ["pytest"]
[tool.pixi.workspace]
channels = ["conda-forge"]
platforms = ["linux-64"]
[tool.pixi.dependencies]
zlib = "*"
[tool.pixi.environments]
full = ["plot", "test"]
"""
    found = read(tmp_path, text, name="pyproject.toml")
    assert found.conda.specs == ("zlib", "python >=3.10")
    assert found.pypi.requirements == ("click>=8",)
    assert (found.name, found.python) == ("demo", ">=3.10")
    full = read(tmp_path, text, name="pyproject.toml", environment="full")
    assert sorted(full.pypi.requirements) == ["click>=8", "matplotlib", "pytest"]


def test_a_lock_beside_it_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "pixi.lock").write_text("version: 6\nenvironments: {}\npackages: []\n")
    warnings: list[str] = []
    read(tmp_path, warnings=warnings)
    assert any("pixi.lock to take what that holds" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('zlib = "*"', "zlib = 1"), "the dependency zlib is not a table"),
        (('zlib = "*"', 'zlib = { path = "../zlib" }'), "zlib is built from source"),
        (('zlib = "*"', 'zlib = { vesion = "1" }'), "'vesion' of the dependency zlib is not known"),
        (('zlib = "*"', "zlib = '1\"]'"), "version of the dependency zlib is not written like"),
        (('zlib = "*"', 'zlib = {\n  version = "1" }'), "inline tables are of one line"),
        (('zlib = "*"', 'zlib = ">="'), "is not a conda package specification"),
        (('zlib = "*"', 'zlib = "1"\nzlib = "2"'), r"pixi.toml:\d+:\d+: not TOML: Cannot overwr"),
        (('six = "*"', 'six = { path = "nowhere" }'), "six: there is no /"),
        (('six = "*"', 'six = { path = "nowhere", editable = true }'), "project that can change"),
        (('six = "*"', 'six = "1.0"'), "version of six is not one: Invalid specifier"),
        (('"disabled"', '"sometimes"'), "'sometimes' is no channel priority"),
        (("glibc", "musl"), "the C library musl is not supported"),
        (('["cuda", "test"]', '["nope"]'), "no feature 'nope'"),
        (("index.example", "u:hunter2@index.example"), "user name or password"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in MANIFEST
    environment = "gpu" if "nope" in message else ""
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, MANIFEST.replace(*change), environment=environment)
    assert "pixi.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
