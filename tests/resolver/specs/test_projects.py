"""pyproject.toml and uv.lock: what a project asks for, and what uv locked of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.lock import Lock
from envstore.resolver.request import Request
from envstore.resolver.specs import read_specs
from envstore.resolver.specs.files import parse_toml
from envstore.resolver.specs.uv_lock import _toml

SHA = "a" * 64
FILES = "https://files.example"

PROJECT = """\
[project]
name = "demo"
version = "1"
requires-python = ">=3.10,<4"
dependencies = [
    "click>=8",
    "colorama ; sys_platform == 'win32'",
    "here @ ./wheels/here-1-py3-none-any.whl",
]

[project.optional-dependencies]
plot = ["matplotlib"]
all = ["demo[plot,fast]", "tqdm"]
Fast_ = ["numba"]
fast = ["numba"]

[dependency-groups]
test = ["pytest", {include-group = "lint"}]
lint = ["ruff"]
loop = [{include-group = "pool"}]
pool = [{include-group = "loop"}]
"""

SETTINGS = """\
[tool.uv]
constraint-dependencies = ["numpy<3"]
override-dependencies = ["six==1.17"]
prerelease = "allow"
exclude-newer = "2025-03-01T12:00:00Z"
index-strategy = "unsafe-best-match"
no-binary-package = ["click"]
find-links = ["wheels"]

[[tool.uv.index]]
url = "https://index.example/simple"
default = true
[[tool.uv.index]]
name = "more"
url = "https://more.example/simple"
[[tool.uv.index]]
url = "flat"

[tool.uv.sources]
click = { git = "https://git.example/click", tag = "8.1", subdirectory = "py" }
colorama = { index = "more" }
"""


def project(tmp_path: Path, text: str = PROJECT) -> Path:
    wheel = tmp_path / "wheels/here-1-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.touch()
    (tmp_path / "pyproject.toml").write_text(text)
    return tmp_path / "pyproject.toml"


def read(path: Path, **choices: object) -> Request:
    found = read_specs([path], platform="linux-64", **choices)  # type: ignore[arg-type]
    assert isinstance(found, Request)
    return found


def test_dependencies_extras_and_groups(tmp_path: Path) -> None:
    path = project(tmp_path)
    warnings: list[str] = []
    found = read(path, warnings=warnings)
    main = (
        "click>=8",
        'colorama; sys_platform == "win32"',
        f"here @ file://{tmp_path}/wheels/here-1-py3-none-any.whl",
    )
    assert found.pypi.requirements == main
    assert (found.name, found.python) == ("demo", "<4,>=3.10")
    assert ["demo, the project itself" in warning for warning in warnings] == [True]
    more = read(path, extras=["ALL"], groups=["test"], python="3.11")
    assert more.pypi.requirements == (*main, "numba", "matplotlib", "tqdm", "pytest", "ruff")
    assert more.python == "<4,>=3.10,==3.11.*"


def test_settings_of_uv(tmp_path: Path) -> None:
    request = read(project(tmp_path, PROJECT + SETTINGS))
    assert request.exclude_newer == "2025-03-01T12:00:00+00:00"
    found = request.pypi
    assert found.requirements[0] == "click @ git+https://git.example/click@8.1#subdirectory=py"
    assert found.constraints == ("numpy<3",)
    assert found.overrides == ("six==1.17",)
    assert found.default_index == "https://index.example/simple"
    assert found.indexes == ("https://more.example/simple", f"file://{tmp_path}/flat")
    assert found.find_links == (f"file://{tmp_path}/wheels",)
    assert (found.prerelease, found.index_strategy) == ("allow", "unsafe-best-match")
    assert found.no_binary == ("click",)


@pytest.mark.parametrize(
    ("change", "choices", "message"),
    [
        (('name = "demo"', 'name = "demo"\ndynamic = ["dependencies"]'), {}, "are dynamic"),
        (("", ""), {"extras": ["nope"]}, r"no extra 'nope' \(it has all, fast"),
        (("", ""), {"groups": ["nope"]}, r"no dependency group 'nope' \(it has lint"),
        (("", ""), {"groups": ["loop"]}, "includes itself"),
        (('"click>=8"', '"click>="'), {}, "'click>=' is not a requirement"),
        (('"click>=8"', "8"), {}, "project.dependencies is not a list of strings"),
        (('"click>=8"', '"c @ https://u:hunter2@x.example/c.whl"'), {}, "user name or password"),
        ((">=3.10,<4", "three"), {}, "Invalid specifier"),
        (("[project]", "[project"), {}, ":1:9: not TOML"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: tuple[str, str], choices: dict[str, object], message: str
) -> None:
    path = project(tmp_path, PROJECT.replace(*change) if change[0] else PROJECT)
    with pytest.raises(UsageError, match=rf"pyproject.toml.*{message}") as caught:
        read(path, **choices)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{ workspace = true }", "click is a project that can change"),
        ('{ path = "../click", editable = true }', "click is a project that can change"),
        ('{ path = "../click" }', "click: there is no /.*/click"),
        ('[{ index = "a" }, { index = "b" }]', "click has several sources"),
        ('{ git = "https://u:hunter2@git.example/click" }', "user name or password"),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, source: str, message: str) -> None:
    path = project(tmp_path, f"{PROJECT}[tool.uv.sources]\nclick = {source}\n")
    with pytest.raises(UsageError, match=message):
        read(path)


def test_a_project_of_poetry(tmp_path: Path) -> None:
    path = project(tmp_path, '[tool.poetry]\nname = "x"\n[tool.poetry.dependencies]\na = "*"\n')
    with pytest.raises(UsageError, match=r"no \[project\] table \(export what poetry locked"):
        read(path)


def entry(name: str, version: str = "1.0") -> str:
    return f"""
[[package]]
name = "{name}"
version = "{version}"
source = {{ registry = "https://index.example/simple" }}
wheels = [
    {{ url = "{FILES}/{name}-{version}-py3-none-any.whl", hash = "sha256:{SHA}", size = 5 }},
]
"""


UV_HEAD = 'version = 1\nrevision = 3\nrequires-python = ">=3.10"\n'
UV_PROJECT = """
[[package]]
name = "demo"
version = "1"
source = { virtual = "." }
dependencies = [
    { name = "click" },
    { name = "colorama", marker = "sys_platform == 'win32'" },
]

[package.optional-dependencies]
plot = [
    { name = "six" },
]

[package.dev-dependencies]
dev = [
    { name = "idna" },
]

[package.metadata]
requires-dist = [
    { name = "click", specifier = ">=8" },
    { name = "colorama", marker = "sys_platform == 'win32'" },
    { name = "six", marker = "extra == 'plot'" },
]
provides-extras = ["plot"]

[package.metadata.requires-dev]
dev = [{ name = "idna", specifier = ">=3" }]
"""
LOCKED = UV_HEAD + entry("click", "8.1") + entry("colorama") + UV_PROJECT + entry("idna", "3.10")
LOCKED += entry("six")
LOCKS = """\
[project]
name = "demo"
version = "1"
requires-python = ">=3.10"
dependencies = ["click >= 08", "colorama; sys_platform == 'win32'"]
optional-dependencies = { plot = ["six"] }
[dependency-groups]
dev = ["idna>=3"]
"""


def names(path: Path, **choices: object) -> list[str]:
    chosen: dict[str, object] = {"python": "3.11", **choices}
    lock = read_specs([path], platform="linux-64", **chosen)  # type: ignore[arg-type]
    assert isinstance(lock, Lock)
    assert all(package.sha256 == SHA for package in lock.pypi())
    return [f"{package.name} {package.version}" for package in lock.pypi()]


def test_a_lock_of_uv_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "uv.lock"
    path.write_text(LOCKED)
    assert names(path) == ["click 8.1"]
    assert names(path, extras=["plot"], groups=["dev"]) == ["click 8.1", "idna 3.10", "six 1.0"]
    assert sorted(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match=r"uv.lock: uv cannot export it: .*`nope`"):
        names(path, extras=["nope"])


def test_a_lock_counts_before_its_project(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text(LOCKED)
    path = project(tmp_path, LOCKS)
    assert names(path) == names(tmp_path) == ["click 8.1"]
    found = read_specs([path], platform="linux-64", python="3.11")
    assert isinstance(found, Lock)
    assert [Path(source.name).name for source in found.sources] == ["pyproject.toml", "uv.lock"]


@pytest.mark.parametrize("flat", [False, True])
def test_extras_that_name_each_other(tmp_path: Path, flat: bool) -> None:
    plot, both = "marker = \"extra == 'plot'\"", "marker = \"extra == 'all'\""
    named = f'{{ name = "demo", extras = ["plot"], {both} }}'
    added = f'{{ name = "six", {both} }}' if flat else named
    there = f'{{ name = "six", {plot} }},\n'
    assert there in LOCKED
    (tmp_path / "uv.lock").write_text(LOCKED.replace(there, f"{there}    {added},\n"))
    text = LOCKS.replace('plot = ["six"]', 'plot = ["six"], all = ["demo[plot]"]')
    assert names(project(tmp_path, text)) == ["click 8.1"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("click >= 08", "click>=8.1"), "click"),
        (('"click >= 08"', '"click>=8", "rich"'), "rich"),
        (('"click >= 08", ', ""), "click"),
        (('["six"]', "[]"), "six"),
        (("idna>=3", "idna>=4"), "idna"),
        (("idna>=3", "idna>=3,<5"), "idna"),
        (('dev = ["idna>=3"]', ""), "idna"),
        (("click >= 08", "click[x]>=8"), "click"),
    ],
)
def test_a_lock_that_is_out_of_date(tmp_path: Path, change: tuple[str, str], name: str) -> None:
    (tmp_path / "uv.lock").write_text(LOCKED)
    path = project(tmp_path, LOCKS.replace(*change))
    with pytest.raises(UsageError, match=rf"uv.lock: is out of date: .* asks for {name} other"):
        names(path)


def test_a_workspace_whose_members_are_not_here(tmp_path: Path) -> None:
    member = UV_PROJECT.replace('virtual = "."', 'editable = "packages/demo"')
    path = tmp_path / "uv.lock"
    head = UV_HEAD + '[manifest]\nmembers = ["demo"]\n'
    path.write_text(LOCKED.replace(UV_PROJECT, member).replace(UV_HEAD, head))
    assert names(path) == ["click 8.1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('virtual = "."', 'registry = "https://x.example/"'), "locks no project"),
        (("version = 1\n", "version = 99\n"), "uv cannot export it"),
        ((f'hash = "sha256:{SHA}"', 'hash = "sha256:zz"'), "Invalid hash digest length"),
        (("files.example/click", "u:hunter2@files.example/click"), "user name or password"),
        (("[[package]]", "[[package]"), r"uv.lock:\d+:\d+: not TOML"),
    ],
)
def test_locks_of_uv_that_are_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in LOCKED
    path = tmp_path / "uv.lock"
    path.write_text(LOCKED.replace(*change))
    with pytest.raises(UsageError, match=message) as caught:
        names(path)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_members_cannot_leave_the_scratch_directory(tmp_path: Path) -> None:
    for place in ("../x", "/tmp/x", "a/../../x", "."):
        head = UV_HEAD + '[manifest]\nmembers = ["demo", "evil"]\n'
        evil = f'\n[[package]]\nname = "evil"\nversion = "1"\nsource = {{ editable = "{place}" }}\n'
        path = tmp_path / "uv.lock"
        path.write_text(LOCKED.replace(UV_HEAD, head) + evil)
        if place != ".":
            with pytest.raises(UsageError, match=r"not a uv.lock: 'evil' lies at"):
                names(path)


def test_what_is_written_for_uv_is_toml(tmp_path: Path) -> None:
    content = {
        "project": {"name": 'a"\\\n\x7f\u0001é', "extras": {"b c": [], "d": ["x", "y"]}},
        "tool": {"uv": {"workspace": {"members": ["a/b"]}}},
    }
    assert parse_toml(tmp_path, _toml(content)) == content
