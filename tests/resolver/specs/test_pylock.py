"""pylock.toml: the wheel that fits the target, markers, and what is to be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.lock import Build, Lock, PypiPackage
from envstore.resolver.specs import read_specs

HEAD = 'lock-version = "1.0"\ncreated-by = "test"\nrequires-python = ">=3.9"\n'
HASH = "a" * 64


def wheel(name: str) -> str:
    return f'{{ url = "https://files.example/{name}", size = 7, hashes = {{ sha256 = "{HASH}" }} }}'


def package(name: str, rest: str) -> str:
    return f'[[packages]]\nname = "{name}"\nversion = "1.0"\n{rest}\n'


def read(tmp_path: Path, text: str, *, name: str = "pylock.toml", **choices: object) -> Lock:
    path = tmp_path / name
    path.write_text(text)
    lock = read_specs([path], platform="linux-64", **{"python": "3.11", **choices})  # type: ignore[arg-type]
    assert isinstance(lock, Lock)
    return lock


MANY = package(
    "fast",
    "wheels = ["
    + ", ".join(
        wheel(f"fast-1.0-{tag}.whl")
        for tag in (
            "py3-none-any",
            "cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64",
            "cp311-cp311-manylinux_2_34_x86_64",
            "cp311-cp311-manylinux_2_17_aarch64",
            "cp312-cp312-manylinux_2_17_x86_64",
            "cp39-abi3-manylinux_2_28_x86_64",
            "cp311-cp311-musllinux_1_2_x86_64",
            "cp311-cp311-win_amd64",
        )
    )
    + "]",
)


@pytest.mark.parametrize(
    ("choices", "tag"),
    [
        ({}, "cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ({"glibc": "2.35"}, "cp311-cp311-manylinux_2_34_x86_64"),
        ({"python": "3.12.4"}, "cp312-cp312-manylinux_2_17_x86_64"),
        ({"python": "3.10"}, "cp39-abi3-manylinux_2_28_x86_64"),
        ({"python": "3.10", "glibc": "2.17"}, "py3-none-any"),
        ({"platform": "linux-aarch64"}, "cp311-cp311-manylinux_2_17_aarch64"),
    ],
)
def test_the_wheel_is_the_targets(tmp_path: Path, choices: dict[str, str], tag: str) -> None:
    (tmp_path / "pylock.toml").write_text(HEAD + MANY)
    chosen = {"platform": "linux-64", "glibc": "2.28", "python": "3.11", **choices}
    lock = read_specs([tmp_path / "pylock.toml"], **chosen)  # type: ignore[arg-type]
    assert isinstance(lock, Lock)
    [found] = lock.pypi()
    name = f"fast-1.0-{tag}.whl"
    assert found == PypiPackage("fast", "1.0", name, f"https://files.example/{name}", HASH, 7)
    assert lock.virtual == {"__glibc": chosen["glibc"]}
    minor = chosen["python"].count(".") == 1
    assert lock.request.python == f"=={chosen['python']}" + (".*" if minor else "")


def test_markers_extras_and_groups(tmp_path: Path) -> None:
    text = HEAD + 'extras = ["x"]\ndependency-groups = ["dev", "doc"]\ndefault-groups = ["doc"]\n'
    for name, marker in {
        "always": "python_version >= '3.9'",
        "windows": "sys_platform == 'win32'",
        "arm": "platform_machine == 'aarch64'",
        "newer": "python_full_version >= '3.11.5'",
        "extra": "'x' in extras",
        "dev": "'dev' in dependency_groups",
        "doc": "'doc' in dependency_groups",
    }.items():
        wheels = f"wheels = [{wheel(f'{name}-1.0-py3-none-any.whl')}]"
        text += package(name, f'marker = "{marker}"\n{wheels}')

    def names(**choices: object) -> list[str]:
        return [found.name for found in read(tmp_path, text, **choices).pypi()]

    assert names() == ["always", "doc"]
    assert names(python="3.11.9") == ["always", "doc", "newer"]
    assert names(extras=["X"], groups=["dev"]) == ["always", "dev", "doc", "extra"]
    with pytest.raises(UsageError, match=r"has no extra 'y' \(it has x\)"):
        names(extras=["y"])
    with pytest.raises(UsageError, match=r"has no group 'z' \(it has dev, doc\)"):
        names(groups=["z"])


def test_sources_are_to_be_built(tmp_path: Path) -> None:
    sdist = f'{{ url = "https://files.example/slow-1.0.tar.gz", hashes = {{ sha256 = "{HASH}" }} }}'
    only_windows = wheel("slow-1.0-cp311-cp311-win_amd64.whl")
    text = HEAD + package("slow", f"sdist = {sdist}\nwheels = [{only_windows}]")
    [found] = read(tmp_path, text, name="pylock.more.toml").pypi()
    build = Build("https://files.example/slow-1.0.tar.gz", HASH)
    assert found == PypiPackage("slow", "1.0", "", "", "", build=build)


def test_archives_and_paths(tmp_path: Path) -> None:
    url = "https://files.example/one-1.0-py3-none-any.whl"
    text = HEAD + package("one", f'archive = {{ url = "{url}", hashes = {{ sha256 = "{HASH}" }} }}')
    text += package(
        "two",
        f'wheels = [{{ path = "w/two-1.0-py3-none-any.whl", hashes = {{sha256 = "{HASH}"}} }}]',
    )
    one, two = read(tmp_path, text).pypi()
    assert one == PypiPackage("one", "1.0", "one-1.0-py3-none-any.whl", url, HASH, direct=url)
    assert two.url == f"file://{tmp_path}/w/two-1.0-py3-none-any.whl"


def test_without_a_version_the_running_python_counts(tmp_path: Path) -> None:
    lock = read(tmp_path, HEAD + MANY, python="")
    assert lock.request.python.endswith(".*")
    with pytest.raises(UsageError, match=r"requires Python >=3.99, not 3\..*--python"):
        read(tmp_path, HEAD.replace("3.9", "3.99") + MANY, python="")


ONE = wheel("a-1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "[[packages]\n", r":4:11: not TOML: Expected"),
        ('created-by = "x"\nlock-version = "9.0"\npackages = []\n', "pylock version 9.0"),
        (HEAD + "[[packages]]\nversion = '1'\n", "not a pylock.toml: Missing required value"),
        (HEAD + package("a", f"wheels = [{wheel('a-1.0-cp311-cp311-win_amd64.whl')}]"), "No wheel"),
        (HEAD + package("a", f"wheels = [{ONE}]") * 2, "Multiple packages with the name 'a'"),
        (HEAD + package("a", 'directory = { path = "./a" }'), "is the directory ./a"),
        (
            HEAD
            + package("a", 'vcs = {type = "git", url = "https://g.example/a", commit-id = "0"}'),
            "version control system",
        ),
        (HEAD + package("a", f"wheels = [{ONE.replace('sha256', 'md5')}]"), "there is no SHA-256"),
        (HEAD + package("a", f"wheels = [{ONE.replace(HASH, 'zz')}]"), "'zz' is not a SHA-256"),
        (
            HEAD + package("a", f"wheels = [{ONE.replace('files', 'u:hunter2@files')}]"),
            "user name or password",
        ),
        (HEAD + "environments = [\"sys_platform == 'win32'\"]\n" + MANY, "does not fit linux-64"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, text)
    assert "pylock.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_versions_of_python(tmp_path: Path) -> None:
    for version in ("2.7", "three", "3.11.x", "3.11.0.0"):
        with pytest.raises(UsageError, match="is no version of Python 3"):
            read(tmp_path, HEAD + MANY, python=version)
