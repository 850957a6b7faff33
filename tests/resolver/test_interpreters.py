from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.interpreters import conda_python, described
from envstore.resolver.packages import interpreter
from envstore.resolver.packages.interpreter import describe_interpreter, fingerprint


@pytest.mark.parametrize(
    ("requires", "spec"),
    [
        ("", "python"),
        (">=3.10,<3.13", "python <3.13,>=3.10"),
        ("==3.11.*", "python 3.11.*"),
        ("==3.11.4", "python ==3.11.4"),
        ("~=3.11", "python ~=3.11"),
        (">=3.9,!=3.10.*", "python !=3.10.*,>=3.9"),
    ],
)
def test_versions_for_conda(requires: str, spec: str) -> None:
    from rattler import MatchSpec

    assert conda_python(requires) == spec
    assert MatchSpec(spec, strict=False).name is not None


def test_malformed_versions() -> None:
    with pytest.raises(UsageError, match="no set of Python versions"):
        conda_python("3.x")


def test_an_interpreter_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(sys.executable)
    found = described(program, tmp_path)
    assert found == describe_interpreter(program)
    monkeypatch.setattr(interpreter, "describe_interpreter", None)
    assert described(program, tmp_path) == found
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    monkeypatch.undo()
    assert described(program, tmp_path) == found


def test_an_interpreter_that_changed_is_another(tmp_path: Path) -> None:
    script = "import os, sys; print(sys.base_prefix, os.path.dirname(os.__file__))"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    _, stdlib = said.stdout.split()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "bin").mkdir()
    ignored = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__")
    shutil.copytree(stdlib, tmp_path / "lib" / name, ignore=ignored, symlinks=False)
    shutil.copy2(os.path.realpath(sys.executable), tmp_path / "bin" / name)
    program = tmp_path / "bin" / name
    first = fingerprint(program)
    assert fingerprint(program) == first
    (tmp_path / "lib" / name / "abc.py").touch()
    assert fingerprint(program) != first
