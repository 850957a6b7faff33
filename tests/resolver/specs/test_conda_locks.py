"""pixi.lock, conda-lock.yml and @EXPLICIT lists."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, UsageError
from envstore.resolver.lock import Build, CondaPackage, Lock, PypiPackage
from envstore.resolver.specs import read_specs

SHA, OTHER, MD5 = "a" * 64, "b" * 64, "c" * 32
FORGE = "https://conda.example/forge"

PIXI = f"""\
version: 6
environments:
  default:
    channels:
    - url: {FORGE}/
    indexes:
    - https://index.example/simple
    packages:
      linux-64:
      - conda: {FORGE}/noarch/tool-2.0-pyh1_0.conda
      - conda: {FORGE}/linux-64/zlib-1.3-h1_0.conda
      - conda: {FORGE}/linux-64/python-3.11.7-h0_cpython.conda
      - pypi: https://files.example/idna-3.10-py3-none-any.whl
      - pypi: https://files.example/slow-1.0.tar.gz
      - pypi: ./
      osx-arm64:
      - conda: {FORGE}/linux-64/zlib-1.3-h1_0.conda
  empty:
    channels: []
    packages: {{}}
packages:
- conda: {FORGE}/linux-64/python-3.11.7-h0_cpython.conda
  sha256: {OTHER}
  depends:
  - zlib
  size: 30
- conda: {FORGE}/noarch/tool-2.0-pyh1_0.conda
  sha256: {SHA}
  noarch: python
  depends:
  - python >=3.9
  license: MIT
- conda: {FORGE}/linux-64/zlib-1.3-h1_0.conda
  sha256: {SHA}
  md5: {MD5}
  build_number: 0
  constrains:
  - other <2
  size: 20
  timestamp: 1720974491916
- pypi: https://files.example/idna-3.10-py3-none-any.whl
  name: idna
  version: '3.10'
  sha256: {SHA}
  requires_dist:
  - ruff>=0.6.2 ; extra == 'all'
  requires_python: '>=3.6'
- pypi: https://files.example/slow-1.0.tar.gz
  name: slow
  version: '1.0'
  sha256: {OTHER}
- pypi: ./
  name: mine
  version: 0.1.0
  sha256: {SHA}
"""

CONDA_LOCK = f"""\
version: 1
metadata:
  content_hash:
    linux-64: {SHA}
  channels:
  - url: {FORGE}
    used_env_vars: []
  platforms: [linux-64]
  sources: [environment.yml]
package:
- name: __glibc
  version: '2.28'
  manager: conda
  platform: linux-64
  dependencies: {{}}
  url: file:///tmp/x/linux-64/__glibc-2.28-0.tar.bz2
  hash:
    md5: ''
    sha256: null
  category: main
  optional: false
- name: zlib
  version: '1.3'
  manager: conda
  platform: linux-64
  dependencies: {{}}
  url: {FORGE}/linux-64/zlib-1.3-h1_0.conda
  hash:
    md5: {MD5}
    sha256: {SHA}
  category: dev
  optional: true
- name: idna
  version: '3.10'
  manager: pip
  platform: linux-64
  dependencies: {{}}
  url: https://files.example/idna-3.10-py3-none-any.whl
  hash:
    sha256: {OTHER}
  category: main
  optional: false
"""


def read(
    tmp_path: Path,
    text: str,
    *,
    name: str = "pixi.lock",
    warnings: list[str] | None = None,
    **choices: str,
) -> Lock:
    path = tmp_path / name
    path.write_text(text)
    chosen = {"platform": "linux-64", **choices}
    lock = read_specs([path], warnings=warnings, **chosen)  # type: ignore[arg-type]
    assert isinstance(lock, Lock)
    return lock


def test_pixi_lock(tmp_path: Path) -> None:
    warnings: list[str] = []
    lock = read(tmp_path, PIXI, warnings=warnings)
    zlib, python, tool = lock.conda()
    assert zlib == CondaPackage(
        "zlib",
        "1.3",
        "h1_0",
        "linux-64",
        f"{FORGE}/linux-64/zlib-1.3-h1_0.conda",
        SHA,
        20,
        MD5,
        FORGE,
        constrains=("other <2",),
        extra={"timestamp": 1720974491916},
    )
    assert (python.name, python.depends, python.size) == ("python", ("zlib",), 30)
    assert (tool.noarch, tool.subdir, tool.extra) == ("python", "noarch", {"license": "MIT"})
    idna, slow = lock.pypi()
    assert idna == PypiPackage(
        "idna",
        "3.10",
        "idna-3.10-py3-none-any.whl",
        "https://files.example/idna-3.10-py3-none-any.whl",
        SHA,
        requires=("ruff>=0.6.2 ; extra == 'all'",),
        requires_python=">=3.6",
    )
    assert slow.build == Build("https://files.example/slow-1.0.tar.gz", OTHER)
    assert slow.filename == slow.url == slow.sha256 == ""
    assert lock.request.conda.channels == (FORGE,)
    assert [Path(source.name).name for source in lock.sources] == ["pixi.lock"]
    [warning] = warnings
    assert "mine, the project itself, is not part of the environment" in warning


def test_the_order_of_packages_does_not_hang_on_that_of_the_lock(tmp_path: Path) -> None:
    head, _, rest = PIXI.partition("      linux-64:\n")
    lines = rest.split("\n")
    for seed in range(5):
        first = lines[:6]
        random.Random(seed).shuffle(first)
        text = "\n".join([f"{head}      linux-64:", *first, *lines[6:]])
        assert read(tmp_path, text).packages == read(tmp_path, PIXI).packages


def test_a_relative_path_of_the_lock_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pixi.lock").write_text(PIXI)
    monkeypatch.chdir(tmp_path)
    lock = read_specs([Path("pixi.lock")], platform="linux-64")
    assert isinstance(lock, Lock)
    assert lock.sources[0].name == "pixi.lock"


VARIANTS = f"""\
version: 7
platforms:
- name: gpu
  subdir: linux-64
  virtual-packages:
  - __glibc=2.28
  - __cuda=12.4
  - __archspec=1=x86_64
environments:
  default:
    channels:
    - url: {FORGE}/
    packages:
      gpu:
      - conda: {FORGE}/linux-64/zlib-1.3-h1_0.conda
packages:
- conda: {FORGE}/linux-64/zlib-1.3-h1_0.conda
  sha256: {SHA}
"""


def test_a_variant_of_a_platform(tmp_path: Path) -> None:
    lock = read(tmp_path, VARIANTS)
    assert [package.name for package in lock.conda()] == ["zlib"]
    assert lock.virtual == {"__cuda": "12.4", "__glibc": "2.28", "__archspec": "1=x86_64"}
    assert lock.platform == "linux-64"
    plain = "- name: cpu\n  subdir: linux-64\n"
    two = VARIANTS.replace("platforms:\n", f"platforms:\n{plain}", 1)
    two = two.replace("packages:\n      gpu:", "packages:\n      cpu: []\n      gpu:", 1)
    with pytest.raises(UsageError, match=r"several variants of linux-64, .*\(it is for cpu, gpu\)"):
        read(tmp_path, two)
    assert len(read(tmp_path, two.replace("cpu", "linux-64")).packages) == 0


def test_packages_that_are_built_from_source(tmp_path: Path) -> None:
    source = (
        "- conda_source: tool[abcd1234] @ {}\n  version: 1.0.0\n  build: h0\n  subdir: linux-64\n"
    )
    listed = "      - conda_source: tool[abcd1234] @ {}\npackages:\n"
    for where in ("./tool", "git+https://git.example/tool.git?tag=v1#" + "0" * 40):
        text = VARIANTS.replace("\npackages:\n", "\n" + listed.format(where)) + source.format(where)
        with pytest.raises(UsageError, match=r"tool is built from source .*build a conda package"):
            read(tmp_path, text)
    warnings: list[str] = []
    text = VARIANTS.replace("\npackages:\n", "\n" + listed.format(".")) + source.format(".")
    assert len(read(tmp_path, text, warnings=warnings).packages) == 1
    assert ["tool, the project itself, is not" in warning for warning in warnings] == [True]


def test_conda_lock(tmp_path: Path) -> None:
    warnings: list[str] = []
    lock = read(tmp_path, CONDA_LOCK, name="conda-lock.yml", warnings=warnings)
    [zlib] = lock.conda()
    assert (zlib.name, zlib.sha256, zlib.md5, zlib.channel) == ("zlib", SHA, MD5, FORGE)
    [idna] = lock.pypi()
    assert (idna.version, idna.sha256) == ("3.10", OTHER)
    assert ["categories dev are included" in warning for warning in warnings] == [True]


def test_a_package_of_several_categories(tmp_path: Path) -> None:
    again = "- name: zlib" + CONDA_LOCK.partition("- name: zlib")[2]
    again = again.replace("category: dev", "category: main")
    lock = read(tmp_path, CONDA_LOCK + again, name="conda-lock.yml")
    assert [package.name for package in lock.packages] == ["zlib", "idna"]
    other = again.replace("idna-3.10", "idna-3.11").replace("'3.10'", "'3.11'")
    with pytest.raises(UsageError, match="holds idna twice for linux-64"):
        read(tmp_path, CONDA_LOCK + other, name="conda-lock.yml")
    other = again.replace("zlib-1.3", "zlib-1.4").replace("'1.3'", "'1.4'")
    with pytest.raises(UsageError, match="holds zlib twice for linux-64"):
        read(tmp_path, CONDA_LOCK + other, name="conda-lock.yml")


@pytest.mark.parametrize(
    ("change", "choices", "message"),
    [
        (("", ""), {"environment": "x"}, r"no environment 'x' \(it has default, empty; choose"),
        (("", ""), {"environment": "empty"}, "its environment is empty"),
        (("", ""), {"platform": "linux-aarch64"}, r"no packages for linux-aarch64 \(it is for li"),
        (("version: 6", "version: 1000"), {}, "not a lock: .*1000"),
        (("  name: idna\n", ""), {}, "not a lock: missing field `name`"),
        (("environments:\n", "environments: {\n"), {}, r"pixi.lock:\d+:\d+: not a lock: "),
        (("pypi: ./\n", "pypi: ./sub\n"), {}, "mine is the directory ./sub"),
        ((f"'1.0'\n  sha256: {OTHER}", "'1.0'"), {}, "slow: there is no SHA-256"),
        ((f"{FORGE}/", "https://u:hunter2@conda.example/forge/"), {}, "user name or password"),
        (("https://files.example/slow", "https://u:hunter2@files.example/slow"), {}, "user name"),
        (
            ("pypi: https://files.example/slow-1.0.tar.gz", "pypi: git+https://g.example/s@abc"),
            {},
            "slow comes from a version control system",
        ),
        (
            ("idna-3.10-py3-none-any.whl", "other-3.10-py3-none-any.whl"),
            {},
            "'other-3.10-py3-none-any.whl', which is no wheel of it",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: tuple[str, str], choices: dict[str, str], message: str
) -> None:
    assert change[0] in PIXI
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, PIXI.replace(*change) if change[0] else PIXI, **choices)
    assert "pixi.lock" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_damage_is_an_error_of_ours_or_goes_unnoticed(tmp_path: Path) -> None:
    chance = random.Random(7)
    for _ in range(300):
        text = list(PIXI)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text))
            text[at] = chance.choice(["", "\n", ":", "-", "{", "'", "é", "0", " "])
        with contextlib.suppress(EnvstoreError):
            read(tmp_path, "".join(text))


EXPLICIT = f"""\
# This file may be used to create an environment using:
# $ conda create --name <env> --file <this file>
# platform: linux-64
@EXPLICIT
{FORGE}/linux-64/zlib-1.3-h1_0.conda#{MD5.upper()}
{FORGE}/noarch/some-tool-2.0-pyh1_0.tar.bz2#sha256:{SHA}

file:///channel/linux-64/xz-5.2-0.conda#{SHA}
# pip idna @ https://files.example/idna-3.10-py3-none-any.whl#sha256={OTHER}
"""


def test_explicit(tmp_path: Path) -> None:
    lock = read(tmp_path, EXPLICIT, name="list.txt")
    zlib, tool, xz = lock.conda()
    assert zlib == CondaPackage(
        "zlib",
        "1.3",
        "h1_0",
        "linux-64",
        f"{FORGE}/linux-64/zlib-1.3-h1_0.conda",
        "",
        md5=MD5,
        channel=FORGE,
    )
    assert (tool.name, tool.version, tool.build) == ("some-tool", "2.0", "pyh1_0")
    assert (tool.subdir, tool.sha256, tool.md5) == ("noarch", SHA, "")
    assert (xz.url, xz.sha256) == ("file:///channel/linux-64/xz-5.2-0.conda", SHA)
    assert [package.name for package in lock.pypi()] == ["idna"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("platform: linux-64", "platform: osx-64"), r"list.txt:3: is for osx-64, not linux-64"),
        (("/linux-64/zlib", "/win-64/zlib"), r":5: zlib is for win-64, not linux-64"),
        ((f"#{MD5.upper()}", ""), r":5: zlib has no digest .*--sha256"),
        ((f"#{MD5.upper()}", "#abcd"), r":5: 'abcd' is neither an MD5 nor a SHA-256"),
        (("zlib-1.3-h1_0.conda", "zlib.conda"), r":5: .* is not the URL of a conda package"),
        (("some-tool-2.0", "zlib-2.0"), "lists zlib twice"),
        (("https://conda", "https://u:hunter2@conda"), r":5: a URL holds a user name or password"),
        (("/forge", "/t/hunter2/forge"), r":5: a URL holds a channel's token"),
        (("\nfile", "\nnumpy=1.0\nfile"), "numpy%3D1.0' is not the URL of a conda package"),
    ],
)
def test_what_is_refused_of_a_list(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in EXPLICIT
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, EXPLICIT.replace(*change), name="list.txt")
    assert "hunter2" not in str(caught.value)


def test_a_path_in_a_list_is_of_its_directory(tmp_path: Path) -> None:
    text = f"@EXPLICIT\nchannel/linux-64/xz-5.2-0.conda#{SHA}\n"
    [xz] = read(tmp_path, text, name="list.txt").conda()
    assert xz.url == "file://" + os.path.join(tmp_path, "channel/linux-64/xz-5.2-0.conda")
