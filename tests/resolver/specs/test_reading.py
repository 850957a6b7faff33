"""What a path is taken for, and several specifications read together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.lock import CondaPackage, Lock
from envstore.resolver.lockfile import encode_lock
from envstore.resolver.request import Request
from envstore.resolver.specs import Prefix, detect_format, read_specs
from envstore.resolver.specs.detect import FOREIGN, LOCKS, REQUESTS, format_of

SHA = "a" * 64
EXAMPLES = {
    "environment.yml": "name: x\nchannels: [c]\ndependencies:\n  - zlib\n",
    "requirements.txt": "# x\nsix==1.0 \\\n  --hash=sha256:0\n-r o.txt\nnumpy[x]>=2; a > 'x'\n",
    "pyproject.toml": '[build-system]\nrequires = ["x"]\n[project]\nname = "x"\n',
    "pixi.toml": '[workspace]\nname = "x"\nchannels = ["c"]\nplatforms = ["linux-64"]\n',
    "pixi.lock": "version: 6\nenvironments:\n  default:\n    channels: []\npackages:\n- conda: x\n",
    "conda-lock.yml": "# made by x\nversion: 1\nmetadata:\n  x: 1\npackage:\n- name: y\n",
    "explicit": "# platform: linux-64\n@EXPLICIT\nhttps://conda.example/x.conda#0\n",
    "pylock.toml": 'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "x"\n',
    "uv.lock": 'version = 1\nrequires-python = ">=3.10"\n\n[[package]]\nname = "x"\n',
    "envstore-lock": '{\n  "format": "envstore-lock",\n  "packages": []\n}\n',
    "poetry.lock": '[[package]]\nname = "x"\n\n[metadata]\ncontent-hash = "x"\n',
    "pdm.lock": '[metadata]\nstrategy = ["x"]\n\n[[package]]\nname = "x"\n',
}


def test_formats_are_known_by_content() -> None:
    assert EXAMPLES.keys() >= LOCKS | REQUESTS
    for form, text in EXAMPLES.items():
        for name in ("whatever", "some.txt", form):
            assert format_of(text, name) == form
            assert format_of(text.replace("\n", "\r\n"), name) == form


@pytest.mark.parametrize(
    ("text", "name", "form"),
    [
        ("six\n", "x", ""),
        ("six\n", "my-requirements.txt", "requirements.txt"),
        ("six >=1\n", "x", "requirements.txt"),
        ("-r other.txt\nsix\n", "x", "requirements.txt"),
        ("", "x", ""),
        ("", "requirements-dev.txt", "requirements.txt"),
        ("", "environment.yml", "environment.yml"),
        ("Dear all,\n\nthis is a letter.\n", "letter.txt", ""),
        ("# Title\n\nSome text: more\n", "README.md", ""),
        ("a,b,c\n1,2,3\n", "data.csv", ""),
        ("import os\n\nprint(os.name)\n", "x.py", ""),
        ("version: 3\nservices:\n  x: 1\n", "compose.yml", ""),
        ('{"a": 1}', "x.json", ""),
        ("version: 6\nenvironments: {\n", "pixi.lock", "pixi.lock"),
        ('[project]\nname = "x"\nchannels = ["c"]\n', "x.toml", "pixi.toml"),
        ('[tool.pixi.workspace]\nchannels = ["c"]\n', "pyproject.toml", "pyproject.toml"),
        ('[package]\nname = "x"\n', "Cargo.toml", ""),
    ],
)
def test_what_is_and_is_not_one(text: str, name: str, form: str) -> None:
    assert format_of(text, name) == form


@given(st.text(max_size=200), st.sampled_from(["x", "x.toml", "requirements.txt", "uv.lock"]))
def test_any_text_has_a_format_or_none(text: str, name: str) -> None:
    assert format_of(text, name) in {"", *LOCKS, *REQUESTS, *FOREIGN}


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"\0\1\2", b"\x7fELF\0\0", b"\xff\xfe\xfd", bytes(range(256))):
        path.write_bytes(data)
        assert detect_format(path) == ""
    with pytest.raises(NotFoundError):
        detect_format(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a regular file"):
        detect_format(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UsageError, match="more than 64 MiB"):
        detect_format(tmp_path / "huge")


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(EXAMPLES["pyproject.toml"])
    (tmp_path / "requirements.txt").write_text("six\n")
    assert detect_format(tmp_path) == "pyproject.toml"
    warnings: list[str] = []
    read_specs([tmp_path], platform="linux-64", warnings=warnings)
    assert f"{tmp_path} is a directory: pyproject.toml in it is taken" in warnings
    (tmp_path / "conda-meta").mkdir()
    assert detect_format(tmp_path) == "prefix"
    assert read_specs([tmp_path], platform="linux-64") == Prefix(tmp_path)
    (tmp_path / "empty").mkdir()
    assert detect_format(tmp_path / "empty") == ""
    with pytest.raises(UsageError, match="is no specification of an environment that is known"):
        read_specs([tmp_path / "empty"], platform="linux-64")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for form, text in EXAMPLES.items():
        found[form] = tmp_path / form
        found[form].write_text(text)
    found["requirements.txt"].write_text("six\n-i https://a.example/simple\n")
    return found


def test_several_together(files: dict[str, Path], tmp_path: Path) -> None:
    more = tmp_path / "more.yml"
    more.write_text("dependencies: [zlib, xz]\nchannels: [d]\nvariables: {A: 1}\n")
    found = read_specs(
        [more],
        conda=[files["environment.yml"]],
        pip=[files["requirements.txt"]],
        platform="linux-64",
        python="3.11",
    )
    assert isinstance(found, Request)
    assert found.name == "x"
    assert found.conda.specs == ("zlib", "xz")
    assert found.conda.channels == ("d", "c")
    assert found.pypi.requirements == ("six",)
    assert found.pypi.default_index == "https://a.example/simple"
    assert found.variables == {"A": "1"}
    assert found.python == "==3.11.*"
    assert [Path(source.name).name for source in found.sources] == [
        "more.yml",
        "environment.yml",
        "requirements.txt",
    ]


def test_what_contradicts(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("six\n-i https://b.example/simple\n")
    with pytest.raises(UsageError, match=r"name different default indexes: https://a.*, https://b"):
        read_specs([files["requirements.txt"], other], platform="linux-64")
    first, second = tmp_path / "1.yml", tmp_path / "2.yml"
    first.write_text("dependencies: [a]\nvariables: {A: 1}\nplatforms: [linux-64]\n")
    second.write_text("dependencies: [a]\nvariables: {A: 2}\n")
    with pytest.raises(UsageError, match="set the variable A to different values"):
        read_specs([first, second], platform="linux-64")
    second.write_text("dependencies: [a]\nplatforms: [linux-aarch64]\n")
    with pytest.raises(UsageError, match="no platform in common"):
        read_specs([first, second], platform="linux-64")


def test_locks_are_read_alone(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a lock \(explicit\), which nothing can be added to"):
        read_specs([files["requirements.txt"], files["explicit"]], platform="linux-64")
    with pytest.raises(UsageError, match=r"is a lock \(pylock.toml\)"):
        read_specs([files["environment.yml"]], pip=[files["pylock.toml"]], platform="linux-64")
    (tmp_path / "env/conda-meta").mkdir(parents=True)
    with pytest.raises(UsageError, match="is an environment, which nothing can be added to"):
        read_specs([tmp_path / "env", files["requirements.txt"]], platform="linux-64")


def test_options_say_what_files_are(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"requirements.txt, which --conda does not take"):
        read_specs([], conda=[files["requirements.txt"]], platform="linux-64")
    with pytest.raises(UsageError, match=r"environment.yml, which --pip does not take"):
        read_specs([], pip=[files["environment.yml"]], platform="linux-64")
    with pytest.raises(UsageError, match="--environment dev: only"):
        read_specs([files["requirements.txt"]], platform="linux-64", environment="dev")
    with pytest.raises(UsageError, match="--extra x: only"):
        read_specs([files["requirements.txt"]], platform="linux-64", extras=["x"])
    with pytest.raises(UsageError, match="--group x: only"):
        read_specs([files["environment.yml"]], platform="linux-64", groups=["x"])
    with pytest.raises(UsageError, match=r"'2.7' is no version of Python 3"):
        read_specs([files["requirements.txt"]], platform="linux-64", python="2.7")
    with pytest.raises(UsageError, match="nothing to read"):
        read_specs([], platform="linux-64")


def test_foreign_formats_are_pointed_elsewhere(files: dict[str, Path], tmp_path: Path) -> None:
    for form in ("poetry.lock", "pdm.lock"):
        with pytest.raises(UsageError, match=rf"is a {form}, which is not read \(export it"):
            read_specs([files[form]], platform="linux-64")
    (tmp_path / "package.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(UsageError, match=r"is a package\.json"):
        read_specs([tmp_path / "package.json"], platform="linux-64")


def test_our_own_lock(tmp_path: Path) -> None:
    url = "https://conda.example/c/linux-64/zlib-1.3-h1_0.conda"
    package = CondaPackage("zlib", "1.3", "h1_0", "linux-64", url, SHA, 5)
    lock = Lock("linux-64", (package,), virtual={"__glibc": "2.28"})
    (tmp_path / "any.name").write_bytes(encode_lock(lock))
    assert detect_format(tmp_path / "any.name") == "envstore-lock"
    assert read_specs([tmp_path / "any.name"], platform="linux-64") == lock
